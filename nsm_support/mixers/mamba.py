"""The mixers of Mamba and Mamba-2, on `selective_scan` and `ssd_scan`: over a sequence at once, or token by token.

Letters: B batch, T tokens, D token width, C channels (expand · D), N width of the state, W width of the convolution;
for Mamba-2 also H heads, P width of a head (C / H).

Parameters bear the names of the published code (state-spaces/mamba), so `load_state_dict` takes its weights. A mixer has
no norm before it and no residual around it: `tokens + mixer(norm(tokens))` is the caller's.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsm_support.checks import Shape, check, check_shape, check_sizes
from nsm_support.mixers.scan import selective_scan, ssd_scan


class MambaStream(NamedTuple):
    """What a mixer remembers between two tokens; its size does not grow with their number."""

    window: Tensor  # (B, W−1, convolved channels), the last inputs of the convolution
    state: Tensor  # (B, C, N), for Mamba-2 (B, H, P, N)


class _Mixer(nn.Module):
    """What both mixers share: the convolution, the stream, and the ways in. Each adds its own `_mix` and `_step`."""

    in_proj: nn.Linear
    _mix: Callable[..., tuple[Tensor, MambaStream]]
    _step: Callable[..., tuple[Tensor, MambaStream]]

    def __init__(self, convolved: int, conv_width: int, state_shape: tuple[int, ...]):
        super().__init__()
        self.state_shape = state_shape
        self.conv1d = nn.Conv1d(convolved, convolved, conv_width, groups=convolved)

    def forward(self, tokens: Tensor, stream: MambaStream | None = None) -> Tensor:
        """Tokens [B,T,D] → [B,T,D], each from itself and those before it, the ones in `stream` included.

        Raises ValueError for shapes that do not fit, or no tokens.
        """
        return self.prefill(tokens, stream)[0]

    def prefill(self, tokens: Tensor, stream: MambaStream | None = None) -> tuple[Tensor, MambaStream]:
        """`forward`, and the stream as it is after the last token."""
        check_shape(self, "tokens", tokens, "B T D", D=self.in_proj.in_features)
        check_sizes(self, batch_size=tokens.shape[0], tokens=tokens.shape[1])
        return self._mix(tokens, self._accepted(stream, tokens))

    def step(self, tokens: Tensor, stream: MambaStream) -> tuple[Tensor, MambaStream]:
        """The next token of each sequence [B,D] → its output [B,D] as in `forward`, and the stream after it."""
        check_shape(self, "token", tokens, "B D", D=self.in_proj.in_features)
        return self._step(tokens, self._accepted(stream, tokens))

    def go_on(self, tokens: Tensor, stream: MambaStream) -> tuple[Tensor, MambaStream]:
        """`prefill` of several tokens [B,T,D], `step` of a single one [B,1,D]: the quicker of the two."""
        if tokens.shape[1] != 1:
            return self.prefill(tokens, stream)
        out, stream = self.step(tokens[:, 0], stream)
        return out[:, None], stream

    def start(self, batch_size: int) -> MambaStream:
        """The stream before the first token: zeros."""
        convolved, _, conv_width = self.conv1d.weight.shape
        zeros = self.conv1d.weight.new_zeros
        return MambaStream(zeros(batch_size, conv_width - 1, convolved), zeros(batch_size, *self.state_shape))

    def _accepted(self, stream: MambaStream | None, tokens: Tensor) -> MambaStream:
        expected = self.start(len(tokens))
        if stream is None:
            return expected
        for name, given, fits in zip(stream._fields, stream, expected, strict=True):
            check(self, given.shape == fits.shape, f"{list(fits.shape)}", **{f"stream.{name}": Shape(given.shape)})
        return stream

    def _convolve(self, x: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        """Causal depthwise convolution and SiLU of x [B,T,convolved] that follows `window`; and the next window."""
        T, x = x.shape[1], torch.cat((window.to(x.dtype), x), 1)
        return F.silu(self.conv1d(x.mT)).mT, x[:, T:]


class MambaBlock(_Mixer):
    """The mixer of Mamba (Gu & Dao 2023, arXiv:2312.00752, section 3.4 and figure 3), without norm and residual.

    Args:
        token_dim: width D of a token. state_dim: N, numbers that a channel remembers.
        expand: channels per token width. conv_width: W, tokens that the convolution sees.
        delta_rank: rank of the step sizes; a sixteenth of D, rounded up, by default.

    At the start A = −(1 … N) in every channel (S4D-real), D = 1, and delta is drawn log-uniformly from 0.001 … 0.1. Raises
    ValueError for sizes that are not whole numbers from 1 up.
    """

    def __init__(
        self, token_dim: int, *, state_dim: int = 16, expand: int = 2, conv_width: int = 4, delta_rank: int | None = None
    ):
        check_sizes(self, token_dim=token_dim, state_dim=state_dim, expand=expand, conv_width=conv_width)
        rank = -(-token_dim // 16) if delta_rank is None else delta_rank
        check_sizes(self, delta_rank=rank)
        channels = expand * token_dim
        super().__init__(channels, conv_width, (channels, state_dim))
        self.in_proj = nn.Linear(token_dim, 2 * channels, bias=False)
        self.x_proj = nn.Linear(channels, rank + 2 * state_dim, bias=False)
        self.dt_proj = nn.Linear(rank, channels)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        self.dt_proj.bias.data = _delta_bias(channels)
        self.A_log = nn.Parameter(torch.arange(1.0, state_dim + 1).log().repeat(channels, 1))
        setattr(self.A_log, "no_weight_decay", True)  # noqa: B010   a rate of forgetting, as in the published code
        self.D = nn.Parameter(torch.ones(channels))
        self.out_proj = nn.Linear(channels, token_dim, bias=False)

    def _mix(self, tokens: Tensor, stream: MambaStream) -> tuple[Tensor, MambaStream]:
        x, z = self.in_proj(tokens).chunk(2, -1)
        x, window = self._convolve(x, stream.window)
        delta, B, C = self._select(x)
        given = (x.mT, delta.mT, -self.A_log.exp(), B.mT, C.mT, self.D)
        y, state = selective_scan(*given, initial_state=stream.state, return_last_state=True)
        return self.out_proj(y.mT * F.silu(z)), MambaStream(window, state)

    def _step(self, tokens: Tensor, stream: MambaStream) -> tuple[Tensor, MambaStream]:
        x, z = self.in_proj(tokens).chunk(2, -1)
        x, window = self._convolve(x[:, None], stream.window)
        x = x[:, 0]
        delta, B, C = self._select(x)
        # h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t,  y_t = C_t · h_t + D u_t
        decay = torch.exp(delta[..., None] * -self.A_log.exp())
        state = torch.addcmul((delta * x)[..., None] * B[:, None], decay, stream.state)
        y = (state @ C[..., None])[..., 0] + self.D * x
        return self.out_proj(y * F.silu(z)), MambaStream(window, state)

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes [...,C], what is written and what is read [...,N], from the convolved x [...,C]."""
        N, rank = self.A_log.shape[1], self.dt_proj.in_features
        delta, B, C = self.x_proj(x).split((rank, N, N), -1)
        return F.softplus(self.dt_proj(delta)), B, C


class Mamba2Block(_Mixer):
    """The mixer of Mamba-2 (Dao & Gu 2024, arXiv:2405.21060, section 7 and figure 6), without norm and residual.

    Args:
        token_dim: width D of a token. num_heads: H; each head has one decay. state_dim: N.
        expand: channels per token width. conv_width: W. chunk: of `ssd_scan`; changes time and memory only.

    All heads share B and C (one group). At the start A is drawn uniformly from −16 … −1, D = 1, delta as in `MambaBlock`. Raises
    ValueError for sizes that are not whole numbers from 1 up, or channels that heads do not share evenly.
    """

    def __init__(
        self, token_dim: int, *, num_heads: int = 4, state_dim: int = 64, expand: int = 2, conv_width: int = 4, chunk: int = 64
    ):
        check_sizes(self, token_dim=token_dim, num_heads=num_heads, state_dim=state_dim)
        check_sizes(self, expand=expand, conv_width=conv_width, chunk=chunk)
        channels = expand * token_dim
        check(self, not channels % num_heads, "a multiple of num_heads", channels=channels, num_heads=num_heads)
        super().__init__(channels + 2 * state_dim, conv_width, (num_heads, channels // num_heads, state_dim))
        self.chunk, self.parts = chunk, (channels, channels + 2 * state_dim, num_heads)
        self.in_proj = nn.Linear(token_dim, sum(self.parts), bias=False)
        self.dt_bias = nn.Parameter(_delta_bias(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(num_heads))
        self.norm = nn.RMSNorm(channels, eps=1e-5)
        self.out_proj = nn.Linear(channels, token_dim, bias=False)

    def _mix(self, tokens: Tensor, stream: MambaStream) -> tuple[Tensor, MambaStream]:
        z, x, delta = self.in_proj(tokens).split(self.parts, -1)
        x, window = self._convolve(x, stream.window)
        x, delta, B, C = self._select(x, delta)
        given = (x, delta, -self.A_log.exp(), B, C, self.D)
        y, state = ssd_scan(*given, chunk=self.chunk, initial_state=stream.state, return_last_state=True)
        return self._emit(y, z), MambaStream(window, state)

    def _step(self, tokens: Tensor, stream: MambaStream) -> tuple[Tensor, MambaStream]:
        z, x, delta = self.in_proj(tokens).split(self.parts, -1)
        x, window = self._convolve(x[:, None], stream.window)
        x, delta, B, C = self._select(x[:, 0], delta)
        # h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_tᵀ,  y_t = h_t C_t + D x_t
        decay = torch.exp(delta * -self.A_log.exp())[..., None, None]
        state = torch.addcmul((delta[..., None] * x)[..., None] * B[:, None, None], decay, stream.state)
        y = (state @ C[:, None, :, None])[..., 0] + self.D[:, None] * x
        return self._emit(y, z), MambaStream(window, state)

    def _select(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What enters the heads [...,H,P], step sizes [...,H], what is written and what is read [...,N]."""
        heads, P, N = self.state_shape
        x, B, C = x.split((heads * P, N, N), -1)
        return x.unflatten(-1, (heads, P)), F.softplus(delta + self.dt_bias), B, C

    def _emit(self, y: Tensor, z: Tensor) -> Tensor:
        """Outputs [...,D] from heads y [...,H,P] and gate z [...,C]."""
        return self.out_proj(self.norm(y.flatten(-2) * F.silu(z)))


def _delta_bias(size: int, low: float = 1e-3, high: float = 1e-1) -> Tensor:
    """Biases whose softplus is log-uniform from `low` to `high`."""
    delta = torch.empty(size).uniform_(math.log(low), math.log(high)).exp()
    return delta + torch.log(-torch.expm1(-delta))  # softplus⁻¹(Δ) = ln(e^Δ − 1)
