"""The benchmark's harness: fair sizes, honest parts, every task in every model, a pool that leaves nothing behind."""

from dataclasses import replace

import pytest
import torch

from nsm_support.costs import count_parameters
from nsm_support.mixers import BASELINES, BaselineConfig
from nsm_support.studies import benchmark
from nsm_support.studies.benchmark import SETTINGS, models_of
from nsm_support.studies.protocol import measure
from nsm_support.tasks import TASKS

TINY = {name: replace(setting, steps=2, held_out=12, batch_size=4) for name, setting in SETTINGS.items()}
TINY["permuted_mnist"] = replace(TINY["permuted_mnist"], held_out=4)


def test_every_task_has_a_setting():
    assert SETTINGS.keys() == TASKS.keys()
    assert all(setting.task == name for name, setting in SETTINGS.items())


@pytest.mark.parametrize("name", SETTINGS)
def test_every_model_has_one_size_trains_on_every_task_and_is_scored_on_what_was_held_out(name):
    sizes = {}
    for model in models_of(name):
        rows = measure(replace(TINY[name], model=model, seed=1)).rows
        sizes[model] = rows[0]["parameters"]
        parts = [(row["part"], row["length"]) for row in rows]
        lengths = TINY[name].lengths or (0,)
        assert parts == [("untrained", lengths[0]), ("validation", 0), *(("test", length) for length in lengths)]
        assert all(0 <= row["accuracy"] <= 1 and 0 < row["nats"] < 50 and row["seed"] == 1 for row in rows)
    assert all(abs(size / sizes["Transformer"] - 1) <= 0.05 for size in sizes.values()), sizes


def test_training_improves_on_the_untrained_network():
    run = replace(SETTINGS["parity"], model="GRU", learning_rate=1e-2, steps=150, lengths=(20,), held_out=100)
    rows = {row["part"]: row for row in measure(run).rows}
    assert rows["test"]["nats"] < rows["untrained"]["nats"] - 0.3


def test_a_variant_changes_what_it_names_and_keeps_the_size():
    base, one = (replace(SETTINGS["mnist"], changes=changes).build() for changes in ({}, {"num_states": 1}))
    assert (base.config.num_states, one.config.num_states) == (8, 1)
    assert abs(count_parameters(one) / count_parameters(base) - 1) < 0.05


def test_an_unknown_model_is_refused_with_those_that_exist():
    with pytest.raises(
        ValueError, match=r"model = 'RNN'; accepted is one of 'NSM', 'Transformer', 'LSTM', 'GRU', 'Mamba', 'CNN'"
    ):
        replace(SETTINGS["mnist"], model="RNN").build()


def test_the_rate_is_chosen_on_validation_alone():
    def row(part, rate, accuracy, nats, variant=""):
        return {"task": "t", "model": "m", "variant": variant, "part": part, "rate": rate, "accuracy": accuracy, "nats": nats}

    rows = [
        row("validation", 0.1, 0.5, 1.0),
        row("test", 0.1, 0.9, 0.1),
        row("validation", 0.2, 0.6, 2.0),
        row("test", 0.2, 0.1, 9.0),
        row("validation", 0.3, 0.6, 1.5),
        row("validation", 0.4, 0.9, 0.1, "a variant"),
    ]
    assert benchmark.best_rates(rows) == {("t", "m"): 0.3}  # most accurate, then the smaller cross-entropy


@pytest.mark.parametrize("model", benchmark.MODELS)
def test_what_is_timed_is_as_large_as_the_transformer_and_leaves_gradients(model):
    size = count_parameters(benchmark.cost_model(model))
    reference = BASELINES["Transformer"](BaselineConfig(head="labelling", vocab_size=64, output_dim=64, token_dim=64))
    assert abs(size / count_parameters(reference) - 1) <= 0.05
    once = benchmark.training_pass(model, 300)  # more than two chunks
    once()
    network = next(cell.cell_contents for cell in once.__closure__ if isinstance(cell.cell_contents, torch.nn.Module))
    assert all(parameter.grad is not None for parameter in network.parameters())
    benchmark.stream_from(model, 9)()


def test_a_run_that_diverges_scores_nothing_and_its_rate_is_not_chosen(monkeypatch):
    run = replace(TINY["recall"], model="GRU")
    monkeypatch.setattr(benchmark, "cross_entropy", lambda model, batch: model(batch.inputs).sum() * torch.nan)
    untrained, *rows = measure(run).rows
    assert 0 < untrained["nats"] < 50 and [row["part"] for row in rows] == ["validation", "test"]
    assert all((row["accuracy"], row["nats"]) == (0, float("inf")) for row in rows)
