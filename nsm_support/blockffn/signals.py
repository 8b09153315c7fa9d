"""What the routers of a model do on a text, per token, layer and expert.

Letters: L layers (routed ones), B batch, T tokens, E experts.
"""

from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsm_support.blockffn.router import BlockRouter
from nsm_support.training import evaluating


class RoutingExtractor:
    """Records every router of a model, whatever stands around its layer, until `remove` or the end of a `with`.

        with RoutingExtractor(model) as extractor:
            activations = extractor(tokens)

    Layers are numbered as they come in the model; where some layers are dense, the routed ones alone are counted.
    Raises ValueError if the model has no router.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.names = [name for name, module in model.named_modules() if isinstance(module, BlockRouter)]
        if not self.names:
            raise ValueError(f"{type(model).__name__} has no BlockFFN layer to record")
        self._logits: list[list[Tensor]] = [[] for _ in self.names]
        self._hooks = ExitStack()
        for recorded, name in zip(self._logits, self.names, strict=True):
            hook = model.get_submodule(f"{name}.router_proj").register_forward_hook(
                lambda module, arguments, logits, recorded=recorded: recorded.append(logits.detach())
            )
            self._hooks.callback(hook.remove)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Run the model on token numbers [B,T]: the routers' activations ReLU(W_r x) [L,B,T,E], before their norm.

        Element [l,b,t] is what layer l made of token [b,t] itself. The model is in eval mode meanwhile.
        Raises RuntimeError after `remove`, or if a router was not called exactly once.
        """
        for recorded in self._logits:
            recorded.clear()
        with evaluating(self.model):
            self.model(tokens)
        calls = [len(recorded) for recorded in self._logits]
        if set(calls) != {1}:
            raise RuntimeError(f"each router is called once a pass; here {dict(zip(self.names, calls, strict=True))}")
        activations = F.relu(torch.stack([recorded.pop() for recorded in self._logits]))
        if activations.shape[1:3] != tokens.shape:
            raise RuntimeError(f"tokens {list(tokens.shape)} were routed as {list(activations.shape[1:3])}")
        return activations

    def remove(self) -> None:
        """Stop recording: the model is as it was."""
        self._hooks.close()

    def __enter__(self) -> "RoutingExtractor":
        return self

    def __exit__(self, *exception) -> None:
        self.remove()
