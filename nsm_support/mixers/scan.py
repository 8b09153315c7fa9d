"""Scans of selective state space models, on any device: of Mamba (`selective_scan`) and of Mamba-2 (`ssd_scan`).

Letters: B batch, C channels, N width of the state, T tokens; for Mamba-2 also H heads, P width of a head, G groups.

Decays are multiplied, or their exponents summed, and never divided out again: a state that is forgotten at once, by
exp(-50) say, costs no precision.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsm_support.checks import Shape, check, check_shape, check_sizes

# Elements that one step and one segment aim at. On a CPU the buffers of a segment fit the cache; elsewhere a call is dear.
ON_CPU, ELSEWHERE = (8_192, 131_072), (1_048_576, 16_777_216)
SHORTEST, LONGEST = 8, 64  # steps in a chunk


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The recurrence of Mamba (Gu & Dao 2023, arXiv:2312.00752, algorithm 2), for each channel by itself:

        h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t,    y_t = C_t · h_t + D u_t

    Args:
        u, delta: [B,C,T]; delta is taken as it is, so after its softplus.
        A: [C,N], negative. B, C: [B,N,T]. D: [C], or None for none of u in y.
        initial_state: h_0 [B,C,N], zeros by default.
        return_last_state: return y [B,C,T] and h_T [B,C,N].

    Differentiable, once, in every input. Only the states between segments are kept, the others made anew in the backward pass:
    all B·C·N·T of them never exist at once. Raises ValueError for shapes that do not fit, no tokens, or numbers that are not real
    floats.
    """
    _check("u", u, "B C T")
    batch, channels, tokens = u.shape
    _check("delta", delta, "B C T", B=batch, C=channels, T=tokens)
    _check("A", A, "C N", C=channels)
    _check("B", B, "B N T", B=batch, N=A.shape[1], T=tokens)
    _check("C", C, "B N T", B=batch, N=A.shape[1], T=tokens)
    if initial_state is None:
        initial_state = u.new_zeros(batch, channels, A.shape[1])
    _check("initial_state", initial_state, "B C N", B=batch, C=channels, N=A.shape[1])
    if D is not None:
        _check("D", D, "C", C=channels)
    given = (u, delta, A, B, C, initial_state)
    dtype = _common_dtype(*given)
    y, last = _SelectiveScan.apply(*(x.to(dtype) for x in given))
    if D is not None:
        y = torch.addcmul(y, D[:, None].to(dtype), u.to(dtype))
    return (y, last) if return_last_state else y


def selective_scan_reference(u, delta, A, B, C, D=None, *, initial_state=None, return_last_state=False):
    """The definition of `selective_scan`, token by token."""
    h = u.new_zeros(*u.shape[:2], A.shape[1]) if initial_state is None else initial_state
    outputs = []
    for t in range(u.shape[-1]):
        # h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[:, None, :, t]
        outputs.append(torch.einsum("bcn,bn->bc", h, C[:, :, t]))
    y = torch.stack(outputs, -1)
    if D is not None:
        y = y + D[:, None] * u
    return (y, h) if return_last_state else y


class _Layout(NamedTuple):
    """How T tokens lie: `segments` one after another, each of `chunks` side by side, each of `length` steps."""

    segments: int
    chunks: int
    length: int

    @classmethod
    def of(cls, tokens: int, width: int, device: torch.device) -> "_Layout":
        """For a state of `width` numbers: chunks enough to make a step worth its call, steps until the cache is full."""
        step, segment = ON_CPU if device.type == "cpu" else ELSEWHERE
        chunks = max(1, step // width)
        length = min(LONGEST, max(SHORTEST, segment // (chunks * width)))
        segments = -(-tokens // (chunks * length))
        chunks = min(chunks, -(-tokens // (segments * length)))
        return cls(segments, chunks, -(-tokens // (segments * chunks)))  # even parts: little to pad

    def split(self, x: Tensor) -> Tensor:
        """[B,K,T] → [segments, length, chunks, B, K], zeros after the last token: they neither decay nor write."""
        rows = x.new_empty(math.prod(self), *x.shape[:2])
        rows[: x.shape[-1]] = x.permute(2, 0, 1)
        rows[x.shape[-1] :] = 0
        return rows.view(self.segments, self.chunks, self.length, *x.shape[:2]).transpose(1, 2).contiguous()

    def join(self, x: Tensor, tokens: int) -> Tensor:
        """The way back from `split`: [B,K,T]."""
        return x.transpose(1, 2).reshape(-1, *x.shape[3:])[:tokens].permute(1, 2, 0)


class _Segment:
    """Decays and states of one segment, in buffers that all segments share.

    `decay` [length, chunks, B, N, C] is exp(Δ_t A); `states` has one step more, the first being the state before each
    chunk. Channels come last, so that a product with delta or u runs along them.
    """

    def __init__(self, layout: _Layout, delta: Tensor, A: Tensor):
        batch, channels = delta.shape[-2:]
        shape = (layout.chunks, batch, A.shape[1], channels)
        # exp2 takes a third of the time of exp: exp(Δ A) = 2^(Δ A / ln 2)
        self.A_binary = (A / math.log(2)).t().contiguous()
        self.decay, self.states = delta.new_empty(layout.length, *shape), delta.new_empty(layout.length + 1, *shape)
        self.step = delta.new_empty(shape)
        self.decays, self.state_steps = self.decay.unbind(), self.states.unbind()

    def run(self, delta: Tensor, written: Tensor, B: Tensor, start: Tensor) -> None:
        """Make the states from delta and delta·u [length, chunks, B, C], B [length, chunks, B, N], start [B, N, C]."""
        decays, states = self.decays, self.state_steps
        torch.mul(delta[..., None, :], self.A_binary, out=self.decay).exp2_()
        torch.mul(written[..., None, :], B[..., None], out=self.states[1:])
        states[0][0] = start
        if self.states.shape[1] > 1:  # where each chunk ends if it starts at 0, then where it starts
            end = self.step.copy_(states[1])
            for decay, write in zip(decays[1:], states[2:], strict=True):
                torch.addcmul(write, decay, end, out=end)
            whole = self.whole_decay(delta)
            for j in range(len(end) - 1):
                torch.addcmul(end[j], whole[j], states[0][j], out=states[0][j + 1])
        for decay, before, state in zip(decays, states, states[1:], strict=False):
            state.addcmul_(decay, before)  # h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t

    def run_back(self, delta: Tensor, pull: Tensor, carry: Tensor) -> Tensor:
        """Turn `pull`, C_t gy_t at each step, into the gradient of h_t, in place; the gradient of h_0 [B, N, C].

        This is the same recurrence, backwards: gh_t = C_t gy_t + exp(Δ_{t+1} A) gh_{t+1}. `carry` [B, N, C] is the
        gradient that the segment's last state receives from what follows.
        """
        decays, pulls = self.decays[::-1], pull.unbind()[::-1]
        if pull.shape[1] > 1:
            start = self.step.copy_(pulls[0])
            for decay, here in zip(decays, pulls[1:], strict=False):
                torch.addcmul(here, decay, start, out=start)
            start.mul_(decays[-1])
            whole = self.whole_decay(delta)
            for j in reversed(range(len(start))):
                pulls[0][j] += carry
                carry = torch.addcmul(start[j], whole[j], carry)
        else:
            pulls[0][0] += carry
        for decay, after, here in zip(decays, pulls, pulls[1:], strict=False):
            here.addcmul_(decay, after)
        return carry if pull.shape[1] > 1 else (decays[-1] * pulls[-1])[0]

    def whole_decay(self, delta: Tensor) -> Tensor:
        """The decay over each whole chunk [chunks, B, N, C]."""
        return (delta.sum(0)[..., None, :] * self.A_binary).exp2_()


class _SelectiveScan(torch.autograd.Function):
    """`selective_scan` without D. A loop runs over the steps of a chunk only; all chunks of a segment step together. On a CPU
    a segment has to fit the cache, so that one of wide states is a single chunk: then a step is a token of all channels."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, initial_state):
        (batch, channels, tokens), N = u.shape, A.shape[1]
        layout = _Layout.of(tokens, max(1, batch * channels * N), u.device)
        rows, written, writes, reads = (layout.split(x) for x in (delta, delta * u, B, C))
        segment = _Segment(layout, rows, A)
        starts = u.new_empty(layout.segments, batch, N, channels)
        y = torch.empty_like(rows)
        last = initial_state.transpose(1, 2)
        for i in range(layout.segments):
            starts[i] = last
            segment.run(rows[i], written[i], writes[i], starts[i])
            # y_t = C_t · h_t
            torch.bmm(reads[i].view(-1, 1, N), segment.states[1:].view(-1, N, channels), out=y[i].view(-1, 1, channels))
            last = segment.states[-1, -1]
        ctx.save_for_backward(u, delta, A, B, C, starts)
        ctx.layout = layout
        return layout.join(y, tokens), last.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_last):
        u, delta, A, B, C, starts = ctx.saved_tensors
        layout, tokens, (channels, N) = ctx.layout, u.shape[-1], A.shape
        rows, written, writes, reads, pulls = (layout.split(x) for x in (delta, delta * u, B, C, grad_y))
        segment = _Segment(layout, rows, A)
        grad_h, product = torch.empty_like(segment.decay), torch.empty_like(segment.decay)
        grad_rows, grad_written = torch.empty_like(rows), torch.empty_like(rows)
        grad_B, grad_C = torch.empty_like(writes), torch.empty_like(reads)
        A_rows, grad_A = A.t().contiguous(), A.new_zeros(N, channels)
        carry = grad_last.transpose(1, 2)
        for i in reversed(range(layout.segments)):
            segment.run(rows[i], written[i], writes[i], starts[i])
            pull = pulls[i][..., None, :]
            torch.mul(reads[i][..., None], pull, out=grad_h)
            carry = segment.run_back(rows[i], grad_h, carry)
            torch.sum(torch.mul(segment.states[1:], pull, out=product), -1, out=grad_C[i])
            torch.sum(torch.mul(grad_h, written[i][..., None, :], out=product), -1, out=grad_B[i])
            into = grad_written[i].view(-1, 1, channels)
            torch.bmm(writes[i].view(-1, 1, N), grad_h.view(-1, N, channels), out=into)
            # gradient of the exponent Δ_t A: gh_t exp(Δ_t A) h_{t−1}
            exponent = segment.decay.mul_(grad_h).mul_(segment.states[:-1])
            torch.sum(torch.mul(exponent, A_rows, out=product), -2, out=grad_rows[i])
            grad_A += exponent.mul_(rows[i][..., None, :]).sum((0, 1, 2))
        grad_written, grad_rows = layout.join(grad_written, tokens), layout.join(grad_rows, tokens)
        grad_delta = torch.addcmul(grad_rows, grad_written, u)
        grads = layout.join(grad_B, tokens), layout.join(grad_C, tokens), carry.transpose(1, 2)
        return grad_written * delta, grad_delta, grad_A.t(), *grads


def ssd_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    chunk: int = 64,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The recurrence of Mamba-2 (Dao & Gu 2024, arXiv:2405.21060, section 6), one decay for a whole head:

        h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_tᵀ,    y_t = h_t C_t + D x_t

    Args:
        x: [B,T,H,P]. delta: [B,T,H], taken as it is. A: [H], negative.
        B, C: [B,T,N], shared by all heads, or [B,T,G,N], shared by groups of H/G neighbouring heads. D: [H], or None.
        chunk: tokens that meet in one matrix; the recurrence runs from chunk to chunk. Changes time and memory only.
        initial_state: h_0 [B,H,P,N], zeros by default.
        return_last_state: return y [B,T,H,P] and h_T [B,H,P,N].

    Raises ValueError for shapes that do not fit, no tokens, or numbers that are not real floats.
    """
    _check("x", x, "B T H P")
    batch, tokens, heads, P = x.shape
    _check("delta", delta, "B T H", B=batch, T=tokens, H=heads)
    _check("A", A, "H", H=heads)
    if B.dim() == C.dim() == 3:
        B, C = B[:, :, None], C[:, :, None]
    _check("B", B, "B T G N", B=batch, T=tokens)
    G, N = B.shape[2:]
    _check("C", C, "B T G N", B=batch, T=tokens, G=G, N=N)
    check("ssd_scan", not heads % G, "groups of equal size", heads=heads, groups=G)
    check_sizes("ssd_scan", chunk=chunk)
    if initial_state is None:
        initial_state = x.new_zeros(batch, heads, P, N)
    _check("initial_state", initial_state, "B H P N", B=batch, H=heads, P=P, N=N)
    if D is not None:
        _check("D", D, "H", H=heads)
    _common_dtype(x, delta, A, B, C, initial_state)

    # Axes: b batch, c chunks, l and s tokens of a chunk, g groups, r heads of a group, p, n.
    chunk = min(chunk, tokens)
    chunks = -(-tokens // chunk)

    def split(v: Tensor, *ends: int) -> Tensor:  # (b, c, l, *ends); what is added has delta = 0, it does nothing
        return F.pad(v, (0, 0) * (v.dim() - 2) + (0, chunks * chunk - tokens)).view(batch, chunks, chunk, *ends)

    written = split(x * delta[..., None], G, -1, P).permute(0, 1, 3, 4, 2, 5)  # (b, c, g, r, s, p)
    exponent = split(delta * A, G, heads // G).permute(0, 1, 3, 4, 2)  # (b, c, g, r, l)
    B, C = split(B, G, N).transpose(2, 3), split(C, G, N).transpose(2, 3)  # (b, c, g, l, n)

    # Inside a chunk: y_l = Σ_{s ≤ l} exp(Σ_{s < k ≤ l} Δ_k A) (C_l · B_s) Δ_s x_s. Each exponent is a sum of its own
    # terms: the difference of two running sums would lose its digits behind one large decay.
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    span = exponent[..., None].masked_fill(~lower.tril(-1), 0).cumsum(-2)
    decay = span.masked_fill(~lower, -math.inf).exp()  # (b, c, g, r, l, s)
    y = (decay * (C @ B.mT)[:, :, :, None]) @ written

    # From chunk to chunk: what each one adds to the state, and the state that each one starts from.
    added = (written * decay[..., -1, :, None]).mT @ B[:, :, :, None]  # (b, c, g, r, p, n)
    since_start = exponent.cumsum(-1).exp()  # (b, c, g, r, l)
    state, starts = initial_state.to(added.dtype).view(batch, G, -1, P, N), []
    for whole, add in zip(since_start[..., -1, None, None].unbind(1), added.unbind(1), strict=True):
        starts.append(state)
        state = whole * state + add
    y = y + since_start[..., None] * (C[:, :, :, None] @ torch.stack(starts, 1).mT)

    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, chunks * chunk, heads, P)[:, :tokens]
    if D is not None:
        y = y + D[:, None] * x
    return (y, state.reshape(batch, heads, P, N)) if return_last_state else y


def ssd_scan_reference(x, delta, A, B, C, D=None, *, initial_state=None, return_last_state=False):
    """The definition of `ssd_scan`, token by token."""
    heads = x.shape[2]
    B, C = (v[:, :, None] if v.dim() == 3 else v for v in (B, C))
    B, C = (v.repeat_interleave(heads // v.shape[2], 2) for v in (B, C))  # (B, T, H, N)
    h = x.new_zeros(x.shape[0], heads, x.shape[3], B.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        # h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_tᵀ
        add = torch.einsum("bh,bhp,bhn->bhpn", delta[:, t], x[:, t], B[:, t])
        h = torch.exp(delta[:, t] * A)[..., None, None] * h + add
        outputs.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]))
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + D[:, None] * x
    return (y, h) if return_last_state else y


def _check(name: str, x: Tensor, axes: str, **sizes: int) -> None:
    """Refuse a tensor whose number of axes, or a size named in `sizes`, is not the one asked for; and empty ones."""
    check_shape("scan", name, x, axes, **sizes)
    check("scan", 0 not in x.shape, "at least one token, and no empty axis", **{name: Shape(x.shape)})


def _common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that holds all of them: under autocast they differ."""
    dtype = tensors[0].dtype
    for x in tensors:
        check("scan", x.is_floating_point(), "real floats", dtype=x.dtype)
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype
