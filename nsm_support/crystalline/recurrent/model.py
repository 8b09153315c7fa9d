"""A recurrent machine whose state is one of K codes: what it learns is a finite table, and can be read out whole.

Between two tokens the machine keeps nothing but the number of a code. From the code's vector and the token a small
network computes where it would go, and the most similar code there is becomes the next state:

    z = W₂ ReLU(W₁ c_k + u_x) + b,    ℓ_j = s·cos(z, c_j),    next code = argmax_j ℓ_j,    output = argmax(R c_j + r).

So the next code depends on code and token alone, and the K·V cases of `tables` are the network itself, not a sample of
it. argmax has no gradient; in training the table is relaxed to probabilities P(j | k, x) = softmax(ℓ), by one of four
objectives (`OBJECTIVES`). With the first one the machine is trained as an input-output hidden Markov model (Bengio and
Frasconi 1995). The evaluation is always hard.

Letters: E machines side by side, each with parameters, data and randomness of its own; B strings, T tokens, V vocabulary,
K codes, D width, H hidden units, C classes of the output.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from nsm_support.checks import Shape, check, check_choice, check_sizes
from nsm_support.crystalline.automata import Automaton
from nsm_support.crystalline.codes.bottleneck import straight_through
from nsm_support.models import PretrainedModel

Objective = Literal["likelihood", "marginal", "straight_through", "continuous"]
OBJECTIVES: dict[Objective, str] = {
    "likelihood": "−log P(y_0 … y_T | x_1 … x_T), summed over all paths of codes; the belief hears past outputs",
    "marginal": "−Σ log P(y_t | x_1 … x_t), summed over all paths of codes; the belief hears tokens alone",
    "straight_through": "as marginal, on the hard table, with the gradient of the soft one",
    "continuous": "no codes at all: z itself, scaled to the length of a code, is the state (the control)",
}
"""What is minimised, in nats; y_0 belongs to the empty string."""
START = 0  #: the code before the first token
TINY = 1e-9  #: the least probability that a logarithm is taken of


@dataclass(frozen=True, kw_only=True, slots=True)
class RecurrentConfig:
    """Sizes of a machine. Raises ValueError naming what does not fit."""

    vocab_size: int  #: V
    output_dim: int  #: C
    num_codes: int = 16  #: K; more than the true machine has states
    dim: int = 64  #: D of a code's vector
    hidden: int = 128  #: H
    num_machines: int = 1  #: E
    scale_init: float = 5.0  #: s at the start, the sharpness of the choice; it is learned

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "output_dim", "num_codes", "dim", "hidden")
        check(self, self.scale_init >= 1, "at least 1", "scale_init")


class Run(NamedTuple):
    """A hard pass: the code after each token, int64 [E, B, T], and the logits of the output there, [E, B, T, C]."""

    codes: Tensor
    logits: Tensor

    @property
    def outputs(self) -> Tensor:
        return self.logits


class Relaxed(NamedTuple):
    """A pass in training, with the empty string as position 0."""

    nats: Tensor  # (E, B, T + 1): loss of each output
    beliefs: Tensor | None  # (E, B, T + 1, K): P(code | tokens so far, and outputs so far if they are heard)


class CrystallineRecurrent(PretrainedModel):
    """E recurrent machines with discrete states, side by side. Their axis stands first: tokens are [E,B,T].

    Args:
        config: the sizes, alike for all machines.
        generators: one a machine, however many the config says; its first parameters are drawn from it, whatever the
            others are. Without any they are drawn from the global one.

    A stream is the code [E,B] of every string.
    """

    Config = RecurrentConfig

    def __init__(self, config: RecurrentConfig, generators: Sequence[Generator] | None = None):
        super().__init__()
        check(self, generators is None or len(generators), "one for each machine, or None", generators=generators)
        sources = [None] * config.num_machines if generators is None else generators
        self.config = replace(config, num_machines=len(sources))
        V, C, K, D, H = config.vocab_size, config.output_dim, config.num_codes, config.dim, config.hidden

        def drawn(*shape: int, std: float = 1.0) -> nn.Parameter:
            return nn.Parameter(std * torch.stack([torch.randn(shape, generator=one) for one in sources]))

        E = len(sources)
        self.codebook, self.token = drawn(K, D), drawn(V, H)
        self.into, self.out = drawn(D, H, std=D**-0.5), drawn(H, D, std=H**-0.5)
        self.out_bias = nn.Parameter(torch.zeros(E, 1, D))
        self.readout = drawn(D, C, std=D**-0.5)
        self.readout_bias = nn.Parameter(torch.zeros(E, 1, C))
        self.log_scale = nn.Parameter(torch.full((E, 1, 1), math.log(config.scale_init)))

    def __len__(self) -> int:
        return len(self.codebook)

    def proposal(self, vectors: Tensor, tokens: Tensor) -> Tensor:
        """z = W₂ ReLU(W₁ c + u_x) + b of vectors [E, N, D] and the tokens' u [E, N, H] → [E, N, D]."""
        return torch.baddbmm(self.out_bias, torch.relu(torch.baddbmm(tokens, vectors, self.into)), self.out)

    def code_logits(self, proposal: Tensor) -> Tensor:
        """ℓ_j = s·cos(z, c_j): [E, N, D] → [E, N, K]."""
        codes = F.normalize(self.codebook, dim=-1)
        return self.log_scale.exp() * torch.bmm(F.normalize(proposal, dim=-1), codes.transpose(1, 2))

    def output_logits(self, vectors: Tensor) -> Tensor:
        """R c + r: [E, N, D] → [E, N, C]."""
        return torch.baddbmm(self.readout_bias, vectors, self.readout)

    def transition_logits(self) -> Tensor:
        """ℓ_j of every code k and token x, [E, K, V, K]."""
        K, V = self.config.num_codes, self.config.vocab_size
        vectors = self.codebook.repeat_interleave(V, 1)  # (E, K·V, D), tokens fastest
        return self.code_logits(self.proposal(vectors, self.token.repeat(1, K, 1))).unflatten(1, (K, V))

    @torch.no_grad()
    def tables(self) -> tuple[Tensor, Tensor]:
        """The machines themselves: next code [E, K, V] and output class [E, K], int64."""
        return self.transition_logits().argmax(-1), self.output_logits(self.codebook).argmax(-1)

    def automata(self) -> list[Automaton]:
        """Each machine as an automaton with K states."""
        tables = (table.cpu() for table in self.tables())
        return [Automaton(START, transition, output) for transition, output in zip(*tables, strict=True)]

    @torch.no_grad()
    def forward(self, tokens: Tensor, start: Tensor | None = None) -> Run:
        """Run the machines hard on tokens [E, B, T], from code `START` or from codes `start` [E, B]. Raises ValueError for a
        shape, token or code that the machines do not have.
        """
        code = self._start(tokens, start)
        table, after = self.tables()[0].flatten(1), []  # (E, K·V)
        for token in tokens.unbind(2):
            code = table.gather(1, code * self.config.vocab_size + token)
            after.append(code)
        codes = torch.stack(after, 2)
        logits = self.output_logits(self.codebook)  # (E, K, C)
        said = logits.gather(1, codes.flatten(1)[..., None].expand(-1, -1, logits.shape[2]))
        return Run(codes, said.view(*codes.shape, -1))

    @torch.no_grad()
    def forward_reference(self, tokens: Tensor, start: Tensor | None = None) -> Run:
        """The definition of `forward`: at each token the network itself, from the vector of the code before."""
        code, codes, logits = self._start(tokens, start), [], []
        machine = torch.arange(len(self), device=tokens.device)[:, None]
        for token in tokens.unbind(2):
            code = self.code_logits(self.proposal(self.codebook[machine, code], self.token[machine, token])).argmax(-1)
            codes.append(code)
            logits.append(self.output_logits(self.codebook[machine, code]))
        return Run(torch.stack(codes, 2), torch.stack(logits, 2))

    def trace(self, tokens: Tensor) -> Run:
        """As `forward`: the codes are all that is inside."""
        return self(tokens)

    def start(self, batch_size: int) -> Tensor:
        """The code of every string before the first token."""
        return torch.full((len(self), batch_size), START, device=self.codebook.device)

    def prefill(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The first tokens [E,B,T] → logits [E,B,T,C], and the codes after them."""
        run = self(tokens)
        return run.logits, run.codes[..., -1]

    def step(self, tokens: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The next token [E,B] of each string → logits [E,B,C], and the codes after it."""
        run = self(tokens[..., None], stream)
        return run.logits[:, :, 0], run.codes[..., 0]

    def _start(self, tokens: Tensor, start: Tensor | None = None) -> Tensor:
        E, V, K = len(self), self.config.vocab_size, self.config.num_codes
        if tokens.ndim != 3 or len(tokens) != E or not tokens.numel() or tokens.min() < 0 or tokens.max() >= V:
            raise ValueError(f"tokens {list(tokens.shape)}; [E={E}, B, T] of at least one token each, 0 to {V - 1}, is accepted")
        if start is None:
            return torch.full_like(tokens[..., 0], START)
        if start.shape != tokens.shape[:2] or start.min() < 0 or start.max() >= K:
            raise ValueError(f"start {list(start.shape)}; codes [E={E}, B={tokens.shape[1]}], 0 to {K - 1}, are accepted")
        return start

    def relaxed(self, tokens: Tensor, targets: Tensor, objective: Objective) -> Relaxed:
        """The differentiable pass on tokens [E, B, T] with outputs [E, B, T + 1], those of the empty string first.

        belief_t(j) = Σ_k belief_{t−1}(k) P(j | k, x_t), the forward algorithm (Rabiner 1989, equation 20): a sum over all Kᵀ
        paths of codes in T products of vector and table. If outputs are heard, belief_t(j) ∝ belief_t(j) P(y_t | j).
        Raises ValueError for an objective that is none of `OBJECTIVES`, or shapes that do not fit.
        """
        check_choice(self, OBJECTIVES, objective=objective)
        code = self._start(tokens)
        E, B, T = tokens.shape
        check(self, targets.shape == (E, B, T + 1), f"[E={E}, B={B}, T + 1={T + 1}]", targets=Shape(targets.shape))
        if objective == "continuous":
            logits = self.output_logits(self.continuous(tokens).flatten(1, 2)).view(E, B, T + 1, -1)
            return Relaxed(F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none"), None)
        K, V = self.config.num_codes, self.config.vocab_size
        logits = self.transition_logits()
        step = logits.softmax(-1)  # (E, K, V, K): P(j | k, x)
        if objective == "straight_through":
            step = straight_through(F.one_hot(logits.argmax(-1), K).to(step), step)
        step = step.flatten(2)  # (E, K, V·K)
        read = self.output_logits(self.codebook).softmax(-1).transpose(1, 2)  # (E, C, K): P(y | j)
        right = read.gather(1, targets.flatten(1)[..., None].expand(-1, -1, K)).view(E, B, T + 1, K)  # P(y_t | j)
        belief = F.one_hot(code, K).to(step)  # (E, B, K)
        nats, beliefs = [], []
        for t in range(T + 1):
            if t:
                token = tokens[:, :, t - 1, None, None].expand(-1, -1, 1, K)
                belief = torch.bmm(belief, step).unflatten(2, (V, K)).gather(2, token).squeeze(2)
            joint = belief * right[:, :, t]
            probability = joint.sum(-1).clamp(min=TINY)
            nats.append(-probability.log())
            if objective == "likelihood":
                belief = joint / probability[..., None]
            beliefs.append(belief)
        return Relaxed(torch.stack(nats, 2), torch.stack(beliefs, 2))

    def continuous(self, tokens: Tensor) -> Tensor:
        """The control: states [E, B, T + 1, D] of the same cell without codes, √D z/‖z‖ fed back, from the code `START`."""
        self._start(tokens)
        states = [self.codebook[:, START : START + 1].expand(*tokens.shape[:2], -1)]
        for token in tokens.unbind(2):
            states.append(self.step_continuous(states[-1], token))
        return torch.stack(states, 2)

    def step_continuous(self, state: Tensor, token: Tensor) -> Tensor:
        """The control's next states [E, N, D] from states [E, N, D] and tokens [E, N]."""
        chosen = F.one_hot(token, self.config.vocab_size).to(state)  # a product's gradient is faster than that of a choice
        return F.normalize(self.proposal(state, torch.bmm(chosen, self.token)), dim=-1) * self.config.dim**0.5
