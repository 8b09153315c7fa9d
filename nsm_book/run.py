"""Run one page through papermill: checked before, recorded after, written whole or not at all.

The way of a page: parameters → fingerprint → kernel → gate → record → its place.
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import py_compile
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nsm_book import BookError, gate
from nsm_book.fingerprint import (
    differences,
    digest,
    digest_of,
    fingerprint,
    inputs,
    module_file,
    product,
    record,
    stale_makers,
    store_files,
    with_checksum,
)
from nsm_book.markup import plain
from nsm_book.schema import BOOK, BUILD, ROOT, Page, check_parameters, parameters, profile_parameters, read_notebook

VERSIONS = ("torch", "numpy", "scipy", "matplotlib", "plotly", "papermill", "jupyter-book")
SOCKETS = "/tmp"  # instead of a TMPDIR whose path is too long: a socket's has 103 bytes at most
DONE, NOTE = "✓ ", "» "  # begin the lines of a step's output that a person who watches sees: what was done, what there is to know
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def environment(profile: str, needs: Path, makes: Path) -> dict[str, str]:
    """What a kernel finds in its environment: one thread, its stores, and nobody's own IPython start-up files."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return {
        **threads,
        "NSM_BOOK_RUN": "1",
        "NSM_BOOK_NEEDS": str(needs),
        "NSM_BOOK_MAKES": str(makes),
        "NSM_BOOK_CLAIMS": str(BOOK / "claims.yml"),
        "NSM_BOOK_RESULTS": str(store_files(profile)[0].parent),
        "IPYTHONDIR": str(BUILD / "ipython"),
        "PYTHONHASHSEED": "0",
        "MPLBACKEND": "agg",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write to that takes the place of `path` only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors_in_words() -> Iterator[None]:
    """Report a disk that is full, or a file that may not be written, in one sentence instead of a traceback."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*DISK_FULL, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise BookError(
            f"{error.filename or BUILD} cannot be used: {os.strerror(error.errno)}. Mend that and give the same "
            "command again: what had ended before is kept"
        ) from None


@contextlib.contextmanager
def reasons_kept(target: Path) -> Iterator[None]:
    """Leave beside what could not be made, as `NAME.failed.txt`, why: for whoever watches from another process or node."""
    reasons = target.with_suffix(".failed.txt")
    reasons.unlink(missing_ok=True)
    try:
        with disk_errors_in_words():
            yield
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk
            reasons.write_text(f"{error if isinstance(error, BookError) else repr(error)}\n")
        raise


@contextlib.contextmanager
def only_run(target: Path) -> Iterator[None]:
    """Let one process at a time make a run: one that outlived its build, or a second command, is waited for."""
    with contextlib.ExitStack() as stack:
        try:
            (BUILD / "locks").mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((BUILD / "locks" / hashlib.sha256(bytes(target)).hexdigest()[:16]).open("a+"))
        except OSError:  # a checkout that may not be written, or a full disk: then nobody waits
            pass
        else:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{NOTE}{target.stem} is being made by a process that is still alive; waiting for it to end", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compile_by_content(modules: Iterable[str]) -> None:
    """Let Python compare these modules with their bytecode by content: by second and size, as is usual, it would run the old
    code of a module that was changed while the clock stood still or went back."""
    for path in map(module_file, modules):
        with contextlib.suppress(OSError):  # a checkout that may not be written: Python writes no bytecode either
            compiled = Path(importlib.util.cache_from_source(str(path)))
            if compiled.read_bytes()[4:8] != b"\3\0\0\0" if compiled.exists() else not sys.dont_write_bytecode:
                py_compile.compile(str(path), quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


def commit() -> str:
    """The checkout's commit, with `+` behind it where the work tree differs; `unknown` outside git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def peak_memory() -> float:
    """The largest resident size in MB of any process that this one has waited for."""
    size = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return size / (2**20 if sys.platform == "darwin" else 2**10)


def reproduce_line(page: Page, profile: str, given: dict[str, Any]) -> str:
    """The one line that repeats a run: the profile, and whatever was given beyond it."""
    of_profile = profile_parameters(page, profile)
    words = ["nsm-book", "run", page.name, "--profile", profile]
    for name, value in given.items():
        if of_profile.get(name, ...) != value:
            words += ["-p", name, value if isinstance(value, str) else repr(value)]
    return shlex.join([*words, "-o", "runs"])


def run_box(run: dict[str, Any]) -> str:
    """The folded "This run" box that ends every page: one block of HTML, in which no value is read as anything but text.

    What a person gave stands in `code`, where MathJax looks for no formula.
    """

    def code(text: Any) -> str:
        return f'<code style="white-space: pre-wrap">{plain(text)}</code>'  # a line break in it is part of the value

    rows = {
        "Profile": plain(run["profile"]),
        "Parameters": code(", ".join(f"{name} = {value!r}" for name, value in run["all_parameters"].items())),
        "Seed": code(run["seed"]),
        "Device": code(run["device"]),
        "Wall time": f"{run['seconds']:.1f} s",
        "Peak memory": f"{run['peak_memory_mb']:.0f} MB",
        "Commit": code(run["commit"]) + (" and uncommitted changes" if run["commit"].endswith("+") else ""),
        "Versions": plain(", ".join(f"{name} {version}" for name, version in run["versions"].items())),
        "Date": plain(run["date"]),
        "Again": code(run["reproduce"]),
    }
    table = "".join(f'<tr><th scope="row">{name}</th><td>{text}</td></tr>' for name, text in rows.items())
    return (
        '<details class="this-run"><summary>This run</summary><table class="table"><thead><tr><th scope="col">what</th>'
        f'<th scope="col">value</th></tr></thead><tbody>{table}</tbody></table></details>'
    )


def run_record(page: Page, profile: str, given: dict[str, Any], seconds: float, made: Path) -> dict[str, Any]:
    """What a run says of itself, besides its fingerprint and commit."""
    everything = {name: parameter.default for name, parameter in parameters(page).items()} | given
    return {
        "page": page.name,
        "profile": profile,
        "parameters": given,
        "all_parameters": everything,
        "seed": everything.get("seed", everything.get("seeds", "none")),
        "device": everything.get("device", "cpu"),
        "seconds": seconds,
        "peak_memory_mb": peak_memory(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "reproduce": reproduce_line(page, profile, given),
        "made": {name: digest(made / name) for name in page.makes},
    }


def check_inputs(page: Page, profile: str) -> None:
    """Raises BookError if a file that the page reads is not there."""
    for path in inputs(page, profile).values():
        if not path.exists():
            raise BookError(f"{page.name}: needs {path.name}, which {path.parent} does not hold yet: make book PROFILE={profile}")


def run_page(
    page: Page, profile: str, given: dict[str, Any], target: Path, *, needs: Path, makes: Path, publish: bool = True
) -> None:
    """Run one page with these parameters and put the executed notebook at `target`.

    Args:
        given: what differs from the page's own defaults, already checked.
        needs, makes: the stores of products, to read from and to write to. What the page makes gets there with the target.
        publish: whether the page's prose will be read, so that every number in it has to be there.

    Raises:
        BookError: if the run does not pass the gate. What it left lies beside the target as `NAME.failed.ipynb`; the target
            and the products are as they were.
    """
    import nbformat

    target.parent.mkdir(parents=True, exist_ok=True)
    failed = target.with_suffix(".failed.ipynb")
    for left in (failed, *target.parent.glob(f".{target.stem}.*")):  # of runs that failed or were killed
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    check_inputs(page, profile)
    today: dict[str, Any] = {"fingerprint": fingerprint(page, profile, given), "commit": commit()}
    compile_by_content(today["fingerprint"]["modules"])
    with tempfile.TemporaryDirectory(prefix=f".{target.stem}.", dir=target.parent, ignore_cleanup_errors=True) as folder:
        output, made = Path(folder, "run.ipynb"), Path(folder, "makes")
        os.environ.update(environment(profile, needs, made))
        began = time.perf_counter()
        problems = execute_notebook(page, given, output)
        notebook = nbformat.read(output, as_version=4)
        seconds = time.perf_counter() - began
        notebook.metadata["nsm_book"] = run = today | run_record(page, profile, given, seconds, made)
        notebook.cells.append(nbformat.v4.new_markdown_cell(run_box(run), id="this-run"))
        for number, cell in enumerate(notebook.cells[:-1], start=1):
            cell.id = f"cell-{number}"  # jupytext and papermill draw random ones
        for name in ("input_path", "output_path"):  # of the folder that is gone in a moment
            notebook.metadata["papermill"].pop(name)
        gate.mark_for_comparison(notebook)
        problems += gate.problems(notebook, page, prose=publish)
        problems = problems or [f"{page.name}: did not make {name}" for name in page.makes if not (made / name).exists()]
        written = with_checksum(json.loads(nbformat.writes(notebook)))
        output.write_text(json.dumps(written, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
        for path in sorted(filter(Path.is_file, made.rglob("*"))) if not problems else ():
            with whole(makes / path.relative_to(made)) as place:
                shutil.move(path, place)
        os.replace(output, failed if problems else target)
    if problems:
        raise BookError("\n\n".join([*problems, f"what the run left: {failed}"]))


def execute_notebook(page: Page, given: dict[str, Any], output: Path) -> list[str]:
    """Let papermill run a page's cells in a kernel of its own and write them to `output`; return why the kernel died, if it
    did. An error in a cell stays in the notebook, where the gate finds it; a dead kernel leaves none."""
    import jupytext
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    logging.getLogger("papermill").setLevel(logging.ERROR)  # it knows no annotation like `int | None` and would warn of it
    with contextlib.suppress(OSError):  # a checkout that may not be written; then IPython takes a folder of its own
        Path(os.environ["IPYTHONDIR"]).mkdir(parents=True, exist_ok=True)
    notebook, source = read_notebook(page), output.with_name("source.ipynb")
    notebook.metadata.pop("jupytext", None)
    jupytext.write(notebook, source)
    # papermill fills parameters into the braces of a path. The kernel is reached by files: two that start at once may be
    # given the same free port.
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (source, output)]
    with tempfile.TemporaryDirectory(prefix="nsm-", dir=SOCKETS if len(tempfile.gettempdir()) > 60 else None) as sockets:
        try:
            papermill.execute_notebook(
                *paths,
                parameters=given,
                kernel_name="python3",
                progress_bar=False,
                cwd=ROOT,
                shutdown_kernel="immediate",
                extra_arguments=["--log-level=ERROR"],
                config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}),
            )
        except papermill.PapermillExecutionError:
            pass
        except DeadKernelError:
            return [
                f"{page.name}: its kernel died (killed, or out of memory) having used {peak_memory():.0f} MB; book/pages.yml "
                f"says {page.memory} MB. Free memory, or run fewer side by side, and give the same command again"
            ]
    return []


def execute(page: Page, profile: str) -> str:
    """Bring one page of a profile up to date; return one line that says what was done."""
    target, store = page.run_file(profile), product("", profile)
    with only_run(target), reasons_kept(target):
        if not differences(page, profile):
            return f"{page.name}: unchanged"
        run_page(page, profile, profile_parameters(page, profile), target, needs=store, makes=store)
    seconds, budget = record(target)["seconds"], page.budget[profile]
    return f"{page.name}: {seconds:.1f} s" + (f", over its budget of {budget:g} s" if seconds > budget else "")


def folder_name(given: dict[str, Any]) -> str:
    """A folder name for these parameters: readable, safe on any file system, and never the same for two sets."""
    text = ",".join(f"{name}={value}" for name, value in sorted(given.items())) or "defaults"
    # Other letters take up to four bytes each, of the 255 that a name may have.
    safe = re.sub(r"[^\w=,.\-]", "_", text, flags=re.ASCII)
    if safe == text and len(text) <= 80 and text.count("=") == len(given):
        return text
    return f"{safe[:60]}-{digest_of(given)[:8]}"


def rerun(page: Page, given: dict[str, Any], profile: str, folder: Path) -> Path:
    """Run a page with other parameters into a folder named after page and parameters; return that folder.

    The folder holds the executed notebook `run.ipynb`, its record `results.json` and the products it made.
    A folder whose run is today's is left as it is.

    Raises:
        BookError: as `run_page`, or if what the page needs of other pages is not what these would make today.
    """
    checked = check_parameters(page, given)
    for maker in stale_makers(page, profile):
        raise BookError(
            f"{page.name}: needs {', '.join(page.needs)}, and {maker.name} has to run for that: "
            f"{differences(maker, profile)[0]}. First: make book PROFILE={profile}"
        )
    name = folder_name(checked) if profile == "full" else f"{profile},{folder_name(checked)}"
    place = folder.resolve() / page.name.replace("/", "-") / name
    with only_run(place), reasons_kept(place / "run.ipynb"):
        run_into(place, page, profile, profile_parameters(page, profile) | checked)
    return place


def run_into(place: Path, page: Page, profile: str, given: dict[str, Any]) -> None:
    """Let a folder hold today's run with these parameters, all that differ from the page's own: `run.ipynb`,
    `results.json` and the products it made. What is whole and today's is not run again."""
    from nsm_book import store

    target = place / "run.ipynb"
    last = record(target)
    if last.get("fingerprint") != fingerprint(page, profile, given) or any(
        digest(place / name) != made for name, made in last["made"].items()
    ):
        run_page(page, profile, given, target, needs=product("", profile), makes=place, publish=False)
    store.write_records([target], place / "results.json")
