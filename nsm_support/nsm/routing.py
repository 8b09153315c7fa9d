"""Tokens and states, in both directions: routing weights, reading, writing. O(T·S) in place of attention's O(T²).

Letters: B batch, T tokens, D token width, S states, M state width, H heads, K width of a head.

The weights are scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, equation 1) of tokens over states; reading
and writing with them is the cross-attention of the Set Transformer's inducing points (Lee et al. 2019, arXiv:1810.00825, equation
9), with the write normalised over tokens as in Slot Attention (Locatello et al. 2020, arXiv:2006.15055, algorithm 1).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsm_support.checks import check, check_shape, check_sizes
from nsm_support.nsm.states import Importance

MIN_MASS = 1e-9
"""Least routing mass that a message is divided by: a state that no token was routed to gets the message 0."""


class Routing(NamedTuple):
    """How tokens are spread over states. `weights` and `logits` [B,H,T,S]; rows of `weights` sum to 1."""

    weights: Tensor
    logits: Tensor


class Written(NamedTuple):
    """What the tokens left for each state."""

    message: Tensor  # (B, S, M): weighted mean of the tokens' messages
    mass: Tensor  # (B, S): routing mass, mean over heads; over all states it sums to the number of tokens
    strength: Tensor  # (B, S): how much of the update is taken, 0 … 1


def routing_logits(q: Tensor, k: Tensor, bias: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """q·k/(√K·τ) + bias: q [·,T,K], k [·,S,K], bias [S] (log-importance) → [·,T,S]; any axes · before."""
    scale = q.shape[-1] ** -0.5 / temperature
    bias = q.new_zeros(()) if bias is None else bias
    logits = torch.baddbmm(bias, q.flatten(0, -3), k.flatten(0, -3).transpose(1, 2), alpha=scale)  # (·, T, S)
    return logits.unflatten(0, q.shape[:-2])


def routing_weights(logits: Tensor, top_k: int | None = None) -> Tensor:
    """Softmax over the states [...,S]; with `top_k` over the k best alone, so that a row has exactly k nonzeros.

    The mask comes before the softmax: masked after it, a row would no longer sum to 1.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        best = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)
    return logits.softmax(-1)


def read(weights: Tensor, values: Tensor) -> Tensor:
    """r_t = Σ_s w_ts v_s: weights [...,T,S], values of the states [...,S,K] → [...,T,K]."""
    return weights @ values


def write(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """m_s = Σ_t w_ts v_t / Σ_t w_ts: weights [...,T,S], values of tokens [...,T,K] → message [...,S,K], mass [...,S].

    Safe at zero mass: the message is then 0, and so is its gradient with respect to the values.
    """
    mass = weights.sum(-2)
    return (weights.transpose(-1, -2) @ values) / mass.clamp(min=MIN_MASS)[..., None], mass


def read_write(q, k, state_values, token_values, bias=None, temperature=1.0, top_k=None):
    """Both directions on one routing: read [...,T,K], message [...,S,K], mass [...,S]. The benchmark times this."""
    weights = routing_weights(routing_logits(q, k, bias, temperature), top_k)
    return read(weights, state_values), *write(weights, token_values)


def read_write_reference(q, k, state_values, token_values, bias=None, temperature=1.0, top_k=None):
    """The definition of `read_write`, token by token and state by state, for q [T,K] and k [S,K] of one head."""
    reads, weights = [], []
    for q_t in q:
        logits = torch.stack([(q_t * k_s).sum() / (math.sqrt(len(q_t)) * temperature) for k_s in k])
        logits = logits if bias is None else logits + bias
        kept = logits.argsort(descending=True, stable=True)[: top_k or len(k)]
        exp = torch.zeros_like(logits).index_put((kept,), (logits[kept] - logits.max()).exp())
        weights.append(exp / exp.sum())
        reads.append(sum(w * v for w, v in zip(weights[-1], state_values, strict=True)))
    mass = [sum(w[s] for w in weights) for s in range(len(k))]
    sums = [sum(w[s] * v for w, v in zip(weights, token_values, strict=True)) for s in range(len(k))]
    message = [total / max(m, torch.tensor(MIN_MASS)) for total, m in zip(sums, mass, strict=True)]
    return torch.stack(reads), torch.stack(message), torch.stack(mass)


class TokenToStateRouter(nn.Module):
    """Content-based multi-head routing between tokens [B,T,D] and states [B,S,M].

    The query comes from the token, the key from the *state*; D and M need not be equal. Calling the router returns what tokens
    read and the head-averaged weights; `route`, `read_states` and `write_tokens` give the parts, per head.

    Args:
        token_dim: width D of a token.
        state_dim: width M of a state.
        num_states: number of states S.
        num_heads: heads H; K = D // H.
        top_k: states per token and head; None for all of them. Where pruning left fewer than k states, all are used.
        temperature: τ, divides the logits.
        use_softmax: False returns raw logits as weights, as the first prototype could (then nothing sums to 1).

    Raises ValueError for sizes that do not fit, a `top_k` outside 1 … S, or a temperature that is not above 0.
    """

    def __init__(
        self,
        token_dim: int,
        state_dim: int,
        num_states: int,
        num_heads: int = 4,
        top_k: int | None = None,
        temperature: float = 1.0,
        use_softmax: bool = True,
    ):
        super().__init__()
        check_sizes(self, token_dim=token_dim, state_dim=state_dim, num_heads=num_heads)
        check(self, not token_dim % num_heads, "a multiple of num_heads", token_dim=token_dim, num_heads=num_heads)
        self.importance = Importance(num_states)
        check(self, top_k is None or 1 <= top_k <= num_states, f"None or 1 … num_states, {num_states}", top_k=top_k)
        check(self, temperature > 0, "above 0", temperature=temperature)
        self.token_dim, self.state_dim, self.num_heads = token_dim, state_dim, num_heads
        self.top_k, self.temperature, self.use_softmax = top_k, temperature, use_softmax
        # No bias on query and key: zero states then give zero logits, whatever the tokens are.
        self.query = nn.Linear(token_dim, token_dim, bias=False)
        self.key = nn.Linear(state_dim, token_dim, bias=False)
        self.state_value = nn.Linear(state_dim, token_dim, bias=False)
        self.read_out = nn.Linear(token_dim, token_dim)
        self.token_value = nn.Linear(token_dim, token_dim, bias=False)
        self.write_out = nn.Linear(token_dim, state_dim)
        for layer in (self.query, self.key):  # logits of about unit spread from the start
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        # Half of the update is taken at this mass; at the start a tenth of what a uniform token gives (see `strength`).
        self.log_half_mass = nn.Parameter(torch.tensor(math.log(0.1 / num_states)))

    @property
    def num_states(self) -> int:
        return self.importance.num_states

    @property
    def log_importance(self) -> nn.Parameter:
        """Learned log-importance [S], added to the logits; a `StateManager` may share it through `importance`."""
        return self.importance.log_importance

    def forward(self, tokens: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Let tokens [B,T,D] read states [B,S,M]: what they read [B,T,D], and weights [B,T,S], the mean over heads."""
        weights = self.route(tokens, states).weights
        return self.read_states(weights, states), weights.mean(1)

    def route(self, tokens: Tensor, states: Tensor) -> Routing:
        """Weights and logits [B,H,T,S] of tokens [B,T,D] over states [B,S,M]. Logits are as before the top-k mask."""
        check_shape(self, "tokens", tokens, "B T D", D=self.token_dim)
        check_shape(self, "states", states, "B S M", B=tokens.shape[0], S=self.num_states, M=self.state_dim)
        return self.match(self.heads(self.query(tokens)), self.heads(self.key(states)))

    def match(self, q: Tensor, k: Tensor) -> Routing:
        """Routing of queries [...,T,K] over keys [...,S,K], with log-importance, temperature and top-k."""
        logits = routing_logits(q, k, self.log_importance, self.temperature)
        if not self.use_softmax:
            return Routing(logits, logits)
        return Routing(routing_weights(logits, self.top_k), logits)

    def read_states(self, weights: Tensor, states: Tensor) -> Tensor:
        """Per-head values of states [...,S,M], gathered with weights [...,H,T,S] → [...,T,D]."""
        return self.read_out(self.merge(read(weights, self.heads(self.state_value(states)))))

    def write_tokens(self, weights: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Written:
        """Messages of tokens [B,T,D], spread with weights [B,H,T,S]; tokens where mask [B,T] is False write nothing."""
        if mask is not None:
            weights = weights * mask[:, None, :, None]
        return self.deliver(*write(weights, self.heads(self.token_value(tokens))))

    def deliver(self, message: Tensor, mass: Tensor) -> Written:
        """Per-head messages [B,H,S,K] and masses [B,H,S] → what arrives at the states."""
        mass = mass.mean(1)
        return Written(self.write_out(self.merge(message)), mass, self.strength(mass))

    def strength(self, mass: Tensor) -> Tensor:
        """How much of its update a state takes, 0 … 1: mass/(mass + h), h learned.

        The message is a mean, so it does not tell how much was routed to the state: from a single token every state
        would hear the same. The strength does. A state that nothing was routed to keeps its value exactly.
        """
        return mass / (mass + self.log_half_mass.exp())

    def heads(self, x: Tensor) -> Tensor:
        """[...,T,H·K] → [...,H,T,K]"""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)

    def merge(self, x: Tensor) -> Tensor:
        """[...,H,T,K] → [...,T,H·K]"""
        return x.transpose(-2, -3).flatten(-2)
