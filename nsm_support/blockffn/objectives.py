"""Objectives that make sparse routing useful, and measures of the sparsity that came of it.

Letters: T tokens, E experts (blocks). Song et al. 2025 (BlockFFN, arXiv:2507.08771), and the code published with it
(thunlp/BlockFFN). A block is active for a token if its score is not 0.
"""

import torch.nn.functional as F
from torch import Tensor

from nsm_support.blockffn.router import Routed


def locality_loss(routed: Routed, sharpness: float = 100.0) -> Tensor:
    """How differently neighbouring tokens use the blocks: BCE(σ(α z_t), σ(α z_{t+1})), mean over pairs and blocks.

    The paper's activation locality, of the logits z [...,T,E] that `routed` holds; α is the sharpness. Both tokens are pulled,
    each towards the other. Raises ValueError for fewer than 2 tokens.
    """
    sharp = sharpness * routed.logits
    if sharp.shape[-2] < 2:
        raise ValueError(f"locality compares neighbouring tokens, so it takes 2 or more; got {sharp.shape[-2]}")
    return F.binary_cross_entropy_with_logits(sharp[..., :-1, :], sharp[..., 1:, :].sigmoid())


def chunk_sparsity_loss(routed: Routed, size: int = 64) -> Tensor:
    """How many blocks a chunk of `size` tokens uses: 1 − mean over chunks and blocks of Π_chunk (1 − p).

    p = ReLU(z) / Σ_e ReLU(z_e) for the logits z [...,T,E] that `routed` holds: were p the probability that a token uses a
    block, this would be the share of blocks that a chunk is expected to use. It is least where the tokens of a chunk share few
    blocks. The paper writes Π (1 − p) as exp Σ ln(1 − p); the product has a gradient at p = 1 too. Tokens after the last whole
    chunk are left out. Raises ValueError for fewer than `size` tokens.
    """
    active = F.relu(routed.logits)
    p = active / (active.sum(-1, keepdim=True) + 1e-5)
    return 1 - (1 - chunks(p, size)).prod(-2).mean()


def token_sparsity(scores: Tensor) -> Tensor:
    """Share of the blocks that each token leaves unused: scores [...,E] → [...]."""
    return (scores == 0).to(scores.dtype).mean(-1)


def chunk_sparsity(scores: Tensor, size: int) -> Tensor:
    """Share of the blocks that no token of a chunk of `size` uses: scores [...,T,E] → [...,T // size].

    Tokens after the last whole chunk are left out: a shorter one would look sparser. Raises ValueError for fewer than `size`
    tokens.
    """
    return (chunks(scores, size) == 0).all(-2).to(scores.dtype).mean(-1)


def dead_experts(scores: Tensor) -> Tensor:
    """Whether no token at all uses a block: scores [...,E] → [E].

    Dead blocks raise every sparsity without being spared by routing: report `scores[..., ~dead]` beside `scores`.
    """
    return (scores == 0).flatten(0, -2).all(0)


def chunks(x: Tensor, size: int) -> Tensor:
    """[...,T,E] → [...,T // size,size,E], the rest left out. A ValueError for fewer than `size` tokens."""
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= x.shape[-2]:
        raise ValueError(f"a chunk has from 1 to {x.shape[-2]} tokens here, as many as there are; got {size!r}")
    whole = x.shape[-2] // size * size
    return x[..., :whole, :].unflatten(-2, (-1, size))
