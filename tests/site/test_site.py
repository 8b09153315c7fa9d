"""The built site, as a reader meets it: in a real browser, over loopback and as files, in both themes, on a phone."""

import functools
import re

import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe

from nsm_book import ROOT
from tests.site.browser import browser, need, served

SITE = (ROOT / "_build" / "html").resolve()
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]
SPECIAL = ["genindex", "search"]
LOUD = ("error", "warning")
pytestmark = pytest.mark.browser

if not (SITE / "build.json").exists():
    need(f"a built site at {SITE}: make book", allow_module_level=True)


class Tab:
    """A tab that opens one page after the other, with all that the open page asked for or complained of."""

    def __init__(self, chromium, **context):
        self.page = chromium.new_context(reduced_motion="reduce", **context).new_page()
        self.page.on("request", lambda request: self.asked.append((request.resource_type, request.url)))
        self.page.on("requestfailed", lambda request: self.problems.append(f"failed request: {request.url}"))
        self.page.on(
            "console",
            lambda said: (
                self.problems.append(f"{said.type}: {said.text} ({said.location['url']})") if said.type in LOUD else None
            ),
        )
        self.page.on("pageerror", lambda error: self.problems.append(f"error in a script: {error}"))

    def open(self, base: str, name: str):
        """Open a page and scroll through it once, so that every figure is drawn."""
        self.asked, self.problems = [], []
        self.page.goto(f"{base}{name}.html", wait_until="load")
        for figure in self.page.locator(".nsm-figure").all():
            figure.scroll_into_view_if_needed()
        for plot in self.page.locator(".nsm-figure:has(.nsm-data) .nsm-live").all():
            plot.locator(".main-svg").first.wait_for(timeout=20_000)
        self.page.wait_for_function("!window.MathJax || !MathJax.startup || MathJax.startup.promise.then(() => true)")
        self.problems += [f"asks {url}" for _, url in self.asked if not url.startswith((base, "data:", "blob:"))]
        return self.page


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def address():
    with served(SITE) as base:
        yield base


@pytest.fixture(scope="module")
def laptop(chromium):
    return Tab(chromium, viewport={"width": 1280, "height": 900})


@pytest.fixture(scope="module")
def phone(chromium):
    return Tab(chromium, viewport={"width": 390, "height": 900}, color_scheme="dark")


@pytest.fixture(scope="module")
def without_script(chromium):
    return chromium.new_context(viewport={"width": 1280, "height": 900}, java_script_enabled=False).new_page()


FIGURES = """() => [...document.querySelectorAll(".nsm-figure")].flatMap((figure) => {
    const plot = figure.querySelector(".nsm-data"), live = figure.querySelector(".nsm-live");
    const drawing = figure.querySelector(plot ? ".nsm-live .main-svg" : ".nsm-drawing svg");
    const box = drawing ? drawing.getBoundingClientRect() : { width: 0, height: 0 };
    const marks = plot ? live.querySelectorAll(".trace, .imagelayer image, .cartesianlayer path").length
                       : drawing && drawing.querySelectorAll("path, use, image, circle, rect").length;
    const words = figure.querySelector("[role=img]").getAttribute("aria-label");
    const faults = { "is not drawn": box.width <= 100 || box.height <= 60,
                     "has no marks": plot ? !(marks && live.data.length) : marks <= 5,
                     "has no description": words.split(/\\s+/).length < 4,
                     "has no caption": !figure.querySelector("figcaption").innerText.trim() };
    return Object.keys(faults).filter((fault) => faults[fault]).map((fault) => `figure ${figure.id} ${fault}`);
})"""

WANTED = """() => {
    const all = [...document.querySelectorAll("a[href], button, input, select, summary, .highlight pre")]
        .filter((e) => e.checkVisibility({ visibilityProperty: true }) && e.getClientRects().length)
        .filter((e) => e.matches("pre") ? e.scrollWidth > e.clientWidth : e.tabIndex >= 0)
        .filter((e) => !e.closest("dialog:not([open])") && !e.disabled)
        .filter((e) => !(e.type === "checkbox" && e.matches(".sidebar-toggle")));
    window.wanted = new Set(all);
    document.addEventListener("focusin", (event) => window.wanted.delete(event.target));
    document.activeElement.blur();
    return all.length;
}"""

# What a control has changed once its plot is drawn again, or after a while: true where it is now another than before.
WATCH = """(live) => {
    const before = JSON.stringify(live.data);
    window.changed = new Promise((done) => { live.once("plotly_react", done); setTimeout(done, 3000); })
        .then(() => JSON.stringify(live.data) !== before);
}"""

# With every fold open, and no tooltip left of what had the focus last.
UNFOLD = "document.querySelectorAll('details').forEach((fold) => { fold.open = true; }); document.activeElement.blur()"
# What unfolds fades in: half-way its colours are not those that are read.
SETTLE = "Promise.allSettled(document.getAnimations().map((animation) => animation.finished)).then(() => true)"
# Thousands of words of code have one of a few colours: of those with the same ancestors, axe is left the first. What stands in
# a drawing it cannot judge, and in the package's page autodoc writes all objects alike.
THIN = """() => {
    const path = (e) => e === document.body ? "" : `${path(e.parentElement)} > ${e.localName}.${e.className}`;
    const seen = new Set(), again = [];
    for (const e of document.querySelectorAll("main :is(span, code, em, mi, mn, mo):not([id], [role], [aria-label])"))
        seen.has(path(e)) ? again.push(e) : seen.add(path(e));
    for (const e of again) e.replaceWith(...e.childNodes);
    for (const e of document.querySelectorAll(".nsm-drawn")) e.className = "";  // not to be drawn again in the other theme
    for (const e of document.querySelectorAll("main svg > :not(title, desc)")) e.remove();
    for (const e of [...document.querySelectorAll("dl.py")].slice(40)) e.remove();
    document.body.normalize();
}"""


def keyboard(page) -> list[str]:
    """What Tab does not reach, of every link, control, fold and scrolling box in sight."""
    for i in range(page.evaluate(WANTED) * 2 + 60):
        page.keyboard.press("Tab")
        if i % 10 == 9 and not page.evaluate("window.wanted.size"):
            return []
    return [f"Tab does not reach {e}" for e in page.evaluate("[...window.wanted].map((e) => e.outerHTML.slice(0, 120))")]


def controls(page) -> list[str]:
    """The native controls that do not move their plot by keyboard, there and back."""
    problems = []
    for figure in page.locator(".nsm-figure:has([data-control])").all():
        for control in figure.locator("[data-control]").all():
            for key in ("ArrowDown", "ArrowUp"):  # back: another choice may leave the next control nothing to change
                figure.locator(".nsm-live").evaluate(WATCH)
                control.press(key)
                if not page.evaluate("window.changed"):
                    problems.append(f"{key} on {control.get_attribute('data-control')} changes nothing")
    return problems


def axe(page, theme: str, **options) -> list[str]:
    page.emulate_media(color_scheme=theme)
    page.wait_for_function(f"document.documentElement.dataset.theme === '{theme}'")
    page.evaluate(SETTLE)
    found = Axe().run(page, options={"resultTypes": ["violations"], "preload": False, **options}).response["violations"]
    return [
        f"axe, {theme}: {v['id']}: {n['target']} {n['html'][:160]} {n['failureSummary'][:300]}"
        for v in found
        for n in v["nodes"][:3]
    ]


@pytest.mark.parametrize("name", PAGES + SPECIAL)
def test_page_on_a_laptop(laptop, address, name):
    """It opens, asks no other host, does not complain; figures are drawn, controls work, Tab reaches all, axe finds nothing."""
    laptop.page.emulate_media(color_scheme="light")
    page = laptop.open(address, name)
    if (headings := page.locator("main h1:visible").count()) != 1:
        laptop.problems.append(f"{headings} headings of the first level")
    laptop.problems += page.evaluate(FIGURES) + controls(page)
    if name in PAGES:
        laptop.problems += keyboard(page)
        page.evaluate(UNFOLD)
        page.evaluate(THIN)
        laptop.problems += axe(page, "light") + axe(page, "dark", runOnly=["color-contrast"])
    assert not laptop.problems, "\n".join([f"{name}:", *laptop.problems])


@pytest.mark.parametrize("name", PAGES)
def test_page_as_a_file_on_a_phone(phone, name):
    """In the dark: it asks nobody and fetches nothing, draws its figures and needs no scrolling sideways."""
    page = phone.open(f"{SITE.as_uri()}/", name)
    phone.problems += [f"fetches {url}" for kind, url in phone.asked if kind in ("fetch", "xhr")] + page.evaluate(FIGURES)
    if (theme := page.evaluate("document.documentElement.dataset.theme")) != "dark":
        phone.problems.append(f"is {theme}")
    page.evaluate("window.scrollTo(200, 0)")
    wide = page.evaluate("[document.documentElement.scrollWidth - document.documentElement.clientWidth, window.scrollX]")
    if wide != [0, 0]:
        phone.problems.append(f"is {wide[0]} px wider than the screen, and scrolls by {wide[1]}")
    assert not phone.problems, "\n".join([f"{name}:", *phone.problems])


@functools.cache
def texts() -> dict:
    return {path: path.read_text() for path in SITE.rglob("*.html") if "_static" not in path.parts}


def test_still_twins_stand_in_without_script(without_script, address):
    problems = []
    for name in PAGES:
        if "nsm-data" in texts()[SITE / f"{name}.html"]:
            without_script.goto(f"{address}{name}.html", wait_until="load")
            for i, still in enumerate(without_script.locator(".nsm-figure:has(.nsm-data) .nsm-still").all()):
                box = still.locator("svg").bounding_box()
                if not box or box["width"] <= 100 or box["height"] <= 100:
                    problems.append(f"{name}: plot {i}: {box}")
    assert not problems, "\n".join(problems)


def test_no_dead_link_inside():
    """Every link between pages, and every anchor in one, leads somewhere."""
    anchors = {path: set(re.findall(r'\b(?:id|name)="([^"]+)"', text)) for path, text in texts().items()}
    dead = set()
    for path, text in texts().items():
        for target in set(re.findall(r'(?:href|src)="([^"]+)"', re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            there = (path.parent / name.partition("?")[0]).resolve() if name else path
            if not there.exists() or (anchor and there in anchors and anchor not in anchors[there]):
                dead.add(f"{path.relative_to(SITE)}: {target}")
    assert not dead, "\n".join(sorted(dead))


def test_every_page_names_its_profile_and_its_run():
    assert any("data-control" in text for text in texts().values())  # the tests above have something to move
    for name in PAGES:
        text = texts()[SITE / f"{name}.html"]
        if "this-run" in text:
            assert re.search(r"(Quick|Full) profile", text), name
            assert f"nsm-book run {name} --profile" in re.sub(r"<[^>]+>", "", text), name


def test_the_ledger_is_drawn_and_leads_to_its_sections(phone, address):
    """On a phone: the figure stays large enough to read, and a question leads to a section that is there."""
    page = phone.open(address, "results/claims")
    asked = yaml.safe_load((ROOT / "book" / "claims.yml").read_text())
    links = page.locator("tbody th a")
    assert links.count() == len(asked) and page.locator("#fig-claims svg").bounding_box()["width"] > 300
    links.first.click()
    anchor = page.evaluate("location.hash.slice(1)")
    assert anchor.startswith("claim-") and page.locator(f"#{anchor}").count() == 1
