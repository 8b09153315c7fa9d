"""How a state changes: a gated update by the message it received, then states listen to each other.

Letters: B batch, S states, M state width, H heads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsm_support.checks import check, check_choice, check_shape, check_sizes

CELLS = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}


class Propagated(NamedTuple):
    """States [B,S,M] after an update, and the LSTM's cell [B,S,M] (None for a GRU)."""

    states: Tensor
    cell: Tensor | None


def gru_update(gates_x: Tensor, gates_h: Tensor, states: Tensor) -> Tensor:
    """Cho et al. 2014 (arXiv:1406.1078), in the form of `torch.nn.GRUCell`; gates [...,3M] of message and state."""
    rz_x, n_x = gates_x.tensor_split([2 * states.shape[-1]], -1)
    rz_h, n_h = gates_h.tensor_split([2 * states.shape[-1]], -1)
    # r = σ(W_ir x + W_hr h), z = σ(W_iz x + W_hz h)
    r, z = (rz_x + rz_h).sigmoid().chunk(2, -1)
    # n = tanh(W_in x + r ⊙ W_hn h)
    n = torch.addcmul(n_x, r, n_h).tanh()
    # h' = (1 − z) ⊙ n + z ⊙ h
    return torch.lerp(n, states, z)


def lstm_update(gates_x: Tensor, gates_h: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Hochreiter and Schmidhuber 1997 with a forget gate, in the form of `torch.nn.LSTMCell`; gates [...,4M]."""
    i, f, g, o = (gates_x + gates_h).chunk(4, -1)
    # c' = σ(f) ⊙ c + σ(i) ⊙ tanh(g)
    cell = torch.addcmul(f.sigmoid() * cell, i.sigmoid(), g.tanh())
    # h' = σ(o) ⊙ tanh(c')
    return o.sigmoid() * cell.tanh(), cell


class StateAttention(nn.Module):
    """Multi-head attention among the states, residual, norm: [B,S,M] → [B,S,M].

    The log-importance of a state is added to the logits of those who listen to it, so a state of no importance is not
    heard. The norm comes last, so that a machine that runs for ever stays bounded.
    """

    def __init__(self, state_dim: int, hidden_dim: int, num_heads: int):
        super().__init__()
        check(self, not hidden_dim % num_heads, "a multiple of num_heads", hidden_dim=hidden_dim, num_heads=num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(state_dim, 3 * hidden_dim)
        self.out = nn.Linear(hidden_dim, state_dim)
        self.scale = nn.Parameter(torch.full((state_dim,), 0.1))  # listen softly at first: states begin distinct
        self.norm = nn.LayerNorm(state_dim)

    def forward(self, states: Tensor, log_importance: Tensor | None = None) -> Tensor:
        B, S, _ = states.shape
        H = self.num_heads
        q, k, v = self.qkv(states).view(B, S, 3, H, -1).permute(2, 0, 3, 1, 4).flatten(1, 2)  # (B·H, S, K) each
        # a = softmax(q·k/√K + log-importance)
        bias = states.new_zeros(()) if log_importance is None else log_importance
        a = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5).softmax(-1)  # (B·H, S, S)
        heard = torch.bmm(a, v).view(B, H, S, -1).transpose(1, 2).flatten(-2)  # (B, S, H·K)
        # s' = Norm(s + γ ⊙ W_o a·v)
        return self.norm(torch.addcmul(states, self.scale, self.out(heard)))


class StatePropagator(nn.Module):
    """Gated update of states [B,S,M] by their messages, then state-to-state attention.

    Args:
        state_dim: width M of states and messages.
        hidden_dim: inner width of the state-to-state attention; M by default.
        gate_type: "gru", or "lstm" with a real cell [B,S,M] beside the states.
        num_heads: heads of the state-to-state attention; 0 leaves it out.

    `cell` holds the weights, a `torch.nn.GRUCell` or `LSTMCell`: the update equals theirs on the same weights. Raises ValueError
    for another gate type, or widths that do not fit.
    """

    def __init__(self, state_dim: int, hidden_dim: int | None = None, gate_type: str = "gru", num_heads: int = 4):
        super().__init__()
        check_sizes(self, state_dim=state_dim)
        check_choice(self, CELLS, gate_type=gate_type)
        self.state_dim, self.hidden_dim, self.gate_type = state_dim, hidden_dim or state_dim, gate_type
        self.cell = CELLS[gate_type](state_dim, state_dim)
        self.attention = StateAttention(state_dim, self.hidden_dim, num_heads) if num_heads else None

    def forward(
        self,
        states: Tensor,
        message: Tensor | None = None,
        cell: Tensor | None = None,
        strength: Tensor | None = None,
        log_importance: Tensor | None = None,
    ) -> Propagated:
        """One update of every state.

        Args:
            states: [B,S,M].
            message: [B,S,M]; without one the states only listen to each other.
            cell: the LSTM's [B,S,M]; a copy of the states by default, so that cells begin as distinct as states.
            strength: [B,S], how much of the gated update is taken; all of it by default.
            log_importance: [S], how loud each state is for the others.
        """
        check_shape(self, "states", states, "B S M", M=self.state_dim)
        if message is not None:
            check_shape(self, "message", message, "B S M", B=states.shape[0], S=states.shape[1], M=self.state_dim)
            states, cell = self.update(states, self.gates(message), cell, strength)
        return Propagated(self.listen(states, log_importance), cell)

    def gates(self, message: Tensor) -> Tensor:
        """The message's share of the gates, [...,M] → [...,3M] (GRU) or [...,4M] (LSTM)."""
        return F.linear(message, self.cell.weight_ih, self.cell.bias_ih)

    def update(self, states: Tensor, gates: Tensor, cell: Tensor | None, strength: Tensor | None) -> Propagated:
        """The gated update alone: states [B,S,M], gates of the message [B,S or 1,·M], strength [B,S]."""
        # Under autocast products are in half precision; states stay as precise as they are.
        gates, gates_h = (x.to(states.dtype) for x in (gates, F.linear(states, self.cell.weight_hh, self.cell.bias_hh)))
        if self.gate_type == "gru":
            new, new_cell = gru_update(gates, gates_h, states), None
        else:
            new, new_cell = lstm_update(gates, gates_h, states if cell is None else cell)
        if strength is None:
            return Propagated(new, new_cell)
        # s' = s + a·(update(s) − s): exactly s where nothing was written
        a = strength[..., None].to(states.dtype)
        new = torch.lerp(states, new, a)
        return Propagated(new, None if new_cell is None else torch.lerp(states if cell is None else cell, new_cell, a))

    def listen(self, states: Tensor, log_importance: Tensor | None = None) -> Tensor:
        """State-to-state attention alone (states as they are where it is left out)."""
        return states if self.attention is None else self.attention(states, log_importance)
