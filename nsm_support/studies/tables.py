"""The files of the BlockFFN experiment, with the fields that its first notebook reads: each is written whole or not at all.

Letters: L layers (routed ones), T tokens, E experts.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor

from nsm_support.blockffn.objectives import token_sparsity
from nsm_support.files import write_json, write_whole

# The columns that a table has at least, in this order; what else the rows hold follows.
ALPHA_SWEEP = ("alpha", "perplexity", "memory_gb", "tokens_per_second")
LAYER_REPLACEMENT = ("layer", "perplexity", "delta", "pct_change")
GATED_HYBRID = ("mode", "temperature", "threshold", "alpha", "perplexity", "delta", "pct_change")


def prompt_record(prompt: str, tokens: Sequence[str], activations: Tensor) -> dict[str, Any]:
    """One entry of `routing_signals.json`: of a prompt, its T tokens as strings, and activations [L,T,E].

    Beside the fields that the first notebook reads, `per_token_sparsity` {layer: [T]} and `active_experts` {layer: [T lists of
    experts]}: entry t belongs to tokens[t]. Raises ValueError if the activations are not of these tokens.
    """
    if activations.dim() != 3 or activations.shape[1] != len(tokens) or not len(tokens):
        raise ValueError(f"{len(tokens)} tokens take activations [L, {len(tokens)}, E]; got {list(activations.shape)}")
    active = (activations > 0).cpu()
    sparsity = token_sparsity(activations.cpu().double())  # (L, T)
    layers = range(len(activations))
    return {
        "prompt": prompt,
        "tokens": list(tokens),
        "seq_len": len(tokens),
        "overall_sparsity": sparsity.mean().item(),
        "per_layer_sparsity": {str(layer): sparsity[layer].mean().item() for layer in layers},
        "signal_shapes": {str(layer): list(active[layer].shape) for layer in layers},
        "per_token_sparsity": {str(layer): sparsity[layer].tolist() for layer in layers},
        "active_experts": {str(layer): [token.nonzero().flatten().tolist() for token in active[layer]] for layer in layers},
    }


def write_routing_signals(path: str | Path, model_name: str, prompts: Iterable[dict[str, Any]]) -> None:
    """Write `routing_signals.json`, whole or not at all: {model_name, prompts}, of entries by `prompt_record`.
    Raises ValueError if there is no prompt, or a number that is not finite.
    """
    prompts = list(prompts)
    if not prompts:
        raise ValueError("routing_signals.json needs at least one prompt")
    write_json(path, {"model_name": model_name, "prompts": prompts})


def write_alpha_sweep(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `alpha_sweep_results.csv`: alpha (Mamba's share, 0 … 1, "baseline" in the first row), perplexity, memory_gb,
    tokens_per_second, and what else the rows hold. Raises ValueError for another first row, an alpha outside 0 … 1, or a row
    without one of the columns.
    """
    rows = list(rows)
    first, *others = [row.get("alpha") for row in rows] or [None]
    if first != "baseline" or not all(isinstance(alpha, int | float) and 0 <= alpha <= 1 for alpha in others):
        raise ValueError(f"alpha is 'baseline' first and then lies in 0 … 1; got {[first, *others]}")
    # Plain decimals: readers of the column, where a word stands too, take digits and one point for a number.
    rows = [{**row, "alpha": f"{row['alpha']:.10f}".rstrip("0").rstrip(".") if row is not rows[0] else first} for row in rows]
    _write_table(path, ALPHA_SWEEP, rows)


def write_layer_replacement(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `layer_replacement_results.csv`: layer (a number, or a word such as "all"), perplexity, delta, pct_change,
    and what else the rows hold. Raises ValueError for a row without one of the columns.
    """
    _write_table(path, LAYER_REPLACEMENT, list(rows))


def write_gated_hybrid(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `gated_hybrid_results.csv`: mode, temperature, threshold, alpha (None where a mode has none), perplexity, delta,
    pct_change, and what else the rows hold. Raises ValueError if a mode carries the word "routing" and does not begin with it:
    readers select true routing by that word, so a control must not bear it. Or for a row without one of the columns.
    """
    rows = list(rows)
    for row in rows:
        mode = str(row.get("mode", "")).lower()
        if "routing" in mode and not mode.startswith("routing"):
            raise ValueError(f"mode {row['mode']!r} bears the word 'routing', which is kept for modes that begin with it")
    _write_table(path, GATED_HYBRID, rows)


def change(perplexity: float, baseline: float) -> dict[str, float]:
    """A perplexity beside the baseline's: `perplexity`, `delta` (their difference) and `pct_change` (in percent of it)."""
    delta = perplexity - baseline
    return {"perplexity": perplexity, "delta": delta, "pct_change": 100 * delta / baseline}


def _write_table(path: str | Path, columns: tuple[str, ...], rows: list[Mapping[str, Any]]) -> None:
    import pandas

    if not rows:
        raise ValueError(f"{path}: no rows to write")
    for number, row in enumerate(rows):
        if missing := [column for column in columns if column not in row]:
            raise ValueError(f"{path}: row {number} has no {', '.join(missing)}; it has {', '.join(row)}")
        for name, value in row.items():
            if isinstance(value, Real) and not math.isfinite(value):  # NumPy's numbers too
                raise ValueError(f"{path}: {name} of row {number} is {value}; None stands for what does not exist")
    others = dict.fromkeys(name for row in rows for name in row if name not in columns)  # of every row, in order
    write_whole(path, pandas.DataFrame(rows, columns=[*columns, *others]).to_csv(index=False))
