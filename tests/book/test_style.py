"""What `make check` holds all code to: lint, format, complexity and no passage that stands twice. (Types are mypy's own step.)"""

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from radon.complexity import cc_visit

from nsm_book import ROOT

CODE = sorted(ROOT.glob("nsm_*/**/*.py"))
MOST = 15  #: branches of a function (McCabe's complexity)
SAME = 6  #: lines that make a passage


def ruff(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ruff", *words], cwd=ROOT, capture_output=True, text=True)


def test_ruff_looks_at_every_module_and_finds_nothing():
    assert {str(path) for path in CODE} <= set(ruff("check", "--show-files", ".").stdout.splitlines())
    for words in (("check", "."), ("format", "--check", ".")):
        done = ruff(*words)
        assert done.returncode == 0, done.stdout


def complex_functions(path: Path) -> list[str]:
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    return [f"{name}: {one.name} has {one.complexity}" for one in cc_visit(path.read_text()) if one.complexity > MOST]


def test_no_function_is_complex():
    assert [line for path in CODE for line in complex_functions(path)] == []


def repeated(paths: list[Path]) -> list[str]:
    """Passages of `SAME` lines that stand in several places; imports, comments, brackets and a signature's lines do not count."""
    places = defaultdict(list)
    for path in paths:
        lines = list(telling(path))
        for i in range(len(lines) - SAME + 1):
            places[tuple(text for _, text in lines[i : i + SAME])].append(f"{path.name}:{lines[i][0]}")
    return [" and ".join(found) for found in places.values() if len(found) > 1]


def telling(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.strip()
        if len(text) > 3 and not text.startswith(("#", "import ", "from ")) and not re.fullmatch(r"\w+: .*,", text):
            yield number, text


def test_no_passage_stands_twice():
    assert repeated(CODE) == []


def test_what_is_complex_or_repeated_is_found(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    branches = "".join(f"    if x == {i}:\n        return {i}\n" for i in range(MOST))
    passage = "".join(f"value_{i} = {i}\n" for i in range(SAME))
    one.write_text(f"{passage}def f(x):\n{branches}")
    two.write_text(f"# another\n{passage}")
    assert complex_functions(one) == [f"one.py: f has {MOST + 1}"] and complex_functions(two) == []
    assert repeated([one, two]) == ["one.py:1 and two.py:2"]


@pytest.mark.parametrize("hook", yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"])
def test_every_hook_is_a_step_of_make_check(hook):
    tool, *rest = hook["entry"].removeprefix(".venv/bin/").split()
    assert f"$(BIN)/{' '.join([tool, *rest[:1]])}".strip() in (ROOT / "Makefile").read_text() and hook["language"] == "system"
