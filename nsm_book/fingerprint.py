"""What a run depends on, as hashes: equal fingerprints mean that a page need not run again."""

import ast
import hashlib
import json
import os
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

from nsm_book import ROOT
from nsm_book.schema import BUILD, Page, claims_of, pages, profile_parameters, read_notebook

PINS = ("requirements.txt", "constraints.txt")


def digest(path: Path) -> str:
    """The SHA-256 of a file, its first 16 hex digits; `missing` if there is none."""
    if not path.exists():
        return "missing"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@cache
def import_graph():
    import grimp

    return grimp.build_graph("nsm_support", cache_dir=None)  # its cache goes by dates, and would miss what they do not tell


def imported_modules(cells: list[str]) -> list[str]:
    """The modules of `nsm_support` that running these cells imports, directly or through others, sorted.

    Importing a module runs the `__init__` of every package around it, so these count too. A cell that is no Python
    imports nothing here: running it is what shows its error.
    """
    graph = import_graph()
    named = set()
    for cell in cells:
        try:
            nodes = list(ast.walk(ast.parse(cell)))
        except SyntaxError:
            continue
        for node in nodes:
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                named |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    waiting, found = {name for name in named if name in graph.modules}, set()
    while waiting:
        module = waiting.pop()
        found.add(module)
        around = {module.rsplit(".", 1)[0]} if "." in module else set()
        waiting |= (graph.find_modules_directly_imported_by(module) | around) - found
    return sorted(found)


def module_file(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def page_code(page: Page) -> list[str]:
    """The code cells of a page."""
    return [cell.source for cell in read_notebook(page).cells if cell.cell_type == "code"]


@cache
def _digest_as_of(path: Path, *state: int) -> str:
    """`digest`, once for each state of a file: runs of one process share the large files that they are given."""
    return digest(path)


def _digest_once(path: Path) -> str:
    now = path.stat()
    return _digest_as_of(path, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


def files(given: dict[str, Any]) -> dict[str, Any]:
    """By the parameter that names it, the digest of a file, or of each file in a folder: paths as a kernel finds them."""
    found = {}
    for name, value in given.items():
        path = os.path.join(ROOT, value) if isinstance(value, str) and value else ""
        if os.path.isfile(path):
            found[name] = _digest_once(Path(path))
        elif os.path.isdir(path):
            found[name] = {one.name: _digest_once(one) for one in sorted(Path(path).iterdir()) if one.is_file()}
    return found


def fingerprint(page: Page, profile: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything a run of this page depends on, part by part.

    Args:
        parameters: what the run is given; by default what the profile gives.
    """
    given = profile_parameters(page, profile) if parameters is None else parameters
    claims = [claim.model_dump() for claim in claims_of(page.name)]
    return {
        "source": digest(page.source),
        "parameters": json.loads(json.dumps(given)),
        "files": files(given),
        "modules": {module: digest(module_file(module)) for module in imported_modules(page_code(page))},
        "products": {name: digest(product(name, profile)) for name in page.needs},
        "claims": hashlib.sha256(json.dumps(claims, sort_keys=True).encode()).hexdigest()[:16],
        "pins": {name: digest(ROOT / name) for name in PINS},
        "python": ".".join(map(str, sys.version_info[:2])),
    }


def product(name: str, profile: str) -> Path:
    """Where a product of this profile lies."""
    return BUILD / "products" / profile / name


def checksum(*said: dict[str, Any]) -> str:
    """The SHA-256 of everything that these say, but the checksum that stands among it: 16 hex digits."""
    told = [{name: value for name, value in one.items() if name != "checksum"} for one in said]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def sealed(notebook: dict[str, Any]) -> dict[str, Any]:
    """An executed notebook with the checksum in it that tells whether it is as it was written."""
    rest = {name: value for name, value in notebook.items() if name != "metadata"}
    return {**rest, "metadata": {**notebook["metadata"], "checksum": checksum(rest, notebook["metadata"])}}


def record(path: Path) -> dict[str, Any]:
    """What a run recorded of itself; empty if there is no run, or it is not as it was written."""
    try:
        notebook = json.loads(path.read_text())
        return notebook["metadata"]["nsm_book"] if notebook == sealed(notebook) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def differences(page: Page, profile: str, remade: frozenset[str] = frozenset()) -> list[str]:
    """Why a page has to run: one line for each part of its fingerprint that is not what the last run had.

    Args:
        remade: products that are about to be made again, and so say nothing yet.
    """
    last = record(page.run_file(profile)) or record(set_aside(page, profile))
    if not last:
        return ["it has not run in this profile"]
    old, new = last["fingerprint"], fingerprint(page, profile)
    lines = [
        f"its product {name} is not what it made"
        for name in page.makes
        if digest(product(name, profile)) != last["made"].get(name)
    ]
    names = {
        "source": f"its source book/{page.name}.md",
        "claims": "its entries in book/claims.yml",
        "python": "the Python version",
    }
    lines += [f"{text} changed" for part, text in names.items() if old.get(part) != new[part]]
    kinds = {
        "parameters": "parameter {}: {} → {}",
        "files": "the file that parameter {} names changed",
        "modules": "module {} changed",
        "pins": "pins: {} changed",
        "products": "product {} of another page changed",
    }
    for part, text in kinds.items():
        before, after = old.get(part, {}), new[part]
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name) and not (part == "products" and name in remade):
                lines.append(text.format(name, before.get(name, "default"), after.get(name, "default")))
    return lines


def set_aside(page: Page, profile: str) -> Path:
    """Where the last run lies once it is no longer today's."""
    return page.run_file(profile).with_suffix(".stale.ipynb")


def stale_pages(profile: str) -> list[Page]:
    """The pages that have to run, as far as can be told before any of them has.

    A page that reads a product of one of these is not among them for that alone: it may be made the same again.
    """
    return _stale(list(pages().values()), profile)


def _stale(among: list[Page], profile: str) -> list[Page]:
    """Which of these pages have to run, if all that they take files from are among them."""
    everything = frozenset(name for page in among for name in page.makes)
    first = [page for page in among if differences(page, profile, everything)]
    remade = frozenset(name for page in first for name in page.makes)
    return [page for page in among if page in first or differences(page, profile, remade)]


def makers(page: Page) -> list[Page]:
    """The pages that have to run before this one, in the order of `book/pages.yml`."""
    waiting, found = list(page.needs), set()
    while waiting:
        product = waiting.pop()
        maker = next(other for other in pages().values() if product in other.makes)
        if maker.name not in found:
            found.add(maker.name)
            waiting += maker.needs
    return [other for other in pages().values() if other.name in found]


def stale_makers(page: Page, profile: str) -> list[Page]:
    """The pages that this one takes files from, and that have to run again."""
    return _stale(makers(page), profile)


def set_aside_stale(profile: str) -> None:
    """Take the runs whose fingerprint is not today's out of the way, so that they are run again.

    A run that was set aside, and is today's again since a change was taken back, returns to its place.
    """
    stale = stale_pages(profile)
    for page in pages().values():
        run, aside = page.run_file(profile), set_aside(page, profile)
        if page in stale and run.exists():
            run.replace(aside)
        elif page not in stale and not record(run):
            aside.replace(run)


def forget_dates(profile: str) -> None:
    """Give one date to everything of a profile that stands after whatever is stale was taken away: Snakemake goes by dates,
    and what a clock that jumped, or an archive, left in the future would be older than nothing made today."""
    now = time.time()
    for folder in ("runs", "products", "results"):
        for path in (BUILD / folder / profile).rglob("*"):
            os.utime(path, (now, now))
    for path in (BUILD / "sites").glob(f"{profile}.json"):
        os.utime(path, (now, now))
