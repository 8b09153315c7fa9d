"""The experiment's files: their columns, what they refuse, and the first notebook's own cells run on them."""

import contextlib
import io
import json
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from nsm_support.studies.tables import (
    change,
    prompt_record,
    write_alpha_sweep,
    write_gated_hybrid,
    write_layer_replacement,
    write_routing_signals,
)

SWEEP = [
    {"alpha": "baseline", "perplexity": 30.0, "memory_gb": 0.5, "tokens_per_second": 900.0},
    {"alpha": 0.0, "perplexity": 30.0, "memory_gb": 0.5, "tokens_per_second": 901.5},
    {"alpha": 0.25, "perplexity": 31.25, "memory_gb": 0.5, "tokens_per_second": 700.0, "seed": 3},
    {"alpha": 1e-5, "perplexity": 40.5, "memory_gb": 0.25, "tokens_per_second": 1100.0},
    {"alpha": 1.0, "perplexity": 44.0, "memory_gb": 0.25, "tokens_per_second": 1200.0},
]
NONE = {"temperature": None, "threshold": None}
GATED = [
    {"mode": "baseline", **NONE, "alpha": None, **change(30.0, 30.0)},
    {"mode": "fixed_0.5", **NONE, "alpha": 0.5, **change(33.0, 30.0)},
    {"mode": "fixed_0.7", **NONE, "alpha": 0.7, **change(36.0, 30.0)},
    {"mode": "routing_hard", "temperature": None, "threshold": 0.8, "alpha": 0.5, **change(32.5, 30.0), "run": 0},
    {"mode": "routing_soft", "temperature": 0.5, "threshold": 0.75, "alpha": 0.5, **change(32.25, 30.0)},
    {"mode": "shuffled_hard", "temperature": None, "threshold": 0.8, "alpha": 0.5, **change(31.0, 30.0)},
]


def run_first_notebook(folder: Path, monkeypatch) -> tuple[str, int]:
    """All cells of the first notebook as they are, in a folder beside `outputs`; what they print, and how many figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    config = types.ModuleType("config")
    config.OUTPUT_DIR = Path("outputs")
    config.ROUTING_SIGNALS_PATH = config.OUTPUT_DIR / "routing_signals.json"
    config.ALPHA_SWEEP_RESULTS_PATH = config.OUTPUT_DIR / "alpha_sweep_results.csv"
    config.GATED_HYBRID_RESULTS_PATH = config.OUTPUT_DIR / "gated_hybrid_results.csv"
    (folder / "notebooks").mkdir()
    monkeypatch.setitem(sys.modules, "config", config)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(folder / "notebooks")
    cells = (Path(__file__).parent / "blockffn_notebook.txt").read_text().split("# %%\n")
    space, printed = {"display": print}, io.StringIO()
    plt.close("all")
    with contextlib.redirect_stdout(printed), plt.rc_context():
        plt.rcdefaults()  # whatever style another test has set
        for cell in cells:
            exec(compile(cell, "notebook", "exec"), space)
        figures = len(plt.get_fignums())
        plt.close("all")
    return printed.getvalue(), figures


def test_the_first_notebook_reads_the_files(tmp_path, monkeypatch):
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    activations = torch.zeros(2, 3, 4)
    activations[0, 0, 0] = activations[1, 2] = 1.0  # layer 0: 1 of 12 used; layer 1: 4 of 12
    longer = "And it came to pass in those days, that there went out a decree"
    records = [
        prompt_record("In the", ["In", " th", "e"], activations),
        prompt_record(longer, ["And", " it", "…"], activations[:, [1] * 3]),
    ]
    write_routing_signals(outputs / "routing_signals.json", "tiny", records)
    write_alpha_sweep(outputs / "alpha_sweep_results.csv", SWEEP)
    write_gated_hybrid(outputs / "gated_hybrid_results.csv", GATED)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    printed, figures = run_first_notebook(tmp_path, monkeypatch)
    assert figures == 5
    first, second = 1 - 5 / 24, 1.0
    for line in (
        "Number of prompts: 2",
        f"Mean sparsity: {(first + second) / 2:.3f}",
        "Tokens: ['In', ' th', 'e']",
        "Best routing-based: routing_soft (perplexity: 32.25)",
        "Best fixed alpha: fixed_0.5 (perplexity: 33.00)",
        "Baseline perplexity: 30.00",
        "Best routing-based perplexity: 32.25",
        "The hypothesis is SUPPORTED.",
    ):
        assert line in printed, line
    table = pd.read_csv(outputs / "alpha_sweep_results.csv")
    numeric = pd.to_numeric(table["alpha"][1:])
    assert numeric.tolist() == [0.0, 0.25, 1e-5, 1.0], "all of them pass the notebook's test for numbers"
    assert all(text.replace(".", "").isdigit() for text in table["alpha"][1:])


def test_columns_are_those_of_every_row(tmp_path):
    """The first row lacks what later rows have: neither a crash nor a lost column."""
    write_alpha_sweep(tmp_path / "sweep.csv", iter(SWEEP))  # any iterable of rows
    table = pd.read_csv(tmp_path / "sweep.csv")
    assert list(table) == ["alpha", "perplexity", "memory_gb", "tokens_per_second", "seed"]
    assert table["alpha"].tolist() == ["baseline", "0", "0.25", "0.00001", "1"]
    assert table["perplexity"].tolist() == [30.0, 30.0, 31.25, 40.5, 44.0] and table["seed"].count() == 1
    write_gated_hybrid(tmp_path / "gated.csv", iter(GATED))
    assert (tmp_path / "gated.csv").read_text().splitlines()[1] == "baseline,,,,30.0,0.0,0.0,", "None is an empty field"
    table = pd.read_csv(tmp_path / "gated.csv")
    assert list(table) == ["mode", "temperature", "threshold", "alpha", "perplexity", "delta", "pct_change", "run"]
    assert table["pct_change"].round(6).tolist() == [0.0, 10.0, 20.0, 8.333333, 7.5, 3.333333]
    assert table["temperature"].isna().tolist() == [True, True, True, True, False, True]
    rows = [{"layer": 3, **change(33.0, 30.0)}, {"layer": "all", **change(60.0, 30.0)}]
    (tmp_path / "layers.csv").write_text("what an earlier run left")
    write_layer_replacement(tmp_path / "layers.csv", iter(rows))
    assert {file.name for file in tmp_path.iterdir()} == {"sweep.csv", "gated.csv", "layers.csv"}
    table = pd.read_csv(tmp_path / "layers.csv")
    assert list(table) == ["layer", "perplexity", "delta", "pct_change"]
    numbers = {"perplexity": [33.0, 60.0], "delta": [3.0, 30.0], "pct_change": [10.0, 100.0]}
    assert table.to_dict("list") == {"layer": ["3", "all"], **numbers}


@pytest.mark.parametrize(
    ("write", "rows", "words"),
    [
        (write_alpha_sweep, SWEEP[1:], "'baseline' first"),
        (write_alpha_sweep, [SWEEP[0], {**SWEEP[1], "alpha": 1.5}], "0 … 1"),
        (write_alpha_sweep, [SWEEP[0], {**SWEEP[1], "alpha": -0.25}], "0 … 1"),
        (write_alpha_sweep, [SWEEP[0], SWEEP[0]], "0 … 1"),
        (write_alpha_sweep, [], "baseline"),
        (write_alpha_sweep, [SWEEP[0], {"alpha": 0.5, "perplexity": 3.0}], "row 1 has no memory_gb, tokens_per_second"),
        (write_gated_hybrid, [{**GATED[3], "mode": "shuffled_routing"}], "kept for modes that begin with it"),
        (write_gated_hybrid, [GATED[0], {**GATED[3], "mode": "Random Routing"}], "kept for modes"),
        (write_gated_hybrid, [{**GATED[3], "perplexity": float("inf")}], "perplexity of row 0 is inf"),
        (write_gated_hybrid, [GATED[0], {**GATED[3], "delta": float("nan")}], "delta of row 1 is nan"),
        (write_gated_hybrid, [{**GATED[3], "delta": np.float32("nan")}], "delta of row 0 is nan"),
        (write_gated_hybrid, [], "no rows"),
        (write_layer_replacement, [{"layer": 0, "perplexity": 1.0}], "row 0 has no delta, pct_change"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(tmp_path, write, rows, words):
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "results.csv", rows)
    assert not list(tmp_path.iterdir())


def counted(activations):
    """Every number of a record, by loops."""
    layers, tokens, experts = activations.shape
    used = [[[e for e in range(experts) if activations[i, t, e] > 0] for t in range(tokens)] for i in range(layers)]
    per_token = {str(i): [1 - len(used[i][t]) / experts for t in range(tokens)] for i in range(layers)}
    per_layer = {i: sum(values) / tokens for i, values in per_token.items()}
    return used, per_token, per_layer, sum(per_layer.values()) / layers


def test_file_holds_the_fields_and_the_tokens_own_numbers(tmp_path):
    path = tmp_path / "routing_signals.json"
    texts = [["In", " the", " begin", "ning"], ["And", " it", " ca", "me", " to", " pass"]]
    generator = torch.Generator().manual_seed(0)
    signals = [torch.randn(3, len(words), 6, generator=generator).relu() for words in texts]
    records = [prompt_record("".join(words), words, signal) for words, signal in zip(texts, signals, strict=True)]
    write_routing_signals(path, "tiny", iter(records))
    data = json.loads(path.read_text())
    assert data["model_name"] == "tiny" and len(data["prompts"]) == 2
    for words, signal, prompt in zip(texts, signals, data["prompts"], strict=True):
        used, per_token, per_layer, overall = counted(signal)
        assert prompt["prompt"] == "".join(words) and prompt["tokens"] == words and prompt["seq_len"] == len(words)
        assert prompt["signal_shapes"] == {str(i): [len(words), 6] for i in range(3)}
        assert prompt["active_experts"] == {str(i): used[i] for i in range(3)}
        assert prompt["overall_sparsity"] == pytest.approx(overall)
        assert prompt["per_layer_sparsity"] == pytest.approx(per_layer)
        for layer, values in per_token.items():
            assert prompt["per_token_sparsity"][layer] == pytest.approx(values)
        assert 0 < prompt["overall_sparsity"] < 1


@pytest.mark.parametrize("activations", [torch.rand(1, 3, 4), torch.rand(2, 4), torch.rand(1, 1, 2, 4)])
def test_record_refuses_signals_of_other_tokens(activations):
    with pytest.raises(ValueError, match="2 tokens take"):
        prompt_record("ab", ["a", "b"], activations)
    with pytest.raises(ValueError, match="0 tokens take"):
        prompt_record("", [], activations[:, :0])


def test_numbers_are_exact_whatever_the_models_type_is():
    """A share of experts is no bfloat16: 1/3 there is 0.3340."""
    record = prompt_record("ab", ["a", "b"], torch.tensor([[[0, 1, 2], [0, 0, 1]]], dtype=torch.bfloat16))
    assert record["per_token_sparsity"] == {"0": [pytest.approx(1 / 3, abs=1e-15), pytest.approx(2 / 3, abs=1e-15)]}
    assert record["overall_sparsity"] == pytest.approx(0.5, abs=1e-15)


def test_the_signals_file_refuses_what_it_cannot_hold_and_stays_as_it_was(tmp_path):
    path = tmp_path / "routing_signals.json"
    record = prompt_record("ab", ["a", "b"], torch.rand(1, 2, 3))
    write_routing_signals(path, "first", [record])
    old = path.read_bytes()
    for prompts, message in (([], "at least one"), ([record, {**record, "overall_sparsity": float("nan")}], "JSON")):
        with pytest.raises(ValueError, match=message):
            write_routing_signals(path, "second", prompts)
    assert path.read_bytes() == old and [file.name for file in tmp_path.iterdir()] == [path.name]
