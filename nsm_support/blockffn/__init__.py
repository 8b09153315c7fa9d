"""Feed-forward layers in routed blocks, a language model of them, and hybrids whose attention the routing gates.

To be read in this order: `router` → `ffn` → `attention` → `model` → `checkpoint` (published weights) → `objectives` (of
training) → `signals` (what routing shows) → `gates` → `hybrid`.
"""

from nsm_support.blockffn.checkpoint import load_checkpoint
from nsm_support.blockffn.ffn import BlockFFN, blockffn_reference, blockffn_sparse
from nsm_support.blockffn.gates import Gate
from nsm_support.blockffn.hybrid import GatedHybridLayer, MambaSidecar, attach, detach
from nsm_support.blockffn.model import BlockFFNConfig, BlockFFNModel
from nsm_support.blockffn.objectives import chunk_sparsity, chunk_sparsity_loss, dead_experts, locality_loss, token_sparsity
from nsm_support.blockffn.router import BlockRouter, Routed
from nsm_support.blockffn.signals import RoutingExtractor

__all__ = [
    "BlockFFN", "BlockFFNConfig", "BlockFFNModel", "BlockRouter", "Gate", "GatedHybridLayer", "MambaSidecar", "Routed",
    "RoutingExtractor", "attach", "blockffn_reference", "blockffn_sparse", "chunk_sparsity", "chunk_sparsity_loss",
    "dead_experts", "detach", "load_checkpoint", "locality_loss", "token_sparsity",
]  # fmt: skip
