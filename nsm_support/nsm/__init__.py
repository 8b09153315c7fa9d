"""Neural state machines: a few persistent states that tokens read and write, in place of attending to each other."""

from .attention import HybridAttention, local_attention, local_attention_reference
from .layer import LayerStream, LayerTrace, NSMLayer
from .models import NSM, ModelStream, ModelTrace, NSMConfig, SimpleNSM
from .propagation import Propagated, StateAttention, StatePropagator
from .routing import Routing, TokenToStateRouter, Written, read, read_write, read_write_reference, write
from .states import Importance, Pruned, StateManager

__all__ = [
    "NSM",
    "HybridAttention",
    "Importance",
    "LayerStream",
    "LayerTrace",
    "ModelStream",
    "ModelTrace",
    "NSMConfig",
    "NSMLayer",
    "Propagated",
    "Pruned",
    "Routing",
    "SimpleNSM",
    "StateAttention",
    "StateManager",
    "StatePropagator",
    "TokenToStateRouter",
    "Written",
    "local_attention",
    "local_attention_reference",
    "read",
    "read_write",
    "read_write_reference",
    "write",
]
