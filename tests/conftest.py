"""A small book of its own for the pipeline's tests: real pages, real kernels, the project's own package."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from nsm_book import schema, sweep_table

ROOT = Path(__file__).resolve().parents[1]
SMALL = Path(__file__).parent / "book/small_book"
COPIED = ("nsm_support", "nsm_book", "profiles", "Snakefile", "_config.yml", "requirements.txt", "constraints.txt")


HEAD = """---
jupytext:
  formats: ipynb,md:myst
kernelspec:
  name: python3
  display_name: Python 3
  language: python
---
"""  # of a page that a test writes


RESULTS = ("results/claims", "results/compare", "results/runs", "reference/parameters")


def small_book(folder: Path, results: bool = False) -> None:
    """The small book; with `results`, the real one's pages that show results stand in it."""
    shutil.copytree(SMALL, folder, dirs_exist_ok=True)
    shutil.copytree(ROOT / "book/_static", folder / "book/_static")
    for name in RESULTS if results else ():
        (folder / f"book/{name}.md").parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / f"book/{name}.md", folder / f"book/{name}.md")
        with (folder / "book/pages.yml").open("a") as pages, (folder / "_toc.yml").open("a") as toc:
            print(f"{name}: {{budget: {{quick: 20, full: 20}}, memory: 600, reads_results: true}}", file=pages)
            print(f"      - file: {name}", file=toc)


class Checkout:
    """A copy of the project in a folder of its own, holding the small book."""

    def __init__(self, folder: Path, results: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / name)
        small_book(folder, results)

    def environment(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("NSM_BOOK", "PYTEST"))}
        return {**clean, "PYTHONPATH": str(self.folder), "COLUMNS": "200"}

    def start(self, *words: str) -> subprocess.Popen:
        own = self.folder / ".venv/bin/python"
        command = [own if own.exists() else sys.executable, "-m", "nsm_book.cli", *words]
        return subprocess.Popen(
            command, cwd=self.folder, text=True, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def book(self, *words: str) -> tuple[int, str]:
        """Run `nsm-book` in the copy; return its exit code and everything it printed."""
        process = self.start(*words)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.folder / name
        text = path.read_text()
        assert old in text, f"{old!r} is not in {name}"
        path.write_text(text.replace(old, new))

    def run(self, page: str) -> Path:
        return self.folder / "_build" / "runs" / "quick" / f"{page}.ipynb"


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def _built(folder: Path, results: bool) -> Checkout:
    checkout = Checkout(folder, results)
    code, output = checkout.book("build")
    assert code == 0, output
    return checkout


def copied(checkout: Checkout, folder: Path) -> Checkout:
    new = object.__new__(Checkout)
    new.folder = folder
    shutil.copytree(checkout.folder, folder, symlinks=True)
    return new


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Checkout:
    """A checkout whose small book is built. Only to be read or copied."""
    return _built(tmp_path_factory.mktemp("built"), results=False)


@pytest.fixture(scope="session")
def built_with_results(tmp_path_factory) -> Checkout:
    """The same with the pages that show results."""
    return _built(tmp_path_factory.mktemp("results"), results=True)


@pytest.fixture
def copy(built, tmp_path) -> Checkout:
    """A built checkout that a test may change."""
    return copied(built, tmp_path / "copy")


@pytest.fixture
def copy_with_results(built_with_results, tmp_path) -> Checkout:
    return copied(built_with_results, tmp_path / "copy")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The small book in place of the real one, in this process; returns a function that writes a sweep, or the CSV file of its
    rows, and reads it."""
    small_book(tmp_path)
    (tmp_path / "book/sweeps").mkdir()
    monkeypatch.setattr(schema, "BOOK", tmp_path / "book")

    def read(name: str, text: str | bytes) -> sweep_table.Sweep:
        path = tmp_path / "book/sweeps" / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        if path.suffix == ".csv":
            path.with_suffix(".yml").write_text(f"page: group/first\nrows: {name}\n")
        return sweep_table.read_sweep(path.stem)

    schema.pages.cache_clear()
    schema.parameters.cache_clear()
    yield read
    schema.pages.cache_clear()
    schema.parameters.cache_clear()


@pytest.fixture
def slurm(tmp_path):
    """A Slurm of one node, on this machine."""
    lacking = [name for name in ("slurmctld", "slurmd", "munged", "sinfo") if not shutil.which(name)]
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        lacking.append("snakemake-executor-plugin-slurm")
    if os.geteuid():
        lacking.append("root")
    if lacking:
        end = pytest.fail if os.environ.get("NSM_BOOK_NEED_SLURM") == "1" else pytest.skip
        end(f"needs {', '.join(lacking)}: apt-get install slurm-wlm munge; pip install -r profiles/slurm/requirements.txt")
    folder, conf = tmp_path / "slurm", Path("/etc/slurm/slurm.conf")
    with Path(tempfile.gettempdir(), "nsm-book-slurm.lock").open("w") as lock:  # one at a time, whichever worker of pytest asks
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield from one_node(folder, conf)


def one_node(folder: Path, conf: Path):
    try:
        subprocess.run([ROOT / "tests/book/slurm/start.sh", folder], check=True, timeout=60)
        yield
    finally:
        pids = [int(path.read_text()) for path in folder.glob("*.pid")]
        daemons = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        for daemon in daemons:
            daemon.terminate()
        for daemon in psutil.wait_procs(daemons, timeout=30)[1]:  # they hold the ports until they have ended
            daemon.kill()
        if conf.is_symlink() and conf.resolve() == (folder / "slurm.conf").resolve():
            conf.unlink()
