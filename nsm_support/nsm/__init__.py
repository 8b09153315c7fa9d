"""Neural state machines: a few persistent states that tokens read and write, in place of attending to each other."""

from nsm_support.nsm.attention import HybridAttention, local_attention, local_attention_reference
from nsm_support.nsm.layer import LayerStream, LayerTrace, NSMLayer
from nsm_support.nsm.models import NSM, ModelStream, ModelTrace, NSMConfig, SimpleNSM
from nsm_support.nsm.propagation import Propagated, StateAttention, StatePropagator
from nsm_support.nsm.routing import Routing, TokenToStateRouter, Written, read, read_write, read_write_reference, write
from nsm_support.nsm.states import Importance, Pruned, StateManager

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
