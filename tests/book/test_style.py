"""The linter's word on all of the code."""

import subprocess
import sys

from nsm_book import ROOT


def test_ruff_looks_at_every_module():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--show-files", "."], cwd=ROOT, capture_output=True, text=True)
    assert {str(path) for path in ROOT.glob("nsm_*/**/*.py")} <= set(done.stdout.splitlines())


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
