"""What the pipeline survives, with real processes: kills, a full disk, no memory, damage, no permission, a clock that jumps.

Two builds and sweeps at once, kills of everything, truncated files and damaged products are tried in `test_pipeline` and
`test_sweeps`.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pyarrow.parquet
import pytest

from tests.conftest import Checkout, copied

pytestmark = pytest.mark.kernel
SWEEP = "page: group/first\nprofile: quick\ngrid: {count: [3, 4, 5, 6]}\n"
KEPT = "what had ended before is kept"


@pytest.fixture(scope="module", autouse=True)
def bytecode():
    """Python keeps bytecode, as it does for a person, whatever it does where the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield


@pytest.fixture(scope="module")
def whole(built, bytecode, tmp_path_factory) -> Checkout:
    """A checkout whose book and one sweep are up to date. Only to be read or copied."""
    checkout = copied(built, tmp_path_factory.mktemp("whole") / "book")
    (checkout.folder / "book/sweeps").mkdir()
    (checkout.folder / "book/sweeps/x.yml").write_text(SWEEP)
    checkout.edit("book/group/second.md", "import majority_share", "import SHIFT")
    checkout.edit("book/group/second.md", "sum(n**power for", "SHIFT + sum(n**power for")
    with (checkout.folder / "nsm_support/metrics.py").open("a") as module:
        print("SHIFT = 0", file=module)
    for words in (("sweep", "x", "--jobs", "2"), ("build",)):
        code, output = checkout.book(*words)
        assert code == 0, output
    return checkout


@pytest.fixture
def book(whole, tmp_path) -> Checkout:
    """A copy of it that a test may harm."""
    return copied(whole, tmp_path / "book")


def runs(checkout: Checkout) -> dict[str, bytes]:
    """Every executed notebook of the book and of the sweep."""
    build = checkout.folder / "_build"
    found = [*build.glob("runs/quick/group/*.ipynb"), *build.glob("sweeps/x/*/run.ipynb")]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in found}


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def site(checkout: Checkout) -> str:
    return os.readlink(checkout.folder / "_build/html")


def kill_snakemake(process: subprocess.Popen, reached) -> str:
    """kill -9 of Snakemake alone, once a page is at work; return what the command said, which ended by itself."""
    deadline = time.time() + 60
    while not reached.exists():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    (snakemake,) = [child for child in psutil.Process(process.pid).children() if "snakemake" in child.cmdline()]
    snakemake.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in output, output
    assert "Snakemake was killed by signal 9: give the same command again" in output and KEPT in output
    return output


def slow(checkout: Checkout):
    """Let the first page write its seed down and, if it is the first to do so, wait for a file `go`; return both files."""
    ran, go = checkout.folder / "ran", checkout.folder / "go"
    checkout.edit(
        "book/group/first.md",
        "\nmean = ",
        f"""
import os
import time
with open({str(ran)!r}, "a") as file:
    print(seed, file=file)
began = time.monotonic()
while len(open({str(ran)!r}).readlines()) == 1 and not os.path.exists({str(go)!r}) and time.monotonic() < began + 60:
    time.sleep(0.05)
mean = """,
    )
    return ran, go


def waits_and_goes_on(process, go) -> str:
    """What a command prints that has to wait for what a killed one left at work, which then may go on."""
    output = ""
    for line in process.stdout:
        output += line
        if "is being made by a process that is still alive; waiting for it to end" in line:
            go.touch()
    assert process.wait() == 0 and go.exists(), output
    return output


def test_a_build_whose_snakemake_is_killed_says_so_and_the_next_waits_for_the_page(book):
    (ran, go), before, published = slow(book), runs(book), site(book)
    assert "The site was left as it was" in kill_snakemake(book.start("build"), ran) and site(book) == published
    output = waits_and_goes_on(book.start("build"), go)
    assert "group/first: unchanged" in output and ran.read_text() == "0\n"  # it ran once
    assert changed(before, runs(book)) == {"group/first.ipynb"}


def test_a_sweep_whose_snakemake_is_killed_repeats_nothing(book):
    ran, go = slow(book)
    (book.folder / "book/sweeps/x.yml").write_text("page: group/first\nprofile: quick\nseeds: [0, 1, 2, 3]\n")
    kill_snakemake(book.start("sweep", "x", "--jobs", "1"), ran)
    assert "sweep x: 4 runs, all done" in waits_and_goes_on(book.start("sweep", "x", "--jobs", "2"), go)
    assert sorted(ran.read_text().split()) == ["0", "1", "2", "3"]


def test_a_kernel_that_gets_no_memory_is_named_and_the_others_end(book):
    """What Python asks for is refused with an error; what C code asks for, and does not look at, kills."""
    book.edit(
        "book/group/first.md",
        "\nmean = ",
        """
if count > 10:
    import ctypes
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    malloc = ctypes.CDLL(None).malloc
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    memory = bytearray(2**32) if count == 13 else ctypes.memset(malloc(2**32), 1, 2**32)
mean = """,
    )
    (book.folder / "book/sweeps/x.yml").write_text(SWEEP.replace("3, 4, 5, 6", "13, 14, 4"))
    code, output = book.book("sweep", "x", "--jobs", "2")
    assert code == 1 and "2 of 3 runs failed" in output, output
    assert "group/first, cell 5 (numbers = [scale" in output and "MemoryError" in output
    assert "group/first: its kernel died (killed, or out of memory) having used" in output
    assert "book/pages.yml says 500 MB. Free memory, or run fewer side by side" in output
    table = pyarrow.parquet.read_table(book.folder / "_build/sweeps/x.parquet").to_pydict()
    assert table["status"] == ["failed", "failed", "done"]


def shell(checkout: Checkout, script: str, before: tuple[str, ...] = ()) -> str:
    """What a script says in which `book` is nsm-book; it tells the exit codes."""
    text = f'book() {{ code=0; {sys.executable} -m nsm_book.cli "$@" 2>&1 || code=$?; echo "code $code"; }}\n{script}'
    done = subprocess.run(
        [*before, "bash", "-euc", text],
        cwd=checkout.folder,
        env=checkout.environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def mounting() -> tuple[str, ...]:
    """The words before a command that may mount, and whose mounts nobody else sees."""
    words = ("unshare", "--mount") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--mount")
    tried = subprocess.run([*words, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"needs to mount a tmpfs, as root or in a user namespace: {tried.stderr.strip()}")
    return words


def test_a_full_disk_is_told_and_costs_no_run(book, mounting):
    before, published = runs(book), site(book)
    book.edit("book/group/second.md", "It reads what", "It also reads what")
    said = shell(
        book,
        """
mv _build saved; mkdir _build; mount -t tmpfs -o size=100m tmpfs _build; cp -a saved/. _build
fill() { dd if=/dev/zero of=_build/filler bs=1k count=$(($(df -k --output=avail _build | tail -1) - $1)) status=none; }
fill 0; book build
sed -i 's/5, 6/5, 6, 7/' book/sweeps/x.yml; book sweep x
rm _build/filler; fill 60; echo "== a little room"; book build
rm _build/filler; echo "== room"; readlink _build/html; book build; book sweep x
rm -r saved; mkdir saved; cp -a _build/. saved; umount _build; rmdir _build; mv saved _build""",
        mounting,
    )
    full, little, room = said.split("== ")
    assert full.count("code 1") == 2 and "Traceback" not in full and "No space left on device" in full, full
    assert full.count(f"the same command again: {KEPT}") >= 2
    assert "code 1" in little and "no room was left for a file below" in little and f"again: {KEPT}" in little, little
    assert f"room\n{published}\n" in room and room.count("code 0") == 2 and "1 of 5 runs to do" in room, room
    moved = changed(before, runs(book))
    assert len(moved) == 2 and "group/second.ipynb" in moved and not moved - {"group/second.ipynb"} & before.keys()


def test_a_file_that_gets_no_room_is_told_and_costs_no_run(book):
    """As on a full disk, where nobody may mount: no file may grow beyond 8 kB."""
    before, published = runs(book), site(book)
    book.edit("book/group/first.md", "It draws", "It also draws")
    said = shell(book, "ulimit -f 8; book build")
    assert "no room was left for a file below" in said and KEPT in said and said.endswith("code 1\n"), said
    assert "Traceback" not in said and site(book) == published
    assert changed(before, runs(book)) <= {"group/first.ipynb"}
    code, output = book.book("build")
    assert code == 0 and changed(before, runs(book)) == {"group/first.ipynb"}, output


def test_a_checkout_that_is_not_to_be_written_says_so_and_can_still_run_a_page(book, mounting, tmp_path):
    before = runs(book)
    book.edit("book/group/second.md", "It reads what", "It also reads what")
    said = shell(
        book,
        f"""
mount --bind . .; mount -o remount,ro,bind .; cd "$PWD"
book build; book sweep x; book run group/first -p count 7 -o runs
echo "== elsewhere"; book run group/first -p count 7 -o {tmp_path / "out"}""",
        mounting,
    )
    inside, elsewhere = said.split("== ")
    assert inside.count("code 1") == 3 and inside.count("cannot be used: Read-only file system. Mend that") == 3, inside
    assert "Traceback" not in inside and "code 0" in elsewhere and runs(book) == before
    (record,) = json.loads((tmp_path / "out/group-first/count=7/results.json").read_text())
    assert record["values"]["mean"]["value"] == 4.0


def harm(path, old: bytes, new: bytes) -> None:
    """Damage that no reader of the format would notice."""
    data = path.read_bytes()
    assert data.count(old) >= 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))


def halve(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_notebook_of_a_build_is_run_again_and_no_other(book):
    before = runs(book)
    harm(book.run("group/first"), b'"value": 3.0', b'"value": 8.0')
    assert "group/first would run again" in book.book("why", "group/first")[1]
    code, output = book.book("build")
    assert code == 0 and "1 of 2 pages to run" in output and "The mean is" not in output, output
    assert changed(before, runs(book)) == {"group/first.ipynb"}
    halve(book.run("group/second"))
    between = runs(book)
    code, output = book.book("build")
    assert code == 0 and "1 of 2 pages to run" in output and changed(between, runs(book)) == {"group/second.ipynb"}, output
    values = [run["values"] for run in json.loads((book.folder / "_build/results/quick/results.json").read_text())]
    assert values[0]["mean"]["value"] == 3.0 and values[1]["total"]["value"] == 14.0


@pytest.mark.parametrize(
    "damage",
    [
        lambda build: harm(build / "results/quick/results.json", b'"value": 3.0', b'"value": 8.0'),
        lambda build: harm(build / "results/quick/results.parquet", b"supported", b"unsported"),
        lambda build: halve(build / "results/quick/book.json"),
    ],
    ids=["a value", "a word in a table", "half a file"],
)
def test_damaged_tables_of_a_build_are_made_again_from_its_runs(book, damage):
    tables = [book.folder / "_build/results/quick" / name for name in ("results.json", "results.parquet")]
    before, good = runs(book), [path.read_bytes() for path in tables]
    damage(book.folder / "_build")
    code, output = book.book("build")
    assert code == 0 and "results: 8 values of 2 pages" in output and "to run" not in output, output
    assert runs(book) == before and [path.read_bytes() for path in tables] == good


def test_a_damaged_card_of_the_site_does_not_stop_a_build_of_a_page_that_changed(book):
    card = book.folder / "_build/sites/quick.json"
    halve(card)
    with (book.folder / "book/group/second.md").open("a") as page:
        page.write("\nOne sentence more.\n")
    code, output = book.book("build")
    assert code == 0 and "1 of 2 pages to run" in output and json.loads(card.read_text())["site"], output


def test_a_run_of_a_sweep_that_was_damaged_unnoticeably_is_made_again_and_no_other(book):
    before, folder = runs(book), book.folder / "_build/sweeps"
    table = folder / "x.parquet"
    names = pyarrow.parquet.read_table(table)["run"].to_pylist()
    harm(folder / "x" / names[0] / "run.ipynb", b'"value": 2.0', b'"value": 8.0')
    harm(folder / "x" / names[1] / "numbers.txt", b"1.0", b"7.0")
    harm(folder / "x" / names[2] / "results.json", b'"value": 3.0', b'"value": 8.0')
    harm(table, b"supported", b"unsported")
    code, output = book.book("sweep", "x", "--jobs", "2")
    assert code == 0 and "3 of 4 runs to do" in output, output
    assert changed(before, runs(book)) == {f"{name}/run.ipynb" for name in names[:2]}  # the third had only to be read again
    after = pyarrow.parquet.read_table(table).to_pydict()
    assert after["values.mean"] == [2.0, 2.5, 3.0, 3.5] and after["values.positive_verdict"] == ["supported"] * 4
    good = table.read_bytes()
    for damage in (halve, lambda path: harm(path, b"supported", b"unsported")):
        damage(table)
        with (book.folder / "book/group/second.md").open("a") as page:
            page.write("\nOne sentence more.\n")
        code, output = book.book("build")  # told before a page runs
        assert code == 1 and "`nsm-book sweep x` makes it anew" in output and "to run" not in output, output
        assert book.book("sweep", "x")[0] == 0 and table.read_bytes() == good


def test_a_command_that_is_ended_takes_its_snakemake_along(book):
    ran, _ = slow(book)
    process = book.start("build")
    while not (ran.exists() and ran.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    (snakemake,) = [child for child in psutil.Process(process.pid).children() if "snakemake" in child.cmdline()]
    begun = [snakemake, *snakemake.children(recursive=True)]
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in output, output
    assert len(begun) > 2 and not psutil.wait_procs(begun, timeout=3)[1]  # the kernel would wait a minute


def test_dates_decide_nothing(book):
    """A clock that jumped, an archive or a copy: some files are of the future, some of the past, and nothing runs again."""
    before, published = runs(book), site(book)
    years = 5 * 365 * 86400
    for number, path in enumerate([*(book.folder / "_build").rglob("*"), *(book.folder / "nsm_support").rglob("*.py")]):
        if path.exists():
            os.utime(path, (time.time() + (-years, years)[number % 2],) * 2)
    os.utime(book.folder / "_build/products/quick/numbers.txt", (time.time() + years,) * 2)
    os.utime(book.run("group/second"), (time.time() - years,) * 2)  # which reads it
    for words in (("build",), ("sweep", "x"), ("build",)):
        code, output = book.book(*words)
        assert code == 0 and "to run" not in output and "to do" not in output and "site:" not in output, output
    assert runs(book) == before and site(book) == published


def test_a_clock_that_jumps_forth_and_back_every_second_costs_nothing(book):
    clock = book.folder / "sitecustomize.py"
    clock.write_text("import time\nreal = time.time\ntime.time = lambda: real() + 400 * 86400 * (int(real()) % 2)\n")
    before = runs(book)
    book.edit("book/group/first.md", "It draws numbers", "It still draws numbers")
    for words, told in ((("build",), "1 of 2 pages to run"), (("sweep", "x", "--jobs", "2"), "4 of 4 runs to do")):
        code, output = book.book(*words)
        assert code == 0 and told in output and "Traceback" not in output, output
    after = runs(book)
    assert "group/first.ipynb" in changed(before, after) and "group/second.ipynb" not in changed(before, after)
    clock.unlink()
    for words in (("build",), ("sweep", "x"), ("build",)):
        code, output = book.book(*words)
        assert code == 0 and "to run" not in output and "to do" not in output, output
    assert runs(book) == after


def test_a_change_that_no_date_shows_is_seen(book):
    module = book.folder / "nsm_support/metrics.py"
    product = book.folder / "_build/products/quick/numbers.txt"
    dates, good = [path.stat() for path in (module, product)], product.read_bytes()
    harm(module, b"SHIFT = 0", b"SHIFT = 2")
    harm(product, b"1.0", b"7.0")
    for path, date in zip((module, product), dates, strict=True):
        os.utime(path, ns=(date.st_atime_ns, date.st_mtime_ns))
    code, output = book.book("build")
    assert code == 0 and "2 of 2 pages to run" in output and product.read_bytes() == good, output
    _, second = json.loads((book.folder / "_build/results/quick/results.json").read_text())
    assert second["values"]["total"]["value"] == 16.0


def timeless(data: bytes) -> bytes:
    """An executed notebook without times, memory, dates, and the checksum over these."""
    notebook = json.loads(data)
    del notebook["metadata"]["checksum"]
    for name in ("seconds", "peak_memory_mb", "date"):
        del notebook["metadata"]["nsm_book"][name]
    for cell in [notebook, *notebook["cells"]]:
        cell["metadata"].pop("execution", None)
        for name in ("duration", "start_time", "end_time"):
            cell["metadata"].get("papermill", {}).pop(name, None)
    box = notebook["cells"][-1]
    box["source"], found = re.subn(r"(Wall time|Peak memory|Date)(</th><td>)[^<]*", r"\1\2", "".join(box["source"]))
    assert found == 3
    return json.dumps(notebook).encode()


def test_the_same_input_twice_gives_the_same_bytes(book, tmp_path):
    build, old = book.folder / "_build", runs(book)
    tables = {name: build / name for name in ("results/quick/results.parquet", "sweeps/x.parquet")}
    measured = ["seconds", "peak_memory_mb", "date"]

    def without_measures(path) -> bytes:
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).drop_columns(measured), tmp_path / "table")
        return (tmp_path / "table").read_bytes()

    def records() -> list[dict]:
        found = [build / "results/quick/results.json", *sorted((build / "sweeps/x").glob("*/results.json"))]
        return [
            {name: value for name, value in run.items() if name not in (*measured, "digest", "checksum")}
            for path in found
            for run in json.loads(path.read_text())
        ]

    old_tables, old_records = {name: without_measures(path) for name, path in tables.items()}, json.dumps(records())
    products = {path: path.read_bytes() for path in build.rglob("numbers.txt")}
    shutil.rmtree(build)
    for words in (("sweep", "x", "--jobs", "2"), ("build",)):
        code, output = book.book(*words)
        assert code == 0, output
    new = runs(book)
    assert new.keys() == old.keys() and len(new) == 6 and changed(old, new) == new.keys()  # all of them ran again
    assert {name: timeless(data) for name, data in new.items()} == {name: timeless(data) for name, data in old.items()}
    assert {name: without_measures(path) for name, path in tables.items()} == old_tables
    assert json.dumps(records()) == old_records and len(products) == 5
    assert {path: path.read_bytes() for path in products} == products
    for data in new.values():
        nbformat.validate(nbformat.reads(data.decode(), as_version=4))
        assert str(book.folder) not in data.decode()
