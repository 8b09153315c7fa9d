"""The workflows: valid, and doing what the README says they do."""

import subprocess
import sys

import pytest
import yaml

from nsm_book import ROOT

FOLDER = ROOT / ".github" / "workflows"


def test_workflows_keep_to_the_schema():
    files = [str(path) for path in sorted(FOLDER.glob("*.yml"))]
    assert len(files) == 3
    for schema, given in (("github-workflows", files), ("dependabot", [str(FOLDER.parent / "dependabot.yml")])):
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *given]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_publish_builds_the_full_book_and_verifies_before_it_deploys():
    steps = yaml.safe_load((FOLDER / "publish.yml").read_text())["jobs"]["publish"]["steps"]
    words = [step.get("run", step.get("uses", "")) for step in steps]
    wanted = (
        "make book PROFILE=full",
        "make rerun PROFILE=full",
        "nsm-book verify --profile full",
        "upload-pages",
        "deploy-pages",
    )
    order = [next(i for i, word in enumerate(words) if text in word) for text in wanted]
    assert order == sorted(order)
    assert words.index("make book PROFILE=full", order[1]) < order[2]  # rendered again, with what the re-run found


@pytest.mark.parametrize("command", ["make check", "make test"])
def test_ci_calls_the_commands_of_the_readme(command):
    for file in (".ci/run", ".github/workflows/check.yml", "README.md", "CONTRIBUTING.md"):
        assert command in (ROOT / file).read_text(), file


def test_publish_tells_every_verdict_that_changed_before_it_deploys():
    steps = yaml.safe_load((FOLDER / "publish.yml").read_text())["jobs"]["publish"]["steps"]
    words = [step.get("run", step.get("uses", "")) for step in steps]
    told = next(i for i, word in enumerate(words) if "nsm-book diff" in word)
    assert steps[told]["env"]["LAST"] == "${{ steps.pages.outputs.base_url }}/results.json"
    assert words.index("actions/configure-pages@v5") < told < words.index("actions/deploy-pages@v4")


@pytest.mark.parametrize(
    ("answered", "diff", "code", "told"),
    [
        ("200", "echo refuted; exit 1", 0, "refuted"),
        ("200", "echo same; exit 0", 0, "same"),
        ("200", "echo broken >&2; exit 2", 0, "broken"),
        ("404", "exit 9", 0, "Nothing was published before."),
        ("500", "exit 9", 1, "answered 500"),
    ],
)
def test_the_step_that_tells_changes_stops_only_where_nothing_can_be_read(tmp_path, answered, diff, code, told):
    """The step itself, with a curl and an nsm-book that answer as they are told to."""
    steps = yaml.safe_load((FOLDER / "publish.yml").read_text())["jobs"]["publish"]["steps"]
    step = next(step["run"] for step in steps if "nsm-book diff" in step.get("run", ""))
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name, script in (("curl", f"echo -n {answered}"), (".venv/bin/nsm-book", diff)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    summary = tmp_path / "summary.md"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LAST": "https://x/results.json", "GITHUB_STEP_SUMMARY": str(summary)}
    done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", step], cwd=tmp_path, env=environment)
    assert done.returncode == code and told in summary.read_text()
