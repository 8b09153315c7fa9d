"""The pipeline on a small book of its own: real pages, real kernels, real processes that really die."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pyarrow.parquet
import pytest

from nsm_book.fingerprint import with_checksum
from tests.site.browser import browser, chromium, served

pytestmark = pytest.mark.kernel


def state(checkout) -> dict[str, tuple]:
    """What must not move when nothing changed: every run and the site."""
    runs = {str(p.relative_to(checkout.folder)): p.read_bytes() for p in (checkout.folder / "_build/runs").rglob("*.ipynb")}
    return {**runs, "site": os.readlink(checkout.folder / "_build" / "html")}


def test_a_second_build_runs_nothing(copy):
    before = state(copy)
    code, output = copy.book("build")
    assert code == 0 and "to run" not in output
    assert state(copy) == before


def words(checkout, page: str) -> str:
    """What a reader reads on a built page, without its markup and its code."""
    html = (checkout.folder / "_build/html" / f"{page}.html").read_text()
    return " ".join(re.sub(r"<pre>.*?</pre>|<[^>]+>", "", html, flags=re.DOTALL).split())


def test_built_page_holds_its_numbers_box_and_profile(built):
    page = words(built, "group/first")
    assert "The mean is 3.0: supported." in page
    assert "Quick profile" in page and "This run" in page
    assert "nsm-book run group/first --profile quick -o runs" in page
    assert "The mean is 3.00, and the question is supported." in words(built, "intro")


def test_the_results_pages_tell_of_the_runs(built_with_results):
    built = built_with_results
    assert "how many numbers" in words(built, "reference/parameters")
    page = (built.folder / "_build/html/results/claims.html").read_text()
    assert "../group/first.html#claim-positive" in page and "1 supported" in words(built, "results/claims")
    assert 'id="claim-positive"' in (built.folder / "_build/html/group/first.html").read_text()
    assert "not run again" in words(built, "results/runs")
    assert "There are 0 sweeps" in words(built, "results/compare")


def test_a_verdict_typed_by_hand_is_not_published(copy):
    copy.edit("book/group/first.md", "{glue:text}`positive_verdict`.", "*supported*.")
    code, output = copy.book("build")
    assert code == 1 and "group/first, cell 7 (The mean is" in output and "*supported* is typed by hand" in output
    copy.edit("book/group/first.md", "*supported*.", "above zero.")
    code, output = copy.book("build")
    assert code == 1 and "group/first: no sentence says how 'positive' came out" in output


def test_a_verdict_typed_on_a_page_without_a_run_is_not_published(copy):
    copy.edit("book/intro.md", "{glue:text}`group/first:positive_verdict`", "*refuted*")
    code, output = copy.book("build")
    assert code == 1 and "intro: '*refuted*' is typed by hand: emphasised as only a verdict of a run is" in output, output


def test_running_the_pages_again_is_kept_and_told(copy_with_results):
    """What `make test` does with nbval: the record is of whole pages, and of the run that was compared."""
    copy = copy_with_results
    (copy.folder / "tests/book").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("nbval_kernels.py"), copy.folder / "tests/book")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.book.nbval_kernels",
        "--nbval-lax",
        "--nbval-current-env",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "2",
        "--dist",
        "loadscope",
        "_build/runs/quick",
    ]

    def again(*more: str) -> dict:
        done = subprocess.run([*command, *more], cwd=copy.folder, env=copy.environment(), capture_output=True, text=True)
        record = copy.folder / "_build/nbval/quick.json"
        return json.loads(record.read_text()) if record.exists() else done.stdout + done.stderr

    assert again("-k", "Cell and 0") == {}  # no page was run to its end
    second = copy.run("group/second")
    other = json.loads(second.read_text().replace('record/text/plain": "14.0"', 'record/text/plain": "15.0"'))
    second.write_text(json.dumps(with_checksum(other)))  # as a run that came out so; without its checksum it would be run again
    found = again()
    assert {name: (entry["same"], entry["cells"]) for name, entry in found.items()} == {
        "group/first": (True, 1),
        "group/second": (False, 1),
    }
    assert copy.book("build")[0] == 0
    told = words(copy, "results/runs")
    assert "same, 1 cells" in told and "OTHER NUMBERS" in told and "not run again" not in told
    copy.edit("book/group/second.md", "It reads what", "It also reads what")
    assert copy.book("build")[0] == 0
    told = words(copy, "results/runs")
    assert "same, 1 cells" in told and "OTHER NUMBERS" not in told and "not run again" in told


def test_a_sweep_is_drawn_with_links_to_its_notebooks(copy_with_results):
    copy = copy_with_results
    (copy.folder / "book/sweeps").mkdir()
    (copy.folder / "book/sweeps/grow.yml").write_text("page: group/first\nprofile: quick\ngrid: {count: [3, 5]}\n")
    assert copy.book("build")[0] == 0
    assert "nsm-book sweep grow" in words(copy, "results/compare")
    code, output = copy.book("sweep", "grow")
    assert code == 0, output
    code, output = copy.book("build")
    assert code == 0 and "to run" not in output  # no page runs again, and yet the site is a new one
    site = copy.folder / "_build/html"
    page = (site / "results/compare.html").read_text()
    links = set(re.findall(r'href="(\.\./sweeps/grow/\w+\.ipynb)"', page))
    assert len(links) == 2 and "2 runs of" in words(copy, "results/compare")
    for link in links:
        there = site / "results" / link
        original = copy.folder / "_build/sweeps/grow" / there.stem / "run.ipynb"
        assert there.read_bytes() == original.read_bytes() and link in (site / "results/runs.html").read_text()


def test_a_drawn_sweep_is_used_in_a_browser(copy_with_results):
    """A point of one run opens its notebook, a point of several their first line in the table; axe finds no fault."""
    copy = copy_with_results
    from axe_playwright_python.sync_playwright import Axe

    chromium()
    (copy.folder / "book/sweeps").mkdir()
    (copy.folder / "book/sweeps/grow.yml").write_text(
        "page: group/first\nprofile: quick\nrows: [{count: 3, seed: 0}, {count: 3, seed: 1}, {count: 5, seed: 0}]\n"
    )
    for words in (("build",), ("sweep", "grow"), ("build",)):
        code, output = copy.book(*words)
        assert code == 0, output
    with served(copy.folder / "_build/html") as address, browser() as running:
        page = running.new_page(viewport={"width": 1200, "height": 900}, reduced_motion="reduce")

        def click(which: int) -> None:
            page.goto(address + "results/compare.html", wait_until="load")
            page.locator("#fig-sweep-1-lines").scroll_into_view_if_needed()  # drawn when it comes near
            points = page.locator("#fig-sweep-1-lines .nsm-live .points path")
            points.first.wait_for()
            points.nth(which).scroll_into_view_if_needed()
            box = points.nth(which).bounding_box()
            middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.mouse.move(middle[0] - 3, middle[1])
            page.mouse.move(*middle)
            page.wait_for_selector("#fig-sweep-1-lines .hoverlayer text")
            page.mouse.click(*middle)

        click(0)
        page.wait_for_url("**/results/compare.html#grow-*")
        assert page.locator(f"[id='{page.url.partition('#')[2]}']").is_visible()
        found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa"]})
        assert found.violations_count == 0, found.generate_report()
        page.locator("summary", has_text="2 settings with mean and interval").click()
        assert "2.5, −3.85 to 8.85" in page.locator("tr", has=page.locator("th", has_text=re.compile("^3$"))).inner_text()
        with page.expect_request(re.compile(r"/sweeps/grow/\w+\.ipynb$")):
            click(1)


def test_links_to_executed_pages_lead_to_them(built):
    assert 'href="first.html"' in (built.folder / "_build/html/group/second.html").read_text()
    intro = (built.folder / "_build/html/intro.html").read_text()
    assert re.search(r'href="group/second.html"[^>]*><span[^>]*>The second page</span>', intro)


def test_results_hold_values_parameters_and_provenance(built):
    folder = built.folder / "_build/results/quick"
    first, second = json.loads((folder / "results.json").read_text())
    assert first["values"]["mean"] == {"value": 3.0, "measured": False}
    assert first["all_parameters"] == {"count": 5, "scale": 1.0, "kind": "up", "names": ["a", "b"], "seed": 0}
    assert second["values"]["total"]["value"] == 1 + 4 + 9
    table = pyarrow.parquet.read_table(folder / "results.parquet").to_pylist()
    row = next(row for row in table if row["key"] == "positive_verdict")
    assert row["text"] == "supported" and row["value"] is None and row["page"] == "group/first"
    assert all(row["seconds"] > 0 and row["peak_memory_mb"] > 30 and row["commit"] for row in table)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("1 / 0", ["group/second, cell 6", "ZeroDivisionError", "Traceback"]),
        ("import sys; print('careful', file=sys.stderr)", ["group/second, cell 6", "wrote to stderr", "careful"]),
        ("import warnings; warnings.warn('old')", ["group/second, cell 6", "wrote to stderr", "UserWarning: old"]),
        (
            "import plotly.graph_objects as go; from IPython.display import display; "
            "display({'application/vnd.plotly.v1+json': go.Figure().to_dict()}, raw=True)",
            ["group/second, cell 6", "a plotly figure without HTML"],
        ),
        ("x = = 1", ["group/second, cell 6", "SyntaxError"]),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ["group/second", "kernel died"]),
    ],
)
def test_a_bad_page_is_not_published_and_harms_no_other(copy, code, told):
    site, first = os.readlink(copy.folder / "_build/html"), copy.run("group/first").read_bytes()
    page = copy.folder / "book/group/second.md"
    page.write_text(page.read_text() + f"\n```{{code-cell}} python3\n{code}\n```\n")
    exit_code, output = copy.book("build")
    assert exit_code == 1
    for words in told:
        assert words in output
    assert "site was left as it was" in output
    assert os.readlink(copy.folder / "_build/html") == site and (copy.folder / "_build/html/index.html").exists()
    assert copy.run("group/first").read_bytes() == first


def test_a_missing_key_names_page_and_cell(copy):
    copy.edit("book/group/second.md", "{glue:text}`total:.1f`", "{glue:text}`totle:.1f`")
    code, output = copy.book("build")
    assert code == 1 and "group/second, cell 5 (The total is" in output and "no cell glues 'totle'" in output


def test_a_missing_key_of_another_page_is_refused(copy):
    copy.edit("book/intro.md", "group/first:mean:.2f", "group/first:maen:.2f")
    code, output = copy.book("build")
    assert code == 1 and "unknown value of group/first 'maen'; nearest: mean" in output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cuont", "3"], "unknown parameter 'cuont'; nearest: count; accepted: count, scale, kind, names, seed"),
        (["count", "3.5"], "parameter count is int (default 50), got 3.5"),
        (["count", "many"], "parameter count is int (default 50), got 'many'"),
        (["count", "True"], "parameter count is int (default 50), got True"),
        (["scale", "nan"], "parameter scale is float (default 1.0), got 'nan'"),
        (["scale", "1e999"], "parameter scale is float (default 1.0), got inf"),
        (["kind", "sideways"], "got 'sideways'"),
        (["names", "[1]"], "parameter names is list[str]"),
    ],
)
def test_a_wrong_parameter_is_refused_before_a_kernel_starts(built, tmp_path, words, told):
    code, output = built.book("run", "group/first", "-p", *words, "-o", str(tmp_path / "out"))
    assert code == 1 and told in output and "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_a_typo_in_the_quick_profile_stops_the_build_before_it_starts(copy):
    copy.edit("book/params/quick.yml", "count", "cuont")
    code, output = copy.book("build")
    assert code == 1 and "book/params/quick.yml: group/first: unknown parameter 'cuont'; nearest: count" in output
    assert "to run" not in output


def test_run_with_other_parameters(built, tmp_path):
    code, output = built.book("run", "group/first", "-p", "count", "3", "-p", "scale", "-2", "-o", str(tmp_path))
    assert code == 0, output
    place = tmp_path / "group-first" / "count=3,scale=-2.0"
    (record,) = json.loads((place / "results.json").read_text())
    assert record["values"]["mean"]["value"] == -4.0
    assert record["values"]["positive_verdict"]["value"] == "refuted"
    assert record["reproduce"] == "nsm-book run group/first --profile full -p count 3 -p scale -2.0 -o runs"
    before = (place / "run.ipynb").read_bytes()
    assert built.book("run", "group/first", "-p", "count", "3", "-p", "scale", "-2", "-o", str(tmp_path))[0] == 0
    assert (place / "run.ipynb").read_bytes() == before  # the same run is not made twice


def test_a_rerun_may_leave_numbers_of_the_prose_out(copy, tmp_path):
    """With other parameters a page may skip what a sentence speaks of; published it may not."""
    copy.edit("book/group/first.md", 'glue("mean", mean)', 'if count == 50:\n    glue("mean", mean)')
    words = ("run", "group/first", "-p", "count", "3", "-o", str(tmp_path))
    code, output = copy.book(*words)
    assert code == 0, output
    (record,) = json.loads((tmp_path / "group-first" / "count=3" / "results.json").read_text())
    assert "positive" in record["values"] and "mean" not in record["values"]
    copy.edit("book/group/first.md", "if count == 50:", "if count == 51:")
    code, output = copy.book("build")
    assert code == 1 and "no cell glues 'mean'" in output


def test_a_changed_module_reruns_only_who_imports_it(copy):
    first = copy.run("group/first").read_bytes()
    module = copy.folder / "nsm_support/metrics.py"
    module.write_text(module.read_text() + "\n# changed\n")
    assert "module nsm_support.metrics changed" in copy.book("why", "group/second")[1]
    assert "group/first is up to date" in copy.book("why", "group/first")[1]
    code, output = copy.book("build")
    assert code == 0 and "1 of 2 pages to run" in output and "group/second: " in output
    assert copy.run("group/first").read_bytes() == first


def test_a_changed_product_reruns_its_reader_and_an_equal_one_does_not(copy):
    second = copy.run("group/second").read_bytes()
    copy.edit("book/group/first.md", "It draws numbers.", "It draws some numbers.")
    code, output = copy.book("build")  # the page runs again, and makes the same file again
    assert code == 0, output
    assert copy.run("group/second").read_bytes() == second
    copy.edit("book/params/quick.yml", "count: 5", "count: 5, scale: 2.0")
    assert "parameter scale: default → 2.0" in copy.book("why", "group/first")[1]
    assert copy.book("build")[0] == 0
    assert json.loads((copy.folder / "_build/results/quick/results.json").read_text())[1]["values"]["total"]["value"] == 56


@pytest.mark.parametrize(
    ("name", "reason"),
    [("requirements.txt", "pins: requirements.txt changed"), ("book/claims.yml", "its entries in book/claims.yml changed")],
)
def test_why_names_pins_and_claims(copy, name, reason):
    path = copy.folder / name
    path.write_text(path.read_text().replace("min_n: 3", "min_n: 4") + "# changed\n")
    assert reason in copy.book("why", "group/first")[1]


def test_a_run_of_yesterday_is_not_published(copy):
    """Rendering by hand, past the step that would run the page again, is refused at the gate."""
    copy.edit("book/group/second.md", "It reads what", "It also reads what")
    code, output = copy.book("site")
    assert code == 1 and "is not today's: its source changed" in output


def kill_everything(process) -> None:
    """kill -9 of the build, of Snakemake, of the page and of its kernel."""
    import psutil

    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.wait()


def test_a_build_killed_half_way_goes_on_where_it_was(copy):
    site = os.readlink(copy.folder / "_build/html")
    page = copy.folder / "book/group/second.md"
    flag = copy.folder / "reached"
    page.write_text(
        page.read_text()
        .replace(
            "\nnumbers = ", f"\nimport time\nfrom pathlib import Path\nPath({str(flag)!r}).touch()\ntime.sleep(NAP)\nnumbers = "
        )
        .replace("power: int = 2  # the exponent", "power: int = 2  # the exponent\nNAP: int = 60  # seconds of waiting")
    )
    copy.edit("book/group/first.md", "It draws numbers.", "It draws three numbers.")
    process = copy.start("build")
    deadline = time.time() + 60
    while not flag.exists():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    first = copy.run("group/first").read_bytes()
    kill_everything(process)
    assert os.readlink(copy.folder / "_build/html") == site
    assert not copy.run("group/second").exists() or nbformat.read(copy.run("group/second"), 4)
    copy.edit("book/params/quick.yml", "group/first:", "group/second: {NAP: 0}\ngroup/first:")
    code, output = copy.book("build")
    assert code == 0, output
    assert "1 of 2 pages to run" in output and copy.run("group/first").read_bytes() == first
    assert not [path for path in (copy.folder / "_build/runs").rglob(".*") if path.is_dir()]


def test_a_page_that_outlives_its_build_is_waited_for(copy):
    """kill -9 of the build and of Snakemake alone: the page goes on, and the next build lets it end."""
    import psutil

    flag = copy.folder / "reached"
    copy.edit(
        "book/group/first.md",
        "\nmean = ",
        f"\nimport time\nfrom pathlib import Path\nPath({str(flag)!r}).touch()\ntime.sleep(5)\nmean = ",
    )
    process = copy.start("build")
    deadline = time.time() + 60
    while not flag.exists():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children()]:
        member.send_signal(signal.SIGKILL)
    process.wait()
    code, output = copy.book("build")
    assert code == 0 and "FAILED" not in output, output
    assert "group/first: unchanged" in output  # it had ended, whole, before this build looked


def test_what_sphinx_refused_once_it_refuses_again(copy):
    site = os.readlink(copy.folder / "_build/html")
    copy.edit("book/intro.md", "The mean is", "{nosuchrole}`x` The mean is")
    for _ in range(2):
        code, output = copy.book("build")
        assert code == 1 and "nosuchrole" in output
        assert os.readlink(copy.folder / "_build/html") == site


def test_prose_edited_while_the_site_is_rendered_is_published_next(copy):
    copy.edit("book/intro.md", "# A small book", "# A book")
    process, log = copy.start("build"), copy.folder / "_build/book/quick/intro.md"
    while "# A book" not in log.read_text():
        time.sleep(0.02)
    copy.edit("book/intro.md", "# A book", "# A tiny book")
    process.wait()
    assert copy.book("build")[0] == 0
    assert "<h1>A tiny book" in (copy.folder / "_build/html/intro.html").read_text()


def test_a_relative_folder_is_that_of_the_caller(built, tmp_path):
    words = [sys.executable, "-m", "nsm_book.cli", "run", "group/first", "-p", "count", "3", "-o", "out"]
    done = subprocess.run(words, cwd=tmp_path, env=built.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/group-first/count=3/numbers.txt").exists()


def test_a_page_that_needs_another_says_how_to_get_it(built, tmp_path):
    code, output = built.book("run", "group/second", "-o", str(tmp_path))
    assert code == 1 and "needs numbers.txt" in output and "make book PROFILE=full" in output
    code, output = built.book("run", "group/second", "--profile", "quick", "-p", "power", "3", "-o", str(tmp_path))
    assert code == 0, output
    (record,) = json.loads((tmp_path / "group-second/quick,power=3/results.json").read_text())
    assert record["values"]["total"]["value"] == 1 + 8 + 27


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        (
            "book/intro.md",
            "positive_verdict`",
            "positive_verdict:.2f`",
            "{glue:text}`group/first:positive_verdict:.2f`: the value",
        ),
        (
            "book/claims.yml",
            "min_n: 3",
            "min_n: few",
            "book/claims.yml: positive: rule: min_n: Input should be a valid integer, got 'few'",
        ),
    ],
)
def test_a_mistake_is_told_with_its_place(copy, name, old, new, told):
    copy.edit(name, old, new)
    code, output = copy.book("build")
    assert code == 1 and told in output and "Traceback" not in output


def test_two_builds_at_once_make_one(copy):
    copy.edit("book/group/first.md", "\nmean = ", "\nimport time\ntime.sleep(3)\nmean = ")
    one, lock = copy.start("build"), copy.folder / "_build/build.lock"
    while f"process {one.pid} " not in lock.read_text():
        assert one.poll() is None
        time.sleep(0.05)
    two = copy.start("build")
    (said_one, _), (said_two, _) = one.communicate(timeout=120), two.communicate(timeout=120)
    assert one.returncode == 0 and two.returncode == 0, said_one + said_two
    assert f"process {one.pid} " in said_two and "waiting for it to end" in said_two
    assert "to run" in said_one and "to run" not in said_two


def test_a_change_taken_back_brings_the_run_back(copy):
    first, second = copy.run("group/first").read_bytes(), copy.run("group/second").read_bytes()
    copy.edit("book/group/second.md", "n**power for", "m**power for")
    code, output = copy.book("build")
    assert code == 1 and "NameError" in output
    assert "its source changed" in copy.book("why", "group/second")[1]
    copy.edit("book/group/second.md", "m**power for", "n**power for")
    code, output = copy.book("build")
    assert code == 0 and "group/second: unchanged" in output
    assert (copy.run("group/first").read_bytes(), copy.run("group/second").read_bytes()) == (first, second)


def test_a_damaged_product_is_made_again(copy):
    product = copy.folder / "_build/products/quick/numbers.txt"
    whole, second = product.read_text(), copy.run("group/second").read_bytes()
    product.write_text(whole[:5])
    assert "its product numbers.txt is not what it made" in copy.book("why", "group/first")[1]
    assert copy.book("build")[0] == 0
    assert product.read_text() == whole and copy.run("group/second").read_bytes() == second


def test_a_product_of_an_earlier_run_does_not_stand_for_one_that_a_run_did_not_make(copy):
    product = copy.folder / "_build/products/quick/numbers.txt"
    first, made = copy.run("group/first").read_bytes(), product.read_bytes()
    copy.edit("book/group/first.md", 'write_product("numbers.txt").write_text(', "print(")
    code, output = copy.book("build")
    assert code == 1 and "group/first: did not make numbers.txt" in output, output
    assert product.read_bytes() == made
    copy.edit("book/group/first.md", "print(", 'write_product("numbers.txt").write_text(')
    code, output = copy.book("build")
    assert code == 0 and "group/first: unchanged" in output and copy.run("group/first").read_bytes() == first


def test_a_run_that_fails_leaves_the_products_as_they_were(copy):
    product = copy.folder / "_build/products/quick/numbers.txt"
    made = product.read_bytes()
    copy.edit("book/group/first.md", "numbers[:3]))\n", "numbers[1:3]))\n1 / 0\n")
    code, output = copy.book("build")
    assert code == 1 and "ZeroDivisionError" in output and product.read_bytes() == made
    copy.edit("book/group/first.md", "numbers[1:3]))\n1 / 0\n", "numbers[1:3]))\n")
    assert copy.book("build")[0] == 0 and product.read_bytes() != made


def test_a_run_takes_no_product_that_its_page_would_not_make_today(copy, tmp_path):
    words = ("run", "group/second", "--profile", "quick", "-p", "power", "3", "-o", str(tmp_path / "out"))
    product = copy.folder / "_build/products/quick/numbers.txt"
    made = product.read_text()
    product.write_text(made.replace("1.0", "7.0"))
    code, output = copy.book(*words)
    assert (
        code == 1
        and (
            "group/second: needs numbers.txt, and group/first has to run for that: its product numbers.txt is not "
            "what it made. First: make book PROFILE=quick"
        )
        in output
    ), output
    product.write_text(made)
    copy.edit("book/group/first.md", "numbers = [scale", "numbers = [2 * scale")
    code, output = copy.book(*words)
    assert code == 1 and "its source changed" in output and not (tmp_path / "out").exists(), output


def test_verify_refuses_a_site_that_is_old_or_not_whole(copy):
    commit = json.loads((copy.folder / "_build/html/build.json").read_text())["pages"]["group/first"]["commit"]
    assert copy.book("verify", "--commit", commit) == (0, "whole and new: 3 pages\n")
    code, output = copy.book("verify", "--profile", "full", "--commit", "0123456789abcdef")
    assert code == 1 and "of the quick profile, not full" in output and "not at 0123456789ab" in output
    (copy.folder / "_build/html/group/second.html").unlink()
    code, output = copy.book("verify", "--commit", commit)
    assert code == 1 and "group/second.html is missing or empty" in output


def test_over_budget_is_reported(copy):
    copy.edit("book/pages.yml", "group/first:\n  budget: {quick: 10", "group/first:\n  budget: {quick: 0.1")
    copy.edit("book/group/first.md", "It draws numbers.", "It draws numbers slowly.")
    code, output = copy.book("build")
    assert code == 0 and "over its budget of 0.1 s" in output


def test_params_lists_type_default_and_meaning(built):
    _, output = built.book("params", "group/first")
    assert "Literal['up', 'down']" in output and "50" in output and "how many numbers" in output
    _, output = built.book("params", "group/thrid")
    assert "unknown page 'group/thrid'; nearest: group/first; accepted: group/first, group/second" in output


def test_the_site_is_whole(built):
    site = built.folder / "_build/html"
    card = json.loads((site / "build.json").read_text())
    assert card["profile"] == "quick" and set(card["pages"]) == {"group/first", "group/second"}
    assert (site / "plotly.min.js").stat().st_size > 1e6 and (site / "tex-svg-full.js").stat().st_size > 1e6
    assert Path(site / "_sources/group/first.ipynb").exists()
