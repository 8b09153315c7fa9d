"""The whole build on six pages of equal work, beside jupyter-book executing the same pages itself; and with nothing to do.

Each page imports what the book's pages import and then works for about five seconds on one thread, here and there.
"""

import os
import shutil
import subprocess
import sys
import time

import jupytext
import pytest
import yaml

from tests.conftest import HEAD, Checkout

PAGES = [f"group/page{i}" for i in range(6)]
PAGE = (
    HEAD
    + """
# Page {i}

```{{code-cell}} python3
:tags: [parameters]

size: int = 700  # of the matrices
times: int = TIMES  # how often they are multiplied
seed: int = {i}  # of their numbers
```

```{{code-cell}} python3
import plotly.graph_objects
import seaborn
import torch

torch.set_num_threads(1)
```

```{{code-cell}} python3
generator = torch.Generator().manual_seed(seed)
matrix = torch.randn(size, size, generator=generator)
for _ in range(times):
    matrix = torch.nn.functional.normalize(matrix @ matrix)
matrix.norm().item()
```
"""
)


@pytest.fixture(scope="module")
def times() -> int:
    """How often the matrices are multiplied in five seconds on this machine, alone on one thread."""
    code = (
        "import time, torch; torch.set_num_threads(1); m = torch.randn(700, 700); t = time.perf_counter()\n"
        "for _ in range(50): m = torch.nn.functional.normalize(m @ m)\n"
        "print(int(5 * 50 / (time.perf_counter() - t)))"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def six_pages(folder, times: int) -> Checkout:
    checkout = Checkout(folder)
    book = folder / "book"
    shutil.rmtree(book / "group")
    (book / "group").mkdir()
    for i, name in enumerate(PAGES):
        (book / f"{name}.md").write_text(PAGE.format(i=i).replace("TIMES", str(times)))
    (book / "intro.md").write_text("# Six pages\n")
    (book / "claims.yml").write_text("[]\n")
    (book / "params/quick.yml").write_text("{}\n")
    page = {"budget": {"quick": 60, "full": 60}, "memory": 800}
    (book / "pages.yml").write_text(yaml.safe_dump({name: page for name in PAGES}))
    chapters = [{"file": name} for name in PAGES]
    (folder / "_toc.yml").write_text(
        yaml.safe_dump({"format": "jb-book", "root": "intro", "parts": [{"caption": "Pages", "chapters": chapters}]})
    )
    return checkout


def by_jupyter_book(checkout: Checkout) -> None:
    """The peer: jupyter-book runs the same pages itself, as notebooks, and renders them."""
    for name in PAGES:
        source = checkout.folder / "book" / f"{name}.md"
        jupytext.write(jupytext.read(source), source.with_suffix(".ipynb"))
        source.unlink()
    config = yaml.safe_load((checkout.folder / "_config.yml").read_text())
    config["execute"] = {"execute_notebooks": "force", "timeout": 300}
    config["sphinx"]["config"].pop("html_extra_path")
    (checkout.folder / "peer.yml").write_text(yaml.safe_dump(config))
    subprocess.run(
        [
            sys.executable,
            "-c",
            "from jupyter_book.cli.main import main; main()",
            "build",
            "book",
            "--all",
            "--config",
            "peer.yml",
            "--toc",
            str(checkout.folder / "_toc.yml"),
            "--path-output",
            "peer",
            "-q",
        ],
        cwd=checkout.folder,
        env=checkout.environment(),
        check=True,
        capture_output=True,
    )
    for name in PAGES:  # it did run them: the norm that each one ends in is on its page
        assert 'class="output text_plain' in (checkout.folder / f"peer/_build/html/{name}.html").read_text()


@pytest.mark.benchmark(group="whole build, six pages")
def test_build_beside_jupyter_book(benchmark, tmp_path, times):
    ours, peer = six_pages(tmp_path / "ours", times), six_pages(tmp_path / "peer", times)

    def both():
        began = time.perf_counter()
        code, output = ours.book("build", "--cores", "2")
        middle = time.perf_counter()
        assert code == 0, output
        by_jupyter_book(peer)
        return middle - began, time.perf_counter() - middle

    seconds, peers = benchmark.pedantic(both, rounds=1, iterations=1)
    began = time.perf_counter()
    assert ours.book("build", "--cores", "2")[0] == 0
    nothing = time.perf_counter() - began
    benchmark.extra_info.update(
        ours=seconds, jupyter_book=peers, ratio=peers / seconds, nothing_changed=nothing, cores=os.cpu_count()
    )
    print(f"\nthis pipeline {seconds:.1f} s, jupyter-book {peers:.1f} s: {peers / seconds:.2f}×; nothing changed {nothing:.2f} s")
