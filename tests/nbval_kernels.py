"""A pytest plugin for nbval: its kernels get what the pipeline's kernels have, and a store of their own to write to."""

import os
import tempfile
from pathlib import Path

from nsm_support.book.execute import environment
from nsm_support.book.fingerprint import product


def pytest_configure(config):
    profile = Path(config.args[-1]).name
    config.nbval_store = tempfile.TemporaryDirectory(prefix="nsm-book-nbval-")
    os.environ.update(environment(needs=product("", profile), makes=Path(config.nbval_store.name)))


def pytest_unconfigure(config):
    config.nbval_store.cleanup()
