"""Values and verdicts: what a page hands over, and the rule that decides."""

import math

import pytest

from nsm_support import results
from nsm_support.results import claim, glue, verdict
from nsm_support.statistics import t_interval

RULE = {"supported": "low > 0", "refuted": "high < 0", "min_n": 6}


@pytest.fixture
def shown(monkeypatch):
    calls = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw, metadata: calls.append((data, metadata)))
    return calls


def glued(calls):
    return {metadata["scrapbook"]["name"]: metadata["scrapbook"]["value"] for _, metadata in calls}


@pytest.mark.parametrize(
    ("low", "estimate", "high", "n", "word", "why"),
    [
        (0.1, 0.2, 0.3, 6, "supported", "the whole interval is above 0"),
        (-0.3, -0.2, -0.1, 6, "refuted", "the whole interval is below 0"),
        (-0.1, 0.1, 0.3, 6, "undecided", "the interval holds 0"),
        (0.0, 0.2, 0.3, 6, "undecided", "the interval holds 0"),
        (0.1, 0.2, 0.3, 5, "undecided", "n = 5, and the rule asks for 6"),
        (0.1, 0.2, 0.3, 0, "undecided", "this run did not measure at the size asked about"),
    ],
)
def test_verdict_and_reason_follow_the_rule(low, estimate, high, n, word, why):
    assert verdict(RULE, estimate=estimate, low=low, high=high, n=n) == word
    assert results.reason(RULE, word, n) == why


def test_every_rule_has_words():
    rule = {"supported": "estimate >= 1", "refuted": "low <= 0.5", "min_n": 1}
    assert verdict(rule, estimate=1, low=1, high=2, n=2) == "supported"
    assert verdict(rule, estimate=0.99, low=0.5, high=2, n=2) == "refuted"
    assert results.reason(rule, "supported", 1) == "the estimate is at least 1"
    assert results.reason(rule, "refuted", 1) == "its lower end is at most 0.5"
    assert results.reason(rule, "undecided", 1) == (
        "neither is it so that the estimate is at least 1, nor that its lower end is at most 0.5"
    )
    assert results.in_words("high < -0.1") == "the whole interval is below -0.1"
    assert results.in_words("high >= 2") == "its upper end is at least 2"


def test_glue_keeps_the_value_exactly(shown):
    glue("third", 1 / 3, measured=True)
    ((data, metadata),) = shown
    assert metadata["scrapbook"]["value"] == 1 / 3 and metadata["scrapbook"]["measured"] is True
    assert data == {results.GLUE_MIME: repr(1 / 3)}


def test_glue_takes_many_by_name(shown):
    glue(loss=0.5, runs=t_interval([1.0, 1.0]), measured=True)
    assert glued(shown) == {"loss": 0.5, "runs": 1.0, "runs_low": 1.0, "runs_high": 1.0, "runs_n": 2}
    assert all(metadata["scrapbook"]["measured"] for _, metadata in shown)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    path = tmp_path / "claims.yml"
    path.write_text("- {id: rises, rule: {supported: low > 0, refuted: high < 0, min_n: 3}}\n")
    monkeypatch.setenv("NSM_BOOK_CLAIMS", str(path))


@pytest.mark.parametrize("by_name", [True, False])
def test_claim_answers_by_the_rule_and_glues(asked, shown, by_name):
    found = t_interval([1.0, 2.0, 3.0])._replace(low=0.5)
    answer = claim("rises", **found._asdict()) if by_name else claim("rises", found)
    assert answer[1:6] == (*found, "supported") and answer.reason == "the whole interval is above 0"
    assert glued(shown) == {
        "rises": 2.0,
        "rises_low": 0.5,
        "rises_high": found.high,
        "rises_n": 3,
        "rises_verdict": "supported",
        "rises_reason": answer.reason,
    }


def test_claim_refuses_what_was_not_asked_and_what_is_no_estimate(asked):
    with pytest.raises(KeyError, match=r"does not stand in .*claims.yml, which holds: rises"):
        claim("afterthought", estimate=1, low=0, high=2, n=9)
    for wrong in ({"found": 0.5}, {"estimate": 0.5}, {"found": t_interval([1, 2]), "n": 0}):
        with pytest.raises(TypeError, match="accepts an estimate, or estimate, low, high, n by name"):
            claim("rises", **wrong)


def test_without_a_book_a_claim_is_an_estimate_without_verdict(monkeypatch, tmp_path, shown):
    monkeypatch.delenv("NSM_BOOK_CLAIMS", raising=False)
    monkeypatch.chdir(tmp_path)
    answer = claim("rises", estimate=1, low=0.5, high=2, n=9)
    assert answer == results.Claim("rises", 1.0, 0.5, 2.0, 9, None, None)
    assert glued(shown) == {"rises": 1.0, "rises_low": 0.5, "rises_high": 2.0, "rises_n": 9}
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "claims.yml").write_text("- {id: rises, rule: {supported: high < 0, refuted: low > 0, min_n: 3}}\n")
    monkeypatch.chdir(tmp_path / "book")  # the nearest upward
    assert claim("rises", estimate=1, low=0.5, high=2, n=9).verdict == "refuted"


def test_a_page_reads_back_what_it_made_in_this_run(monkeypatch, tmp_path):
    for name in ("NEEDS", "MAKES"):
        monkeypatch.setenv(f"NSM_BOOK_{name}", str(tmp_path / name))
        (tmp_path / name).mkdir()
    for name in ("../out.pt", "/out.pt", "a/../../out.pt"):
        with pytest.raises(ValueError, match="relative path inside the store"):
            results.write_product(name)
    with pytest.raises(FileNotFoundError, match="run the page that makes it first"):
        results.read_product("a.txt")
    (tmp_path / "NEEDS" / "a.txt").write_text("another page's, or an earlier run's")
    assert results.read_product("a.txt") == tmp_path / "NEEDS" / "a.txt"
    results.write_product("a.txt").write_text("this run's")
    assert results.read_product("a.txt").read_text() == "this run's"


def test_a_notebook_outside_the_pipeline_finds_what_was_built(monkeypatch, tmp_path):
    for name in ("NEEDS", "MAKES"):
        monkeypatch.delenv(f"NSM_BOOK_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    for use in (results.read_product, results.write_product):
        with pytest.raises(FileNotFoundError, match="there is no store; accepts a folder in NSM_BOOK_"):
            use("model.pt")
    (tmp_path / "book" / "group").mkdir(parents=True)
    (tmp_path / "book" / "pages.yml").touch()
    monkeypatch.chdir(tmp_path / "book" / "group")
    for profile in ("quick", "full", "interactive"):
        path = tmp_path / "_build/products" / profile / "some" / "model.pt"
        path.parent.mkdir(parents=True)
        path.touch()
        assert results.read_product("some/model.pt") == path
    assert results.write_product("some/model.pt") == path


@pytest.mark.parametrize("value", [[1], None, {"a": 1}, math.nan, math.inf])
def test_glue_refuses_what_no_sentence_can_hold(value):
    with pytest.raises((TypeError, ValueError), match=r"accepts a number, a string or an estimate|no sentence can use"):
        glue("odd", value)


@pytest.mark.parametrize(
    ("rule", "low", "estimate", "words"),
    [
        ({}, 2.0, 1.0, "does not hold the estimate"),
        ({}, 2.0, math.nan, "does not hold the estimate"),
        ({"refuted": "high > 0"}, 1.0, 1.0, "both"),
        ({"supported": "low > zero"}, 1.0, 1.0, "not of the form"),
    ],
)
def test_verdict_refuses_what_cannot_be_decided(rule, low, estimate, words):
    with pytest.raises(ValueError, match=words):
        verdict(RULE | rule, estimate=estimate, low=low, high=3.0, n=9)
