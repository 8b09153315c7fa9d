"""What the routers of a model do on a text, per token, layer and expert, as tensors and as `routing_signals.json`.

Letters: L layers (routed ones), B batch, T tokens, E experts.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsm_support.blockffn.objectives import token_sparsity
from nsm_support.blockffn.router import BlockRouter
from nsm_support.files import write_json
from nsm_support.training import evaluating


class RoutingExtractor:
    """Listens to every router of a model, whatever stands around its layer, until `remove` or the end of a `with`.

        with RoutingExtractor(model) as extractor:
            activations = extractor(tokens)

    Layers are numbered as they come in the model; where some layers are dense, the routed ones alone are counted.

    Raises:
        ValueError: if the model has no router.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.names = [name for name, module in model.named_modules() if isinstance(module, BlockRouter)]
        if not self.names:
            raise ValueError(f"{type(model).__name__} has no BlockFFN layer to listen to")
        self._heard: list[list[Tensor]] = [[] for _ in self.names]
        self._hooks = ExitStack()
        for heard, name in zip(self._heard, self.names, strict=True):
            hook = model.get_submodule(name).router_proj.register_forward_hook(
                lambda module, arguments, logits, heard=heard: heard.append(logits.detach())
            )
            self._hooks.callback(hook.remove)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Run the model on token numbers [B,T]: the routers' activations ReLU(W_r x) [L,B,T,E], before their norm.

        Element [l,b,t] is what layer l made of token [b,t] itself. The model is in eval mode meanwhile.

        Raises:
            RuntimeError: after `remove`, or if a router was not called exactly once.
        """
        for heard in self._heard:
            heard.clear()
        with evaluating(self.model):
            self.model(tokens)
        calls = [len(heard) for heard in self._heard]
        if set(calls) != {1}:
            raise RuntimeError(f"each router is heard once a pass; here {dict(zip(self.names, calls, strict=True))}")
        activations = F.relu(torch.stack([heard.pop() for heard in self._heard]))
        if activations.shape[1:3] != tokens.shape:
            raise RuntimeError(f"tokens {list(tokens.shape)} were routed as {list(activations.shape[1:3])}")
        return activations

    def remove(self) -> None:
        """Stop listening: the model is as it was."""
        self._hooks.close()

    def __enter__(self) -> "RoutingExtractor":
        return self

    def __exit__(self, *exception) -> None:
        self.remove()


def prompt_record(prompt: str, tokens: Sequence[str], activations: Tensor) -> dict[str, Any]:
    """One entry of `routing_signals.json`: of a prompt, its T tokens as strings, and activations [L,T,E].

    Beside the fields that the first notebook reads, `per_token_sparsity` {layer: [T]} and `active_experts` {layer: [T
    lists of experts]}: entry t belongs to tokens[t].

    Raises:
        ValueError: if the activations are not of these tokens.
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

    Raises:
        ValueError: if there is no prompt, or a number that is not finite.
    """
    prompts = list(prompts)
    if not prompts:
        raise ValueError("routing_signals.json needs at least one prompt")
    write_json(path, {"model_name": model_name, "prompts": prompts})
