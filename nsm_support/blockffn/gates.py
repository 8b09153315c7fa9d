"""Gates: which share of a token's mixing a Mamba sidecar takes from attention, and the controls beside the routing gate.

Letters: B batch, T tokens, D token width. α is Mamba's share: 0 is attention, 1 is Mamba.

A gate is a signal per token, on which α rises, and a shape: hard, α = 1 where the signal reaches a threshold, else 0;
or soft, α = σ((signal − threshold) / scale). `hybrid.calibrate` sets the threshold so that the mean of α is the one asked
for: gates are compared at the same mean, the hard with the hard and the soft with the soft. Many tokens share a sparsity;
ties at a hard gate's threshold are broken at random, or the mean could not be met.
"""

import torch
from torch import Tensor, nn

from nsm_support.checks import check, check_choice

#: signal → what it is
SIGNALS = {
    "routing": "share of experts that the token does not use",
    "shuffled": "the routing gate's α, in another order within each sequence: same mean, same compute, wrong tokens",
    "random": "a draw for each place",
    "position": "mean of the routing signal at this place of the sequence, over the calibration's sequences",
    "learned": "a linear map of the mixing's input, trained through the soft gate",
    "oracle": "closeness of the sidecar's output to attention's own; runs both, and knows what no gate could",
}
SHAPES = ("hard", "soft")
MODES = ("fixed", *(f"{signal}_{shape}" for signal in SIGNALS for shape in SHAPES))


class Gate(nn.Module):
    """α of each token, 0 … 1: [B,T], bool from a hard gate, float from a soft one.

    Random draws belong to the places of a batch and never change: equal calls, equal bits.

    Shuffled gates look ahead: an α may come from a later token of the sequence. They are controls, not causal models.
    The others are causal, the oracle among them.

    Args:
        mode: one of MODES; "fixed" is α for every token.
        alpha: the mean of α to calibrate for; of "fixed", α itself.
        width: D, for "learned".
        temperature: scale of a soft gate, in standard deviations of the signal (of "learned", in its own units).
        seed: of the random draws. Give each layer its own.

    Raises ValueError for another mode, an alpha outside 0 … 1, a temperature not above 0, "learned" without a width.
    """

    threshold: Tensor
    scale: Tensor
    tie_limit: Tensor  # at the threshold, tokens whose draw is below this go to Mamba
    profile: Tensor

    def __init__(self, mode: str, alpha: float = 0.5, *, width: int | None = None, temperature: float = 0.5, seed: int = 0):
        super().__init__()
        check_choice(self, MODES, mode=mode)
        check(self, 0 <= alpha <= 1, "0 … 1", alpha=alpha)
        check(self, temperature > 0, "above 0", temperature=temperature)
        self.mode, self.alpha, self.temperature, self.seed = mode, alpha, temperature, seed
        self.kind, _, shape = mode.partition("_")
        self.hard, self.calibrating = shape == "hard", False
        self.register_buffer("threshold", torch.tensor(torch.nan, dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("tie_limit", torch.ones((), dtype=torch.float64))
        if self.kind == "position":
            self.register_buffer("profile", torch.zeros(0))
        if self.kind == "learned":
            if width is None:
                raise ValueError("a learned gate takes the width of a token")
            self.map = nn.Linear(width, 1, bias=False)  # no bias: the threshold is one
            nn.init.zeros_(self.map.weight)  # begins as the fixed gate

    @property
    def needs_routing(self) -> bool:
        """Whether the gate reads the sparsity of routing (that of position only while it is calibrated)."""
        return self.kind in ("routing", "shuffled") or (self.kind == "position" and self.calibrating)

    def forward(self, x: Tensor, sparsity: Tensor | None = None, distance: Tensor | None = None) -> Tensor:
        """α [B,T] of the mixing's input x [B,T,D].

        Args:
            sparsity: [B,T], for the gates that need routing. distance: of the two outputs [B,T], for the oracle.

        Raises ValueError if the gate is not calibrated, or a sequence is longer than the calibration's (position).
        """
        if self.kind == "fixed":
            return x.new_full(x.shape[:2], self.alpha)
        signal = self._signal(x, sparsity, distance)
        if self.calibrating or (self.training and self.kind == "learned"):
            self._calibrate(signal.detach().double(), self._draws(x)[1])
        if self.threshold.isnan():
            raise ValueError(f"the gate {self.mode!r} has no threshold yet: calibrate it, or set `threshold`")
        if self.hard:
            signal = signal.double()  # as in calibration: a float32 signal would round the threshold to itself
            alpha = (signal > self.threshold) | ((signal == self.threshold) & (self._draws(x)[1] < self.tie_limit))
        else:
            alpha = ((signal - self.threshold) / self.scale).sigmoid().to(x.dtype)
        return alpha.gather(1, self._draws(x)[0].argsort(1)) if self.kind == "shuffled" else alpha

    def _signal(self, x: Tensor, sparsity: Tensor | None, distance: Tensor | None) -> Tensor:
        if self.kind == "learned":
            return self.map(x)[..., 0]
        if self.kind == "random":
            return self._draws(x)[0]
        if self.kind != "position" or self.calibrating:
            signal = distance if self.kind == "oracle" else sparsity
            if signal is None:
                raise ValueError(f"the gate {self.mode!r} needs {'a distance' if self.kind == 'oracle' else 'the sparsity'}")
            if self.kind != "position":
                return -signal if self.kind == "oracle" else signal
            self.profile = signal.mean(0)
        if x.shape[1] > len(self.profile):
            raise ValueError(f"the position gate knows {len(self.profile)} places; got a sequence of {x.shape[1]}")
        return self.profile[: x.shape[1]].expand(x.shape[:2])

    def _draws(self, x: Tensor) -> Tensor:
        """Two uniform numbers for each place [2,B,T]: a signal, and what breaks ties. The same at every call, and for any T."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand((x.shape[1], x.shape[0], 2), generator=generator).permute(2, 1, 0).to(x.device)

    def _calibrate(self, signal: Tensor, draws: Tensor) -> None:
        """Set the threshold (and, hard, the limit for ties) at which the mean of α over this signal [B,T] is `alpha`."""
        if self.hard:
            count = round(self.alpha * signal.numel())  # tokens for Mamba
            ends = signal.new_tensor([torch.inf, -torch.inf])
            ordered = torch.cat((ends[:1], signal.flatten().sort(descending=True).values, ends[1:]))
            last, after = ordered[count], ordered[count + 1]  # of Mamba's tokens, and of attention's first
            # Between two values a threshold is safe from rounding; where they are one value, the draws break the tie.
            self.threshold.copy_(after if last == after else (last + after) / 2)
            tied = draws[signal == self.threshold].sort().values
            winners = count - int((signal > self.threshold).sum())
            self.tie_limit.copy_(tied[winners] if winners < len(tied) else tied.new_ones(()))
            return
        if self.alpha in (0, 1):
            raise ValueError(f"no soft gate has a mean of {self.alpha}; use 'fixed'")
        spread = signal.std(correction=0) if self.kind != "learned" else torch.ones(())
        self.scale.fill_(self.temperature * (spread if spread > 0 else 1))  # equal everywhere: α is then its own mean
        reach = 40 * self.scale  # σ(±40) is 0 or 1 to the last bit that counts
        low, high = signal.min() - reach, signal.max() + reach
        for _ in range(80):  # the mean falls as the threshold rises: halve the interval that holds it
            self.threshold.copy_((low + high) / 2)
            above = torch.sigmoid((signal - self.threshold) / self.scale).mean() > self.alpha
            low, high = torch.where(above, self.threshold, low), torch.where(above, high, self.threshold)
