"""The workflows: valid, and doing what the README says they do."""

import subprocess
import sys

import yaml

from nsm_support.results import ROOT

FOLDER = ROOT / ".github" / "workflows"


def test_workflows_keep_to_the_schema():
    files = [str(path) for path in sorted(FOLDER.glob("*.yml"))]
    done = subprocess.run([sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *files],
                          capture_output=True, text=True)
    assert len(files) == 3 and done.returncode == 0, done.stdout


def test_publish_builds_the_full_book_and_verifies_before_it_deploys():
    steps = yaml.safe_load((FOLDER / "publish.yml").read_text())["jobs"]["publish"]["steps"]
    words = [step.get("run", step.get("uses", "")) for step in steps]
    order = [next(i for i, word in enumerate(words) if text in word)
             for text in ("make book PROFILE=full", "nsm-book verify --profile full", "upload-pages", "deploy-pages")]
    assert order == sorted(order)


def test_ci_calls_the_command_of_the_readme():
    assert "make test" in (ROOT / ".ci" / "run").read_text() and "make test" in (ROOT / "README.md").read_text()
