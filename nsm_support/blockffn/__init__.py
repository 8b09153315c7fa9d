"""Feed-forward layers in routed blocks, a language model of them, and hybrids whose attention the routing gates."""

from .checkpoint import load_checkpoint
from .ffn import BlockFFN, blockffn_reference, blockffn_sparse
from .gates import Gate
from .hybrid import GatedHybridLayer, MambaSidecar, attach, detach
from .model import BlockFFNConfig, BlockFFNModel
from .objectives import chunk_sparsity, chunk_sparsity_loss, dead_experts, locality_loss, token_sparsity
from .router import BlockRouter, Routed
from .signals import RoutingExtractor, write_routing_signals

__all__ = [
    "BlockFFN",
    "BlockFFNConfig",
    "BlockFFNModel",
    "BlockRouter",
    "Gate",
    "GatedHybridLayer",
    "MambaSidecar",
    "Routed",
    "RoutingExtractor",
    "attach",
    "blockffn_reference",
    "blockffn_sparse",
    "chunk_sparsity",
    "chunk_sparsity_loss",
    "dead_experts",
    "detach",
    "load_checkpoint",
    "locality_loss",
    "token_sparsity",
    "write_routing_signals",
]
