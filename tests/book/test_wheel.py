"""What a stranger installs: a real wheel in real, empty virtual environments, far from any checkout.

Nothing is fetched: an environment gets links to those installed distributions, and to nothing else, that a set of
requirements brings with it. So what `pyproject.toml` forgets to ask for is missing there, as it would be for a stranger.
"""

import importlib.metadata as metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import nsm_support
from nsm_book import ROOT

IMPORTS = """
import importlib, json, pkgutil, nsm_support
failed = {}
for module in pkgutil.walk_packages(nsm_support.__path__, "nsm_support."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        failed[module.name] = str(error)
print(json.dumps({"failed": failed, "at": nsm_support.__file__, "version": nsm_support.__version__}))
"""
USES = """
import matplotlib.pyplot as plt, plotly.graph_objects as go
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
publisher = InteractiveShell.instance(display_pub_class=CapturingDisplayPublisher).display_pub
from nsm_support.crystalline.automata import make_machine
from nsm_support.crystalline.automata.drawing import Pair, show_stepper
from nsm_support.data import load_digits, load_text
from nsm_support.figures import show
from nsm_support.results import claim
from nsm_support.statistics import mean_interval

WORDS = {"alt": "a line that goes up", "caption": "A line, drawn once for a test."}
def line():
    figure, axes = plt.subplots()
    axes.plot([1, 2])
    return figure
show(line(), name="still", **WORDS)
show(go.Figure(go.Scatter(y=[1, 2])), name="moving", still=line(), **WORDS)
show_stepper([Pair("parity", make_machine("parity"), make_machine("parity"))], name="step", caption="Equal.")
still, moving, stepper = (output["data"]["text/html"] for output in publisher.outputs)
assert "<svg" in still and "Plotly" in moving and "nsm-data" in moving and ".nsm-" in stepper and "<script>" in stepper
answer = claim("any", mean_interval([1.0, 2.0, 3.0]))
assert answer.estimate == 2.0 and answer.low < 2.0 < answer.high and answer.n == 3 and answer.verdict is None
assert load_digits(5).images.shape == (50, 28, 28) and len(load_text().chapters) == 1189
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no build folder of an earlier day slips in."""
    copy, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("nsm_support", "nsm_book"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(built), str(copy))
    return next(built.glob("*.whl"))


def pip(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "--quiet", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class Stranger:
    """A virtual environment that holds the wheel, and a working folder outside any checkout."""

    def __init__(self, folder: Path, wheel: Path):
        self.bin, self.work = folder / "bin", folder / "work"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.packages = next(folder.glob("lib/python*/site-packages"))
        pip("--python", str(self.bin / "python"), "install", "--no-deps", "--no-compile", str(wheel))
        self.own = metadata.Distribution.at(next(self.packages.glob("nsm_support-*.dist-info")))
        self.work.mkdir()

    def bring(self, extra: str | None = None) -> None:
        """Link what the wheel's requirements, or those of an extra, bring with them."""
        wanted, seen = [(line, extra or "") for line in self.own.requires or []], set()
        while wanted:
            line, extra = wanted.pop()
            one = Requirement(line)
            if (one.marker and not one.marker.evaluate({"extra": extra})) or (line, extra) in seen:
                continue
            seen.add((line, extra))
            given = self.own if one.name == self.own.name else metadata.distribution(one.name)
            wanted += [(line, name) for line in given.requires or [] for name in one.extras or {""}]
            if given is not self.own:
                self.link(given)

    def link(self, given: metadata.Distribution) -> None:
        for top in {Path(file).parts[0] for file in given.files or []} - {"..", "__pycache__"}:
            if not (self.packages / top).exists():
                (self.packages / top).symlink_to(Path(str(given.locate_file(top))))

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NSM_BOOK", "MPLBACKEND"))}
        return subprocess.run(
            words, cwd=self.work, env={**kept, "HOME": str(self.work), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )

    def python(self, code: str) -> str:
        done = self.run(str(self.bin / "python"), "-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, wheel) -> Stranger:
    """With the base requirements and no extra."""
    stranger = Stranger(tmp_path_factory.mktemp("base") / "venv", wheel)
    stranger.bring()
    return stranger


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment_says_what_it_lacks(tmp_path, wheel):
    empty = Stranger(tmp_path / "venv", wheel)
    assert empty.python("import nsm_support; print(nsm_support.__version__)").strip() == empty.own.version
    done = empty.run(str(empty.bin / "nsm-book"), "build")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "nsm-book: click is not installed; the extra 'book' brings it: pip install 'nsm-support[book]'\n"


@pytest.mark.slow
def test_every_module_imports_or_names_its_extra(stranger):
    """The base first, then with its extra: after it nothing is missing."""
    found = json.loads(stranger.python(IMPORTS))
    assert Path(found["at"]).is_relative_to(stranger.packages) and found["version"] == stranger.own.version
    assert 0 < len(found["failed"]) < 8 and not any(".nsm" in module for module in found["failed"])
    assert all(message.endswith("pip install 'nsm-support[checkpoints]'") for message in found["failed"].values()), found
    stranger.bring("checkpoints")
    assert json.loads(stranger.python(IMPORTS))["failed"] == {}


@pytest.mark.slow
def test_the_example_of_the_readme_runs(stranger):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    stranger.python(f"{code}\nassert torch.allclose(step, logits[:, 19], atol=1e-4)")


@pytest.mark.slow
def test_figures_claims_data_and_the_stepper_work_far_from_a_checkout(stranger):
    stranger.python(USES)


@pytest.mark.slow
def test_the_command_works_with_its_extra_and_asks_for_a_book(tmp_path, wheel):
    stranger = Stranger(tmp_path / "venv", wheel)
    stranger.bring("book")
    assert "Usage: nsm-book" in stranger.run(str(stranger.bin / "nsm-book"), "-h").stdout
    done = stranger.run(str(stranger.bin / "nsm-book"), "params", "tutorials/routing")
    assert done.returncode == 1 and "no book here" in done.stderr and "Traceback" not in done.stderr


def test_every_requirement_is_pinned_and_the_version_stands_once():
    pins = (ROOT / "requirements.txt").read_text() + (ROOT / "constraints.txt").read_text()
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r"^([\w.-]+)==", pins, re.MULTILINE)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [line for lines in (project["dependencies"], *project["optional-dependencies"].values()) for line in lines]
    names = {re.sub(r"[-_.]+", "-", Requirement(line).name).lower() for line in wanted} - {"nsm-support"}
    assert names <= pinned, names - pinned
    version = nsm_support.__version__
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## \[?{re.escape(version)}\]?", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
