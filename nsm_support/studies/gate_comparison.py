"""Gates compared: each on the same sidecars, tuned alike, at the same mean α.

`compare_gate` is a function of one run, which `nsm_support.workers` can call. Runs of one base model and seed begin with
the same sidecars and see the same batches, whatever their gate.

Letters: L layers, T tokens of a window.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from nsm_support.blockffn.gates import MODES, Gate
from nsm_support.blockffn.hybrid import GatedHybridLayer, calibrate, detach, tune
from nsm_support.data import window_sampler
from nsm_support.studies.sidecars import Material, attach_all, evenly, load, own_seed, pieces, score, sidecars_of
from nsm_support.training import TrainingConfig

GATES = (*MODES, "inverted_hard", "inverted_soft")
CALIBRATION = 64  #: windows of training chapters, at most, that thresholds are set on


@dataclass(frozen=True, kw_only=True, slots=True)
class GateRun:
    """All that decides one gate's result: what it is, and the sidecars that it begins with."""

    material: Material
    sidecars: str  #: a file by `save_sidecars`
    base: int
    seed: int  #: with that of the base model, of the sidecars, of the batches, and of the gate's draws
    mode: str  #: of GATES
    alpha: float = 0.5
    temperature: float = 0.5
    steps: int = 40  #: updates under this gate
    map_steps: int = 0  #: of "learned" alone: updates beforehand, of which only the gate's map is kept
    batch_size: int = 8
    learning_rate: float = 1e-3


class InvertedGate(Gate):
    """Gives to Mamba what another gate would keep from it, at the same mean: of "routing", the tokens with dense routing."""

    def __init__(self, mode: str, alpha: float = 0.5, **options: Any):
        super().__init__(mode, 1 - alpha, **options)

    def forward(self, *inputs: Tensor, **signals: Tensor) -> Tensor:
        alpha = super().forward(*inputs, **signals)
        return ~alpha if self.hard else 1 - alpha


def make_gate(run: GateRun, layer: int, width: int) -> Gate:
    """The gate of one layer, with draws of its own."""
    options = {"width": width, "temperature": run.temperature, "seed": 1_000 * own_seed(run) + layer}
    kind, _, shape = run.mode.partition("_")
    if kind == "inverted":
        return InvertedGate(f"routing_{shape}", run.alpha, **options)
    return Gate(run.mode, run.alpha, **options)


def layer_passes(run: GateRun, tokens: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Passes of layer 0 over tokens [B,T] of any length, no gradient: by "attention", by the "gate" and by the "sidecar".

    The gate is calibrated on these tokens; its own cost, that of the router that it asks, is in its time.
    """
    model = load(run.material).models[run.base]
    sidecar, layer = sidecars_of(run)[0], model.layers[0]
    x = model.model.embed_tokens(tokens.to(run.material.device)).detach() * model.config.scale_emb
    gates = {"gate": make_gate(run, 0, x.shape[-1]), "sidecar": Gate("fixed", 1.0)}
    passes = {"attention": layer} | {n: GatedHybridLayer(layer, sidecar, gate, "own").eval() for n, gate in gates.items()}
    gates["gate"].calibrating = True
    with torch.no_grad():
        passes["gate"](x)
    gates["gate"].calibrating = False
    return {name: torch.no_grad()(lambda module=module: module(x)[0]) for name, module in passes.items()}


def compare_gate(run: GateRun) -> dict[str, Any]:
    """One gate on test chapters, calibrated on training chapters: on the sidecars as they are, and tuned under it.

    All gates of one base and seed are tuned from the same sidecars, on the same batches, as often and at the same rate;
    what a gate draws (shuffles, lots) is drawn anew for every batch. A learned gate's map is trained before, through the
    soft gate; the sidecars then begin as everybody's.

    Returns:
        before, after: `Scored` before and after tuning. threshold: [L] after tuning (NaN for "fixed"). calibrated: the
        mean α [L] that calibration reached. batches: sum of the token numbers that tuning saw, equal for equal batches.
    """
    text, model = pieces(run.material), load(run.material).models[run.base]
    calibration = evenly(text.train.flatten(0, 1), CALIBRATION)[:, :-1]
    sample, width = window_sampler(text.stream, run.material.window), model.config.token_dim
    seen = 0

    def ready(mode_run: GateRun) -> list[Gate]:
        attach_all(model, sidecars_of(run), lambda i: make_gate(mode_run, i, width))
        return [layer.gate for layer in model.layers]

    def train(gates: list[Gate], steps: int, seed: int) -> None:
        seeds = [gate.seed for gate in gates]

        def sample_anew(generator: Generator, batch_size: int) -> tuple[Tensor, Tensor]:
            nonlocal seen
            batch = sample(generator, batch_size)
            seen += int(batch[0].sum())
            for gate in gates:
                gate.seed += 1_000_000_000
            return batch

        plan = {"batch_size": run.batch_size, "learning_rate": run.learning_rate}
        tune(model, sample_anew, TrainingConfig(steps=steps, seed=seed, **plan))
        for gate, original in zip(gates, seeds, strict=True):
            gate.seed = original

    maps = None
    if run.mode.startswith("learned") and run.map_steps:
        gates = ready(replace(run, mode="learned_soft"))
        calibrate(model, calibration)
        train(gates, run.map_steps, own_seed(run) + 500_000)
        maps = [gate.map.state_dict() for gate in gates]
        detach(model)
    gates, seen = ready(run), 0
    for gate, state in zip(gates, maps or (), strict=maps is not None):
        gate.map.load_state_dict(state)
    calibrate(model, calibration)
    before = score(model, text.test)
    if run.steps:
        train(gates, run.steps, own_seed(run))
    reached = calibrate(model, calibration)
    return {
        "before": before,
        "after": score(model, text.test) if run.steps else before,
        "batches": seen,
        "threshold": [gate.threshold.item() for gate in gates],
        "calibrated": list(reached.values()),
    }
