"""Runs in processes of their own: in order, on one thread, with their errors, and never longer than the page."""

import math
import operator
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from nsm_support.workers import run_all


def test_results_come_in_order_from_processes_of_one_thread_and_an_error_ends_the_call():
    assert run_all(math.factorial, range(20)) == [math.factorial(n) for n in range(20)]
    assert os.getpid() not in run_all(operator.methodcaller("__call__"), [os.getpid] * 4)
    assert run_all(operator.methodcaller("__call__"), [torch.get_num_threads] * 2) == [1, 1]
    with pytest.raises(ValueError, match="factorial"):
        run_all(math.factorial, [1, -1, 2])
    assert run_all(math.factorial, [3]) == [6]


@pytest.mark.slow
def test_an_interrupt_ends_workers_without_a_word_and_the_next_call_gets_new_ones():
    code = """
import math, time
from concurrent.futures.process import BrokenProcessPool
from nsm_support.workers import run_all
run_all(math.factorial, [1, 2])
print("up", flush=True)
try:
    run_all(time.sleep, [60, 60])
except (KeyboardInterrupt, BrokenProcessPool):  # the workers' end may be noticed first
    print(run_all(math.factorial, [3]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "NSM_BOOK_RUN": "1"},
    )
    assert process.stdout.readline() == "up\n"
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60) == ("[6]\n", "")


@pytest.mark.slow
def test_workers_do_not_outlive_a_process_that_was_killed():
    code = (
        "import os, time; from nsm_support import workers; pool = workers._pool(2);"
        "print(*{pool.submit(os.getpid).result() for _ in range(2)}, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    workers = [int(number) for number in process.stdout.readline().split()]
    assert workers and all(psutil.pid_exists(worker) for worker in workers)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 20
    while any(psutil.pid_exists(worker) for worker in workers) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(worker) for worker in workers)
