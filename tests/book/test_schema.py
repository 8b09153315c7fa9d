"""One schema for all that people write: what is accepted, and how whatever is wrong is refused, in one line."""

import ast
import csv
import io
import itertools
import json
import re
import shlex
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nsm_book
from nsm_book import BookError, schema, sweep_table
from nsm_book.run import folder_name, reproduce_line
from nsm_book.sweep_table import SweepFile

FIRST = "page: group/first\n"
# One string for all readers: HTML, Markdown, MyST, formulas, the shell, Python, paths, and the book's own rewriting.
EVIL = (
    "</code></td></table></details><script>hit(1)</script><img src=x onerror=hit(2)>\n\n# Title\n\n`a` | b ``` $x^2$ "
    "\\(y\\) [go](javascript:hit(3)) ![i](x.png) [](first.md) {glue:text}`lost` {{ mean }} {count} *supported* _refuted_ "
    "<!-- ${7*7} $(touch hit) `touch hit`; touch hit; \" + __import__('os').system('touch hit') + \" ' \\ ../../hit "
    "\u202e\x1b[31m\u2028\tü https://hit.example &lt;"
)
PIECES = [EVIL, "0x" + "f" * 5000, "9" * 5000, "é" * 90, "𝒳" * 72]
PIECES += re.split(  # one of them is empty
    "¦",
    '¦<b>x</b>¦$x$¦\\$x$¦../../hit¦/etc/passwd¦a|b¦`¦\'¦"¦"""¦\n¦\r\n¦\x00¦\ud800¦((¦nan¦inf¦-1e999¦1e308¦None¦True'
    "¦true¦[¦]¦{¦}¦{[]: 1}¦[1, 2]¦['a']¦'None'¦5¦1_0¦\\N{BULLET}¦__import__('os').system('touch hit')"
    "¦*supported*¦--profile¦{glue:text}`mean`¦=cmd|'/C calc'!A0¦%s¦{0.__class__}"
    "¦!!python/object/apply:os.system [touch hit]¦&a [*a]¦<<: {count: 1}¦!!bool maybe¦!!int ''"
    "¦!!timestamp x¦1:1:1¦2020-13-01¦,¦#¦? [a]¦---¦- ¦: ¦- &¦\ufeff¦page¦count¦group/first",
)
TEXT = st.one_of(
    st.sampled_from(PIECES),
    st.text(max_size=30),
    st.lists(st.sampled_from(PIECES), max_size=4).map("".join),
    st.characters(codec=None).map(str),
)
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 9),
    st.sampled_from([2**63, -(2**63), 10**400]),
    st.floats(),
    st.binary(max_size=3),
    st.dates(),
    TEXT,
)
ANY = st.recursive(
    PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=2)), max_leaves=6
)
VALUE = st.one_of(ANY, ANY.map(schema.brief), st.lists(st.integers(-3, 9), max_size=3).map(str))
WHOLE = st.integers(-(2**63), 2**63 - 1)


def fuzz(examples: int, check, *strategies) -> None:
    """Give a check so many examples, the same ones every time."""
    how = settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    how(given(*strategies)(check))()


def refused(error: BookError) -> str:
    """What a person is refusals: one line that a terminal shows as it stands, and no more than a person reads."""
    message = str(error)
    assert message.isprintable() and 10 < len(message) < 900, message
    return message


REFUSED = [  # of a sweep x.yml, or of one whose rows are x.csv: the file, what is in it, what a person is refusals
    ("x.csv", "count\nthree\n", "x.csv: line 2: group/first: parameter count is int (default 50), got 'three': Input"),
    ("x.csv", "count\n3.5\n", "got 3.5"),
    ("x.csv", 'count\n""\n', "got ''"),
    ("x.csv", "scale\nnan\n", "parameter scale is float (default 1.0), got 'nan'"),
    ("x.csv", "scale\n1e999\n", "got inf: Input should be a finite number"),
    ("x.csv", "count\n" + "9" * 6000 + "\n", "(6002 characters)"),
    ("x.csv", "cuont\n3\n", "x.csv: line 2: group/first: unknown parameter 'cuont'; nearest: count; accepted: count, "),
    ("x.csv", "page,count\ngroup/first,3\n", "unknown parameter 'page'"),
    ("x.csv", "count,count\n3,4\n", "x.csv: column 'count' stands there 2 times"),
    ("x.csv", "count\n3\n4,5\n", "x.csv: line 3: needs 1 cells, one for each column"),
    ("x.csv", "count\n3\n\n3\n", "x.csv: line 4: the same run as x.csv: line 2: count=3"),
    ("x.csv", "scale\n1\n1.0\n", "line 3: the same run as x.csv: line 2: scale=1.0"),
    ("x.csv", 'kind\n"up\n', "unexpected end of data"),
    ("x.csv", "count\n", "x.csv: holds no run"),
    ("x.csv", "", "x.csv: holds no run"),
    ("x.csv", "names\n\"['a', __import__('os')]\"\n", "parameter names is list[str]"),
    ("x.csv", "kind\nü\n".encode("latin-1"), "x.csv: byte 5: accepts UTF-8 only"),
    ("x.csv", "count\n3\n".encode("utf-16"), "x.csv: byte 0: accepts UTF-8 only"),
    ("x.csv", "seed\n" + "".join(f"{seed}\n" for seed in range(100_001)), "100001 runs; accepts 100000 at most"),
    ("x.yml", FIRST + "rows: y.csv\n", "y.csv: No such file or directory"),
    ("x.yml", FIRST + "rows: ../../x.csv\n", "or NAME.csv for a file beside the sweep; got '../../x.csv'"),
    ("x.yml", "page: group/frist\n", "unknown page 'group/frist'; nearest: group/first"),
    ("x.yml", "page: ../../etc/passwd\n", "unknown page '../../etc/passwd'"),
    ("x.yml", FIRST + "profile: fast\n", "profile: Input should be 'quick' or 'full', got 'fast'"),
    ("x.yml", "", "accepts the keys page, profile, question, measure, rows, grid, seeds; got None"),
    ("x.yml", "grid: {count: [1]}\n", "page: Field required, got nothing"),
    ("x.yml", FIRST + "seeds:\n", "seeds: has no value"),
    ("x.yml", FIRST + "question: [why]\n", "question: Input should be a valid string, got ['why']"),
    ("x.yml", FIRST + 'question: "a\\nb"\n', "question: accepts one line of text, got 'a\\nb'"),
    ("x.yml", FIRST + "gird: {count: [1]}\n", "unknown key 'gird'; nearest: grid"),
    ("x.yml", FIRST + "page: group/second\n", "line 2: key 'page': accepts each name once"),
    ("x.yml", FIRST + "grid: {count: [1], count: [2]}\n", "line 2: key 'count': accepts each name once"),
    ("x.yml", FIRST + "grid: {count: 1}\n", "grid: count: Input should be a valid list, got 1"),
    ("x.yml", FIRST + "grid: {count: []}\n", "grid: count: List should have at least 1 item after validation, not 0, got []"),
    ("x.yml", FIRST + "grid: {scale: [1, .nan]}\n", "grid: group/first: parameter scale is float (default 1.0), got nan"),
    ("x.yml", FIRST + "grid: {count: [1, 1]}\n", "the same run as grid: count=1"),
    ("x.yml", FIRST + "grid: {1: [1]}\n", "grid: Input should be a valid string, got 1"),
    ("x.yml", FIRST + "rows: [{count: 1}, {scale: 1.0}]\n", "row 2: has scale, and row 1 has count"),
    ("x.yml", FIRST + "rows: [{count: 1}, 2]\n", "row 2: accepts `{parameter: value}`, got 2"),
    ("x.yml", FIRST + "rows: [{count: 1}, {count: true}]\n", "row 2: group/first: parameter count is int (default 50), got True"),
    ("x.yml", FIRST + "rows: [{count: 1}]\ngrid: {count: [2]}\n", "parameter 'count' stands there 2 times"),
    ("x.yml", FIRST + "grid: {seed: [1]}\nseeds: [2]\n", "parameter 'seed' stands there 2 times"),
    ("x.yml", "page: group/second\nseeds: [1]\n", "seeds: group/second has neither a parameter `seed` nor `seeds`"),
    ("x.yml", FIRST + "rows: [{count: 2020-01-01}]\n", "got datetime.date(2020, 1, 1)"),
    ("x.yml", FIRST + "rows: [{count: 2020-13-01}]\n", "is no YAML: month must be in 1..12"),
    ("x.yml", FIRST + "rows: [{count: 1}\n", "line 3: expected ',' or ']'"),
    ("x.yml", FIRST + "rows: &a [*a]\n", "line 2: accepts no aliases"),
    ("x.yml", FIRST + "rows: !!python/object/apply:os.system [touch hit]\n", "line 2: could not determine a constructor"),
    ("x.yml", FIRST + "rows: " + "[" * 3000, "is no YAML: maximum recursion depth"),
    ("x.yml", FIRST + "grid: {count: %s, seed: %s}\n" % ((list(range(400)),) * 2), "160000 runs; accepts 100000 at most"),
    ("a b.yml", FIRST, "'a b.yml': a sweep's name accepts letters, digits, - and _"),
    ("quick.yml", FIRST, "'quick.yml': a sweep's name accepts letters, digits, - and _, and is no profile's"),
]


@pytest.mark.parametrize(("name", "text", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_wrong_sweep_is_refused_in_one_line(small, name, text, message):
    with pytest.raises(BookError) as error:
        small(name, text)
    assert message in refused(error.value) and str(error.value).startswith("book/sweeps") and len(str(error.value)) < 600


def test_a_sweep_is_rows_by_grid_by_seeds(small):
    found = small("x.yml", FIRST + "profile: quick\nrows: [{kind: up}, {kind: down}]\ngrid: {scale: [1, 2.5]}\nseeds: [7, 8]\n")
    given = [run.parameters for run in found.runs.values()]
    assert len(given) == 8 and found.page.name == "group/first" and found.profile == "quick"
    assert given[3] == {"count": 5, "kind": "up", "scale": 2.5, "seed": 8}  # the quick profile's count with it
    assert next(iter(found.runs.values())).label == "kind='up', scale=1.0, seed=7"


def test_rows_of_a_csv_file_hold_any_text_and_are_crossed_alike(small):
    small("t.csv", '\ufeffnames,count\r\n"[""a\'b"", ""$(x)\\n<b>""]",3\r\n')
    first, second = small("x.yml", FIRST + "rows: t.csv\nseeds: [1, 2]\n").runs.values()
    assert first.parameters == {"names": ["a'b", "$(x)\n<b>"], "count": 3, "seed": 1} and second.parameters["seed"] == 2


def test_a_runs_id_is_its_page_profile_and_parameters(small):
    """The very ids that runs had before, so that theirs are found again."""
    from_csv = small("x.csv", "count,scale\n3,1\n")
    from_yaml = small("y.yml", FIRST + "rows: [{scale: 1.0, count: 3}]\n")
    quick = small("z.yml", FIRST + "profile: quick\nrows: [{scale: 1.0, count: 3}]\n")
    assert list(from_csv.runs) == list(from_yaml.runs) == ["30d49b9a016b"] and list(quick.runs) == ["969085ce9296"]


def test_what_editors_leave_beside_the_sweeps_is_no_sweep(small):
    small("x.yml", FIRST)
    folder = schema.BOOK / "sweeps"
    (folder / ".#x.yml").symlink_to("nobody@nowhere")
    (folder / "._x.yml").write_bytes(b"\xff")
    (folder / "y.yml").mkdir()
    (folder / "z.yml").symlink_to("nowhere")
    assert list(sweep_table.sweeps()) == ["x"]
    for name in ("y", "z", ".#x", "../x", "x.yml"):
        with pytest.raises(BookError, match=r"unknown sweep .*accepted: x$"):
            sweep_table.read_sweep(name)


@pytest.mark.slow
def test_ninety_thousand_runs_are_checked_in_seconds(small):
    began = time.process_time()
    counts = list(range(300))
    grid = small("x.yml", FIRST + f"grid: {{count: {counts}, seed: {counts}}}\n")
    rows = small("y.csv", "count,seed\n" + "".join(f"{count},{seed}\n" for count in counts for seed in counts))
    assert list(grid.runs) == list(rows.runs) and len(rows.runs) == 90_000
    assert time.process_time() - began < 10


RULE = "{supported: low > 0, refuted: high < 0, min_n: 3}"
CLAIM = f"- {{id: a, question: 'Is it?', page: group/first, metric: mean of all, rule: {RULE}}}\n"
PAGES = "group/first: {budget: {quick: 1, full: 2}, memory: 5, makes: [a.pt]}\n"
WRONG = [  # another text of a file of the small book, or a change in it
    ("pages.yml", "- a\n", "book/pages.yml: accepts `PAGE: {key: value}`, got ['a']"),
    ("pages.yml", "group/first:\n", "group/first: accepts the keys name, budget, memory, "),
    ("pages.yml", "group/first: {memory: 5}\n", "group/first: budget: Field required, got nothing"),
    ("pages.yml", PAGES.replace("full: 2", "fulll: 2"), "budget: unknown profile 'fulll'; nearest: full; accepted: quick, full"),
    ("pages.yml", PAGES.replace(", full: 2", ""), "budget: needs seconds for each profile, has none for full"),
    ("pages.yml", PAGES.replace("full: 2", "full: 0"), "budget: full: Input should be greater than 0, got 0"),
    ("pages.yml", PAGES.replace("full: 2", "full: .inf"), "Input should be a finite number, got inf"),
    ("pages.yml", PAGES.replace("memory: 5", 'memory: "5"'), "memory: Input should be a valid integer, got '5'"),
    ("pages.yml", PAGES.replace("memory", "memry"), "group/first: unknown key 'memry'; nearest: memory"),
    ("pages.yml", PAGES.replace("memory: 5", "memory: 5, reads_results: yes please"), "Input should be a valid boolean"),
    ("pages.yml", PAGES.replace("memory: 5", "memory: 5, name: x"), "group/first: there is no book/x.md"),
    ("pages.yml", PAGES.replace("a.pt", "../a.pt"), "makes: entry 1: String should match pattern"),
    ("pages.yml", PAGES.replace("group/first", "group/third"), "group/third: there is no book/group/third.md"),
    ("pages.yml", PAGES + PAGES.replace("first", "second"), "group/second: makes a.pt, which group/first makes already"),
    ("pages.yml", PAGES.replace("makes", "needs"), "group/first: needs a.pt, which no page makes"),
    ("pages.yml", PAGES + PAGES, "book/pages.yml: line 2: key 'group/first': accepts each name once"),
    ("claims.yml", "positive: {}\n", "book/claims.yml: entry 1: unknown key 'positive'; accepted: id"),
    ("claims.yml", CLAIM + CLAIM, "book/claims.yml: a: stands there twice"),
    ("claims.yml", "- 3\n", "entry 1: accepts the keys id, question, page, metric, rule; got 3"),
    ("claims.yml", ("min_n: 3", "min_n: few"), "positive: rule: min_n: Input should be a valid integer, got 'few'"),
    ("claims.yml", ("min_n: 3", "min_n: 1"), "min_n: Input should be greater than or equal to 2, got 1"),
    ("claims.yml", ("min_n", "minn"), "positive: rule: unknown key 'minn'; nearest: min_n"),
    ("claims.yml", ("low > 0", "low is above 0"), "rule: supported: String should match pattern"),
    ("claims.yml", ("zero?", "zero"), "question: String should match pattern '\\?$', got 'Is the mean above zero'"),
    ("claims.yml", ("group/first", "group/frist"), "positive: unknown page 'group/frist'; nearest: group/first"),
    ("claims.yml", ("id: positive", "id: Positive"), "Positive: id: String should match pattern"),
    ("claims.yml", ("  metric", "  metrics"), "positive: unknown key 'metrics'; nearest: metric"),
    ("params/quick.yml", "group/frist: {count: 5}\n", "book/params/quick.yml: unknown page 'group/frist'; nearest: group/first"),
    ("params/quick.yml", "group/first: {cuont: 5}\n", "book/params/quick.yml: group/first: unknown parameter 'cuont'"),
    ("params/quick.yml", "group/first: {count: true}\n", "parameter count is int (default 50), got True"),
    ("params/quick.yml", "group/first: 5\n", "book/params/quick.yml: group/first: accepts `{parameter: value}`, got 5"),
    ("params/quick.yml", "5\n", "book/params/quick.yml: accepts `PAGE: {key: value}`, got 5"),
    (
        "group/first.md",
        ("count: int = 50", "count: int = 5 * 10"),
        "book/group/first.md: line 21: parameters cell: the default of count has",
    ),
    ("group/first.md", ("count: int = 50", "count = 50"), "line 21: parameters cell: accepts `name: type = default"),
    ("group/first.md", ("  # how many numbers", ""), "line 21: parameters cell: accepts `name: type = default"),
    ("group/first.md", ("count: int = 50", "count: int = 5O"), "line 21: parameters cell: invalid decimal literal"),
    ("group/first.md", ("count: int = 50", "count: int = 5.5"), "group/first: parameter count is int (default 5.5), got 5.5"),
    ("group/first.md", ("count: int", "count: tuple"), "line 21: parameters cell: type tuple: accepts int, float"),
    ("group/first.md", ("count: int", "count: int[3]"), "type int[3]: accepts int"),
    ("group/first.md", ("scale: float = 1.0", "count: float = 1.0"), "line 22: parameters cell: count stands there twice"),
    ("group/first.md", ("[parameters]", "[parameter]"), "needs exactly one code cell with `:tags: [parameters]`, has 0"),
    ("group/first.md", ("# The first page", "The first page"), "book/group/first.md: has no title: needs a line `# Title`"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_file_is_refused_in_one_line(small, name, change, message):
    path = schema.BOOK / name
    text = path.read_text()
    assert not isinstance(change, tuple) or change[0] in text
    path.write_text(text.replace(*change) if isinstance(change, tuple) else change)
    with pytest.raises(BookError) as error:
        page = schema.page("group/first")
        schema.title(page), schema.profile_parameters(page, "quick"), schema.claims()
    assert message in refused(error.value)


def test_the_small_book_is_read_as_it_stands(small):
    page = schema.page("book/group/second.md")
    assert page.needs == ("numbers.txt",) and page.makes == () and page.cores == 1 and not page.reads_results
    assert page.source == schema.BOOK / "group/second.md" and page.run_file("quick").parts[-4:] == (
        "runs",
        "quick",
        "group",
        "second.ipynb",
    )
    assert schema.title(schema.page("group/first")) == "The first page"
    (claim,) = schema.claims_of("group/first")
    assert claim.rule.min_n == 3 and schema.claims_of("group/second") == []
    assert schema.profile_parameters(schema.page("group/first"), "quick") == {"count": 5}
    with pytest.raises(BookError, match="unknown profile 'fast'; accepted: quick, full"):
        schema.profile_parameters(page, "fast")


def test_a_notebook_is_the_callers_own_and_has_the_same_parameters(small):
    page = schema.page("group/first")
    schema.read_notebook(page).cells.clear()
    assert len(schema.read_notebook(page).cells) == 7
    page.source.write_text(
        page.source.read_text().replace("[parameters]", "[parameter]")
        + "\n<!--\n```{code-cell} python3\n:tags: [parameters]\n\nx: int = 1  # x\n```\n-->\n"
    )
    with pytest.raises(BookError, match="needs its parameters in a code cell of their own"):
        schema.read_notebook(page)


def test_the_book_is_found_above_the_working_folder(tmp_path, monkeypatch):
    """By a package that stands elsewhere, as one that was installed does."""
    monkeypatch.setattr("nsm_book.__file__", str(tmp_path / "site/nsm_book/__init__.py"))
    (tmp_path / "mine/book").mkdir(parents=True)
    (tmp_path / "mine/deep/down").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine/deep/down")
    with pytest.raises(BookError, match=r"^no book here: neither .*down nor a folder above it holds book/pages\.yml$"):
        nsm_book.ROOT  # noqa: B018
    (tmp_path / "mine/book/pages.yml").touch()
    assert tmp_path / "mine" == nsm_book.ROOT


def test_any_value_of_any_parameter_is_accepted_as_it_is_or_refused():
    """A thousand values, one after the other given to a parameter of each type that the book's pages have."""
    from papermill.translators import PythonTranslator

    by_type = {p.type: (page, p) for page in schema.pages().values() for p in schema.parameters(page).values()}
    assert len(by_type) >= 8
    accepted, refusals = [], []

    def check(kind, value):
        page, parameter = by_type[kind]
        try:
            (found,) = schema.check_parameters(page, {parameter.name: value}).values()
        except BookError as error:
            refusals.append(refused(error))
            assert page.name in refusals[-1] and parameter.name in refusals[-1]
            assert not (kind in ("str", "str | None") and isinstance(value, str) and value.isprintable()), value
            return
        accepted.append(found)
        assert schema.check_parameters(page, {parameter.name: found}) == {parameter.name: found}
        assert json.loads(json.dumps(found).encode()) == found
        code = PythonTranslator.translate(found)  # what papermill writes into the kernel's cell: a literal, and no more
        assert "\n" not in code and ast.literal_eval(code) == found
        again = shlex.split(reproduce_line(page, "full", {parameter.name: found}))
        assert schema.check_parameters(page, {again[6]: again[7]}) == {parameter.name: found} and "\0" not in again[7]
        name = folder_name({parameter.name: found})
        assert "/" not in name and "\0" not in name and name.strip(".") and len(f"quick,{name}".encode()) < 256

    for kind, value in itertools.product(sorted(by_type), PIECES):
        check(kind, value)
    fuzz(1000, check, st.sampled_from(sorted(by_type)), VALUE)
    assert len(accepted) > 250 and len(refusals) > 700


GOOD = {
    "count": WHOLE,
    "scale": st.floats(allow_nan=False, allow_infinity=False),
    "kind": st.sampled_from(["up", "down"]),
    "names": st.lists(st.one_of(st.just(EVIL), st.text(max_size=9)), max_size=3),
}
NAMES = st.one_of(st.sampled_from([*GOOD, "seed"]), TEXT)


def some(values):
    return st.lists(values, min_size=1, max_size=3, unique_by=repr)


GOOD_YAML = st.fixed_dictionaries(
    {"page": st.just("group/first")},
    optional={
        "profile": st.sampled_from(["quick", "full"]),
        "seeds": some(WHOLE),
        "rows": some(st.fixed_dictionaries({name: GOOD[name] for name in ("count", "names")})),
        "grid": st.fixed_dictionaries({}, optional={name: some(GOOD[name]) for name in ("scale", "kind")}),
    },
)
WILD_YAML = st.dictionaries(
    st.sampled_from([*SweepFile.model_fields, *SweepFile.model_fields, ""]),
    st.one_of(
        VALUE,
        st.just("group/first"),
        st.lists(st.dictionaries(NAMES, VALUE, max_size=3), max_size=3),
        st.dictionaries(NAMES, st.lists(VALUE, max_size=3), max_size=3),
    ),
    max_size=4,
)
GOOD_CSV = some(st.tuples(WHOLE.map(str), GOOD["names"].map(str), GOOD["kind"]))
WILD_CSV = st.lists(st.lists(st.one_of(TEXT, st.sampled_from(["3", "[]", "up"])), max_size=4), max_size=4)


@st.composite
def mutated(draw, texts):
    """A text as it is, or with a piece of harm put in somewhere in place of a few characters."""
    text = draw(texts)
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at, length = draw(st.integers(0, len(text))), draw(st.integers(0, 4))
        text = text[:at] + draw(TEXT) + text[at + length :]
    return text


def as_csv(rows) -> str:
    out = io.StringIO()
    csv.writer(out).writerows([["count", "names", "kind"], *rows])
    return out.getvalue()


@pytest.mark.slow
def test_any_table_of_runs_is_accepted_or_refused_in_one_line(small):
    """800 tables: whole ones, wrong ones, and ones with harm put in at any place."""
    accepted, refusals = [], []

    def check(name, text):
        try:
            found = small(name, text.encode("utf-8", "surrogatepass"))
        except BookError as error:
            refusals.append(refused(error))
            assert refusals[-1].startswith((f"book/sweeps/{name[0]}.yml: ", f"book/sweeps/{name}: "))
            return
        accepted.append(found)
        for run in found.runs.values():
            assert schema.check_parameters(found.page, run.parameters) == run.parameters
            assert re.fullmatch("[0-9a-f]{12}", run.id) and run.label.isprintable()

    for piece in PIECES:
        check("y.yml", f"page: group/first\nrows: {piece}\n")
        check("y.yml", f"page: group/first\ngrid: {{count: [1, {piece}]}}\n")
    fuzz(400, check, st.just("x.csv"), mutated(st.one_of(GOOD_CSV, WILD_CSV).map(as_csv)))
    fuzz(400, check, st.just("y.yml"), mutated(st.one_of(GOOD_YAML, WILD_YAML).map(yaml.dump)))
    assert len(accepted) > 120 and len(refusals) > 400
