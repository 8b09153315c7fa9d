"""The router of BlockFFN: which blocks of a feed-forward layer a token uses, and how strongly.

Letters: D token width, E experts (blocks).
"""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from nsm_support.checks import check_choice, check_shape, check_sizes

NORMS = ("rms", "sum", "none")


class Routed(NamedTuple):
    """How tokens are routed; both [...,E]. A score is exactly 0 where the logit is not above 0: that block is not used."""

    scores: Tensor
    logits: Tensor


class BlockRouter(nn.Module):
    """r = RMSNorm(ReLU(W_r x)), with no top-k: differentiable, and each token uses as many blocks as it needs.

    Song et al. 2025 (BlockFFN, arXiv:2507.08771). Parameters bear the names of the published checkpoints:
    `router_proj.weight` [E,D] and, for the norm "rms", `router_norm.weight` [E].

    Args:
        dim: token width D. num_experts: E.
        norm_after_router: "rms" (the paper's), "sum" (ReLU(W_r x) over its sum times `norm_scale`) or "none".
        norm_scale: of "sum" only. eps: of "rms" only.

    Raises ValueError for sizes that are not whole numbers from 1 up, or a norm of another name.
    """

    def __init__(self, dim: int, num_experts: int, *, norm_after_router: str = "rms", norm_scale: float = 1.0, eps: float = 1e-5):
        super().__init__()
        check_sizes(self, dim=dim, num_experts=num_experts)
        check_choice(self, NORMS, norm_after_router=norm_after_router)
        self.dim, self.num_experts = dim, num_experts
        self.norm_after_router, self.norm_scale = norm_after_router, norm_scale
        self.router_proj = nn.Linear(dim, num_experts, bias=False)
        nn.init.normal_(self.router_proj.weight, std=dim**-0.5)  # logits of unit spread: half of the blocks at the start
        if norm_after_router == "rms":
            self.router_norm = nn.RMSNorm(num_experts, eps=eps)

    def route(self, x: Tensor) -> Routed:
        """Scores and logits [...,E] of tokens [...,D]. A ValueError for another last axis."""
        check_shape(self, "tokens", x, "... D", D=self.dim)
        logits = self.router_proj(x)
        scores = F.relu(logits)
        if self.norm_after_router == "rms":
            scores = self.router_norm(scores)
        elif self.norm_after_router == "sum":
            scores = scores / (scores.sum(-1, keepdim=True) * self.norm_scale + 1e-5)
        return Routed(scores, logits)

    def forward(self, x: Tensor) -> Any:
        return self.route(x)
