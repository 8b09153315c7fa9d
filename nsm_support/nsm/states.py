"""The states of a machine: where they start, how much each one counts, how they become fewer or more.

Letters: B batch, S states, M state width.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsm_support.checks import check_choice, check_shape, check_sizes


class Importance(nn.Module):
    """How much each state counts: a learned number per state, and beside it the use that was measured.

    `log_importance` [S] is added to the routing logits of its state, so it lies in the forward path and has a gradient.
    `mean_mass` [S] is a running average of the share of the routing mass that each state received while training
    (a buffer, sums to 1, starts at 1/S). One `Importance` may belong to a router and a `StateManager` at once.
    """

    mean_mass: Tensor

    def __init__(self, num_states: int, momentum: float = 0.01):
        super().__init__()
        check_sizes(self, num_states=num_states)
        self.momentum = momentum
        self.log_importance = nn.Parameter(torch.zeros(num_states))
        self.register_buffer("mean_mass", torch.full((num_states,), 1 / num_states))

    @property
    def num_states(self) -> int:
        return self.log_importance.shape[0]

    @torch.no_grad()
    def observe(self, mass: Tensor) -> None:
        """Take the routing mass [..., S] of one batch into the running average. In evaluation nothing changes."""
        if self.training:
            mass = mass.reshape(-1, self.num_states).sum(0)
            self.mean_mass.lerp_((mass / mass.sum().clamp(min=1e-12)).to(self.mean_mass.dtype), self.momentum)

    def scores(self, by: str = "importance") -> Tensor:
        """Scores [S] in fair shares: mean exactly 1, from 0 (never) to S (alone). 0.3 is 30 % of a fair share.

        Args:
            by: "importance", S · softmax(log_importance), or "mass", S · mean_mass.
        """
        check_choice(self, ("importance", "mass"), by=by)
        share = self.log_importance.softmax(0) if by == "importance" else self.mean_mass
        return (share * self.num_states).detach()


class Pruned(NamedTuple):
    """What a pruning left: the indices [S'] of the kept states in the old numbering, and how many went."""

    kept: Tensor
    removed: int


class StateManager(nn.Module):
    """Holds the learned initial states of a machine, and makes them fewer or more.

    Args:
        num_states: states at the start; `initial_states` is another name for it.
        state_dim: width M of a state.
        max_states: how far `allocate` may go; the number at the start by default.
        prune_threshold: score below which `prune` takes a state away, in fair shares (`Importance.scores`).
        importance: the `Importance` of a router, to share it; a new one by default.

    Initial states are drawn from N(0, 1), so they differ: equal states (zeros, say) would receive equal routing weights and equal
    messages, and stay equal for ever. Raises ValueError for counts that are missing, contradict each other or lie above
    `max_states`.
    """

    def __init__(
        self,
        num_states: int | None = None,
        state_dim: int | None = None,
        *,
        max_states: int | None = None,
        initial_states: int | None = None,
        prune_threshold: float = 0.3,
        importance: Importance | None = None,
    ):
        super().__init__()
        if num_states is not None and initial_states is not None and num_states != initial_states:
            raise ValueError(f"num_states ({num_states}) and initial_states ({initial_states}) name the same: give one")
        count = next((n for n in (num_states, initial_states, max_states) if n is not None), None)
        if count is None or state_dim is None:
            raise ValueError("a StateManager takes state_dim and one of num_states, initial_states and max_states")
        check_sizes(self, num_states=count, state_dim=state_dim)
        if max_states is not None and max_states < count:
            raise ValueError(f"max_states ({max_states}) is below the number of states at the start ({count})")
        if importance is not None and importance.num_states != count:
            raise ValueError(f"the importance to share has {importance.num_states} states, this manager {count}")
        self.max_states = max_states or count
        self.prune_threshold = prune_threshold
        self.initial = nn.Parameter(torch.randn(count, state_dim))
        self.importance: Importance
        if importance is None:
            self.importance = Importance(count)
        else:  # it stays the router's part: registered here too, it would stand twice in a state_dict
            object.__setattr__(self, "importance", importance)

    @property
    def num_states(self) -> int:
        return self.initial.shape[0]

    @property
    def state_dim(self) -> int:
        return self.initial.shape[1]

    def forward(self, initial_states: Tensor | None = None, batch_size: int | None = None) -> Tensor:
        """The states [B,S,M] to start from: the given ones, checked, or the learned ones for `batch_size`.

        Raises ValueError when neither is given, or the given states are not [B,S,M].
        """
        if initial_states is not None:
            batch = {} if batch_size is None else {"B": batch_size}
            check_shape(self, "initial_states", initial_states, "B S M", S=self.num_states, M=self.state_dim, **batch)
            return initial_states
        if batch_size is None:
            raise ValueError("give initial_states [B,S,M] or batch_size; neither was given")
        return self.initial.expand(batch_size, -1, -1)

    def get_importance_scores(self, by: str = "importance") -> Tensor:
        """Scores [S] in fair shares (mean 1); see `Importance.scores`."""
        return self.importance.scores(by)

    def prune(
        self,
        keep: Tensor | Sequence[int] | None = None,
        *,
        threshold: float | None = None,
        by: str = "importance",
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Pruned:
        """Take states away: initial states, log-importance and mean mass really become smaller. One state always stays.

        Args:
            keep: indices of the states to keep. By default those whose score is at least `threshold`; where none is, the one with
                the best score.
            threshold: in fair shares; `prune_threshold` by default.
            by: the score to hold against it, "importance" or "mass".
            optimizer: the optimiser of these parameters; its groups and its per-state moments follow.

        Raises ValueError for an empty `keep`, an index that is no state, or an optimiser without these parameters.
        """
        if keep is None:
            scores = self.get_importance_scores(by)
            limit = self.prune_threshold if threshold is None else threshold
            chosen = (scores >= limit) | (torch.arange(len(scores), device=scores.device) == scores.argmax())
            kept = chosen.nonzero()[:, 0]
        else:
            kept = torch.as_tensor(keep, device=self.initial.device).unique()  # sorted, each once
            if len(kept) == 0 or kept.min() < 0 or kept.max() >= self.num_states:
                raise ValueError(f"keep takes at least one index of 0 … {self.num_states - 1}, got {list(keep)}")
        removed = self.num_states - len(kept)
        if removed:
            self._resize(lambda rows: rows[kept], optimizer)
            mass = self.importance.mean_mass[kept]
            self.importance.mean_mass = mass / mass.sum().clamp(min=1e-12)
        return Pruned(kept, removed)

    @torch.no_grad()
    def allocate(
        self,
        vector: Tensor | None = None,
        *,
        noise: float = 0.1,
        generator: torch.Generator | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> int:
        """Add one state, really written into the learned initial states, and return its index.

        Args:
            vector: the new initial state [M]; it starts with a fair share (score 1). Without it the busiest state (by mean mass)
                is split: parent and child take half of the parent's importance each, and the child is the parent plus N(0,
                noise²). With noise 0 a dense read gives the same as before.
            generator: source of that noise.
            optimizer: as in `prune`; the moments of the new row start at zero.

        Raises ValueError when `max_states` is reached, or for a vector that is not [M].
        """
        if self.num_states >= self.max_states:
            raise ValueError(f"all {self.max_states} states (max_states) are in use: prune first, or raise max_states")
        log_importance, mass = self.importance.log_importance.detach().clone(), self.importance.mean_mass.clone()
        if vector is None:
            parent = int(mass.argmax())
            start = self.initial[parent].detach()
            row = start + noise * torch.randn(start.shape, generator=generator, device=start.device, dtype=start.dtype)
            log_importance[parent] -= math.log(2)
            mass[parent] /= 2
            level, share = log_importance[parent], mass[parent]
        else:
            check_shape(self, "vector", vector, "M", M=self.state_dim)
            row = vector.to(self.initial)
            level = log_importance.logsumexp(0) - math.log(self.num_states)  # score 1, before and after
            share = mass.mean()
        self.importance.log_importance.copy_(log_importance)
        new = {self.initial: row, self.importance.log_importance: level}
        self._resize(lambda rows: torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])]), optimizer, new)
        mass = torch.cat([mass, share[None]])
        self.importance.mean_mass = mass / mass.sum()
        return self.num_states - 1

    def _resize(self, change, optimizer, last_row: dict | None = None) -> None:
        """Replace both per-state parameters by `change(rows)`; `last_row` fills the row that `change` added."""
        owners = ((self, "initial"), (self.importance, "log_importance"))
        if optimizer is not None:  # before anything changes
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for module, name in owners:
                if getattr(module, name).requires_grad and id(getattr(module, name)) not in held:
                    raise ValueError(f"the optimizer does not hold this manager's {name}: give the one that trains it")
        for module, name in owners:
            old = getattr(module, name)
            data = change(old.detach()).clone()
            if last_row is not None:
                data[-1] = last_row[old]
            new = nn.Parameter(data, requires_grad=old.requires_grad)
            if old.grad is not None:
                new.grad = change(old.grad).clone()
            if optimizer is not None:
                follow(optimizer, old, new, change)
            setattr(module, name, new)


def follow(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, change) -> None:
    """Put `new` in the place of `old` in an optimiser; moments shaped like `old` go through `change`."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old in optimizer.state:
        moments = optimizer.state.pop(old)
        same = {key: torch.is_tensor(value) and value.shape == old.shape for key, value in moments.items()}
        optimizer.state[new] = {key: change(v).clone() if same[key] else v for key, v in moments.items()}
