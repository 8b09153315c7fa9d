"""Discrete codes in sequence models, the finite automata that make their data, and the automata read out of the codes."""

from .alignment import compute_state_code_alignment, plot_code_state_alignment
from .automata import FiniteStateMachine, FSMConfig
from .bottleneck import Bottleneck, BottleneckConfig, straight_through
from .losses import commitment_loss, compression_loss
from .model import CrystallineTransformer, ModelConfig
from .schedules import temperature_at

__all__ = [
    "Bottleneck",
    "BottleneckConfig",
    "CrystallineTransformer",
    "FSMConfig",
    "FiniteStateMachine",
    "ModelConfig",
    "commitment_loss",
    "compression_loss",
    "compute_state_code_alignment",
    "plot_code_state_alignment",
    "straight_through",
    "temperature_at",
]
