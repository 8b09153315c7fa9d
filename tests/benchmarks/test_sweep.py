"""What a run of a sweep costs beside the kernel that it needs: against a bare kernel, a shell loop over papermill, and a kill.

A trivial page imports nothing; a page that does nothing imports what the book's pages import.
"""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time

import jupytext
import psutil
import pytest

from tests.conftest import HEAD, Checkout

IMPORTS = "import plotly.graph_objects\nimport seaborn\nimport torch"
PAGE = (
    HEAD
    + """
# A page

```{{code-cell}} python3
:tags: [parameters]

seed: int = 0  # of nothing
```

```{{code-cell}} python3
{imports}
```
"""
)
KERNEL = """
import time
from jupyter_client.manager import start_new_kernel
for run in range({runs}):
    manager, client = start_new_kernel(extra_arguments=["--log-level=ERROR"])
    reply = client.execute_interactive({code!r})
    assert reply["content"]["status"] == "ok"
    client.stop_channels()
    manager.shutdown_kernel(now=True)
"""


def checkout(folder, runs: int, imports: str = "") -> Checkout:
    """A book of one page, and a sweep of so many runs of it."""
    made = Checkout(folder)
    (made.folder / "book/sweeps").mkdir()
    (made.folder / "book/group/first.md").write_text(PAGE.format(imports=imports))
    (made.folder / "book/params/quick.yml").write_text("{}\n")
    (made.folder / "book/pages.yml").write_text("group/first:\n  budget: {quick: 2, full: 2}\n  memory: 500\n")
    (made.folder / "book/claims.yml").write_text("[]\n")
    (made.folder / "book/sweeps/x.yml").write_text(f"page: group/first\nseeds: {list(range(runs))}\n")
    return made


def timed(work) -> tuple[float, float]:
    """Wall seconds, and processor seconds of all processes that were started."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    began, before = time.perf_counter(), used()
    work()
    return time.perf_counter() - began, used() - before


@contextlib.contextmanager
def two_cores():
    """Let what is started meanwhile have two cores and no more."""
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(every)[:2])
    try:
        yield
    finally:
        os.sched_setaffinity(0, every)


def sweep(made: Checkout, jobs: int) -> None:
    code, output = made.book("sweep", "x", "--jobs", str(jobs))
    assert code == 0, output


def whole(made: Checkout) -> int:
    return len(list((made.folder / "_build/sweeps/x").glob("*/results.json")))


@pytest.mark.benchmark(group="sweep: a page that does nothing")
def test_run_beside_a_bare_kernel(benchmark, tmp_path):
    runs, made = 12, checkout(tmp_path, 12, IMPORTS)
    bare = [sys.executable, "-c", KERNEL.format(runs=runs, code=IMPORTS)]
    kernel, kernel_busy = timed(lambda: subprocess.run(bare, check=True, env=made.environment()))
    ours, ours_busy = benchmark.pedantic(lambda: timed(lambda: sweep(made, 1)), rounds=1, iterations=1)
    benchmark.extra_info.update(run=ours / runs, kernel=kernel / runs, ratio=ours / kernel, processor=ours_busy / kernel_busy)
    print(
        f"\na run {ours / runs:.2f} s, a bare kernel {kernel / runs:.2f} s: {ours / kernel:.2f}×; "
        f"of processor time {ours_busy / kernel_busy:.2f}×"
    )
    assert ours / kernel <= 1.5


@pytest.mark.benchmark(group="sweep: 200 runs")
def test_two_hundred_runs_beside_a_loop_over_papermill(benchmark, tmp_path):
    runs, looped, made = 200, 20, checkout(tmp_path, 200)
    jupytext.write(jupytext.read(made.folder / "book/group/first.md"), tmp_path / "page.ipynb")
    loop = (
        f"for seed in $(seq {looped}); do {sys.executable} -m papermill --no-progress-bar -p seed $seed page.ipynb "
        f"out-$seed.ipynb; done"
    )
    with two_cores():
        ours, busy = benchmark.pedantic(lambda: timed(lambda: sweep(made, 2)), rounds=1, iterations=1)
    peer, _ = timed(
        lambda: subprocess.run(["bash", "-ec", loop], cwd=tmp_path, env=made.environment(), check=True, capture_output=True)
    )
    assert whole(made) == runs and len(list(tmp_path.glob("out-*.ipynb"))) == looped
    share = busy / (2 * ours)
    benchmark.extra_info.update(seconds=ours, run=ours / runs, papermill_run=peer / looped, busy=share)
    print(
        f"\n{runs} runs on 2 cores {ours:.0f} s, {ours / runs:.2f} s a run, cores {share:.0%} busy; "
        f"a loop over papermill {peer / looped:.2f} s a run: {peer / looped / (ours / runs):.2f}×"
    )
    assert share >= 0.85


@pytest.mark.benchmark(group="sweep: killed at half")
def test_a_sweep_that_is_killed_at_half_needs_the_other_half(benchmark, tmp_path):
    runs = 120
    made, killed = checkout(tmp_path / "whole", runs), checkout(tmp_path / "killed", runs)
    once, _ = timed(lambda: sweep(made, 2))
    process = killed.start("sweep", "x", "--jobs", "2")
    while whole(killed) < runs // 2:
        assert process.poll() is None
        time.sleep(0.02)
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.wait()
    rest, _ = benchmark.pedantic(lambda: timed(lambda: sweep(killed, 2)), rounds=1, iterations=1)
    benchmark.extra_info.update(whole=once, resumed=rest, share=rest / once)
    print(f"\na whole sweep {once:.1f} s, the rest of one killed at half {rest:.1f} s: {rest / once:.0%}")
    assert whole(killed) == runs and rest / once <= 0.55
