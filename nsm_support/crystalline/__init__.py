"""Discrete codes in sequence models, the finite automata that make their data, and the automata read out of the codes.

To be read in this order: `automata` (machines, and what is read out of codes) → `codes` (in a transformer) → `recurrent`.
"""

from nsm_support.crystalline.automata import FiniteStateMachine, FSMConfig
from nsm_support.crystalline.codes.alignment import compute_state_code_alignment, plot_code_state_alignment
from nsm_support.crystalline.codes.bottleneck import Bottleneck, BottleneckConfig, commitment_loss, compression_loss
from nsm_support.crystalline.codes.schedules import temperature_at
from nsm_support.crystalline.codes.transformer import CrystallineConfig, CrystallineTransformer, ModelConfig

__all__ = [
    "Bottleneck", "BottleneckConfig", "CrystallineConfig", "CrystallineTransformer", "FSMConfig", "FiniteStateMachine",
    "ModelConfig", "commitment_loss", "compression_loss", "compute_state_code_alignment", "plot_code_state_alignment",
    "temperature_at",
]  # fmt: skip
