"""What a run depends on, as hashes: a run whose fingerprint is today's need not be made again."""

import ast
import hashlib
import json
import os
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

from nsm_book.schema import BUILD, ROOT, Page, claims_of, pages, profile_parameters, read_notebook

PINS = ("requirements.txt", "constraints.txt")
CHANGES = {
    "source": "its source changed",
    "claims": "its entries in book/claims.yml changed",
    "python": "the Python version changed",
    "parameters": "parameter {}: {} → {}",
    "files": "the file that parameter {} names changed",
    "modules": "module {} changed",
    "pins": "pins: {} changed",
    "products": "product {} of another page changed",
}


def digest(path: Path) -> str:
    """The SHA-256 of a file, its first 16 hex digits; `missing` if there is none."""
    if not path.exists():
        return "missing"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def digest_of(content: Any) -> str:
    """The SHA-256 of a JSON value, its first 16 hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@cache
def import_graph():
    import grimp

    return grimp.build_graph("nsm_support", cache_dir=None)  # its cache goes by dates


def imported_modules(cells: list[str]) -> list[str]:
    """The modules of `nsm_support` that running these cells imports, directly or through others, sorted.

    Importing a module runs the `__init__` of every package around it, so these count too. A cell that is no Python
    imports nothing here: running it is what shows its error.
    """
    graph, named = import_graph(), set()
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
def _module_digests(page: Page, source: str) -> dict[str, str]:
    cells = page_code(page)
    return {module: digest(module_file(module)) for module in imported_modules(cells)}


@cache
def _digest_of_state(path: Path, *state: int) -> str:
    """`digest`, once for each state of a file: runs of one process share the large files that they are given."""
    return digest(path)


def files(given: dict[str, Any]) -> dict[str, Any]:
    """By the parameter that names it, the digest of a file, or of each file in a folder: paths as a kernel finds them."""

    def cached(path: Path) -> str:
        now = path.stat()
        return _digest_of_state(path, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)

    found: dict[str, Any] = {}
    for name, value in given.items():
        path = Path(ROOT, value) if isinstance(value, str) and value and "\0" not in value else None
        if path and os.path.isfile(path):
            found[name] = cached(path)
        elif path and os.path.isdir(path):
            found[name] = {file.name: cached(file) for file in sorted(path.iterdir()) if file.is_file()}
    return found


def product(name: str, profile: str) -> Path:
    """Where a product of this profile lies."""
    return BUILD / "products" / profile / name


def store_files(profile: str) -> list[Path]:
    """The files of a profile's result store."""
    return [BUILD / "results" / profile / name for name in ("results.json", "results.parquet", "book.json")]


def inputs(page: Page, profile: str) -> dict[str, Path]:
    """The files that a page reads, by name: products of other pages, and the result store if it asks for that."""
    store = {path.name: path for path in store_files(profile)} if page.reads_results else {}
    return {**{name: product(name, profile) for name in page.needs}, **store}


def read_digests(page: Page, profile: str) -> dict[str, str]:
    """The digests of the files that a page reads."""
    return {name: digest(path) for name, path in inputs(page, profile).items()}


def dependencies(page: Page, profile: str, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """All that a run depends on but what it reads of other pages: what Snakemake compares.

    Args:
        given: the parameters of the run; by default those of the profile.
    """
    given = profile_parameters(page, profile) if given is None else given
    return {
        "source": digest(page.source),
        "parameters": json.loads(json.dumps(given)),
        "files": files(given),
        "modules": _module_digests(page, digest(page.source)),
        "claims": digest_of([claim.model_dump() for claim in claims_of(page.name)]),
        "pins": {name: digest(ROOT / name) for name in PINS},
        "python": ".".join(map(str, sys.version_info[:2])),
    }


def fingerprint(page: Page, profile: str, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything a run of this page depends on, part by part."""
    return {**dependencies(page, profile, given), "products": read_digests(page, profile)}


def with_checksum(notebook: dict[str, Any]) -> dict[str, Any]:
    """An executed notebook with the checksum in it that tells whether it is as it was written."""
    metadata = {name: value for name, value in notebook["metadata"].items() if name != "checksum"}
    bare = {**notebook, "metadata": metadata}
    return {**bare, "metadata": {**metadata, "checksum": digest_of(bare)}}


def record(path: Path) -> dict[str, Any]:
    """What a run recorded of itself; empty if there is no run, or it is not as it was written."""
    try:
        notebook = json.loads(path.read_text())
        return notebook["metadata"]["nsm_book"] if notebook == with_checksum(notebook) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each part in which two fingerprints differ."""
    lines = []
    for part, text in CHANGES.items():
        before, after = old.get(part), new.get(part)
        if not isinstance(after, dict):
            lines += [text] if before != after else []
            continue
        before = before if isinstance(before, dict) else {}
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                lines.append(text.format(name, before.get(name, "default"), after.get(name, "default")))
    return lines


def differences(page: Page, profile: str) -> list[str]:
    """Why a page has to run: one line for each reason."""
    last = record(page.run_file(profile))
    if not last:
        return ["it has not run in this profile"]
    made = [f"its product {name} is not what it made" for name in damaged_products(page, profile, last)]
    return made + changes(last["fingerprint"], fingerprint(page, profile))


def damaged_products(page: Page, profile: str, last: dict[str, Any]) -> list[str]:
    return [name for name in page.makes if digest(product(name, profile)) != last["made"].get(name)]


def makers(page: Page) -> list[Page]:
    """The pages that have to run before this one, in the order of `book/pages.yml`."""
    found = {other.name: other for other in pages().values() if set(other.makes) & set(page.needs)}
    for maker in list(found.values()):
        found |= {other.name: other for other in makers(maker)}
    return [other for other in pages().values() if other.name in found]


def stale_makers(page: Page, profile: str) -> list[Page]:
    """The pages that this one takes files from, and that have to run again."""
    return [maker for maker in makers(page) if differences(maker, profile)]


def discard_damaged(profile: str) -> None:
    """Remove the runs that are not as they were written, whose products are not, or that read other files than there are now:
    what Snakemake, which compares sources and parameters, does not look at. A damaged product may be made again the same."""
    last = {page.name: record(page.run_file(profile)) for page in pages().values()}
    damaged = {page.name: damaged_products(page, profile, last[page.name]) for page in pages().values() if last[page.name]}
    made_again = {name for names in damaged.values() for name in names}
    for page in pages().values():
        read = last[page.name]["fingerprint"]["products"] if last[page.name] else {}
        now = read_digests(page, profile)
        others = {name for name in read.keys() | now.keys() if read.get(name) != now.get(name)} - made_again
        if not last[page.name] or damaged[page.name] or others:
            page.run_file(profile).unlink(missing_ok=True)


def forget_dates(profile: str) -> None:
    """Give one date to everything of a profile: Snakemake refuses what is newer than what is made from it, as after a clock that
    jumped, and what it has to compare is compared by content."""
    now = time.time()
    for folder in ("runs", "products", "results"):
        for path in (BUILD / folder / profile).rglob("*"):
            os.utime(path, (now, now))
    for path in (BUILD / "sites").glob(f"{profile}.json"):
        os.utime(path, (now, now))
