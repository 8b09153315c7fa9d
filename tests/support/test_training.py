"""The loop against a loop written out by hand, and every way in which a run can be cut short."""

import copy
import io
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nsm_support.training import CheckpointError, TrainingConfig, evaluating, fit, load_model, save_model

STEPS = 60
WEIGHT = torch.randn(8, 3, generator=torch.Generator().manual_seed(99))


@pytest.fixture(autouse=True)
def pipeline(monkeypatch):
    monkeypatch.setenv("NSM_BOOK_RUN", "1")


def make_model(dropout: float = 0.2, seed: int = 0) -> nn.Module:
    """A model with all that a resumed run could lose: dropout's stream, a buffer, two kinds of parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3))


def sample_batch(generator, batch_size):
    x = torch.randn(batch_size, 8, generator=generator)
    return x, (x @ WEIGHT).argmax(-1)


def loss_function(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def evaluate(model):
    x, y = sample_batch(torch.Generator().manual_seed(7), 500)
    torch.rand(3)  # an evaluation that draws from the global stream must not disturb the run
    return {"accuracy": (model(x).argmax(-1) == y).float().mean(), "noise": float(model.training)}


def settings(**changes) -> TrainingConfig:
    return TrainingConfig(
        **{"steps": STEPS, "batch_size": 32, "learning_rate": 0.02, "evaluation_interval": 7, "checkpoint_interval": 4} | changes
    )


def run(model=None, **changes):
    model = model or make_model()
    return model, fit(model, sample_batch, loss_function, settings(**changes), evaluate=evaluate)


def same(model, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def measured(history) -> list[dict]:
    """The records without what the clock decides, and with None for NaN, which equals nothing."""
    return [{k: None if v != v else v for k, v in record.items() if k != "seconds"} for record in history.records]


def test_it_learns_and_says_so():
    model, history = run(steps=300, evaluation_interval=100)
    table = history.frame()
    assert table["step"].tolist() == [0, 100, 200, 300]
    assert table["accuracy"].iloc[0] < 0.6 < 0.9 < table["accuracy"].iloc[-1]
    assert math.isnan(table["train_loss"].iloc[0]) and table["train_loss"].iloc[1:].is_monotonic_decreasing
    assert table["noise"].eq(0).all()  # evaluated in eval mode
    assert table["seconds"].iloc[0] == 0 and table["seconds"].is_monotonic_increasing
    assert history.resumed_at == 0
    assert evaluate(model.eval())["accuracy"] == history.records[-1]["accuracy"]


def test_the_loop_is_the_loop_written_out():
    config = settings(
        steps=25, learning_rate=0.03, weight_decay=0.1, gradient_clip=0.5, warmup=0.2, seed=3, evaluation_interval=10
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))
    twin = copy.deepcopy(model)
    history = fit(model, sample_batch, loss_function, config)

    matrices, plain = [twin[0].weight, twin[3].weight], [twin[0].bias, twin[1].weight, twin[1].bias, twin[3].bias]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0}])
    generator = torch.Generator().manual_seed(3)
    torch.empty((), dtype=torch.int64).random_(generator=generator)  # the seed of dropout's stream
    losses = []
    for step in range(25):
        rate = 0.03 * (step + 1) / 5 if step < 5 else 0.015 * (1 + math.cos(math.pi * (step - 5) / 20))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_function(twin, sample_batch(generator, 32))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in twin.parameters()))
        for p in twin.parameters():
            p.grad *= min(1, 0.5 / norm)
        optimizer.step()
    for ours, by_hand in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-5)
    expected = [sum(losses[:10]) / 10, sum(losses[10:20]) / 10, sum(losses[20:]) / 5]
    assert [record["step"] for record in history.records] == [0, 10, 20, 25]
    assert [record["train_loss"] for record in history.records[1:]] == pytest.approx(expected, rel=1e-4)
    assert history.records[-1]["learning_rate"] == pytest.approx(rate)


def test_a_run_is_its_seed_and_nothing_else():
    torch.manual_seed(1)
    model, history = run()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, other = run()
    assert torch.equal(before, torch.get_rng_state())  # the caller's stream is as it was
    assert same(model, again) and measured(history) == measured(other)
    assert not same(model, run(seed=1)[0])
    quiet = make_model()
    fit(quiet, sample_batch, loss_function, settings(evaluation_interval=1))
    assert same(model, quiet)  # however often it is evaluated


def test_modes_come_back_module_by_module():
    model = make_model()
    model.eval()
    model[3].train()
    modes = [module.training for module in model.modules()]
    run(model, steps=3)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        fit(model, sample_batch, lambda model, batch: 1 / 0, settings())
    assert [module.training for module in model.modules()] == modes
    with evaluating(model) as inside:
        assert not any(module.training for module in inside.modules()) and not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()


def test_on_step_comes_before_each_update_and_frozen_parameters_stay():
    model, seen = make_model(), []
    model[0].weight.requires_grad_(False)
    weight, bias = model[0].weight.clone(), model[0].bias.clone()
    fit(
        model,
        sample_batch,
        loss_function,
        settings(steps=5),
        on_step=lambda step, m, optimizer: seen.append((step, m is model, type(optimizer).__name__)),
    )
    assert seen == [(step, True, "AdamW") for step in range(5)]
    assert torch.equal(model[0].weight, weight) and not torch.equal(model[0].bias, bias)


class Stopped(BaseException):
    """A run that is cut off where the test says."""


@pytest.mark.parametrize("stop", [0, 4, 5, 59])
def test_cut_anywhere_and_resumed_it_is_the_uninterrupted_run(tmp_path, stop):
    def cut(step, model, optimizer):
        if step == stop:
            raise Stopped

    path = tmp_path / "run.pt"
    whole, history = run()
    with pytest.raises(Stopped):
        fit(make_model(), sample_batch, loss_function, settings(checkpoint=path), evaluate=evaluate, on_step=cut)
    torch.manual_seed(5)  # another process has another stream
    resumed, rest = run(make_model(seed=8), checkpoint=path) if stop >= 4 else run(checkpoint=path)
    assert rest.resumed_at == stop // 4 * 4
    assert same(whole, resumed) and measured(history) == measured(rest)
    assert [r["seconds"] for r in rest.records] == sorted(r["seconds"] for r in rest.records)
    done, final = run(make_model(seed=9), checkpoint=path)  # once more: it is at its end
    assert final.resumed_at == STEPS and same(whole, done) and measured(final) == measured(history)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    run(checkpoint=path)
    content = path.read_bytes()
    for change, message in (
        ({"learning_rate": 0.5}, "learning_rate = 0.02, not 0.5"),
        ({"seed": 2}, "seed = 0, not 2"),
        ({"steps": 70, "batch_size": 8}, "batch_size = 32, not 8, steps = 60, not 70"),
    ):
        with pytest.raises(CheckpointError, match=f"belongs to another run, of {message}: remove"):
            run(checkpoint=path, **change)
    with pytest.raises(CheckpointError, match="belongs to another model than this Linear"):
        fit(nn.Linear(8, 3), sample_batch, loss_function, settings(checkpoint=path))
    moved = tmp_path / "moved.pt"
    path.rename(moved)
    assert run(checkpoint=moved, checkpoint_interval=9)[1].resumed_at == STEPS  # where it is kept is no matter
    assert moved.read_bytes() == content
    save_model(moved, make_model())
    with pytest.raises(CheckpointError, match="another kind: it has no 'config'"):
        run(checkpoint=moved)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    run(checkpoint=path)
    whole = path.read_bytes()
    weights = next(iter(torch.load(io.BytesIO(whole), weights_only=True)["model"].values()))
    place = whole.index(weights.numpy().tobytes()) + 5
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]  # one bit of one weight
    for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2], whole[:-1], flipped):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"run\.pt is damaged or no checkpoint .*: remove it and run again"):
            run(checkpoint=path)
        with pytest.raises(CheckpointError, match="damaged"):
            load_model(path, lambda _: make_model())
    evil = {"config": {}, "run": print}
    torch.save(evil, path)
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):  # nothing but weights is ever unpickled
        run(checkpoint=path)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_step(wrong):
    model, states = make_model(), []

    def loss(model, batch):
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return loss_function(model, batch) * (wrong if len(states) == 4 else 1)

    with pytest.raises(FloatingPointError, match=f"at step 3 the loss is {wrong}"):
        fit(model, sample_batch, loss, settings())
    assert all(torch.equal(p, states[-1][name]) for name, p in model.named_parameters())  # the step was not taken


def test_a_gradient_that_is_not_finite_names_its_step():
    def loss(model, batch):  # sqrt(0): a finite loss whose gradient is not
        return loss_function(model, batch) + (model[4].weight - model[4].weight.detach()).norm(dim=1).sqrt().sum()

    with pytest.raises(FloatingPointError, match=r"at step 0 the loss is [\d.]+, its gradient nan"):
        fit(make_model(), sample_batch, loss, settings())


def test_a_parameter_made_in_forward_is_refused():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_model()

        def forward(self, x):
            if not hasattr(self, "late"):
                self.late = nn.Linear(3, 3)
            return self.late(self.inner(x))

    with pytest.raises(RuntimeError, match=r"late\.weight was made after the optimiser"):
        fit(Late(), sample_batch, loss_function, settings())
    with pytest.raises(ValueError, match="Tanh has no parameter"):
        fit(nn.Tanh(), sample_batch, loss_function, settings())


def test_the_bar_is_for_people_only(capfd, monkeypatch):
    run(steps=5)
    assert capfd.readouterr() == ("", "")
    monkeypatch.delenv("NSM_BOOK_RUN")
    run(steps=5)
    out, error = capfd.readouterr()
    assert "/5 [" in out and error == ""


def test_a_saved_model_is_built_again_from_its_metadata(tmp_path):
    path = tmp_path / "model.pt"
    model, _ = run(steps=5)
    metadata = {"config": {"dropout": 0.5, "seed": 4}, "accuracy": 0.25, "classes": ["a", "b"], "note": None}
    save_model(path, model, metadata)
    seen = []
    loaded = load_model(path, lambda data: seen.append(data) or make_model(**data["config"]))
    assert seen == [metadata] and same(loaded, model) and loaded[3].p == 0.5
    assert not any(module.training for module in loaded.modules())
    with pytest.raises(CheckpointError, match="another model than this Linear"):
        load_model(path, lambda _: nn.Linear(2, 2))
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "none.pt", lambda _: make_model())
    with pytest.raises(TypeError, match=r"only tensors, numbers, strings"):
        save_model(path, model, {"path": Path("x")})
    assert same(load_model(path, lambda _: make_model()), model)  # the refusal left the file alone


def test_weight_decay_spares_what_asks_to_be_spared():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.decays, self.stays = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
            self.stays.no_weight_decay = True

    model = Two()
    config = TrainingConfig(steps=5, batch_size=1, learning_rate=0.1, weight_decay=0.5)
    fit(model, lambda generator, size: None, lambda m, _: 0 * (m.decays.sum() + m.stays.sum()), config)
    assert (model.decays < 0.95).all() and torch.equal(model.stays, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("change", "returned", "message"),
    [
        ({}, {"step": 1.0}, "returned .'step'., names of the loop"),
        ({}, {"map": torch.ones(2)}, "'map', a Tensor"),
        ({}, {"word": "high"}, "'word', a str"),
        ({"steps": 0}, {}, "TrainingConfig: steps = 0; accepted is"),
        ({"checkpoint_interval": -1}, {}, "TrainingConfig: checkpoint_interval = -1; accepted is"),
        ({"learning_rate": math.nan}, {}, "TrainingConfig: learning_rate = nan; accepted is"),
        ({"gradient_clip": 0}, {}, "TrainingConfig: gradient_clip = 0; accepted is"),
        ({"warmup": 1.0}, {}, "TrainingConfig: warmup = 1.0; accepted is"),
        ({"weight_decay": -1}, {}, "TrainingConfig: weight_decay = -1; accepted is"),
    ],
)
def test_what_is_out_of_range_is_named(change, returned, message):
    with pytest.raises(ValueError, match=message):
        fit(make_model(), sample_batch, loss_function, settings(**change), evaluate=lambda model: returned)
