"""How the strength of the noise goes down in training."""

import math
from typing import Literal, get_args

from nsm_support.checks import check, check_choice

Schedule = Literal["linear", "cosine", "exponential", "learned", "none"]


def check_schedule(schedule: str, start: float, end: float) -> None:
    """Raises ValueError for no schedule, and for an exponential or learned one that begins or ends at 0."""
    check_choice("temperature", get_args(Schedule), schedule=schedule)
    fits = schedule not in ("exponential", "learned") or (start > 0 and end > 0)
    check("temperature", fits, "temperatures above 0", schedule=schedule, start=start, end=end)


def temperature_at(progress: float, schedule: Schedule, start: float, end: float) -> float:
    """Temperature τ after a share p of the training, 0 … 1, from τ₀ = `start` to τ₁ = `end`.

    linear: τ₀ + p(τ₁ − τ₀); cosine: τ₁ + (τ₀ − τ₁)(1 + cos πp)/2; exponential: τ₀(τ₁/τ₀)^p; none: τ₀ throughout.
    Raises ValueError for a share outside 0 … 1, for "learned", which no clock sets, and as `check_schedule`.
    """
    check_schedule(schedule, start, end)
    check("temperature", 0 <= progress <= 1, "0 to 1, the share of the training that is done", progress=progress)
    if schedule == "linear":
        return start + progress * (end - start)
    if schedule == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "exponential":
        return start * (end / start) ** progress
    if schedule == "none":
        return start
    raise ValueError("a learned temperature follows from the training; linear, cosine, exponential and none are accepted")
