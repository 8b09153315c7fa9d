"""A real Chromium for the browser tests, and a site served on loopback."""

import functools
import http.server
import os
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"


def need(what: str, **options) -> None:
    """Skip the test, or the module, that lacks something; fail where NSM_BOOK_NEED_BROWSER says that it must be there."""
    if os.environ.get("NSM_BOOK_NEED_BROWSER"):
        pytest.fail(f"NSM_BOOK_NEED_BROWSER is set, and this needs {what}", pytrace=False)
    pytest.skip(f"needs {what}", **options)


def chromium() -> str:
    """The path of Chromium; skips the test without one."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return path or need("Chromium: apt-get install chromium (Debian), brew install --cask chromium (macOS)")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextmanager
def served(folder: Path):
    """The address of a folder, served on loopback."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()


@contextmanager
def browser():
    from playwright.sync_api import sync_playwright

    path = chromium()
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=[*FLAGS.split(), "--disable-sync"])
        try:
            yield running
        finally:
            running.close()
