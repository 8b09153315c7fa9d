"""A discrete bottleneck: each vector is replaced by the code that it is most like, or by the mean of the k codes.

Letters: N tokens (all leading axes in one), D width, K codes, k codes chosen for a token.

The codebook is that of the vector-quantised autoencoder (van den Oord et al. 2017, arXiv:1711.00937): gradients pass the
choice as if it were the identity (section 3.2), and codes follow the inputs that choose them (appendix A.1). Codes are
compared by cosine (Yu et al. 2022, arXiv:2110.04627, section 3.2), and are initialised from inputs once the network around them
has learned something (Łańcucki et al. 2020, arXiv:2005.08520, section III).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsm_support.checks import check, check_shape, check_sizes
from nsm_support.crystalline.codes.schedules import Schedule, check_schedule

DECAY = 0.9  #: what a code keeps of itself in an update; the rest is the mean of the inputs nearest to it
DEAD = 0.01  #: a code that is nearest less often than this share of the average is dead
FAR = 0.02  #: a code is initialised only from an input whose distance 1 − cos to the nearest code is above this
CANDIDATES = 8  #: inputs tried for each code that is initialised
LEARNED_RATE = 10.0  #: a learned temperature is exp(10 θ), since Adam moves any θ by about the learning rate a step


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard` with the gradient of `soft` (Bengio et al. 2013, arXiv:1308.3432); shapes broadcast."""
    return soft + (hard - soft).detach()


def gumbel_like(logits: Tensor) -> Tensor:
    """Standard Gumbel noise g: argmax_k (l_k + τ g_k) is a draw from softmax(l/τ) for τ > 0, and argmax_k l_k at τ = 0."""
    return -torch.log(-torch.log(torch.rand_like(logits).clamp(min=1e-20)))


def compression_loss(soft_codes: Tensor) -> Tensor:
    """Entropy in nats of noise-free code distributions [..., K], mean over tokens: 0 … ln K. Finite gradient at p = 0."""
    return -(soft_codes * soft_codes.clamp(min=1e-12).log()).sum(-1).mean()


def commitment_loss(input: Tensor, output: Tensor) -> Tensor:
    """Mean squared distance of a bottleneck's input [..., D] to its output, which is held fixed."""
    return F.mse_loss(input, output.detach())


def choose(scores: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest scores [..., K]. (`max` is many times as fast as `topk`.)"""
    return scores.max(-1, keepdim=True).indices if k == 1 else scores.topk(k, -1).indices


def spread_out(points: Tensor, count: int, kept: Tensor) -> Tensor:
    """Indices [at most count] of points [N, D] far from each other and from those `kept` [any, D], for codes to begin at.

    Greedy k-means++ (Arthur and Vassilvitskii 2007) on the sphere, where half the squared distance is 1 − cos: candidates
    are drawn in proportion to it, and the one that leaves the least of it stays. It ends early when no point is `FAR` from
    all codes: a code more would only share what another one stands for. Draws from the global generator.
    """
    points, kept = F.normalize(points, dim=-1), F.normalize(kept, dim=-1)
    distance = 1 - (points @ kept.T).amax(-1) if len(kept) else points.new_ones(len(points))  # (N): to the nearest
    drawn: list[Tensor] = []
    while len(drawn) < count and (distance > FAR).any():
        tried = torch.multinomial(distance.where(distance > FAR, 0), CANDIDATES, replacement=True)
        left = torch.minimum(distance, 1 - points[tried] @ points.T)  # (candidates, N)
        best = left.sum(-1).argmin()
        drawn.append(tried[best])
        distance = left[best]
    return torch.stack(drawn) if drawn else torch.empty(0, dtype=torch.long, device=points.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class BottleneckConfig:
    """Sizes and noise of a bottleneck. Raises ValueError for values that do not fit, naming them."""

    codebook_size: int = 32  #: K
    num_codes_k: int = 1  #: k, codes chosen for a token
    temp_init: float = 2.0  #: τ at the start of training: how strong the Gumbel noise on the logits is
    temp_min: float = 0.1  #: τ at its end
    schedule: Schedule = "linear"  #: how τ goes from one to the other
    scale_init: float = 10.0  #: s at the start; it is learned
    lay_every: int = 100  #: training passes after which dead codes are re-initialised; before the first time there are none

    def __post_init__(self) -> None:
        check_sizes(self, "num_codes_k", "codebook_size", "lay_every")
        check(self, self.num_codes_k <= self.codebook_size, "1 … codebook_size", "num_codes_k", "codebook_size")
        check(self, self.temp_init >= 0 and self.temp_min >= 0, "0 or more", "temp_init", "temp_min")
        check(self, self.scale_init > 0, "above 0", "scale_init")
        check_schedule(self.schedule, self.temp_init, self.temp_min)


class Bottleneck(nn.Module):
    """Replaces vectors [..., D] by codes: l_k = s cos(x, c_k); the k largest of l + τ g win; y is the mean of their codes.

    The noise g is there in training alone. Gradients pass to x as if y were x. The codes are no parameters: in training
    each goes a tenth of the way to the mean of the inputs nearest to it. After every `lay_every` training passes, codes
    that were nearest to (almost) nothing are re-initialised from inputs far from the others. At the first time that is all
    of them; before it a training pass hands x on as it is, and evaluation meets random codes.

    `usage` [K] counts how often each code was nearest since the last re-initialisation.
    """

    codebook: Tensor  # (K, D)
    usage: Tensor  # (K)
    passes: Tensor
    _temperature: Tensor

    def __init__(self, dim: int, config: BottleneckConfig):
        super().__init__()
        self.dim, self.config = dim, config
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale_init)))
        self.log_temperature = None
        if config.schedule == "learned":
            self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temp_init) / LEARNED_RATE))
        self.register_buffer("codebook", torch.randn(config.codebook_size, dim))
        self.register_buffer("usage", torch.zeros(config.codebook_size))
        self.register_buffer("passes", torch.tensor(0))
        self.register_buffer("_temperature", torch.tensor(float(config.temp_init)))

    @property
    def temperature(self) -> Tensor:
        """τ: learned, or what was last put into the buffer `_temperature`."""
        return self._temperature if self.log_temperature is None else (LEARNED_RATE * self.log_temperature).exp()

    @property
    def perplexity(self) -> float:
        """exp of the entropy of `usage`: how many codes, equally used, would be as many. 0 before the first training pass."""
        share = self.usage.double() / self.usage.sum().clamp(min=1)
        return torch.special.entr(share).sum().exp().item() if self.usage.any() else 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """x [..., D] → y [..., D], and what happened.

        The keys: `soft_codes` [..., K], softmax(l), without noise and at τ = 1 whatever τ is; `hard_codes` [..., K], 1 for the
        k codes that won and 0 elsewhere; `entropy`, that of the soft codes over ln K, mean over tokens; `input` x; `output` y.
        Raises ValueError if the last axis is not D.
        """
        check_shape(self, "x", x, "... D", D=self.dim)
        flat, k, K = x.flatten(0, -2), self.config.num_codes_k, self.config.codebook_size
        if self.training:
            self._initialise(flat)
        logits = self.logits(flat)  # (N, K)
        soft = logits.softmax(-1)
        noisy = logits.detach()
        if self.training:
            self._follow(flat, choose(noisy, 1)[:, 0])
            if self.temperature > 0:  # to draw noise for nothing takes longer than all else, with many codes
                noisy = noisy + self.temperature * gumbel_like(noisy)
        indices = choose(noisy, k)  # (N, k)
        output = F.embedding_bag(indices, self.codebook, mode="mean")
        if self.training:
            # What gradients see in place of the codes: x; for a learned τ also the mixture Σ_k softmax(l + τ g)_k c_k.
            relaxed = flat if self.log_temperature is None else flat + noisy.softmax(-1) @ self.codebook.clone()
            output = straight_through(output, relaxed) if self.initialised else flat
        output = output.view_as(x)
        soft = soft.unflatten(0, x.shape[:-1])
        hard = torch.zeros_like(soft).scatter_(-1, indices.view(*x.shape[:-1], k), 1.0)
        entropy = compression_loss(soft) / math.log(K) if K > 1 else soft.new_zeros(())
        return output, {"soft_codes": soft, "hard_codes": hard, "entropy": entropy, "input": x, "output": output}

    @property
    def initialised(self) -> bool:
        """Whether the codes lie on inputs, so that training passes go through them."""
        return bool(self.passes >= self.config.lay_every)

    def logits(self, x: Tensor) -> Tensor:
        """l_k = s cos(x, c_k): x [N, D] → [N, K]."""
        scale = self.log_scale.exp() / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12)
        return (x @ F.normalize(self.codebook, dim=-1).T) * scale

    def lookup(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Indices [..., k] and output [..., D] of an evaluation, where nothing else is wanted: x [..., D]."""
        scores = x.flatten(0, -2) @ F.normalize(self.codebook, dim=-1).T  # neither s nor the length of x changes their order
        indices = choose(scores, self.config.num_codes_k)
        output = F.embedding_bag(indices, self.codebook, mode="mean")
        return indices.view(*x.shape[:-1], -1), output.view_as(x)

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        """Count a training pass over x [N, D], and initialise dead codes from some of it when it is time."""
        self.passes += 1
        if self.passes % self.config.lay_every == 0:
            dead = self.usage < DEAD * self.usage.mean()
            if self.passes == self.config.lay_every:
                dead[:] = True
            places = spread_out(x, int(dead.sum()), self.codebook[~dead])
            self.codebook[dead.nonzero()[: len(places), 0]] = x[places]
            self.usage.zero_()

    @torch.no_grad()
    def _follow(self, x: Tensor, nearest: Tensor) -> None:
        """Move each code towards the mean of the inputs [N, D] whose nearest code [N] it is."""
        x = x.to(self.codebook.dtype)  # under autocast it is less precise
        counts = torch.bincount(nearest, minlength=len(self.codebook)).to(x.dtype)
        means = torch.zeros_like(self.codebook).index_add_(0, nearest, x) / counts.clamp(min=1)[:, None]
        self.codebook.lerp_(means, (1 - DECAY) * (counts > 0).to(x.dtype)[:, None])
        self.usage += counts


@contextmanager
def written(bottleneck: Bottleneck, codes: Tensor) -> Iterator[None]:
    """Inside, a bottleneck hands on codes [B, T] in place of its own, where they are not −1."""

    def overwrite(module: Bottleneck, arguments, result):
        output, info = result
        chosen = codes.to(output.device)[..., None]
        return torch.where(chosen >= 0, module.codebook[chosen[..., 0].clamp(min=0)], output), info

    with bottleneck.register_forward_hook(overwrite):
        yield
