"""`nsm-book diff`: what counts as moved, which runs meet, what is refused, and what a terminal shows of it."""

import io
import json
import math

import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from rich.console import Console

from nsm_book import BookError, compared, diff, store
from nsm_book.cli import main
from nsm_book.compared import Run, read_store
from nsm_book.diff import BEYOND, OTHER, VERDICTS, Shown
from nsm_book.fingerprint import digest_of


def run(page="group/first", parameters=None, **values) -> Run:
    return Run(page, parameters or {}, values)


def estimate(key, value, low, high, n=6) -> dict:
    return {key: value, f"{key}_low": low, f"{key}_high": high, f"{key}_n": n}


def record(page="group/first", parameters=None, **values) -> dict:
    return {
        "page": page,
        "profile": "quick",
        "seconds": 1.0,
        "peak_memory_mb": 99.0,
        "seed": 0,
        "device": "cpu",
        "commit": "abc",
        "date": "2026-01-01T00:00:00+00:00",
        "python": "3.11",
        "platform": "Linux",
        "versions": {},
        "all_parameters": parameters or {},
        "values": {key: {"value": v, "measured": False} for key, v in values.items()},
    }


@pytest.mark.parametrize(
    ("second", "span", "expected"),
    [
        (0.5, (0.0, 1.0), 0.0),
        (1.0, (0.0, 1.0), 0.0),
        (1.5, (0.0, 1.0), 1.0),
        (-1.0, (0.0, 1.0), 2.0),
        (2, (1.0, 1.0), math.inf),
        (1, (1.0, 1.0), 0.0),
        (9.0, None, 0.0),
        ("text", (0.0, 1.0), 0.0),
        (True, (2.0, 3.0), 0.0),
    ],
)
def test_beyond_counts_half_widths_outside_the_interval(second, span, expected):
    assert Shown(0.5, span).beyond(second) == expected


def test_what_moved_farthest_comes_first_and_what_stayed_within_does_not_count():
    first = run(**estimate("a", 0.5, 0.0, 1.0), **estimate("b", 5.0, 4.0, 6.0), **estimate("c", 1.0, 0.0, 2.0), plain=3, same=7)
    second = run(**estimate("a", 1.5, 1.0, 2.0), **estimate("b", 9.0, 8.0, 9.5), **estimate("c", 1.9, 1.0, 2.5), plain=4, same=7)
    found = diff.compare([first], [second])
    assert found.rows[BEYOND] == [
        ("group/first", "b", Shown(5.0, (4.0, 6.0)), Shown(9.0, (8.0, 9.5)), 3.0),
        ("group/first", "a", Shown(0.5, (0.0, 1.0)), Shown(1.5, (1.0, 2.0)), 1.0),
    ]
    assert [row[1] for row in found.rows[OTHER]] == ["c", "plain"] and found.equal == 1 and found.matters
    assert not any(found.rows[title] for title in diff.HEADS if title not in (BEYOND, OTHER))


def test_an_interval_that_changed_alone_is_listed_and_does_not_matter():
    found = diff.compare([run(**estimate("a", 0.5, 0.0, 1.0))], [run(**estimate("a", 0.5, 0.4, 0.6))])
    assert [row[1] for row in found.rows[OTHER]] == ["a"] and found.equal == 0 and not found.matters


def test_what_is_listed_with_nothing_else_has_a_line_of_its_own():
    found = diff.compare(
        [run(**estimate("a", 0.5, 0.0, 1.0, n=3), b=1, b_high=3, c=1, c_n="x")],
        [run(**estimate("a", 0.5, 0.0, 1.0, n=300), b=1, b_high=99, c=1, c_n="x")],
    )
    assert [row[1] for row in found.rows[OTHER]] == ["a_n", "b_high"] and found.equal == 3 and not found.rows[BEYOND]


def test_a_changed_verdict_matters_with_its_reasons_and_only_once():
    first = run(**estimate("c", 1.0, 0.5, 1.5), c_verdict="supported", c_reason="low > 0")
    second = run(**estimate("c", 1.2, -0.5, 2.5), c_verdict="undecided", c_reason="n = 3, and the rule asks for 6")
    found = diff.compare([first], [second])
    assert found.rows[VERDICTS] == [("group/first", "c", "supported", "undecided", "low > 0", "n = 3, and the rule asks for 6")]
    assert [row[1] for row in found.rows[OTHER]] == ["c"] and not found.rows[BEYOND] and found.matters
    assert not diff.compare([first], [first]).matters


def test_what_one_store_alone_has_names_the_run_or_the_value_and_no_parts():
    new = {**estimate("new", 1.0, 0.0, 2.0), "new_verdict": "supported", "new_reason": "low > 0"}
    found = diff.compare([run(**new, shared=1), run("group/gone", x=1)], [run(shared=1, later=2)])
    assert found.rows["Only in A"] == [("group/first: new",), ("group/gone",)]
    assert found.rows["Only in B"] == [("group/first: later",)] and not found.matters


def test_a_page_that_stands_once_meets_whatever_its_parameters_and_others_by_those_that_differ():
    found = diff.compare([run(parameters={"count": 3, "seed": 1}, x=1)], [run(parameters={"count": 5, "seed": 1}, x=2)])
    assert [row[0] for row in found.rows[OTHER]] == ["group/first"]
    assert found.rows["Parameters that differ"] == [("group/first", "count", Shown(3), Shown(5))]
    table = [run(parameters={"count": c, "kind": "up"}, x=c) for c in (3, 5)]
    many = diff.compare(table, [run(parameters={"count": c, "kind": "up"}, x=x) for c, x in ((5, 6), (7, 7))])
    assert many.rows[OTHER] == [("group/first count=5", "x", Shown(5), Shown(6))]
    assert many.rows["Only in A"] == [("group/first count=3",)] and many.rows["Only in B"] == [("group/first count=7",)]


def test_one_run_twice_in_a_store_is_refused():
    with pytest.raises(BookError, match="one store holds two runs of group/first"):
        diff.compare([run(x=1), run(x=2)], [run(x=1)])


def test_all_kinds_of_stores_hold_the_same(tmp_path):
    records = [record(**estimate("mean", 2.0, 1.0, 3.0), word="yes", flag=True), record("group/second", {"power": 2}, total=14.0)]
    (tmp_path / "results.json").write_text(json.dumps(records))
    store.write_table(records, tmp_path / "results.parquet")
    for number, entry in enumerate(records):
        (tmp_path / "runs" / str(number)).mkdir(parents=True)
        (tmp_path / "runs" / str(number) / "results.json").write_text(json.dumps([entry]))
    (tmp_path / "runs" / ".killed").mkdir()
    (tmp_path / "runs" / ".killed" / "results.json").write_text("half of")
    stores = [read_store(str(tmp_path / name)) for name in ("results.json", "results.parquet", "runs", ".")]
    for other in stores[1:]:
        found = diff.compare(stores[0], other)
        assert found.equal == 4 and not any(found.rows.values())


def test_a_table_of_a_sweep_gives_its_finished_runs(tmp_path):
    table = pyarrow.table(
        {
            "run": ["a", "b"],
            "page": ["group/first"] * 2,
            "status": ["done", "failed"],
            "parameters.count": [3, 5],
            "values.mean": [2.0, None],
            "values.note": [None, None],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "s.parquet")
    assert read_store(str(tmp_path / "s.parquet")) == [run(parameters={"count": 3}, mean=2.0)]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("half.json", b'[{"page": "group/first"', "half.json is no results.json of this book, or not whole: JSONDecodeError"),
        ("other.json", b'[{"page": "group/first"}]', "is no results.json of this book, or not whole: KeyError 'values'"),
        ("deep.json", b"[" * 100_000, "deep.json is no results.json of this book, or not whole: RecursionError"),
        ("list.json", b"[3]", "list.json is no results.json of this book, or not whole: TypeError"),
        ("half.parquet", b"PAR1", "half.parquet is no whole Parquet file"),
        ("text.csv", b"a,b", "text.csv is neither .json nor .parquet; accepted: a profile, a sweep, a results.json"),
    ],
)
def test_what_is_no_store_is_refused(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BookError) as refused:
        read_store(str(tmp_path / name))
    assert told in str(refused.value)


def test_a_damaged_store_that_can_still_be_read_is_refused(tmp_path):
    records = [record(**estimate("mean", 2.0, 1.0, 3.0), c_verdict="supported")]
    store.write_table(records, tmp_path / "results.parquet")
    records[0]["checksum"] = digest_of({name: records[0][name] for name in records[0] if name != "checksum"})
    (tmp_path / "results.json").write_text(json.dumps(records))
    assert read_store(str(tmp_path / "results.parquet")) == read_store(str(tmp_path / "results.json"))
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b"supported", b"unsported"))
        with pytest.raises(BookError, match=r"not whole|no whole"):
            read_store(str(path))


def test_a_parquet_file_of_something_else_is_refused(tmp_path):
    row = {name: ["x"] for name in ("page", "parameters", "key", "value", "text")}  # no profile
    pyarrow.parquet.write_table(pyarrow.table(row), tmp_path / "other.parquet")
    with pytest.raises(BookError, match=r"neither a results\.parquet nor a sweep's table"):
        read_store(str(tmp_path / "other.parquet"))


def test_names_without_a_store_say_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.setattr(compared, "BUILD", tmp_path)
    monkeypatch.setattr(compared, "sweeps", lambda: {"states": tmp_path})
    (tmp_path / "empty").mkdir()
    for given, told in [
        ("quick", "quick has no results yet: make book PROFILE=quick"),
        ("states", "states has no results yet: nsm-book sweep states"),
        ("sttaes", "unknown store 'sttaes'; nearest: states; accepted: quick, full, states, or a profile"),
        (str(tmp_path / "empty"), "empty holds no results.json"),
    ]:
        with pytest.raises(BookError) as refused:
            read_store(given)
        assert told in str(refused.value)
    (tmp_path / "results" / "quick").mkdir(parents=True)
    (tmp_path / "results" / "quick" / "results.json").write_text(json.dumps([record(x=1)]))
    assert read_store("quick") == [run(x=1)]


def test_the_command_prints_what_moved_first_and_ends_as_it_says(tmp_path):
    c = estimate("c", 1, 0.5, 2), estimate("c", 1, -1, 2)
    first = record("a", {"x": 3}, **estimate("mean", 2.0, 1.0, 3.0), **c[0], c_verdict="supported", c_reason="yes", gone=1)
    second = record("a", {"x": 5}, **estimate("mean", 9.0, 8.0, 9.5), **c[1], c_verdict="undecided", c_reason="no", came=1)
    for name, one in (("a.json", first), ("b.json", second)):
        (tmp_path / name).write_text(json.dumps([one]))
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    done = CliRunner().invoke(main, ["diff", a, b])
    assert done.exit_code == 1
    order = [
        done.output.index(text)
        for text in (
            "Moved beyond the interval of A (1)",
            "Verdicts that changed (1)",
            "Only in A",
            "Only in B",
            "Changed within the interval",
            "Parameters that differ (1)",
        )
    ]
    assert order == sorted(order) and "2 [1, 3]" in done.output and "9 [8, 9.5]" in done.output
    assert (
        "1 values beyond their interval, 1 verdicts changed, 1 other values changed, 0 equal; 1 only in A, 1 only in B"
        in done.output
    )
    same = CliRunner().invoke(main, ["diff", a, a])
    assert same.exit_code == 0 and "0 verdicts changed, 0 other values changed, 3 equal" in same.output
    refused = CliRunner().invoke(main, ["diff", a, str(tmp_path / "none.json")])
    assert refused.exit_code == 2 and "nsm-book: diff: unknown store" in refused.output and "Traceback" not in refused.output


def test_a_store_cannot_steer_the_terminal():
    console = Console(file=io.StringIO(), width=160)
    first = run("group/[red]x", note="[bold]a\x1b[31m", gone=1)
    found = diff.compare([first], [run("group/[red]x", note="b", **{"k\x1b]0;t\x07": 1})])
    diff.show(found, "A\x1b[2J", "B", console)
    text = console.file.getvalue()
    assert "\x1b" not in text and "\x07" not in text and "group/[red]x" in text and "[bold]a" in text
