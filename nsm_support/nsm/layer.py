"""One layer of a neural state machine: tokens hear their window, write to the states, and read them once they changed.

Letters: B batch, T tokens, D token width, S states, M state width, H heads, K width of a head, c tokens of a chunk.

One rule holds in every mode: *a token reads the newest states that it may know.* Bidirectionally these are the states
after all tokens have written. Causally tokens write in chunks of c, and a token reads the states after the last chunk
that is complete once it has arrived; the last token of a chunk therefore reads what its own chunk wrote, and with c = 1
the layer is a recurrent machine, y_t = f(h_t).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsm_support.checks import check, check_choice, check_shape, check_sizes
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

    position: int  # of the next token
    states: Tensor | None  # (B, S, M), after the last complete chunk
    cell: Tensor | None  # (B, S, M), the LSTM's
    message: Tensor | None  # (B, H, S, K), sum of w·v over the chunk so far
    mass: Tensor | None  # (B, H, S), sum of w over the chunk so far
    keys: Tensor | None  # (B, H, ≤ W−1, K), the window behind the next token
    values: Tensor | None  # (B, H, ≤ W−1, K)


class Passed(NamedTuple):
    """What a pass over the states gives the tokens."""

    read: Tensor  # (B, T, D)
    states: Tensor  # (B, S, M)
    routing: Routing  # of the read: (B, H, T, S), causally (B, chunks, H, c, S)
    mass: Tensor  # (B, S), mean over heads; from `_recur` (B, T, S)
    complete: Propagated  # states and cell after the last complete chunk


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSizes:
    """What a layer and a model of layers have in common."""

    num_states: int = 16  # S
    max_states: int | None = None  # how far `allocate` may go
    state_dim: int = 64  # M
    token_dim: int = 64  # D
    num_heads: int = 4  # H, of window, routing and state-to-state attention
    window: int = 16  # tokens seen on one side, itself included
    chunk: int | None = None  # None: bidirectional; c ≥ 1: causal, in chunks of c tokens
    gate_type: str = "gru"  # or "lstm"
    state_attention: bool = True  # whether states listen to each other after each update
    top_k: int | None = None  # states per token and head; None: all
    temperature: float = 1.0  # of the router
    mix: str = "gate"  # or "sum", "fixed" (with alpha), "local" (leaves the states out), "read"
    alpha: float = 0.5
    ffn_multiple: int = 4  # inner width of the feed-forward part, in token widths
    dropout: float = 0.0  # on both residual branches, in training only


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerConfig(LayerSizes):
    """Everything that makes an `NSMLayer`."""

    rotary: bool = False  # positions inside the window


class NSMLayer(nn.Module):
    """Local attention and states, mixed, residual; feed-forward, residual (norm before each).

    Args:
        num_states: states S. state_dim: their width M. token_dim: width D of the tokens. Other options: of `LayerConfig`.

    Each layer has initial states of its own, in both modes. Handing the states up instead would break causality (the
    states at the end of a layer have heard the last token), and would force every layer to keep equally many states.
    """

    def __init__(self, num_states: int, state_dim: int, token_dim: int, **options: Any):
        super().__init__()
        config = LayerConfig(num_states=num_states, state_dim=state_dim, token_dim=token_dim, **options)
        causal = config.chunk is not None
        if causal:
            check_sizes(self, chunk=config.chunk)
        self.token_dim, self.chunk, heads = token_dim, config.chunk, config.num_heads
        mixing: dict[str, Any] = {"mix": config.mix, "alpha": config.alpha, "rotary": config.rotary}
        self.hybrid_attn = HybridAttention(token_dim, heads, config.window, causal=causal, **mixing)
        self.has_states = config.mix != "local"
        if self.has_states:
            self.router = TokenToStateRouter(token_dim, state_dim, num_states, heads, config.top_k, config.temperature)
            shared: dict[str, Any] = {"max_states": config.max_states, "importance": self.router.importance}
            self.state_manager = StateManager(num_states, state_dim, **shared)
            listening = heads if config.state_attention else 0
            self.propagator = StatePropagator(state_dim, gate_type=config.gate_type, num_heads=listening)
        self.norm, self.ffn_norm = nn.LayerNorm(token_dim), nn.LayerNorm(token_dim)
        inner = config.ffn_multiple * token_dim
        self.ffn = nn.Sequential(nn.Linear(token_dim, inner), nn.GELU(), nn.Linear(inner, token_dim))
        self.dropout = nn.Dropout(config.dropout)

    @property
    def num_states(self) -> int:
        return self.state_manager.num_states if self.has_states else 0

    def forward(self, tokens: Tensor, states: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens [B,T,D] and states [B,S,M] (the learned ones by default) → both, updated.

        Tokens where mask [B,T] is False are padding: no one hears them and they write nothing. Raises ValueError for shapes that
        do not fit.
        """
        return self._run(tokens, states, mask, trace=False)[0][:2]

    def trace(self, tokens: Tensor, states: Tensor | None = None, mask: Tensor | None = None) -> LayerTrace:
        """`forward`, with the routing weights and the mix beside it."""
        return self._run(tokens, states, mask, trace=True)[0]

    def _run(
        self, tokens: Tensor, states: Tensor | None, mask: Tensor | None, trace: bool
    ) -> tuple[LayerTrace, Tensor, Passed | None]:
        """The pass; and what a stream goes on from: the tokens with what they heard in their window, and the states."""
        check_shape(self, "tokens", tokens, "B T D", D=self.token_dim)
        B, T, _ = tokens.shape
        check_sizes(self, **{"number of tokens": T})
        if mask is not None:
            check_shape(self, "mask", mask, "B T", B=B, T=T)
            check_choice(self, (torch.bool,), **{"mask.dtype": mask.dtype})
        u = self.norm(tokens)
        local = self.hybrid_attn.local(u, mask)  # (B, T, D)
        heard = u if local is None else u + local
        read = weights = passed = None
        if self.has_states:
            # With c = 1 and dense, one token's message, a mean over one, is the same for every state.
            plain = self.chunk == 1 and (self.router.top_k is None or self.router.top_k >= self.num_states)
            sweep = self._together if self.chunk is None else self._recur if plain else self._in_chunks
            passed = sweep(heard, self.state_manager(states, B), mask)
            read, states = passed.read, passed.states
            self.router.importance.observe(passed.mass)
            if trace:
                weights = passed.routing.weights
                weights = weights if self.chunk is None else self._align(weights.transpose(1, 2), T)
        tokens = self._finish(tokens, heard, local, read)
        return LayerTrace(tokens, states, weights, self.hybrid_attn.share(heard) if trace else None), heard, passed

    def _finish(self, tokens: Tensor, heard: Tensor, local: Tensor | None, read: Tensor | None) -> Tensor:
        """Mix, residual, feed-forward, residual: nothing here lets a token see another."""
        tokens = tokens + self.dropout(self.hybrid_attn.combine(heard, local, read))
        return tokens + self.dropout(self.ffn(self.ffn_norm(tokens)))

    def _together(self, heard: Tensor, states: Tensor, mask: Tensor | None) -> Passed:
        """Bidirectional: all tokens write at once, the states change once, all tokens read."""
        router = self.router
        q, v = router.heads(router.query(heard)), router.heads(router.token_value(heard))
        weights = router.match(q, router.heads(router.key(states))).weights  # (B, H, T, S)
        new, mass = self._write(weights, v, states, None, mask)
        routing = router.match(q, router.heads(router.key(new.states)))
        return Passed(router.read_states(routing.weights, new.states), new.states, routing, mass, new)

    def _in_chunks(self, heard: Tensor, states: Tensor, mask: Tensor | None) -> Passed:
        """Causal: chunk after chunk writes; then all tokens read at once, each from the states that it may know."""
        router, T = self.router, heard.shape[1]
        c = min(self.chunk or 0, T + 1)
        q, v = router.heads(router.query(heard)), router.heads(router.token_value(heard))  # (B, H, T, K)
        new = complete = Propagated(states, None)
        total, known, keys = states.new_zeros(()), [states], [router.heads(router.key(states))]
        masks: Iterable[Tensor | None] = [None] * -(-T // c) if mask is None else mask.split(c, 1)
        for q_c, v_c, mask_c in zip(q.split(c, 2), v.split(c, 2), masks, strict=True):
            weights = router.match(q_c, keys[-1]).weights  # (B, H, c, S)
            new, mass = self._write(weights, v_c, *new, mask_c)
            total = total + mass
            if q_c.shape[2] == c:  # complete: from here on it may be read
                complete = new
                known.append(new.states)
                keys.append(router.heads(router.key(new.states)))
        # Token t reads known[(t + 1) // c]: one empty place in front makes these groups of c.
        q = F.pad(q, (0, 0, 1, len(known) * c - T - 1)).unflatten(2, (-1, c)).transpose(1, 2)  # (B, chunks, H, c, K)
        routing = router.match(q, torch.stack(keys, 1))
        read = router.read_states(routing.weights, torch.stack(known, 1))  # (B, chunks, c, D)
        return Passed(self._align(read, T), new.states, routing, total, complete)

    def _align(self, grouped: Tensor, T: int) -> Tensor:
        """[..., chunks, c, ·] of `_in_chunks` or `_recur` → [..., T, ·]: away with the empty places."""
        flat = grouped.flatten(-3, -2)
        return flat if flat.shape[-2] == T else flat[..., 1 : T + 1, :]

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
        cell: Tensor | None = None
        after, masses = [], []
        for t, (q_t, gates_t) in enumerate(zip(q.unbind(1), gates.split(1, 1), strict=True)):
            weights = torch.baddbmm(bias, q_t, states.transpose(1, 2)).softmax(-1)  # (B, H, S)
            mass = weights.mean(1)
            if mask is not None:
                mass = mass * mask[:, t, None]
            new = propagator.update(states, gates_t, cell, router.strength(mass))
            new = Propagated(propagator.listen(new.states, bias), new.cell)
            states, cell = self._unless_padding(new, states, cell, None if mask is None else mask[:, t, None])
            after.append(states)
            masses.append(mass.detach())
        known = torch.stack(after, 1)  # (B, T, S, M)
        logits = q @ known.transpose(-1, -2) + bias  # (B, T, H, S)
        weights = logits.softmax(-1)
        values = router.state_value.weight.view(H, -1, M)
        read = torch.einsum("bthm,hkm->bthk", weights @ known, values)
        routing = Routing(weights[:, :, :, None], logits[:, :, :, None])  # (B, chunks = T, H, c = 1, S)
        return Passed(router.read_out(read.flatten(-2)), states, routing, torch.stack(masses, 1), Propagated(states, cell))

    def _write(
        self, weights: Tensor, values: Tensor, states: Tensor, cell: Tensor | None, mask: Tensor | None
    ) -> tuple[Propagated, Tensor]:
        """Write values [B,H,c,K] by weights [B,H,c,S], and let the states change; and the mass [B,S]."""
        if mask is not None:
            weights = weights * mask[:, None, :, None]
        message, mass = write(weights, values)
        new = self._propagate(states, cell, message, mass)
        return self._unless_padding(new, states, cell, mask), mass.detach().mean(1)

    def _propagate(self, states: Tensor, cell: Tensor | None, message: Tensor, mass: Tensor) -> Propagated:
        written = self.router.deliver(message, mass)
        return self.propagator(states, written.message, cell, written.strength, self.router.log_importance)

    def _unless_padding(self, new: Propagated, states: Tensor, cell: Tensor | None, mask: Tensor | None) -> Propagated:
        """Leave everything as it was where a chunk holds nothing but padding."""
        if mask is None:
            return new
        real = mask.any(-1)[:, None, None]
        kept_cell = None if new.cell is None else torch.where(real, new.cell, states if cell is None else cell)
        return Propagated(torch.where(real, new.states, states), kept_cell)

    def start(self, batch_size: int, states: Tensor | None = None) -> LayerStream:
        """The memory of a causal layer before the first of a stream of tokens.

        Raises ValueError in the bidirectional mode, which needs all tokens at once.
        """
        check(self, self.chunk is not None, "a number of tokens: a stream sees no later token", chunk=self.chunk)
        H, mix = self.hybrid_attn.num_heads, self.hybrid_attn.mix
        window = None if mix == "read" else self.norm.weight.new_zeros(batch_size, H, 0, self.token_dim // H)
        if not self.has_states:
            return LayerStream(0, None, None, None, None, window, window)
        states = self.state_manager(states, batch_size)
        message = states.new_zeros(batch_size, H, self.num_states, self.token_dim // H)
        return LayerStream(0, states, None, message, message[..., 0], window, window)

    def go_on(self, tokens: Tensor, stream: LayerStream) -> tuple[Tensor, LayerStream]:
        """The first tokens [B,T,D] of a stream at once, or the next one [B,1,D], and the memory after it."""
        if tokens.shape[1] == 1:
            out, stream = self.step(tokens[:, 0], stream)
            return out[:, None], stream
        T, window = tokens.shape[1], self.hybrid_attn.window
        trace, heard, passed = self._run(tokens, None, None, trace=False)
        stream = stream._replace(position=T)
        if stream.keys is not None:
            first = max(0, T - window)
            _, k, v = self.hybrid_attn.project(self.norm(tokens[:, first:]), first)
            stream = stream._replace(keys=self._behind(k), values=self._behind(v))
        if passed is not None:
            states, cell = passed.complete
            stream = stream._replace(states=states, cell=cell)
            if rest := T % (self.chunk or 1):  # an incomplete chunk waits to be written
                waiting = heard[:, T - rest :]
                weights = self.router.route(waiting, states).weights
                message = weights.mT @ self.router.heads(self.router.token_value(waiting))
                stream = stream._replace(message=message, mass=weights.sum(-2))
        return trace.tokens, stream

    def step(self, tokens: Tensor, stream: LayerStream) -> tuple[Tensor, LayerStream]:
        """The next token [B,D] of each sequence; equals the full pass at its place."""
        check_shape(self, "tokens", tokens, "B D", D=self.token_dim)
        attn, read = self.hybrid_attn, None
        position, states, cell, message, mass, keys, values = stream
        tokens = tokens[:, None]  # (B, 1, D)
        heard, local = self.norm(tokens), None
        if keys is not None and values is not None:
            q, k, v = attn.project(heard, position)
            keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            local = attn.out(F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(-2))
            heard = heard + local
            keys, values = self._behind(keys), self._behind(values)
        position += 1
        if states is not None and message is not None and mass is not None:
            router = self.router
            q, v = router.heads(router.query(heard)), router.heads(router.token_value(heard))  # (B, H, 1, K)
            weights = router.match(q, router.heads(router.key(states))).weights  # (B, H, 1, S)
            message, mass = message + weights.mT * v, mass + weights[:, :, 0]
            if position % (self.chunk or 1) == 0:
                states, cell = self._settle(states, cell, message, mass)
                message, mass = torch.zeros_like(message), torch.zeros_like(mass)
                weights = router.match(q, router.heads(router.key(states))).weights
            read = router.read_states(weights, states)
        tokens = self._finish(tokens, heard, local, read)
        return tokens[:, 0], LayerStream(position, states, cell, message, mass, keys, values)

    def close(self, stream: LayerStream) -> Tensor | None:
        """The states [B,S,M] of a stream as a full pass returns them: with the chunk that is still incomplete."""
        position, states, cell, message, mass, *_ = stream
        if states is None or message is None or mass is None or position % (self.chunk or 1) == 0:
            return states
        return self._settle(states, cell, message, mass).states

    def _settle(self, states: Tensor, cell: Tensor | None, message: Tensor, mass: Tensor) -> Propagated:
        """Let the states change by a chunk's sums of w·v [B,H,S,K] and of w [B,H,S]."""
        return self._propagate(states, cell, message / mass.clamp(min=MIN_MASS)[..., None], mass)

    def _behind(self, x: Tensor) -> Tensor:
        """Of keys or values [B,H,T,K] those that the next token sees."""
        return x[:, :, max(0, x.shape[2] - self.hybrid_attn.window + 1) :]
