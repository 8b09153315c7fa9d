"""Drawn automata, and the stepper as a reader meets it: in a real browser, by keyboard, on a phone, without a script."""

import re

import pytest
import torch

from nsm_support.crystalline.automata import Automaton, make_machine, modular_counter
from nsm_support.crystalline.automata.drawing import Pair, automaton_svg, show_stepper, stepper
from nsm_support.crystalline.automata.extraction import minimise
from nsm_support.figures import STATIC
from tests.site.browser import browser

TOMITA7 = make_machine("tomita7")
WRONG = Automaton(0, torch.tensor([[0, 1], [2, 1], [2, 3], [3, 3]]), torch.tensor([1, 1, 1, 0]))  # takes 0*1*0* for 0*1*0*1*
PAIRS = [Pair("Tomita 7, early", WRONG, TOMITA7), Pair("S3 & proven", make_machine("s3"), make_machine("s3"))]
WORDS = {"name": "step", "caption": "A learned automaton beside the true one."}


def test_a_drawing_holds_every_state_arrow_and_token():
    svg = automaton_svg(TOMITA7)
    assert re.findall(r'data-state="(\d)"', svg) == list("01234")
    assert svg.count("nsm-head") == 9 + 1, "nine arrows, of which one carries both tokens, and the one to the start"
    assert sorted(re.findall(r'nsm-token"[^>]*>([\d,]+)<', svg)) == sorted(["0", "1", "1", "0", "0", "1", "1", "0", "0,1"])
    assert svg.count("<circle") == 5 + 4, "four of the five accept"


def test_states_of_a_machine_with_many_outputs_say_theirs():
    texts = re.findall(r'data-state="\d">.*?<text[^>]*>([^<]+)<', automaton_svg(make_machine("s3")))
    smallest = minimise(make_machine("s3"))
    assert texts == [f"{state}/{int(output)}" for state, output in enumerate(smallest.output)]


def test_arrows_end_at_the_edge_of_their_states():
    """Every arrow's head touches the ring of one of the states, and no drawing leaves its frame."""
    for name in ("tomita7", "tomita5", "s3"):
        svg = automaton_svg(make_machine(name))
        places = [tuple(map(float, pair)) for pair in re.findall(r'data-state="\d"><circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
        size = float(re.search(r'viewBox="0 0 (\d+)', svg).group(1))
        for x, y in re.findall(r'nsm-head" d="M([\d.]+) ([\d.]+)', svg):
            gaps = [((float(x) - a) ** 2 + (float(y) - b) ** 2) ** 0.5 for a, b in places]
            assert 19 <= min(gaps) <= 23
        numbers = [float(n) for path in re.findall(r' d="([^"]+)"', svg) for n in re.findall(r"-?[\d.]+", path)]
        assert min(numbers) >= 0 and max(numbers) <= size


def test_too_many_states_or_tokens_are_refused():
    with pytest.raises(ValueError, match="13 states; up to 12"):
        automaton_svg(modular_counter(13))
    wide = Automaton(0, torch.zeros(1, 11, dtype=torch.int64), torch.tensor([1]))
    with pytest.raises(ValueError, match="11 tokens; up to 10"):
        stepper([Pair("wide", wide, wide)], **WORDS)
    with pytest.raises(ValueError, match="no pair was given"):
        show_stepper([], **WORDS)


def test_still_table_is_the_shortest_string_on_which_they_part():
    rows = re.findall(r'<tr><th scope="row">(\w+)</th>((?:<td>\d</td>)+)', stepper(PAIRS, **WORDS))
    cells = [(read, re.findall(r"\d", numbers)) for read, numbers in rows]
    assert [read for read, _ in cells] == ["nothing", "1", "10", "101"]
    assert all(true == learned for _, (_, true, _, learned) in cells[:-1]) and cells[-1][1] == ["3", "1", "3", "0"]
    assert "No string tells them apart" in stepper(PAIRS[1:], **WORDS)


def test_a_page_gets_the_figure_and_a_live_notebook_its_script_too(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data["text/html"]))
    monkeypatch.setenv("NSM_BOOK_RUN", "1")
    show_stepper(PAIRS, **WORDS)
    monkeypatch.delenv("NSM_BOOK_RUN")
    show_stepper(PAIRS, **WORDS)
    assert shown[0] == stepper(PAIRS, **WORDS) and shown[0] in shown[1]
    assert "addEventListener" in shown[1] and "addEventListener" not in shown[0]


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The figure as a file, in either theme."""
    folder = tmp_path_factory.mktemp("stepper")
    for theme, ground, ink in (("light", "#fff", "#222"), ("dark", "#121212", "#ddd")):
        style = f"body {{ background: {ground}; color: {ink}; --pst-color-background: {ground}; }}"
        style += (STATIC / "figures.css").read_text() + (STATIC / "automata.css").read_text()
        (folder / f"{theme}.html").write_text(
            f'<!doctype html><html lang="en" data-theme="{theme}"><head><meta charset="utf-8"><title>Stepper</title>'
            f'<meta name="viewport" content="width=device-width"><style>{style}</style></head><body><main><h1>Stepper</h1>'
            f"{stepper(PAIRS, **WORDS)}</main><script>{(STATIC / 'automata.js').read_text()}</script></body></html>"
        )
    return folder


def opened(chromium, folder, theme="light", width=1280, script=True):
    page = chromium.new_context(viewport={"width": width, "height": 900}, java_script_enabled=script).new_page()
    page.goto((folder / f"{theme}.html").as_uri())
    return page


def here(page) -> tuple[str, str]:
    return tuple(
        page.locator(f'.nsm-pair:visible [data-side="{side}"] .nsm-here').get_attribute("data-state")
        for side in ("true", "learned")
    )


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
class TestInBrowser:
    def test_a_typed_string_moves_both_and_tells_where_they_part(self, chromium, folder):
        page = opened(chromium, folder)
        field, status = page.get_by_label("string"), page.get_by_role("status")
        assert here(page) == ("0", "0") and "agreed at every step" in status.inner_text()
        field.fill("10")
        assert here(page) == ("2", "2") and "agreed at every step" in status.inner_text()
        field.fill("101")
        assert here(page) == ("3", "3")
        assert "true state 3, accepts; learned state 3, rejects. They first differed after 101." in status.inner_text()
        field.fill("1010")
        assert here(page) == ("4", "3") and "They first differed after 101." in status.inner_text()
        field.fill("1x2")
        assert field.input_value() == "1" and "Tokens are 0 to 1." in status.inner_text()

    def test_everything_works_by_keyboard(self, chromium, folder):
        page = opened(chromium, folder)
        page.get_by_role("combobox").focus()
        reached = []
        for _ in range(6):
            reached.append(page.evaluate("document.activeElement.textContent || document.activeElement.tagName"))
            page.keyboard.press("Tab")
        assert reached[1:] == ["INPUT", "0", "1", "take one back", "where they part"]
        page.get_by_role("button", name="where they part").press("Enter")
        assert page.get_by_label("string").input_value() == "101"
        page.get_by_role("button", name="take one back").press("Enter")
        page.get_by_role("button", name="0", exact=True).press("Enter")
        assert page.get_by_label("string").input_value() == "100" and here(page) == ("2", "2")
        page.get_by_role("combobox").focus()
        page.keyboard.press("ArrowDown")
        assert page.get_by_label("string").input_value() == "" and page.locator(".nsm-pair:visible").count() == 1
        assert page.get_by_role("button", name="they never part").is_disabled()
        page.get_by_label("string").fill("011")
        assert here(page)[0] == here(page)[1] and "output" in page.get_by_role("status").inner_text()

    def test_without_script_drawings_and_the_still_table_remain(self, chromium, folder):
        page = opened(chromium, folder, script=False)
        assert page.locator(".nsm-automaton:visible").count() == 4 and page.locator("table:visible").count() == 1
        assert page.locator("input:visible, button:visible, select:visible").count() == 0

    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_axe_finds_nothing_and_a_phone_holds_it(self, chromium, folder, theme):
        from axe_playwright_python.sync_playwright import Axe

        page = opened(chromium, folder, theme, width=390)
        page.get_by_label("string").fill("101")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        found = Axe().run(page).response["violations"]
        assert not [f"{v['id']}: {n['html'][:200]}" for v in found for n in v["nodes"]]
