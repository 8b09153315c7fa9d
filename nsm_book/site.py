"""The site: executed pages and prose in one folder, rendered, checked, and switched to in one step."""

import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat

from nsm_book import BookError, gate
from nsm_book.fingerprint import differences, digest, digest_of, record, store_files
from nsm_book.markup import anchored, plain
from nsm_book.run import whole
from nsm_book.schema import BOOK, BUILD, ROOT, Page, claims, claims_of, page, pages, unknown
from nsm_book.store import rerun_record, toc_pages
from nsm_support import figures

SITE = BUILD / "html"
FOREIGN = re.compile(r"\{glue:text\}`([\w/\-]+):([\w.\-]+)(?::([^`]*))?`")
LINK = re.compile(r"(\]\()([\w./-]+)\.md(?=[)#])")
SOURCES = {".csv", ".md", ".bib", ".yml", ".json", ".css", ".js", ".svg", ".png", ".ico"}
BANNER = {
    "quick": ":::{admonition} Quick profile\n:class: profile warning\nThe numbers and figures of this page come from "
    "a run of seconds. They are real, but small, and too few for most verdicts: `make book PROFILE=full` gives "
    "the published ones, in an hour or two.\n:::",
    "full": ":::{admonition} Full profile\n:class: profile tip\nThe numbers and figures of this page are the "
    "published ones.\n:::",
}


def card_file(profile: str) -> Path:
    """What says which folder holds a profile's site, and what it holds."""
    return BUILD / "sites" / f"{profile}.json"


def ingredients(profile: str) -> str:
    """One hash of every file that the site is made from, besides the runs: prose, assets, settings, the package, the tables
    of sweeps, what running the pages again has found."""
    sources = {entry.source for entry in pages().values()}
    files = [path for path in BOOK.rglob("*") if path.suffix in SOURCES and path not in sources and path.is_file()]
    files += [*ROOT.glob("nsm_*/**/*.py"), *figures.STATIC.iterdir(), ROOT / "_config.yml", ROOT / "_toc.yml"]
    files += [*(BUILD / "sweeps").glob("*.parquet"), *filter(Path.exists, [rerun_record(profile)])]
    return digest_of({os.path.relpath(path, ROOT): digest(path) for path in files})


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file of a site."""
    return {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def discard_damaged(profile: str) -> None:
    """Let a site be rendered again that is not, file by file, what was rendered, or that was made from other runs or files."""
    card = card_file(profile)
    try:
        written = json.loads(card.read_text())
        folder = card.parent / written["site"]
        made_from = json.loads((folder / "build.json").read_text())
        runs = {name: record(entry.run_file(profile)) for name, entry in pages().items()}
        good = contents(folder) == written["files"] and made_from["pages"] == runs
        good = good and made_from["ingredients"] == ingredients(profile)
    except (OSError, ValueError, KeyError, TypeError):
        good = False
    if not good:
        card.unlink(missing_ok=True)


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
    problems = [
        f"{entry.name}: the run at {path.relative_to(ROOT)} is not today's: {difference}"
        for difference in differences(entry, profile)
    ]
    if not problems:
        notebook = nbformat.read(path, as_version=4)
        problems = gate.problems(notebook, entry)
    if problems:
        raise BookError("\n".join(problems))
    for output in [output for cell in notebook.cells for output in cell.get("outputs", ())]:
        output.get("data", {}).pop(gate.PLOTLY, None)  # the site draws its HTML
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source, entry.name)
    first = notebook.cells[0]
    first.source = with_banner(first.source, profile)
    anchored(notebook, [claim.id for claim in claims_of(entry.name)])
    write_if_changed(folder / f"{entry.name}.ipynb", nbformat.writes(notebook) + "\n")


def stage_prose(name: str, profile: str, folder: Path, records: dict[str, dict[str, Any]]) -> None:
    """Put one page without code into the folder that Sphinx reads, with the values of executed pages that it names.

    Raises:
        BookError: for a typed verdict, or as `fill`.
    """
    source = (BOOK / f"{name}.md").read_text()
    if typed := gate.typed_verdicts(nbformat.v4.new_markdown_cell(source)):
        raise BookError(f"{name}: {typed[0]!r} is typed by hand: emphasised as only a verdict of a run is, or beside one")
    text = linked(fill(source, records, f"book/{name}.md"), name)
    write_if_changed(folder / f"{name}.md", with_banner(text, profile) if FOREIGN.search(source) else text)


def stage(profile: str) -> Path:
    """Lay out `_build/book/PROFILE`: prose with its numbers filled in, and the executed pages.

    Raises:
        BookError: with every reason why the book may not be published, page by page.
    """
    claims()
    folder, refused, order = BUILD / "book" / profile, [], toc_pages()
    records = {run["page"]: run for run in json.loads(store_files(profile)[0].read_text())}
    for name in order:
        try:
            if name in pages():
                stage_page(page(name), profile, folder)
            else:
                stage_prose(name, profile, folder, records)
        except BookError as error:
            refused.append(str(error))
        except FileNotFoundError as error:
            refused.append(f"_toc.yml names {name}: {error}")
    refused += [f"book/pages.yml names {name}, which _toc.yml does not" for name in pages() if name not in order]
    if refused:
        raise BookError("not published:\n\n" + "\n\n".join(refused))
    wanted = {folder / f"{name}{'.ipynb' if name in pages() else '.md'}" for name in order}
    for path in [*folder.rglob("*.md"), *folder.rglob("*.ipynb")]:
        if path not in wanted:
            path.unlink()
    shutil.rmtree(folder / "_static", ignore_errors=True)
    for assets in (BOOK / "_static", figures.STATIC):
        shutil.copytree(assets, folder / "_static", dirs_exist_ok=True)
    write_if_changed(folder / "references.bib", (BOOK / "references.bib").read_text())
    local_scripts(folder / "_local")
    return folder


def local_scripts(folder: Path) -> None:
    """plotly.js and MathJax, taken from the installed packages, for the site's own root: nothing is fetched."""
    from plotly.offline import get_plotlyjs

    mathjax = importlib.resources.files("sphinx-mathjax-offline") / "static" / "mathjax" / "tex-svg-full.js"
    write_if_changed(folder / "plotly.min.js", get_plotlyjs())
    write_if_changed(folder / "tex-svg-full.js", mathjax.read_text())


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


REPAIRS = (
    # A font asked for ahead of time with `crossorigin` is refused, loudly, where pages are opened as files.
    (re.compile(r'<link rel="preload" as="font"[^>]*>\s*'), ""),
    # The theme's sidebar holds the logo and the search outside of any landmark.
    (re.compile(r'<div class="bd-sidebar-primary'), '<div role="complementary" aria-label="Book" class="bd-sidebar-primary'),
    (re.compile(r'role="doc-biblioentry"'), 'role="listitem"'),  # docutils' list of references has no items otherwise
    # pandas heads the column of row names with an empty cell.
    (re.compile(r"<th></th>"), "<td></td>"),
)


def repair(folder: Path) -> None:
    """Repair what the theme's templates do wrong and cannot be told not to."""
    for path in folder.rglob("*.html"):
        text = path.read_text()
        for pattern, better in REPAIRS:
            text = pattern.sub(better, text)
        path.write_text(text)


def copy_notebooks(profile: str, rendered: Path) -> None:
    """Put the executed notebooks of sweeps, to which the results pages link, into a rendered site."""
    for sweep in json.loads(store_files(profile)[2].read_text())["sweeps"]:
        for run in sweep["runs"]:
            if run["notebook"]:
                target = (rendered / "results" / run["notebook"]).resolve()
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(BUILD / "sweeps" / sweep["name"] / run["id"] / "run.ipynb", target)


def publish(profile: str) -> str:
    """Render the staged book and keep it, whole, beside the one that is open; return one line that says so."""
    before, began = ingredients(profile), time.perf_counter()
    rendered = render(stage(profile), profile)
    repair(rendered)
    copy_notebooks(profile, rendered)
    shutil.copy(store_files(profile)[0], rendered / "results.json")
    card: dict[str, Any] = {"profile": profile, "built": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "ingredients": before}
    card["pages"] = {name: record(entry.run_file(profile)) for name, entry in pages().items()}
    (rendered / "build.json").write_text(json.dumps(card, indent=1) + "\n")
    place = card_file(profile).with_name(f"{profile}-{digest_of(card)[:8]}")
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    os.replace(rendered, place)
    with whole(card_file(profile)) as path:
        path.write_text(json.dumps({"site": place.name, "files": contents(place)}) + "\n")
    return f"site: {len(toc_pages())} pages, {time.perf_counter() - began:.1f} s"


def switch(profile: str) -> Path:
    """Let `_build/html` be this profile's site, in one step; remove the profile's older ones."""
    name = json.loads(card_file(profile).read_text())["site"]
    if not SITE.is_symlink() or os.readlink(SITE) != f"sites/{name}":
        if SITE.is_dir() and not SITE.is_symlink():
            raise BookError(f"{SITE} is a folder that this book did not make: move it away")
        new = SITE.with_name(".html.new")
        new.unlink(missing_ok=True)
        new.symlink_to(f"sites/{name}")
        os.replace(new, SITE)
    for old in card_file(profile).parent.glob(f"{profile}-*"):
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
        BookError: with everything that is missing, changed or old.
    """
    if not (SITE / "build.json").exists():
        raise BookError(f"there is no site at {SITE}: make book PROFILE={profile}")
    card = json.loads((SITE / "build.json").read_text())
    wrong = [] if card["profile"] == profile else [f"the site is of the {card['profile']} profile, not {profile}"]
    wrong += [
        f"{name}: run at {run['commit']}, not at {commit[:12]}"
        for name, run in card["pages"].items()
        if run["commit"] != commit[:12]
    ]
    written, found = json.loads(card_file(card["profile"]).read_text())["files"], contents(SITE)
    wanted = {f"{name}.html" for name in toc_pages()} | {"index.html", "search.html", "searchindex.js", "results.json"}
    wrong += [
        f"{name} is missing or empty"
        for name in sorted(wanted | written.keys())
        if not (SITE / name).is_file() or not (SITE / name).stat().st_size
    ]
    wrong += [f"{name} is not what was rendered" for name in found if found[name] != written.get(name)]
    if wrong:
        raise BookError("not fit to deploy:\n" + "\n".join(wrong))
    return len(toc_pages())
