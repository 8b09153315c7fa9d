"""A feed-forward layer in blocks, of which each token uses those that its router gives a score.

Letters: D token width, E experts (blocks), F width of a block. A pair is a token and a block that it uses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nsm_support.blockffn.router import BlockRouter, Routed
from nsm_support.checks import check_choice, check_sizes

PATHS = ("auto", "dense", "sparse")
FEW = 2048  # pairs up to which one call for all blocks is faster than a few calls for each

# What decides between the paths: their cost in multiplications, as measured with one thread.
READING = 2  # reading a block's weights takes as long as multiplying them with this many tokens
CALLS = {  # of a pass, and of each block
    "one token": (0, 350_000),
    "one call": (2_500_000, 150_000),
    "one call, with gradient": (12_500_000, 150_000),
    "by block": (0, 1_000_000),
}
SHARE = 0.9  # the sparse path is taken below this share of the cost of the dense path


def blockffn_reference(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The definition, every block for every token: y = W_down (SiLU(W_up x) ⊙ r), r_e for the F numbers of block e.

    x [...,D], scores r [...,E], up [E·F,D], down [D,E·F] → [...,D]. The dense path.
    """
    hidden = F.silu(F.linear(x, up)).unflatten(-1, (scores.shape[-1], -1)) * scores[..., None]  # (..., E, F)
    return F.linear(hidden.flatten(-2), down)


def blockffn_sparse(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`blockffn_reference` that computes a block for those tokens alone that have a score other than 0 for it.

    Differentiable, once, in every input. A score of 0 gets no gradient, where the definition has one: the ReLU that made
    it 0 passes none on, so that nothing before it can tell.
    """
    keep = torch.is_grad_enabled() and any(v.requires_grad for v in (x, scores, up, down))
    experts = scores.shape[-1]
    if scores.numel() == experts and not keep:
        return _one_token(x, scores, up, down)
    rows, r = x.reshape(-1, x.shape[-1]), scores.reshape(-1, experts)
    # Both weights by blocks, as they multiply tokens from the right: (E, D, F) and (E, F, D)
    ups, downs = up.view(experts, -1, up.shape[1]).mT, down.view(len(down), experts, -1).permute(1, 2, 0)
    block, token = r.t().nonzero().unbind(1)  # the pairs, in the order of the blocks
    if len(token) <= FEW and _one_call_takes(x.dtype, *downs.shape[1:]):
        return _one_call(rows, r, ups, downs, block, token).view(x.shape)
    return _ByBlock.apply(rows, r, ups, downs, block, token, keep).view(x.shape)


def _one_token(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One token without a gradient: in few calls, which take longer than its arithmetic."""
    token, width = x.view(-1), len(up) // scores.numel()
    y = torch.zeros_like(token)
    for e, score in enumerate(scores.view(-1).tolist()):
        if score:
            block = slice(e * width, (e + 1) * width)
            hidden = F.silu(torch.mv(up[block], token), inplace=True)
            y.addmv_(down[:, block], hidden, alpha=score)
    return y.view(x.shape)


def _one_call_takes(dtype: torch.dtype, width: int, dim: int) -> bool:
    """Whether torch's grouped product takes such blocks: single precision, rows of whole 16 bytes."""
    return dtype == torch.float32 and width % 4 == dim % 4 == 0


def _one_call(x: Tensor, scores: Tensor, ups: Tensor, downs: Tensor, block: Tensor, token: Tensor) -> Tensor:
    """All pairs at once, by products that are grouped by block."""
    ends = scores.count_nonzero(0).cumsum(0, dtype=torch.int32)
    hidden = F.silu(F.grouped_mm(x.index_select(0, token), ups, offs=ends)) * scores[token, block][:, None]
    return torch.zeros_like(x).index_add(0, token, F.grouped_mm(hidden, downs, offs=ends))


class _ByBlock(torch.autograd.Function):
    """For each block: gather the tokens that use it, run them through it, add what comes out to where it belongs.

    What a block needs stays in the cache. Of all pairs only W_up x is kept, for the backward pass.
    """

    @staticmethod
    def forward(ctx, x, scores, ups, downs, block, token, keep):
        weight = scores[token, block][:, None]
        used = [(e, count) for e, count in enumerate(scores.count_nonzero(0).tolist()) if count]
        before = x.new_empty(len(token) if keep else 0, ups.shape[-1])  # W_up x
        y, end = torch.zeros_like(x), 0
        for e, count in used:
            pairs = slice(end, end := end + count)
            tokens = token[pairs]
            h = torch.mm(x.index_select(0, tokens), ups[e], out=before[pairs] if keep else None)
            h = F.silu(h, inplace=not keep).mul_(weight[pairs])
            y.index_add_(0, tokens, h @ downs[e])
        if keep:
            ctx.save_for_backward(x, ups, downs, block, token, weight, before)
            ctx.used, ctx.shape = used, scores.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, ups, downs, block, token, weight, before = ctx.saved_tensors
        grad_x, grad_weight = torch.zeros_like(x), torch.empty_like(weight)
        # In the memory layout of the weights, whose views these are
        grad_ups = torch.zeros_like(ups) if ctx.needs_input_grad[2] else None
        grad_downs = torch.zeros_like(downs) if ctx.needs_input_grad[3] else None
        end = 0
        for e, count in ctx.used:
            pairs = slice(end, end := end + count)
            tokens, w, z = token[pairs], weight[pairs], before[pairs]
            pull = grad_y.index_select(0, tokens)
            grad_h, silu = pull @ downs[e].t(), F.silu(z)
            torch.sum(grad_h * silu, 1, keepdim=True, out=grad_weight[pairs])
            grad_z = torch.ops.aten.silu_backward(grad_h.mul_(w), z)
            grad_x.index_add_(0, tokens, grad_z @ ups[e].t())
            if grad_ups is not None:
                torch.mm(x.index_select(0, tokens).t(), grad_z, out=grad_ups[e])
            if grad_downs is not None:
                torch.mm(silu.mul_(w).t(), pull, out=grad_downs[e])
        grad_scores = weight.new_zeros(ctx.shape).index_put_((token, block), grad_weight[:, 0])
        return grad_x, grad_scores, grad_ups, grad_downs, None, None, None


class BlockFFN(BlockRouter):
    """A BlockFFN layer (Song et al. 2025, arXiv:2507.08771): y = W_down (SiLU(W_up x) ⊙ r), no gate matrix.

    It is its own router, so that the parameters bear the names of the published checkpoints: `router_proj.weight` [E,D],
    `router_norm.weight` [E], `up_proj` [E·F,D], `down_proj` [D,E·F].

    Args:
        dim: D. num_experts: E. expert_size: F. Other options: of `BlockRouter`.
        path: "dense" computes every block for every token, "sparse" the blocks in use; "auto" the one that is faster, on
            a CPU: elsewhere the dense one. The paths agree to rounding, not to the bit.

    Raises ValueError as `BlockRouter`, or for another path.
    """

    def __init__(self, dim: int, num_experts: int, expert_size: int, *, path: str = "auto", **router):
        super().__init__(dim, num_experts, **router)
        check_sizes(self, expert_size=expert_size)
        check_choice(self, PATHS, path=path)
        self.expert_size, self.path = expert_size, path
        hidden = num_experts * expert_size
        self.up_proj = nn.Parameter(torch.empty(hidden, dim).normal_(std=dim**-0.5))
        self.down_proj = nn.Parameter(torch.empty(dim, hidden).normal_(std=hidden**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [...,D] → [...,D], each from itself alone."""
        return self.forward_with_routing(x)[0]

    def forward_with_routing(self, x: Tensor) -> tuple[Tensor, Routed]:
        """`forward`, and how the tokens were routed."""
        routed = self.route(x)
        sparse = self.path == "sparse" or (self.path == "auto" and self.sparse_wins(routed.scores))
        function = blockffn_sparse if sparse else blockffn_reference
        return function(x, routed.scores, self.up_proj, self.down_proj), routed

    def sparse_wins(self, scores: Tensor) -> bool:
        """Whether the sparse path is the faster one for these scores [...,E]."""
        if scores.device.type != "cpu":
            return False
        tokens = scores.numel() // self.num_experts
        dense = 2 * self.dim * self.expert_size * self.num_experts * (tokens + READING)
        if self._sparse_cost(scores.dtype, tokens, 1, 1) > dense / 2:  # little to win: looking at the scores takes time too
            return False
        if tokens == 1:
            used = pairs = self.num_experts - scores.view(-1).tolist().count(0)
        else:
            counts = scores.reshape(-1, self.num_experts).count_nonzero(0).tolist()
            used, pairs = self.num_experts - counts.count(0), sum(counts)
        return self._sparse_cost(scores.dtype, tokens, used, pairs) < SHARE * dense

    def _sparse_cost(self, dtype: torch.dtype, tokens: int, used: int, pairs: int) -> int:
        """What the sparse path costs, in multiplications, with this many blocks in use."""
        if tokens == 1 and not torch.is_grad_enabled():
            way = "one token"
        elif pairs > FEW or not _one_call_takes(dtype, self.expert_size, self.dim):
            way = "by block"
        else:
            way = "one call, with gradient" if torch.is_grad_enabled() else "one call"
        of_pass, of_block = CALLS[way]
        return of_pass + of_block * used + 2 * self.dim * self.expert_size * (pairs + READING * used)
