"""What a pass costs, on any model: operations, seconds, memory.

step = training_step(model, inputs)  # any function without arguments
flops(step), seconds({"ours": step, "theirs": other}, rounds=15), peak_memory("package.module:prepare", "ours", 4096)
"""

import gc
import importlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _lstm_layer(inputs, input_weight, hidden_weight, *_, out_shape=None, **__) -> int:
    """One direction of one layer: for each token, 4H gates from the token and from the state before."""
    return 2 * prod(inputs[:-1]) * (prod(input_weight) + prod(hidden_weight))


# What torch's counter takes for nothing, though kernels of the CPU (and any code with vectors) go through it.
FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *qkv, **_: sdpa_flop_count(*qkv[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *given, **_: sdpa_backward_flop_count(*given[:4]),
    aten.mkldnn_rnn_layer: _lstm_layer,
    aten.mkldnn_rnn_layer_backward: lambda *shapes, **__: 2 * _lstm_layer(*shapes),
    aten.mv: lambda matrix, vector, **_: 2 * prod(matrix),
    aten.addmv: lambda bias, matrix, vector, **_: 2 * prod(matrix),
    aten.dot: lambda vector, other, **_: 2 * prod(vector),
}


def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of one call: what the matrix products, convolutions and attentions in it take.

    A multiplication and an addition count as two, as in `torch.utils.flop_counter`, which does the counting. A call that
    also goes backward is counted with it. On tensors of the "meta" device nothing is computed and any size can be
    counted, through other kernels with the same products, except that attention goes unfused (see below).

    To know when reading the count:
    - On the CPU torch's counter misses fused attention, the LSTM (oneDNN) and products with a vector; here they count.
    - Causal attention counts as full attention, although a kernel may skip the half that is hidden.
    - Fused attention goes backward in five products, of which one makes the scores anew; unfused in four.
    - Pointwise kernels (sums, gates, activations, softmax) and reductions count nothing, as in most publications.
    - A kernel that neither torch nor this module has a formula for (cuDNN's LSTM, Triton's) counts nothing.
    """
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one kernel for a whole nn.TransformerEncoderLayer, not counted
    try:
        with counter:
            function()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()


def seconds(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Wall time of each function, once per round: the i-th times of two functions were taken one after the other.

    So what else the machine does meets them alike, and the ratio within a round is a paired one. Each function runs once before,
    untimed. Time is `time.perf_counter` on one CPU thread, without garbage collection; on CUDA after the device has finished.
    Torch's number of threads and the collector are afterwards as they were. Raises ValueError for no functions, or less than one
    round.
    """
    if not functions or rounds < 1:
        raise ValueError(f"seconds takes at least one function and one round; got {len(functions)} and {rounds!r}")
    finish = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    taken: dict[str, list[float]] = {name: [] for name in functions}
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    try:
        for function in functions.values():
            function()
        gc.collect()
        gc.disable()
        for _ in range(rounds):
            for name, function in functions.items():
                finish()
                start = time.perf_counter()
                function()
                finish()
                taken[name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()
    return taken


def peak_memory(prepare: str, *arguments: Any, warm_up: tuple | None = None, device: str = "cpu") -> float:
    """MiB by which memory grows, at its highest, during one call, in a fresh process with one thread.

    Args:
        prepare: importable name "package.module:function" of a function that makes models and inputs, which are not counted, and
            returns the function without arguments that is measured.
        arguments: of `prepare`; they are pickled.
        warm_up: arguments of a small case that is prepared and called before, so that libraries loaded at the first call do not
            count. Without it they do (some MiB).
        device: "cpu", or "cuda" where memory is that of torch's allocator (`torch.cuda.max_memory_allocated`).

    On Linux CPU memory is the resident set: its high-water mark (/proc/self/status, VmHWM), started anew before the call, minus
    what was resident then; steps of a page, and some 0.5 MiB of noise. On other systems it is `resource.getrusage`'s, which
    cannot be started anew: growth beyond the highest mark that preparation left, too small where preparation needed much memory
    for a moment. Raises RuntimeError with the error's type and message, where the process fails; with its exit code, where it is
    killed.
    """
    task = {"path": sys.path, "task": (prepare, arguments, warm_up, device)}
    code = "import pickle, sys; task = pickle.load(sys.stdin.buffer); sys.path[:] = task['path']; "
    code += "from nsm_support.costs import _measure_here; _measure_here(*task['task'])"
    # glibc would keep a freed block for the next one, and so hide growth; with a fixed threshold each is given back.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(task), capture_output=True, env=environment)
    if done.returncode:
        errors = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"peak_memory: the process for {prepare} ended with exit code {done.returncode}: {errors}")
    result = pickle.loads(done.stdout)
    if isinstance(result, str):
        raise RuntimeError(f"peak_memory: {prepare} failed: {result}")
    return result


def _measure_here(prepare: str, arguments: tuple, warm_up: tuple | None, device: str) -> None:
    """In the fresh process: measure, and write MiB, or what went wrong, pickled to stdout."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints must not mix with the answer
    try:
        torch.set_num_threads(1)
        module, _, name = prepare.partition(":")
        make = getattr(importlib.import_module(module), name)
        if warm_up is not None:
            make(*warm_up)()
        function = make(*arguments)
        gc.collect()
        result: float | str = (_growth_on_cuda if device == "cuda" else _growth)(function) / 2**20
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    with answer:
        pickle.dump(result, answer)


def _growth_on_cuda(function: Callable[[], Any]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def _growth(function: Callable[[], Any]) -> int:
    if not sys.platform.startswith("linux"):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        function()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit

    def resident(field: str) -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def count_parameters(module: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def match_parameters(build: Callable[[int], nn.Module], parameters: int, widths: Iterable[int]) -> tuple[int, nn.Module]:
    """The width at which `build(width)` has most nearly so many parameters, and the module, built once.

    The module is what `build(width)` gives under the present random state, which stays as it was: seed before each. Raises
    ValueError if the nearest is more than 5 % away.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        with torch.device("meta"):  # sizes without numbers, and without drawing any
            counts = {width: count_parameters(build(width)) for width in widths}
        if not counts:
            raise ValueError("match_parameters: no width was given to choose from")
        width = min(counts, key=lambda width: abs(counts[width] - parameters))
        if abs(counts[width] - parameters) > 0.05 * parameters:
            nearest = f"width {width} with {counts[width]:,}, of {len(counts)} widths from {min(counts)} to {max(counts)}"
            raise ValueError(f"no width gives {parameters:,} parameters within 5 %; nearest is {nearest}")
        return width, build(width)
