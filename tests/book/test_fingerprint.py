"""What a page depends on: exactly the modules that running it imports."""

import ast
import subprocess
import sys

import pytest

from nsm_book import schema
from nsm_book.fingerprint import fingerprint, imported_modules, page_code
from nsm_book.run import folder_name


def really_imported(cells: list[str]) -> set[str]:
    """What Python itself has loaded of the package after the page's imports."""
    nodes = [node for node in ast.walk(ast.parse("\n".join(cells))) if isinstance(node, (ast.Import, ast.ImportFrom))]
    imports = "\n".join(line for line in map(ast.unparse, nodes) if "nsm_support" in line)
    script = f"{imports}\nimport sys\nprint(*[m for m in sys.modules if m.split('.')[0] == 'nsm_support'])"
    return set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("page", schema.pages().values(), ids=lambda page: page.name)
def test_a_pages_modules_hold_all_that_python_loads(page):
    assert really_imported(page_code(page)) <= set(imported_modules(page_code(page)))
    assert not {name for name in imported_modules(page_code(page)) if name.startswith("nsm_book")}


def test_imports_are_followed_through_packages():
    found = imported_modules(["x = = 1", "%%html\n<b>", "from nsm_support.nsm.models import NSM"])
    assert {"nsm_support", "nsm_support.nsm", "nsm_support.nsm.models", "nsm_support.nsm.layer"} <= set(found)
    assert imported_modules(["import numpy"]) == []
    assert "nsm_support.metrics" not in imported_modules(["from nsm_support import results"])


def test_a_run_depends_on_what_is_in_the_files_that_its_parameters_name(tmp_path):
    page, text, folder = schema.page("blockffn/model"), tmp_path / "text.txt", tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    text.write_text("one")
    given = {"text": str(text), "checkpoint": str(folder), "device": "cpu"}
    before = fingerprint(page, "quick", given)
    assert fingerprint(page, "quick", given) == before and before["files"].keys() == {"text", "checkpoint"}
    text.write_text("two")
    assert fingerprint(page, "quick", given) != before
    text.write_text("one")
    (folder / "config.json").write_text("[]")
    assert fingerprint(page, "quick", given) != before


def test_folder_names_are_readable_safe_and_never_shared():
    assert folder_name({"count": 3, "kind": "up"}) == "count=3,kind=up"
    assert folder_name({}) == "defaults"
    assert folder_name({"a": "1,b=2"}) != folder_name({"a": "1", "b": "2"})
    assert folder_name({"a": 1, "b": 2}) == folder_name({"b": 2, "a": 1})
    odd = [
        {"name": "../../etc"},
        {"name": ".._.._etc"},
        {"name": "a b"},
        {"name": "a/b"},
        {"name": "x" * 300},
        {"name": "x" * 301},
    ]
    names = [folder_name(given) for given in odd]
    assert len(set(names)) == len(names)
    assert all("/" not in name and len(name) <= 80 for name in names)
