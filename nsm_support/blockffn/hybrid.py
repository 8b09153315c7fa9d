"""Hybrids: a trained model some of whose attention a Mamba sidecar takes over, token by token, as a gate says.

Letters: B batch, T tokens, D token width. α is Mamba's share: out = (1−α)·Attn(h) + α·Mamba(h), the FFN untouched.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from nsm_support.blockffn.gates import Gate
from nsm_support.blockffn.model import BlockFFNLayer, BlockFFNModel, losses
from nsm_support.blockffn.objectives import token_sparsity
from nsm_support.blockffn.router import BlockRouter, Routed
from nsm_support.checks import check_choice
from nsm_support.mixers.mamba import MambaBlock, MambaStream
from nsm_support.training import History, TrainingConfig, evaluating, fit

SOURCES = ("previous", "own")


class MambaSidecar(nn.Module):
    """A norm and a Mamba mixer (Gu & Dao 2023, arXiv:2312.00752), to stand where an attention stands.

    It has no residual of its own: as with the attention that it replaces, the layer's residual goes around it. Options
    besides the width D are those of `nsm_support.mixers.mamba.MambaBlock`.
    """

    def __init__(self, dim: int, **mamba: Any):
        super().__init__()
        self.norm, self.block = nn.RMSNorm(dim, eps=1e-5), MambaBlock(dim, **mamba)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B,T,D] → [B,T,D], each from itself and those before it."""
        return self.block(self.norm(x))

    def start(self, batch_size: int) -> MambaStream:
        """The memory before the first token; its size does not grow."""
        return self.block.start(batch_size)

    def step(self, x: Tensor, stream: MambaStream) -> tuple[Tensor, MambaStream]:
        """The next token of each sequence [B,D] → its output as in `forward`, and the memory after it."""
        return self.block.step(self.norm(x), stream)


Sidecars = Mapping[int, MambaSidecar]  #: by layer number
Sampler = Callable[[Generator, int], tuple[Tensor, Tensor]]  #: a generator and a batch size → inputs and targets [B,T]
Evaluate = Callable[[nn.Module], Mapping[str, float]]


class GatedHybridLayer(nn.Module):
    """A layer whose tokens are mixed by its attention, by a sidecar, or by both.

    What α takes away is not computed: where α is 0 for every token the sidecar does not run, where it is 1 attention
    does not, and a hard gate leaves the queries of Mamba's tokens out (`CausalAttention.forward` with positions). The
    sidecar reads all tokens if it runs at all, since its state comes from all of them.

    Args:
        layer: the layer, kept whole in `layer`. sidecar, gate: kept under these names.
        source: where the gate's sparsity comes from, which has to exist before the mixing: "previous", the routing of
            the same token in the layer before; or "own", this layer's router on what enters the mixing, under the norm
            that it was trained with.

    Raises ValueError for another source.
    """

    def __init__(self, layer: BlockFFNLayer, sidecar: MambaSidecar, gate: Gate, source: str = "previous"):
        super().__init__()
        check_choice(self, SOURCES, source=source)
        self.layer, self.sidecar, self.gate, self.source = layer, sidecar, gate, source

    def forward(self, x: Tensor, previous: Routed | None = None) -> tuple[Tensor, Routed | None]:
        """As `BlockFFNLayer.forward`. Raises ValueError if the gate needs a layer before and there is none."""
        return self.layer.finish(x, self.mix(x, previous))

    def mix(self, x: Tensor, previous: Routed | None = None) -> Tensor:
        """(1−α)·Attn(h) + α·Mamba(h) [B,T,D] of what enters the layer [B,T,D], h its norm."""
        h = self.layer.input_layernorm(x)
        sparsity = self._sparsity(x, previous) if self.gate.needs_routing else None
        if self.gate.kind == "oracle":
            attended, scanned = self.layer.self_attn(h), self.sidecar(h)
            alpha = self.gate(h, distance=(attended - scanned).square().mean(-1))
            return torch.lerp(attended, scanned, alpha.to(h.dtype)[..., None])
        alpha = self.gate(h, sparsity)
        if not alpha.any():
            return self.layer.self_attn(h)
        scanned = self.sidecar(h)
        if (alpha == 1).all():
            return scanned
        if alpha.dtype == torch.bool:
            return put_attention(self.layer.self_attn, h, scanned, ~alpha)
        return torch.lerp(self.layer.self_attn(h), scanned, alpha[..., None])

    def _sparsity(self, x: Tensor, previous: Routed | None) -> Tensor:
        if self.source == "previous":
            if previous is None:
                raise ValueError("no routed layer comes before this one; source='own' asks its own router")
            return token_sparsity(previous.scores.detach())
        # From the weights, so that hooks on the router see what the FFN asks it and nothing else.
        router, z = self.layer.mlp, self.layer.post_attention_layernorm(x)
        if not isinstance(router, BlockRouter):
            raise ValueError("a dense layer has no router of its own to ask; source='previous' is accepted")
        return token_sparsity(F.relu(F.linear(z, router.router_proj.weight)).detach())


def put_attention(attention: nn.Module, h: Tensor, scanned: Tensor, chosen: Tensor) -> Tensor:
    """`scanned` [B,T,D] with attention's outputs on h [B,T,D] put where `chosen` [B,T] bool is True.

    Rows with fewer chosen tokens than the fullest repeat their place 0 to fill up; what comes of it is dropped.
    """
    count = chosen.sum(1)
    places = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(count.max())]  # chosen first, in order
    real = torch.arange(places.shape[1], device=h.device) < count[:, None]
    attended = attention(h, places.where(real, 0))
    return scanned.index_put(chosen.nonzero(as_tuple=True), attended[real])  # both in order of (row, place)


def attach(model: BlockFFNModel, sidecars: Sidecars, gate: Callable[[int], Gate], *, source: str = "previous") -> None:
    """Put a `GatedHybridLayer` in the place of each layer that has a sidecar; `gate(layer number)` makes its gate.
    Raises ValueError for a layer that the model does not have, or that has a sidecar already.
    """
    for index in sidecars:
        if not 0 <= index < len(model.layers) or isinstance(model.layers[index], GatedHybridLayer):
            raise ValueError(f"layer {index} of {len(model.layers)} does not exist or has a sidecar: detach first")
    for index, sidecar in sidecars.items():
        layer = model.layers[index]
        assert isinstance(layer, BlockFFNLayer)
        hybrid = GatedHybridLayer(layer, sidecar, gate(index), source)
        model.layers[index] = hybrid.to(model.lm_head.weight.device).train(model.training)


def hybrid_layers(model: BlockFFNModel) -> dict[int, GatedHybridLayer]:
    """The layers that have sidecars, by layer number."""
    return {index: layer for index, layer in enumerate(model.layers) if isinstance(layer, GatedHybridLayer)}


def detach(model: BlockFFNModel) -> dict[int, MambaSidecar]:
    """Put the layers back as they were before `attach`, and return the sidecars by layer number."""
    hybrids = hybrid_layers(model)
    for index, hybrid in hybrids.items():
        model.layers[index] = hybrid.layer
    return {index: hybrid.sidecar for index, hybrid in hybrids.items()}


@contextmanager
def recorded_alpha(model: BlockFFNModel) -> Iterator[dict[int, list[Tensor]]]:
    """Inside, each pass appends the α [B,T] of each hybrid layer to the list under its number."""
    record: dict[int, list[Tensor]] = {}
    with ExitStack() as hooks:
        for index, hybrid in hybrid_layers(model).items():
            kept = record[index] = []
            hook = hybrid.gate.register_forward_hook(lambda gate, arguments, alpha, kept=kept: kept.append(alpha.detach()))
            hooks.enter_context(hook)
        yield record


def calibrate(model: BlockFFNModel, tokens: Tensor) -> dict[int, float]:
    """Set every gate's threshold on one pass over tokens [B,T], and return the means of α that were reached, by layer.

    A layer is calibrated on what the layers before it, already calibrated, make of the tokens.
    """
    gates = [layer.gate for layer in hybrid_layers(model).values()]
    for gate in gates:
        gate.calibrating = True
    try:
        with evaluating(model), recorded_alpha(model) as record:
            model(tokens)
    finally:
        for gate in gates:
            gate.calibrating = False
    return {index: alphas[0].double().mean().item() for index, alphas in record.items()}


def distillation_errors(model: BlockFFNModel, sidecars: Sidecars, tokens: Tensor) -> dict[int, Tensor]:
    """How far each sidecar is from the attention of its layer, on the layer's own input of tokens [B,T]: mean of
    ‖Mamba(h) − Attn(h)‖² over mean of ‖Attn(h)‖² (1 is what an output of zero scores). No gradient reaches the model.
    Raises ValueError if a sidecar is attached: then the layers' own inputs are not to be had.
    """
    if hybrid_layers(model):
        raise ValueError("sidecars are attached; detach them before they are distilled")
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    with ExitStack() as hooks, evaluating(model):
        for index in sidecars:
            attention = model.get_submodule(f"model.layers.{index}.self_attn")
            hook = attention.register_forward_hook(
                lambda _, arguments, output, index=index: seen.update({index: (arguments[0], output)})
            )
            hooks.enter_context(hook)
        model(tokens)
    return {i: (sidecar(seen[i][0]) - seen[i][1]).square().mean() / seen[i][1].square().mean() for i, sidecar in sidecars.items()}


def distil(
    model: BlockFFNModel, sidecars: Sidecars, sample_batch: Sampler, config: TrainingConfig, *, held_out: Tensor | None = None
) -> History:
    """Train sidecars in place to give what the attention of their layers gives, on the layers' own inputs.

    The loss is the mean of `distillation_errors`; on `held_out` tokens [B,T] each one is recorded, as `layer_<number>`.
    """
    students = nn.ModuleDict({str(index): sidecar for index, sidecar in sidecars.items()})

    def loss(_: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.stack(list(distillation_errors(model, sidecars, batch[0]).values())).mean()

    def evaluate(_: nn.Module) -> dict[str, float]:
        errors = {} if held_out is None else distillation_errors(model, sidecars, held_out)
        return {f"layer_{index}": error.item() for index, error in errors.items()}

    return fit(students, sample_batch, loss, config, evaluate=evaluate)


def tune(model: BlockFFNModel, sample_batch: Sampler, config: TrainingConfig, *, evaluate: Evaluate | None = None) -> History:
    """Train the attached sidecars and learned gates in place on the model's cross-entropy; all else stays as it is.

    Learned gates are calibrated on every batch, so that their α keeps its mean while they learn where to spend it;
    `calibrate` them afterwards.
    """
    trained = {p for hybrid in hybrid_layers(model).values() for part in (hybrid.sidecar, hybrid.gate) for p in part.parameters()}
    frozen = [p for p in model.parameters() if p not in trained and p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        return fit(model, sample_batch, lambda _, batch: losses(model, batch).cross_entropy, config, evaluate=evaluate)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
