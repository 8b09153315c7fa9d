"""One layer of a neural state machine: tokens hear their window, write to the states, and read them once they changed.

Letters: B batch, T tokens, D token width, S states, M state width, H heads, K width of a head, c tokens of a chunk.

One rule holds in every mode: *a token reads the newest states that it may know.* Bidirectionally these are the states
after all tokens have written. Causally tokens write in chunks of c, and a token reads the states after the last chunk
that is complete once it has arrived; the last token of a chunk therefore reads what its own chunk wrote, and with c = 1
the layer is a recurrent machine, y_t = f(h_t).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsm_support.checks import check_choice, check_shape, check_sizes
from nsm_support.nsm.attention import HybridAttention
from nsm_support.nsm.propagation import Propagated, StatePropagator
from nsm_support.nsm.routing import MIN_MASS, Routing, TokenToStateRouter, write
from nsm_support.nsm.states import StateManager


class LayerTrace(NamedTuple):
    """All that a pass through a layer makes. Entries are None for parts that the layer's mix leaves out."""

    tokens: Tensor  # (B, T, D)
    states: Tensor | None  # (B, S, M), after every token has written
    weights: Tensor | None  # (B, H, T, S): routing by which the tokens read
    share: Tensor | None  # (B, T, 1): the window's share in the mix


class LayerStream(NamedTuple):
    """What a causal layer remembers between two tokens; its size does not grow with the number of tokens."""

    states: Tensor  # (B, S, M), after the last complete chunk
    cell: Tensor | None  # (B, S, M), the LSTM's
    message: Tensor  # (B, H, S, K), sum of w·v over the chunk so far
    mass: Tensor  # (B, H, S), sum of w over the chunk so far
    count: int  # tokens of the chunk so far
    keys: Tensor | None  # (B, H, ≤ W−1, K), the window behind the next token
    values: Tensor | None  # (B, H, ≤ W−1, K)


class Passed(NamedTuple):
    """What a pass over the states gives the tokens."""

    read: Tensor  # (B, T, D)
    states: Tensor  # (B, S, M)
    routing: Routing  # of the read: (B, H, T, S), causally (B, chunks, H, c, S)
    mass: Tensor  # (B, S), mean over heads; from `_recur` (B, T, S)


class NSMLayer(nn.Module):
    """Local attention and states, mixed, residual; feed-forward, residual (norm before each).

    Args:
        num_states: states S. state_dim: their width M. token_dim: width D of the tokens.
        num_heads: heads H of window, routing and state-to-state attention.
        window: tokens seen on one side, itself included.
        chunk: None for the bidirectional mode; c ≥ 1 for the causal mode in chunks of c tokens.
        gate_type: "gru" or "lstm". state_attention: whether states listen to each other after each update.
        top_k, temperature: of the router. mix, alpha, rotary: of the hybrid attention; "local" leaves the states out.
        ffn_multiple: inner width of the feed-forward part, in token widths. max_states: how far `allocate` may go.
        dropout: on both residual branches, in training only.

    Each layer has initial states of its own, in both modes. Handing the states up instead would break causality (the
    states at the end of a layer have heard the last token), and would force every layer to keep equally many states.
    """

    def __init__(
        self,
        num_states: int,
        state_dim: int,
        token_dim: int,
        *,
        num_heads: int = 4,
        window: int = 16,
        chunk: int | None = None,
        gate_type: str = "gru",
        state_attention: bool = True,
        top_k: int | None = None,
        temperature: float = 1.0,
        mix: str = "gate",
        alpha: float = 0.5,
        rotary: bool = False,
        ffn_multiple: int = 4,
        max_states: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        if chunk is not None:
            check_sizes(self, chunk=chunk)
        self.token_dim, self.chunk = token_dim, chunk
        self.hybrid_attn = HybridAttention(
            token_dim, num_heads, window, causal=chunk is not None, mix=mix, alpha=alpha, rotary=rotary
        )
        self.router = self.state_manager = self.propagator = None
        if mix != "local":
            self.router = TokenToStateRouter(token_dim, state_dim, num_states, num_heads, top_k, temperature)
            self.state_manager = StateManager(num_states, state_dim, max_states=max_states, importance=self.router.importance)
            self.propagator = StatePropagator(state_dim, gate_type=gate_type, num_heads=num_heads if state_attention else 0)
        self.norm, self.ffn_norm = nn.LayerNorm(token_dim), nn.LayerNorm(token_dim)
        self.ffn = nn.Sequential(
            nn.Linear(token_dim, ffn_multiple * token_dim), nn.GELU(), nn.Linear(ffn_multiple * token_dim, token_dim)
        )
        self.dropout = nn.Dropout(dropout)

    @property
    def num_states(self) -> int:
        return self.state_manager.num_states if self.state_manager is not None else 0

    def forward(self, tokens: Tensor, states: Tensor | None = None, mask: Tensor | None = None):
        """Tokens [B,T,D] and states [B,S,M] (the learned ones by default) → both, updated.

        Tokens where mask [B,T] is False are padding: no one hears them and they write nothing.

        Raises:
            ValueError: for shapes that do not fit.
        """
        return self._run(tokens, states, mask, trace=False)[:2]

    def trace(self, tokens: Tensor, states: Tensor | None = None, mask: Tensor | None = None) -> LayerTrace:
        """`forward`, with the routing weights and the mix beside it."""
        return self._run(tokens, states, mask, trace=True)

    def _run(self, tokens: Tensor, states: Tensor | None, mask: Tensor | None, trace: bool) -> LayerTrace:
        check_shape(self, "tokens", tokens, "B T D", D=self.token_dim)
        B, T, _ = tokens.shape
        check_sizes(self, **{"number of tokens": T})
        if mask is not None:
            check_shape(self, "mask", mask, "B T", B=B, T=T)
            check_choice(self, (torch.bool,), **{"mask.dtype": mask.dtype})
        u = self.norm(tokens)
        local = self.hybrid_attn.local(u, mask)  # (B, T, D)
        heard = u if local is None else u + local
        read = weights = None
        if self.router is not None:
            states = self.state_manager(states, B)
            sweep = self._together if self.chunk is None else self._recur if self._plain_recurrence else self._in_chunks
            read, states, routing, mass = sweep(heard, states, mask)
            self.router.importance.observe(mass)
            if trace:
                weights = routing.weights if self.chunk is None else self._align(routing.weights.transpose(1, 2), T)
        tokens = self._finish(tokens, heard, local, read)
        return LayerTrace(tokens, states, weights, self.hybrid_attn.share(heard) if trace else None)

    def _finish(self, tokens: Tensor, heard: Tensor, local: Tensor | None, read: Tensor | None) -> Tensor:
        """Mix, residual, feed-forward, residual: nothing here lets a token see another."""
        tokens = tokens + self.dropout(self.hybrid_attn.combine(heard, local, read))
        return tokens + self.dropout(self.ffn(self.ffn_norm(tokens)))

    def _together(self, heard: Tensor, states: Tensor, mask: Tensor | None) -> Passed:
        """Bidirectional: all tokens write at once, the states change once, all tokens read."""
        router = self.router
        q, v = router.heads(router.query(heard)), router.heads(router.token_value(heard))
        weights = router.match(q, router.heads(router.key(states))).weights  # (B, H, T, S)
        states, _, mass = self._write(weights, v, states, None, mask)
        routing = router.match(q, router.heads(router.key(states)))
        return Passed(router.read_states(routing.weights, states), states, routing, mass)

    def _in_chunks(self, heard: Tensor, states: Tensor, mask: Tensor | None) -> Passed:
        """Causal: chunk after chunk writes; then all tokens read at once, each from the states that it may know."""
        router, T = self.router, heard.shape[1]
        c = min(self.chunk, T + 1)
        q, v = router.heads(router.query(heard)), router.heads(router.token_value(heard))  # (B, H, T, K)
        cell, total, known, keys = None, 0, [states], [router.heads(router.key(states))]
        masks = [None] * -(-T // c) if mask is None else mask.split(c, 1)
        for q_c, v_c, mask_c in zip(q.split(c, 2), v.split(c, 2), masks, strict=True):
            weights = router.match(q_c, keys[-1]).weights  # (B, H, c, S)
            states, cell, mass = self._write(weights, v_c, states, cell, mask_c)
            total = total + mass
            if q_c.shape[2] == c:  # complete: from here on it may be read
                known.append(states)
                keys.append(router.heads(router.key(states)))
        # Token t reads known[(t + 1) // c]: one empty place in front makes these groups of c.
        q = F.pad(q, (0, 0, 1, len(known) * c - T - 1)).unflatten(2, (-1, c)).transpose(1, 2)  # (B, chunks, H, c, K)
        routing = router.match(q, torch.stack(keys, 1))
        read = router.read_states(routing.weights, torch.stack(known, 1))  # (B, chunks, c, D)
        return Passed(self._align(read, T), states, routing, total)

    def _align(self, grouped: Tensor, T: int) -> Tensor:
        """[..., chunks, c, ·] of `_in_chunks` or `_recur` → [..., T, ·]: away with the empty places."""
        flat = grouped.flatten(-3, -2)
        return flat if flat.shape[-2] == T else flat[..., 1 : T + 1, :]

    @property
    def _plain_recurrence(self) -> bool:
        """c = 1 and dense: one token's message, a mean over one, is the same for every state."""
        return self.chunk == 1 and (self.router.top_k is None or self.router.top_k >= self.num_states)

    def _recur(self, heard: Tensor, states: Tensor, mask: Tensor | None) -> Passed:
        """`_in_chunks` for c = 1, with all that needs no state done before the loop or after it.

        The key projection moves to the query's side, q·(W_k s) = (W_kᵀ q)·s, and the read's value projection behind the
        weighted sum, so that the loop projects no state.
        """
        router, propagator = self.router, self.propagator
        B, T, D = heard.shape
        H, M = router.num_heads, router.state_dim
        per_head = router.key.weight.view(H, -1, M)  # (H, K, M)
        q = torch.einsum("bthk,hkm->bthm", router.query(heard).view(B, T, H, -1), per_head)
        q = q * (router.temperature * (D // H) ** 0.5) ** -1
        gates = propagator.gates(router.write_out(router.token_value(heard)))  # (B, T, 3M or 4M)
        bias = router.log_importance
        cell, known, masses = None, [], []
        for t, (q_t, gates_t) in enumerate(zip(q.unbind(1), gates.split(1, 1), strict=True)):
            weights = torch.baddbmm(bias, q_t, states.transpose(1, 2)).softmax(-1)  # (B, H, S)
            mass = weights.mean(1)
            if mask is not None:
                mass = mass * mask[:, t, None]
            new = propagator.update(states, gates_t, cell, router.strength(mass))
            new = Propagated(propagator.listen(new.states, bias), new.cell)
            states, cell = self._unless_padding(new, states, cell, None if mask is None else mask[:, t, None])
            known.append(states)
            masses.append(mass.detach())
        known = torch.stack(known, 1)  # (B, T, S, M)
        logits = q @ known.transpose(-1, -2) + bias  # (B, T, H, S)
        weights = logits.softmax(-1)
        values = router.state_value.weight.view(H, -1, M)
        read = torch.einsum("bthm,hkm->bthk", weights @ known, values)
        routing = Routing(weights[:, :, :, None], logits[:, :, :, None])  # (B, chunks = T, H, c = 1, S)
        return Passed(router.read_out(read.flatten(-2)), states, routing, torch.stack(masses, 1))

    def _write(self, weights, values, states, cell, mask):
        """Write values [B,H,c,K] by weights [B,H,c,S], and let the states change."""
        if mask is not None:
            weights = weights * mask[:, None, :, None]
        message, mass = write(weights, values)
        new = self._propagate(states, cell, message, mass)
        return *self._unless_padding(new, states, cell, mask), mass.detach().mean(1)

    def _propagate(self, states, cell, message, mass) -> Propagated:
        written = self.router.deliver(message, mass)
        return self.propagator(states, written.message, cell, written.strength, self.router.log_importance)

    def _unless_padding(self, new: Propagated, states: Tensor, cell: Tensor | None, mask: Tensor | None) -> Propagated:
        """Leave everything as it was where a chunk holds nothing but padding."""
        if mask is None:
            return new
        real = mask.any(-1)[:, None, None]
        old_cell = states if cell is None else cell
        kept_cell = None if new.cell is None else torch.where(real, new.cell, old_cell)
        return Propagated(torch.where(real, new.states, states), kept_cell)

    def start(self, batch_size: int, states: Tensor | None = None) -> LayerStream:
        """The memory of a causal layer before the first of a stream of tokens.

        Raises:
            ValueError: in the bidirectional mode, which needs all tokens at once, and without states (mix "local").
        """
        if self.chunk is None or self.router is None:
            raise ValueError("streaming takes a causal layer with states: give chunk, and a mix other than 'local'")
        states = self.state_manager(states, batch_size)
        H, K = self.router.num_heads, self.token_dim // self.router.num_heads
        empty = None if self.hybrid_attn.mix == "read" else states.new_zeros(batch_size, H, 0, K)
        message = states.new_zeros(batch_size, H, self.num_states, K)
        return LayerStream(states, None, message, message[..., 0], 0, empty, empty)

    def step(self, tokens: Tensor, stream: LayerStream, position: int = 0) -> tuple[Tensor, LayerStream]:
        """One token [B,D] of each sequence, at `position` (for rotary alone); equals the full pass at that place."""
        check_shape(self, "tokens", tokens, "B D", D=self.token_dim)
        router, attn = self.router, self.hybrid_attn
        states, cell, message, mass, count, keys, values = stream
        tokens = tokens[:, None]  # (B, 1, D)
        heard, local = self.norm(tokens), None
        if attn.mix != "read":
            q, k, v = attn.project(heard, position)
            keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            local = attn.out(F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(-2))
            heard = heard + local
            keys, values = (x[:, :, max(0, x.shape[2] - attn.window + 1) :] for x in (keys, values))
        q, v = router.heads(router.query(heard)), router.heads(router.token_value(heard))  # (B, H, 1, K)
        weights = router.match(q, router.heads(router.key(states))).weights  # (B, H, 1, S)
        message, mass, count = message + weights.transpose(-1, -2) * v, mass + weights[:, :, 0], count + 1
        if count == self.chunk:
            states, cell = self._propagate(states, cell, message / mass.clamp(min=MIN_MASS)[..., None], mass)
            message, mass, count = torch.zeros_like(message), torch.zeros_like(mass), 0
            weights = router.match(q, router.heads(router.key(states))).weights
        tokens = self._finish(tokens, heard, local, router.read_states(weights, states))
        return tokens[:, 0], LayerStream(states, cell, message, mass, count, keys, values)

    def close(self, stream: LayerStream) -> Tensor:
        """The states [B,S,M] of a stream as a full pass returns them: with the chunk that is still incomplete."""
        if stream.count == 0:
            return stream.states
        message = stream.message / stream.mass.clamp(min=MIN_MASS)[..., None]
        return self._propagate(stream.states, stream.cell, message, stream.mass).states
