"""Sequence mixers that several threads use. To be read in this order:

`rotary` (positions) and `cache` (what attention keeps of a stream) → `scan` (selective state spaces, as sequences) → `mamba`
(mixers made of them) → `baselines` (whole models to compare with) → `cnn` (one for digits alone).
"""

from nsm_support.mixers.baselines import BASELINES, GRU, LSTM, Baseline, BaselineConfig, Mamba, Transformer
from nsm_support.mixers.cache import Cache
from nsm_support.mixers.cnn import CNNConfig, SmallCNN
from nsm_support.mixers.mamba import Mamba2Block, MambaBlock, MambaStream
from nsm_support.mixers.rotary import rotate
from nsm_support.mixers.scan import selective_scan, ssd_scan

__all__ = [
    "BASELINES", "GRU", "LSTM", "Baseline", "BaselineConfig", "CNNConfig", "Cache", "Mamba", "Mamba2Block", "MambaBlock",
    "MambaStream", "SmallCNN", "Transformer", "rotate", "selective_scan", "ssd_scan",
]  # fmt: skip
