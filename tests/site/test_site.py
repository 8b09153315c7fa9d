"""The built site, as a reader meets it: in a real browser, over loopback and as files, in both themes, on a phone."""

import os
import re
from pathlib import Path

import pytest
import yaml
from browser import browser, served

from nsm_book import ROOT

SITE = (ROOT / "_build" / "html").resolve()
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]
SPECIAL = ["genindex", "search"]
pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

if not (SITE / "build.json").exists():
    if os.environ.get("NSM_BOOK_NEED_BROWSER"):
        raise RuntimeError(f"NSM_BOOK_NEED_BROWSER is set, and there is no built site at {SITE}: make book")
    pytest.skip("there is no built site: make book", allow_module_level=True)


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def address():
    with served(SITE) as base:
        yield base


def opened(chromium, url: str, *, width: int = 1280, theme: str = "light", script: bool = True):
    """A page, scrolled through once so that every figure is drawn, and all that it asked for or complained of."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, java_script_enabled=script)
    page = context.new_page()
    asked, complaints = [], []
    page.on("request", lambda request: asked.append((request.resource_type, request.url)))
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
    page.goto(url, wait_until="load")
    if script:
        figures = page.locator(".nsm-figure")
        for i in range(figures.count()):
            figures.nth(i).scroll_into_view_if_needed()
        plots = page.locator(".nsm-figure:has(.nsm-data)")
        for i in range(plots.count()):
            plots.nth(i).locator(".main-svg").first.wait_for(timeout=20_000)
        page.wait_for_function("!window.MathJax || !MathJax.startup || MathJax.startup.promise.then(() => true)")
    return page, asked, complaints


def outside(asked, base: str) -> list[str]:
    return [url for _, url in asked if not url.startswith((base, "data:", "blob:"))]


@pytest.mark.parametrize("name", PAGES + SPECIAL)
def test_page_opens_asks_nobody_and_does_not_complain(chromium, address, name):
    page, asked, complaints = opened(chromium, f"{address}{name}.html")
    assert not outside(asked, address)
    assert not complaints
    assert page.locator("main h1:visible").count() == 1
    page.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_page_opens_as_a_file(chromium, name):
    base = SITE.as_uri()
    page, asked, complaints = opened(chromium, f"{base}/{name}.html")
    assert not outside(asked, base)
    assert not [kind for kind, _ in asked if kind in ("fetch", "xhr")]
    assert not complaints
    page.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_is_really_drawn(chromium, address, name):
    page, _, _ = opened(chromium, f"{address}{name}.html")
    figures = page.locator(".nsm-figure")
    for i in range(figures.count()):
        figure = figures.nth(i)
        plot = figure.locator(".nsm-data").count() > 0
        drawing = figure.locator(".nsm-live .main-svg" if plot else ".nsm-drawing svg").first
        box = drawing.bounding_box()
        assert box["width"] > 100 and box["height"] > 100, figure.get_attribute("id")
        if plot:
            live = figure.locator(".nsm-live")
            marks = ".trace, .imagelayer image, .cartesianlayer path"
            traces = live.evaluate(f"(e) => [e.data.length, e.querySelectorAll('{marks}').length]")
            assert min(traces) > 0, figure.get_attribute("id")
        else:
            assert drawing.locator("path, use, image, circle, rect").count() > 5, figure.get_attribute("id")
        words = figure.locator("[role=img]").first.get_attribute("aria-label")
        assert len(words.split()) >= 4
        assert figure.locator("figcaption").inner_text().strip()
    page.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_still_twin_stands_in_without_script(chromium, address, name):
    page, _, _ = opened(chromium, f"{address}{name}.html", script=False)
    plots = page.locator(".nsm-figure:has(.nsm-data)")
    for i in range(plots.count()):
        box = plots.nth(i).locator(".nsm-still svg").bounding_box()
        assert box["width"] > 100 and box["height"] > 100
    page.context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing(chromium, address, name, theme):
    from axe_playwright_python.sync_playwright import Axe

    page, _, _ = opened(chromium, f"{address}{name}.html", theme=theme)
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    # What unfolds fades in: half-way its colours are not those that are read.
    page.evaluate("Promise.allSettled(document.getAnimations().map((animation) => animation.finished)).then(() => true)")
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    found = Axe().run(page).response["violations"]
    told = [f"{v['id']}: {n['target']} {n['html'][:160]} {n['failureSummary'][:300]}" for v in found for n in v["nodes"][:3]]
    assert not told, "\n".join(told)
    page.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_phone_needs_no_sideways_scroll(chromium, address, name):
    page, _, _ = opened(chromium, f"{address}{name}.html", width=390)
    wide = page.evaluate("""() => {
        const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
        window.scrollTo(200, 0);
        return [wide, window.scrollX];
    }""")
    assert wide == [0, 0]
    page.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_keyboard_reaches_everything(chromium, address, name):
    """Tab through the page: every link, control, fold and scrolling box in sight gets the focus once."""
    page, _, _ = opened(chromium, f"{address}{name}.html")
    wanted = page.evaluate("""() => {
        const inSight = (e) => e.checkVisibility({ visibilityProperty: true }) && e.getClientRects().length;
        const all = [...document.querySelectorAll("a[href], button, input, select, summary, .highlight pre")].filter(inSight)
            .filter((e) => !e.matches("pre") || e.scrollWidth > e.clientWidth).filter((e) => e.tabIndex >= 0 || e.matches("pre"))
            .filter((e) => !e.closest("dialog:not([open])") && !e.disabled)
            .filter((e) => !(e.type === "checkbox" && e.matches(".sidebar-toggle")));
        all.forEach((e, i) => { e.dataset.wanted = i; });
        document.activeElement.blur();
        return all.map((e) => e.outerHTML.slice(0, 120));
    }""")
    reached = set()
    for _ in range(len(wanted) * 2 + 60):
        page.keyboard.press("Tab")
        at = page.evaluate("document.activeElement && document.activeElement.dataset.wanted")
        if at is not None:
            reached.add(int(at))
        if len(reached) == len(wanted):
            break
    missing = [wanted[i] for i in range(len(wanted)) if i not in reached]
    assert not missing, missing
    page.context.close()


def test_controls_change_what_is_drawn(chromium, address):
    """Every native control of every figure moves its plot, by keyboard."""
    moved = 0
    for name in PAGES:
        page, _, _ = opened(chromium, f"{address}{name}.html")
        figures = page.locator(".nsm-figure:has([data-control])")
        for i in range(figures.count()):
            figure = figures.nth(i)
            for control in figure.locator("[data-control]").all():
                state = "(e) => JSON.stringify(e.data)"
                before = figure.locator(".nsm-live").evaluate(state)
                control.focus()
                page.keyboard.press("ArrowDown")
                page.wait_for_timeout(300)
                assert figure.locator(".nsm-live").evaluate(state) != before, (name, control.get_attribute("data-control"))
                moved += 1
                page.keyboard.press("ArrowUp")  # back: another choice may leave the next control nothing to change
                page.wait_for_timeout(300)
                assert figure.locator(".nsm-live").evaluate(state) == before
        page.context.close()
    assert moved > 0


def test_no_dead_link_inside():
    """Every link between pages, and every anchor in one, leads somewhere."""
    pages = {path: path.read_text() for path in SITE.rglob("*.html") if "_static" not in path.parts}
    dead = []
    for path, text in pages.items():
        for target in re.findall(r'(?:href|src)="([^"]+)"', re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            there = (path.parent / name.partition("?")[0]).resolve() if name else path
            if not there.exists():
                dead.append(f"{path.relative_to(SITE)}: {target}")
            elif anchor and there in pages and not re.search(rf'(?:id|name)="{re.escape(anchor)}"', pages[there]):
                dead.append(f"{path.relative_to(SITE)}: {target}")
    assert not dead, "\n".join(sorted(set(dead)))


def test_every_page_names_its_profile_and_its_run():
    for name in PAGES:
        text = Path(SITE / f"{name}.html").read_text()
        if "this-run" in text:
            assert re.search(r"(Quick|Full) profile", text), name
            assert f"nsm-book run {name} --profile" in re.sub(r"<[^>]+>", "", text), name


def test_the_ledger_is_drawn_and_leads_to_its_sections(chromium, address):
    """On a phone: the figure stays large enough to read, and a question leads to a section that is there."""
    page, _, _ = opened(chromium, f"{address}results/claims.html", width=390)
    asked = yaml.safe_load((ROOT / "book" / "claims.yml").read_text())
    links = page.locator("tbody th a")
    assert links.count() == len(asked) and page.locator("#fig-claims svg").bounding_box()["width"] > 300
    links.first.click()
    anchor = page.evaluate("location.hash.slice(1)")
    assert anchor.startswith("claim-") and page.locator(f"#{anchor}").count() == 1
    page.context.close()
