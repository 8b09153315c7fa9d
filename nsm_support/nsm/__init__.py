"""Neural state machines: a few persistent states that tokens read and write, in place of attending to each other.

To be read in this order: `states` (where they start, what they count for) → `routing` (reading and writing them) →
`propagation` (how they change) → `attention` (what a token hears of its neighbours) → `layer` → `models`.
"""

from nsm_support.nsm.attention import HybridAttention, local_attention, local_attention_reference
from nsm_support.nsm.layer import LayerConfig, LayerStream, LayerTrace, NSMLayer
from nsm_support.nsm.models import NSM, NSMConfig, SimpleNSM
from nsm_support.nsm.propagation import Propagated, StateAttention, StatePropagator
from nsm_support.nsm.routing import Routing, TokenToStateRouter, Written, read, read_write, read_write_reference, write
from nsm_support.nsm.states import Importance, Pruned, StateManager

__all__ = [
    "NSM", "HybridAttention", "Importance", "LayerConfig", "LayerStream", "LayerTrace", "NSMConfig", "NSMLayer", "Propagated",
    "Pruned", "Routing", "SimpleNSM", "StateAttention", "StateManager", "StatePropagator", "TokenToStateRouter", "Written",
    "local_attention", "local_attention_reference", "read", "read_write", "read_write_reference", "write",
]  # fmt: skip
