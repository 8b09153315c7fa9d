"""A pytest plugin for nbval: its kernels get what the pipeline's kernels have, and a store of their own to write to.

What it finds is kept for the page `results/runs`: which pages came out the same when they were run again.
"""

import json
import os
import tempfile
from pathlib import Path

import nbformat

from nsm_book.fingerprint import digest, product
from nsm_book.run import environment, whole
from nsm_book.schema import pages
from nsm_book.store import read_reruns, rerun_record


class Rerun:
    """Of each page that was run again from its first cell to its last: did every compared cell give the same?"""

    def __init__(self, profile: str):
        self.profile = profile
        there = [page for page in pages().values() if page.run_file(profile).exists() and not page.reads_results]
        self.runs = {page.name: page.run_file(profile) for page in there}
        self.before = {name: digest(run) for name, run in self.runs.items()}
        self.outcomes: dict[str, dict[str, bool]] = {name: {} for name in self.runs}

    def pytest_runtest_logreport(self, report):
        file, _, cell = report.nodeid.partition("::")
        name = next((name for name, run in self.runs.items() if str(run).endswith(f"/{file}")), None)
        if name is not None:
            same = report.outcome == "passed" and not hasattr(report, "wasxfail")
            self.outcomes[name][cell] = self.outcomes[name].get(cell, True) and same

    def pytest_sessionfinish(self):
        found = read_reruns(self.profile)
        for name, run in self.runs.items():
            cells = [cell for cell in nbformat.read(run, as_version=4).cells if cell.cell_type == "code"]
            if len(self.outcomes[name]) == len(cells):
                compared = sum("nbval-check-output" in cell.metadata.get("tags", ()) for cell in cells)
                found[name] = {"digest": self.before[name], "same": all(self.outcomes[name].values()), "cells": compared}
        with whole(rerun_record(self.profile)) as new:
            new.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def pytest_configure(config):
    profile = Path(config.args[-1]).name
    config.nbval_store = tempfile.TemporaryDirectory(prefix="nsm-book-nbval-")
    os.environ.update(environment(profile, needs=product("", profile), makes=Path(config.nbval_store.name)))
    if not hasattr(config, "workerinput"):  # the one process that hears of all cells
        config.pluginmanager.register(Rerun(profile))


def pytest_unconfigure(config):
    config.nbval_store.cleanup()
