"""Thermometers: one set of code logits read at several temperatures, to tell sharper codes from a lower temperature."""

import math

import torch
from torch import Tensor

from nsm_support.crystalline.codes.transformer import CrystallineTransformer, Info


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


def thermometers(model: CrystallineTransformer, infos: list[Info]) -> dict[str, float]:
    """Entropies of the noise-free code distributions over ln K, mean over bottlenecks, read in three ways; and the scale.

    l = s·cos(x, c) has the learned scale s; τ is the temperature that the model is at. `on_schedule` reads l/τ, as the
    seed does, and falls if τ does; `as_learned` reads l, and falls if s grows; `fixed` reads s₀·cos, with the scale s₀
    that training began with, and falls only if tokens come closer to their codes. `scale` is the mean s.

    Takes what the model gave in evaluation, as a `measure` of `experiment.Run`.
    """
    every = [one["soft_codes"] for info in infos for one in info.values()]
    bottlenecks = [bottleneck for _, bottleneck in model.bottlenecks()]
    read = {"on_schedule": [], "as_learned": [], "fixed": [], "scale": []}
    for soft, bottleneck in zip(every, bottlenecks, strict=True):
        scale = bottleneck.log_scale.exp().item()
        read["on_schedule"].append(read_entropy(soft, float(bottleneck.temperature)))
        read["as_learned"].append(read_entropy(soft))
        read["fixed"].append(read_entropy(soft, scale / bottleneck.config.scale_init))
        read["scale"].append(scale)
    return {name: sum(values) / len(values) for name, values in read.items()}
