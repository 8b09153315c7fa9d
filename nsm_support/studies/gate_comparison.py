"""Gates compared: each on the same sidecars, tuned alike, at the same mean α.

Runs of one base model and seed begin with the same sidecars and see the same batches, whatever their gate. Letters: L
layers, T tokens of a window.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from nsm_support.blockffn.gates import MODES, Gate
from nsm_support.blockffn.hybrid import GatedHybridLayer, calibrate, detach, tune
from nsm_support.blockffn.model import BlockFFNLayer, BlockFFNModel
from nsm_support.data import window_sampler
from nsm_support.studies.protocol import Row, Scores
from nsm_support.studies.sidecars import AttachedRun, attach_all, evenly, gates_of, load_windows, score_windows
from nsm_support.training import TrainingConfig

GATES = (*MODES, "inverted_hard", "inverted_soft")
CALIBRATION = 64  #: windows of training chapters, at most, that thresholds are set on
OTHER_DRAWS = 1_000_000_000  #: what a batch of training adds to the seed of a gate's draws


class InvertedGate(Gate):
    """Gives to Mamba what another gate would keep from it, at the same mean: of "routing", the tokens with dense routing."""

    def __init__(self, mode: str, alpha: float = 0.5, **options: Any):
        super().__init__(mode, 1 - alpha, **options)

    def forward(self, x: Tensor, sparsity: Tensor | None = None, distance: Tensor | None = None) -> Tensor:
        alpha = super().forward(x, sparsity, distance)
        return ~alpha if self.hard else 1 - alpha


@dataclass(frozen=True, kw_only=True, slots=True)
class GateRun(AttachedRun):
    """One gate on test chapters, calibrated on training chapters: on the sidecars as they are, and tuned under it.

    All gates of one base and seed are tuned from the same sidecars, on the same batches, as often and at the same rate;
    what a gate draws is drawn anew for every batch. A learned gate's map is trained before, through the soft gate; the
    sidecars then begin as everybody's.

    Rows: `part` "before" and, with steps, "after" tuning: `nats`, and mean `alpha`. The tensors: `before` and `after`, each
    a `WindowScores`; `threshold` [L] in the end (NaN for "fixed"); `calibrated`, the mean α [L] that calibration reached;
    `batches`, the sum of the token numbers that tuning saw, equal for equal batches.
    """

    mode: str  #: of GATES
    alpha: float = 0.5
    temperature: float = 0.5
    steps: int = 40  #: updates under this gate
    map_steps: int = 0  #: of "learned" alone: updates beforehand, of which only the gate's map is kept
    batch_size: int = 8
    learning_rate: float = 1e-3

    def labels(self) -> Row:
        return {"mode": self.mode, "base": self.base, "seed": self.seed}

    def make_gate(self, layer: int, width: int) -> Gate:
        """The gate of one layer, with draws of its own."""
        kind = InvertedGate if self.mode.startswith("inverted") else Gate
        mode, seed = self.mode.replace("inverted", "routing"), 1_000 * self.own_seed + layer
        return kind(mode, self.alpha, width=width, temperature=self.temperature, seed=seed)

    def build(self) -> BlockFFNModel:
        """The base model with sidecars and calibrated gates."""
        model, maps = self.base_model(), []
        if self.mode.startswith("learned") and self.map_steps:
            self._attach(model, replace(self, mode="learned_soft"))
            self._calibrate(model)
            self._tune(model, self.map_steps, self.own_seed + 500_000)
            maps = [gate.map.state_dict() for gate in gates_of(model)]
            detach(model)
        self._attach(model, self)
        for gate, state in zip(gates_of(model), maps, strict=bool(maps)):
            gate.map.load_state_dict(state)
        self._calibrate(model)
        return model

    def _attach(self, model: BlockFFNModel, run: "GateRun") -> None:
        attach_all(model, self.load_sidecars(), lambda i: run.make_gate(i, model.config.token_dim))

    def _calibrate(self, model: BlockFFNModel) -> list[float]:
        """Set the thresholds, and return the mean α [L] that they reach."""
        tokens = evenly(load_windows(self.setup).train.flatten(0, 1), CALIBRATION)[:, :-1]
        return list(calibrate(model, tokens).values())

    def _tune(self, model: BlockFFNModel, steps: int, seed: int) -> tuple[list[Row], int]:
        gates, seen = gates_of(model), 0
        seeds = [gate.seed for gate in gates]
        sample = window_sampler(load_windows(self.setup).stream, self.setup.window)

        def sample_and_draw(generator: Generator, batch_size: int) -> tuple[Tensor, Tensor]:
            nonlocal seen
            batch = sample(generator, batch_size)
            seen += int(batch[0].sum())
            for gate in gates:
                gate.seed += OTHER_DRAWS
            return batch

        plan = TrainingConfig(steps=steps, seed=seed, batch_size=self.batch_size, learning_rate=self.learning_rate)
        history = tune(model, sample_and_draw, plan)
        for gate, original in zip(gates, seeds, strict=True):
            gate.seed = original
        return history.records, seen

    def train(self, model: BlockFFNModel) -> Scores:
        history, seen = self._tune(model, self.steps, self.own_seed) if self.steps else ([], 0)
        return Scores(tensors={"batches": seen}, history=history)

    def score(self, model: BlockFFNModel, trained: bool) -> Scores:
        part, rows = "after" if trained else "before", []
        tensors: dict[str, Any] = {}
        if trained:
            tensors["calibrated"] = self._calibrate(model)
            tensors["threshold"] = [gate.threshold.item() for gate in gates_of(model)]
        if self.steps or not trained:
            tensors[part] = scored = score_windows(model, load_windows(self.setup).test)
            rows = [{"part": part, "nats": scored.nats.mean().item(), "alpha": scored.alpha.mean().item()}]
        return Scores(rows, tensors)


def layer_passes(run: GateRun, tokens: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Passes of layer 0 over tokens [B,T] of any length, no gradient: by "attention", by the "gate" and by the "sidecar".

    The gate is calibrated on these tokens; its own cost, that of the router that it asks, is in its time.
    """
    model = run.base_model()
    sidecar, layer = run.load_sidecars()[0], model.layers[0]
    assert isinstance(layer, BlockFFNLayer)
    x = model.model.embed_tokens(tokens.to(run.setup.device)).detach() * model.config.scale_emb
    gates = {"gate": run.make_gate(0, x.shape[-1]), "sidecar": Gate("fixed", 1.0)}
    passes: dict[str, nn.Module] = {"attention": layer} | {
        n: GatedHybridLayer(layer, sidecar, gate, "own").eval() for n, gate in gates.items()
    }
    gates["gate"].calibrating = True
    with torch.no_grad():
        passes["gate"](x)
    gates["gate"].calibrating = False
    return {name: torch.no_grad()(lambda module=module: module(x)[0]) for name, module in passes.items()}
