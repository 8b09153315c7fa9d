"""Many runs at once: calls of one function in processes of their own, one thread each.

Small models on small batches leave a second core idle; a second process does not. The processes are spawned (a fork of a
process with torch's threads may hang) and stay for the whole page, since one takes two seconds to start.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from typing import Any

import torch
from tqdm import tqdm


def _end_with_parent() -> None:
    """Let no worker outlive a kernel that was killed: its end of the pipe alone would not wake it. And let an interrupt,
    which reaches the kernel's workers too, end them without a traceback each.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in workers alone"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@cache
def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent)


def _alone(function: Callable[..., Any], run: Any) -> Any:
    torch.set_num_threads(1)
    return function(run)


def run_all(function: Callable[[Any], Any], runs: Iterable[Any], workers: int = 2) -> list[Any]:
    """`function(run)` for every run, `workers` at once; the results in the order of the runs.

    Runs are started in their order, so give the longest first. Progress and the time left go to stdout, unless the
    pipeline runs the page. The first error ends the call, and the runs that have not begun.

    Args:
        function: of a module that a fresh process can import; not one that a notebook defines.
        runs: its arguments, which can be pickled, as can the results.
    """
    futures = [_pool(workers).submit(partial(_alone, function), run) for run in runs]
    try:
        for future in tqdm(
            as_completed(futures), total=len(futures), file=sys.stdout, leave=False, disable="NSM_BOOK_RUN" in os.environ
        ):
            future.result()
    except BaseException:  # an interrupt may have ended workers: the next call gets new ones
        try:
            _pool(workers).shutdown(wait=False, cancel_futures=True)
        finally:  # also if it comes only now, after the workers' end
            _pool.cache_clear()
        raise
    return [future.result() for future in futures]
