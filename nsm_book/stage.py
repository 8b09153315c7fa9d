"""The gate and the site: executed pages and prose in one folder, rendered, checked, and switched to in one step."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import nbformat
import yaml

from nsm_book import ROOT, BookError, collect, compare, gate, ledger, reference, runs, swept
from nsm_book.fingerprint import differences, digest, record
from nsm_book.markup import plain
from nsm_book.schema import BOOK, BUILD, Page, claims, claims_of, page, pages, unknown
from nsm_support.figures import STATIC

SITE = BUILD / "html"
FOREIGN = re.compile(r"\{glue:text\}`([\w/\-]+):([\w.\-]+)(?::([^`]*))?`")
LINK = re.compile(r"(\]\()([\w./-]+)\.md(?=[)#])")
BANNER = {
    "quick": ":::{admonition} Quick profile\n:class: profile warning\nThe numbers and figures of this page come from "
    "a run of seconds. They are real, but small, and too few for most verdicts: `make book PROFILE=full` gives "
    "the published ones, in an hour or two.\n:::",
    "full": ":::{admonition} Full profile\n:class: profile tip\nThe numbers and figures of this page are the "
    "published ones.\n:::",
}


# The pages that are made from the runs of all others, each from the profile and the pages' records.
MADE = {
    "results/claims": lambda profile, records: ledger.ledger_page(records, toc_pages()),
    "results/compare": lambda profile, records: compare.compare_page(),
    "results/runs": lambda profile, records: runs.runs_page(profile, records, toc_pages()),
    "reference/parameters": lambda profile, records: reference.parameter_page(),
}


def toc_pages() -> list[str]:
    """All pages of `_toc.yml`, in the reader's order."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    chapters = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    return [toc["root"], *chapters]


def ingredients(profile: str) -> str:
    """One hash of every file that the site is made from, besides the runs: prose, assets, settings, the package, the tables
    of sweeps, what running the pages again has found."""
    sources = {entry.source for entry in pages().values()}
    kinds = {".csv", ".md", ".bib", ".yml", ".json", ".css", ".js", ".svg", ".png", ".ico"}
    files = [path for path in BOOK.rglob("*") if path.suffix in kinds and path not in sources and path.is_file()]
    files += [*ROOT.glob("nsm_*/**/*.py"), *STATIC.iterdir(), ROOT / "_config.yml", ROOT / "_toc.yml"]
    files += [*(BUILD / "sweeps").glob("*.parquet"), *filter(Path.exists, [runs.rerun_record(profile)])]
    each = [f"{os.path.relpath(path, ROOT)} {digest(path)}" for path in sorted(files)]
    return hashlib.sha256("\n".join(each).encode()).hexdigest()


def drop_stale_site(profile: str) -> None:
    """Let the site be rendered again if anything that it is made from is not what it was when it was rendered."""
    path = BUILD / "sites" / f"{profile}.json"
    try:
        same = json.loads(path.read_text())["ingredients"] == ingredients(profile)
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged
        same = False
    if not same:
        path.unlink(missing_ok=True)


def write_if_changed(path: Path, text: str) -> None:
    """Leave a file alone that already holds this text, so that Sphinx need not read it again."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def with_banner(text: str, profile: str) -> str:
    """The page's text with its profile named below the title."""
    title, separator, rest = text.partition("\n")
    return f"{title}\n\n{BANNER[profile]}\n{separator}{rest}"


def linked(text: str, name: str) -> str:
    """Links of page `name` to executable pages, which are notebooks in the staged book, lead to these."""

    def target(match: re.Match) -> str:
        there = os.path.normpath(os.path.join(os.path.dirname(name), match[2]))
        return f"{match[1]}{match[2]}{'.ipynb' if there in pages() else '.md'}"

    return LINK.sub(target, text)


def fill(text: str, records: dict[str, dict[str, Any]], where: str) -> str:
    """Put values of executed pages into prose: ``{glue:text}`page:key:format` ``.

    Raises:
        BookError: for a page or a key that has no value, naming it and the nearest.
    """

    def value(match: re.Match) -> str:
        name, key, form = match.groups()
        if name not in records:
            raise BookError(f"{where}: {unknown('page', name, records)}")
        values = records[name]["values"]
        if key not in values:
            raise BookError(f"{where}: {unknown(f'value of {name}', key, values)}")
        try:
            return plain(format(values[key]["value"], form or ""))
        except (ValueError, TypeError) as error:
            raise BookError(f"{where}: {match[0]}: the value is {values[key]['value']!r}: {error}") from None

    return FOREIGN.sub(value, text)


def stage_page(entry: Page, profile: str, folder: Path) -> None:
    """Put one executed page into the folder that Sphinx reads, if it may be published.

    Raises:
        BookError: with every reason against it.
    """
    path = entry.run_file(profile)
    found = [
        f"{entry.name}: the run at {path.relative_to(ROOT)} is not today's: {difference}"
        for difference in differences(entry, profile)
    ]
    if not found:
        notebook = nbformat.read(path, as_version=4)
        found = gate.problems(notebook, entry)
    if found:
        raise BookError("\n".join(found))
    for output in [output for cell in notebook.cells for output in cell.get("outputs", ())]:
        output.get("data", {}).pop(gate.PLOTLY, None)  # the site draws its HTML
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source, entry.name)
    first = notebook.cells[0]
    first.source = with_banner(first.source, profile)
    ledger.anchored(notebook, [claim.id for claim in claims_of(entry.name)])
    write_if_changed(folder / f"{entry.name}.ipynb", nbformat.writes(notebook) + "\n")


def stage(profile: str) -> Path:
    """Lay out `_build/book/PROFILE`: prose with its numbers filled in, and the executed pages.

    Raises:
        BookError: with every reason why the book may not be published, page by page.
    """
    claims()
    folder, refused = BUILD / "book" / profile, []
    records = {run["page"]: run for run in json.loads(results(profile, "json").read_text())}
    for name in toc_pages():
        try:
            if name in pages():
                stage_page(page(name), profile, folder)
            else:
                source = MADE[name](profile, records) if name in MADE else (BOOK / f"{name}.md").read_text()
                typed = [] if name in MADE else gate.typed_verdicts(nbformat.v4.new_markdown_cell(source))
                if typed:
                    raise BookError(
                        f"{name}: {typed[0]!r} is typed by hand: emphasised as only a verdict of a run is, or beside one"
                    )
                text = linked(fill(source, records, f"book/{name}.md"), name)
                has_numbers = FOREIGN.search(source) or name in ("results/claims", "results/runs")
                write_if_changed(folder / f"{name}.md", with_banner(text, profile) if has_numbers else text)
        except BookError as error:
            refused.append(str(error))
        except FileNotFoundError as error:
            refused.append(f"_toc.yml names {name}: {error}")
    refused += [f"book/pages.yml names {name}, which _toc.yml does not" for name in pages() if name not in toc_pages()]
    if refused:
        raise BookError("not published:\n\n" + "\n\n".join(refused))
    wanted = {folder / f"{name}{'.ipynb' if name in pages() else '.md'}" for name in toc_pages()}
    for path in [*folder.rglob("*.md"), *folder.rglob("*.ipynb")]:
        if path not in wanted:
            path.unlink()
    shutil.rmtree(folder / "_static", ignore_errors=True)
    for assets in (BOOK / "_static", STATIC):
        shutil.copytree(assets, folder / "_static", dirs_exist_ok=True)
    for name in ("references.bib",):
        write_if_changed(folder / name, (BOOK / name).read_text())
    local_scripts(folder / "_local")
    return folder


def local_scripts(folder: Path) -> None:
    """plotly.js and MathJax, taken from the installed packages, for the site's own root: nothing is fetched."""
    import importlib.util

    plotly = Path(importlib.util.find_spec("plotly").origin).parent / "package_data" / "plotly.min.js"
    mathjax = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax/tex-svg-full.js"
    folder.mkdir(parents=True, exist_ok=True)
    for path in (plotly, mathjax):
        target = folder / path.name
        if not target.exists() or target.stat().st_size != path.stat().st_size:
            shutil.copy(path, target)


def results(profile: str, kind: str) -> Path:
    return BUILD / "results" / profile / f"results.{kind}"


def render(folder: Path, profile: str) -> Path:
    """Turn the staged book into HTML with jupyter-book; return the folder that holds it.

    Raises:
        BookError: with Sphinx's own warnings and errors.
    """
    work = BUILD / "sphinx" / profile
    unfinished = BUILD / "sphinx" / f"{profile}.unfinished"
    if unfinished.exists():  # a page whose warning was given before would pass in silence now
        shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(work / "_build" / "html", ignore_errors=True)  # pages that are gone must not stay
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    command = [
        sys.executable,
        "-c",
        "from jupyter_book.cli.main import main; main()",
        "build",
        str(folder),
        "--config",
        str(ROOT / "_config.yml"),
        "--toc",
        str(ROOT / "_toc.yml"),
        "--path-output",
        str(work),
        "-W",
        "-n",
        "--keep-going",
        "-q",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    if done.returncode:
        raise BookError(f"jupyter-book refused the book:\n{done.stderr[-6000:] or done.stdout[-6000:]}")
    unfinished.unlink()
    return work / "_build" / "html"


MENDS = (
    # A font asked for ahead of time with `crossorigin` is refused, loudly, where pages are opened as files.
    (re.compile(r'<link rel="preload" as="font"[^>]*>\s*'), ""),
    # The theme's sidebar holds the logo and the search outside of any landmark.
    (re.compile(r'<div class="bd-sidebar-primary'), '<div role="complementary" aria-label="Book" class="bd-sidebar-primary'),
    (re.compile(r'role="doc-biblioentry"'), 'role="listitem"'),  # docutils' list of references has no items otherwise
    # pandas heads the column of row names with an empty cell.
    (re.compile(r"<th></th>"), "<td></td>"),
)


def mend(folder: Path) -> None:
    """Mend what the theme's templates do wrong and cannot be told not to."""
    for path in folder.rglob("*.html"):
        text = path.read_text()
        for pattern, better in MENDS:
            text = pattern.sub(better, text)
        path.write_text(text)


def publish(profile: str) -> Path:
    """Render the staged book and keep it, whole, beside the one that is open; return its folder."""
    before = ingredients(profile)
    rendered = render(stage(profile), profile)
    mend(rendered)
    swept.copy_notebooks(rendered)
    card = {
        "profile": profile,
        "built": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "pages": {name: record(entry.run_file(profile)) for name, entry in pages().items()},
    }
    stamp = json.dumps(card, sort_keys=True)
    place = BUILD / "sites" / f"{profile}-{zlib.crc32(stamp.encode()):08x}"
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    os.replace(rendered, place)
    (place / "build.json").write_text(json.dumps(card, indent=1) + "\n")
    shutil.copy(results(profile, "json"), place / "results.json")
    with collect.whole(BUILD / "sites" / f"{profile}.json") as path:
        path.write_text(json.dumps({"site": place.name, "ingredients": before}) + "\n")
    return place


def switch(profile: str) -> Path:
    """Let `_build/html` be this profile's site, in one step; remove the profile's older ones."""
    name = json.loads((BUILD / "sites" / f"{profile}.json").read_text())["site"]
    if not SITE.is_symlink() or os.readlink(SITE) != f"sites/{name}":
        if SITE.is_dir() and not SITE.is_symlink():
            raise BookError(f"{SITE} is a folder that this book did not make: move it away")
        new = SITE.with_name(".html.new")
        new.unlink(missing_ok=True)
        new.symlink_to(f"sites/{name}")
        os.replace(new, SITE)
    for old in (BUILD / "sites").glob(f"{profile}-*"):
        if old.name != name:
            shutil.rmtree(old, ignore_errors=True)
    return SITE


def verify(profile: str, commit: str) -> int:
    """Refuse to deploy a site that is not whole, not of this profile, or not made from this commit.

    Args:
        commit: the commit, at least 12 hex digits of it.

    Returns:
        The number of pages found.

    Raises:
        BookError: with everything that is missing or old.
    """
    card_path = SITE / "build.json"
    if not card_path.exists():
        raise BookError(f"there is no site at {SITE}: make book PROFILE={profile}")
    card = json.loads(card_path.read_text())
    wrong = [] if card["profile"] == profile else [f"the site is of the {card['profile']} profile, not {profile}"]
    wrong += [
        f"{name}: run at {run['commit']}, not at {commit[:12]}"
        for name, run in card["pages"].items()
        if run["commit"] != commit[:12]
    ]
    wanted = [
        *(f"{name}.html" for name in toc_pages()),
        "index.html",
        "search.html",
        "searchindex.js",
        "results.json",
        "plotly.min.js",
        "tex-svg-full.js",
    ]
    wrong += [f"{name} is missing or empty" for name in wanted if not (SITE / name).exists() or not (SITE / name).stat().st_size]
    if wrong:
        raise BookError("not fit to deploy:\n" + "\n".join(wrong))
    return len(toc_pages())
