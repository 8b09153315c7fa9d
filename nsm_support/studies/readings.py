"""What trained codes are asked: how certain they are, which edges of TokFSM the model knows, and what a written node changes.

`entropy_readings` and `first_transition` are `readings` of a `CodesRun`. Letters: N nodes, K codes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nsm_support.crystalline.automata import TokFSM
from nsm_support.crystalline.codes.alignment import by_bottleneck
from nsm_support.crystalline.codes.bottleneck import Bottleneck, written
from nsm_support.crystalline.codes.transformer import CrystallineTransformer, Info
from nsm_support.training import evaluating


def read_entropy(soft_codes: Tensor, temperature: float = 1.0) -> float:
    """H(softmax(l/τ))/ln K, mean over tokens, of the logits behind soft codes softmax(l) [..., K]. At τ = 0 it is 0.
    Raises ValueError for a temperature below 0, or a single code.
    """
    codes = soft_codes.shape[-1]
    if not temperature >= 0 or codes < 2:
        raise ValueError(f"read_entropy: temperature {temperature!r}, {codes} codes; 0 or more, and at least 2, are accepted")
    if temperature == 0:  # the limit: all mass lies on the nearest code
        return 0.0
    logits = soft_codes.double().clamp(min=torch.finfo(torch.float32).tiny).log() / temperature
    return torch.special.entr(logits.softmax(-1)).sum(-1).mean().item() / math.log(codes)


def entropy_readings(model: CrystallineTransformer, infos: list[Info]) -> dict[str, float]:
    """Entropies of the noise-free code distributions over ln K, mean over bottlenecks, read in three ways; and the scale.

    l = s·cos(x, c) has the learned scale s; τ is the temperature that the model is at. `on_schedule` reads l/τ and falls
    if τ does; `as_learned` reads l, and falls if s grows; `fixed` reads s₀·cos, with the scale s₀ that training began
    with, and falls only if tokens come closer to their codes. `scale` is the mean s.
    """
    readings: dict[str, list[float]] = {"on_schedule": [], "as_learned": [], "fixed": [], "scale": []}
    for info, (_, bottleneck) in zip(by_bottleneck(infos).values(), model.bottlenecks(), strict=True):
        soft, scale = info["soft_codes"], bottleneck.log_scale.exp().item()
        readings["on_schedule"].append(read_entropy(soft, float(bottleneck.temperature)))
        readings["as_learned"].append(read_entropy(soft))
        readings["fixed"].append(read_entropy(soft, scale / bottleneck.config.scale_init))
        readings["scale"].append(scale)
    return {name: sum(values) / len(values) for name, values in readings.items()}


def _log_probabilities(model: CrystallineTransformer) -> Callable[[Tensor], Tensor]:
    device = model.head.weight.device
    return lambda tokens: model(tokens.to(device))[0].log_softmax(-1).cpu()


def first_transition(model: CrystallineTransformer, infos: list[Info]) -> dict[str, float]:
    """`TokFSM.first_transition` of a model in evaluation: `first_transition`, the share of true edges among as many of
    the likeliest next nodes, and `mass`, the probability of true neighbours.
    """
    found = TokFSM().first_transition(_log_probabilities(model))
    return {"first_transition": found.accuracy, "mass": found.mass}


def after_writing(model: CrystallineTransformer, bottleneck: Bottleneck, machine: TokFSM, codes: Tensor | None) -> Tensor:
    """P(next node | a node was read) [N, N], after code n of `codes` [N] was written over what stood for node n.

    It is written where the node's last digit was read, and nowhere else; None writes nothing. Rows may sum to less than 1.
    Raises ValueError if `codes` are not N codes of the bottleneck.
    """
    K = bottleneck.config.codebook_size
    if codes is not None and (codes.shape != (machine.num_nodes,) or codes.min() < 0 or codes.max() >= K):
        raise ValueError(f"after_writing: codes {list(codes.shape)}; [{machine.num_nodes}] from 0 to {K - 1} are accepted")
    read = _log_probabilities(model)

    def read_written(prompts: Tensor) -> Tensor:
        if codes is None:
            return read(prompts)
        places = torch.full_like(prompts, -1)
        places[:, machine.digits] = codes.repeat_interleave(len(prompts) // machine.num_nodes)
        with written(bottleneck, places):
            return read(prompts)

    with evaluating(model):
        return machine.first_transition(read_written).probabilities
