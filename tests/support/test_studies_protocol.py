"""What holds for every study: equal runs give equal results, the untrained model is the seed's, and a pool changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nsm_support.blockffn.model import BlockFFNConfig, BlockFFNModel
from nsm_support.corpus import load_corpus
from nsm_support.crystalline import BottleneckConfig, CrystallineConfig
from nsm_support.crystalline.recurrent.training import RecurrentTraining
from nsm_support.studies.benchmark import SETTINGS
from nsm_support.studies.codes import CodesRun
from nsm_support.studies.gate_comparison import GateRun
from nsm_support.studies.language_model import LanguageModelRun, save_trained
from nsm_support.studies.protocol import measure, measure_all, rows_of
from nsm_support.studies.recurrent import RecurrentRun
from nsm_support.studies.sidecars import Mixture, Setup, SidecarRun, SweepRun, make_sidecars, save_sidecars

STUDIES = ("benchmark", "codes", "language model", "recurrent", "sidecars", "sweep", "gates")
LANGUAGE_MODEL = BlockFFNConfig(vocab_size=270, token_dim=16, num_layers=2, num_heads=2, num_experts=6, expert_size=4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A small run of each study."""
    folder, draw = tmp_path_factory.mktemp("studies"), np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefgh"), 5)) for _ in range(50)]
    text, models, sidecars = (str(folder / name) for name in ("text.txt", "models.pt", "sidecars.pt"))
    (folder / "text.txt").write_text("\n\n".join(" ".join(draw.choice(words, 120)) + "." for _ in range(200)))
    torch.manual_seed(0)
    model = BlockFFNModel(LANGUAGE_MODEL)
    save_trained(models, {0: model}, load_corpus(text, vocab_size=270).tokenizer)
    save_sidecars(sidecars, {(0, seed): make_sidecars(model, seed, {"expand": 1}) for seed in (3, 4)}, {"expand": 1})
    setup = Setup(models=models, text=text, window=24)
    hybrid = {"setup": setup, "base": 0, "seed": 3}
    bottleneck = BottleneckConfig(codebook_size=6, lay_every=5)
    transformer = CrystallineConfig(vocab_size=24, token_dim=16, num_layers=1, num_heads=2, max_length=12, bottleneck=bottleneck)
    training = RecurrentTraining(steps=4, record_every=2)
    made = (
        replace(SETTINGS["recall"], model="GRU", steps=3, seed=3, held_out=12),
        CodesRun(model=transformer, seed=3, length=12, batch_size=8, steps=6, records=2, held_out=12),
        LanguageModelRun(model=LANGUAGE_MODEL, text=text, seed=3, window=64, steps=4, records=2, validated=3, held_out=2),
        RecurrentRun(machine="parity", seeds=(3, 4), training=training, num_codes=8, strings=10),
        SidecarRun(**hybrid, mamba={"expand": 1}, distil_steps=8, tune_steps=2),
        SweepRun(**hybrid, sidecars=sidecars, mixtures=(Mixture((0.5, 1.0)), Mixture((1.0, 1.0), "silent"))),
        GateRun(**hybrid, sidecars=sidecars, mode="learned_soft", steps=2, map_steps=2),
    )
    return dict(zip(STUDIES, made, strict=True))


@pytest.fixture(scope="module")
def results(runs):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {name: measure(run) for name, run in runs.items()}
    torch.set_num_threads(threads)


def comparable(result):
    """All of a result that no clock decides."""
    rows, history = ([{k: v for k, v in row.items() if k != "seconds"} for row in part] for part in (result.rows, result.history))
    return [rows, history, result.state, result.tensors]


def assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        assert_equal(list(a.values()), list(b.values()))
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b or (a != a and b != b)


@pytest.mark.parametrize("name", STUDIES)
def test_a_repeat_gives_every_value_again_and_leaves_the_global_random_state_alone(runs, results, name):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = measure(runs[name])
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(comparable(again), comparable(results[name]))


@pytest.mark.parametrize("name", STUDIES)
def test_another_seed_gives_another_result(runs, results, name):
    changed = {"seeds": (4, 5)} if name == "recurrent" else {"seed": 4}
    if name == "sweep":  # of the untrained sidecars alone
        changed["mixtures"] = (Mixture((1.0, 1.0), "untrained"),)
        results = {name: measure(replace(runs[name], mixtures=changed["mixtures"]))}
    other = measure(replace(runs[name], **changed))
    with pytest.raises(AssertionError):
        assert_equal(comparable(other)[2:], comparable(results[name])[2:])


@pytest.mark.parametrize("name", STUDIES)
def test_rows_are_labelled_and_the_model_is_the_trained_one(runs, results, name):
    run, result = runs[name], results[name]
    assert result.run == run and result.rows and all(run.labels().items() <= row.items() for row in result.rows)
    assert all(row["seconds"] == result.seconds > 0 for row in result.rows)
    if not run.keeps_state:
        assert result.state == {}
        return
    model = result.model()
    assert_equal(model.state_dict(), model.state_dict() | result.state)
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        untrained = run.build().state_dict()
    assert any(not torch.equal(value, untrained[key]) for key, value in result.state.items()) and not model.training


@pytest.mark.parametrize("name", ["benchmark", "codes", "language model"])
def test_the_training_begins_with_the_untrained_model_of_the_seed(runs, results, name, monkeypatch):
    run, seen, key = runs[name], [], next(iter(results[name].state))
    monkeypatch.setattr(type(run), "before_step", lambda self, step, model: seen.append(model.state_dict()[key].clone()))
    measure(run)
    torch.manual_seed(run.seed)
    assert len(seen) == run.steps and torch.equal(seen[0], run.build().state_dict()[key])
    records = results[name].history
    assert records[0]["step"] == 0 and np.isnan(records[0]["train_loss"]) and records[-1]["step"] == run.steps


def test_a_pool_gives_what_one_process_gives_in_the_order_of_the_runs(runs, results):
    pooled = measure_all(runs.values(), workers=2)
    for one, alone in zip(pooled, results.values(), strict=True):
        assert_equal(comparable(one), comparable(alone))
    assert len(rows_of(pooled)) == sum(len(result.rows) for result in pooled)
    with pytest.raises(ValueError, match="model = 'none of them'"):  # a run that fails says why
        measure_all([replace(runs["benchmark"], model="none of them")])


def test_a_loss_that_is_not_finite_is_an_error_where_the_study_does_not_score_it(runs):
    with pytest.raises(FloatingPointError, match="at step 0"):
        measure(replace(runs["codes"], compress=float("nan")))
