"""What a bottleneck adds to the loss of prediction."""

import torch.nn.functional as F
from torch import Tensor

from nsm_support.crystalline.codes.bottleneck import code_entropy


def compression_loss(soft_codes: Tensor) -> Tensor:
    """Entropy in nats of the noise-free code distributions [..., K], mean over tokens: 0 … ln K."""
    return code_entropy(soft_codes)


def commitment_loss(input: Tensor, output: Tensor) -> Tensor:
    """Mean squared distance of a bottleneck's input [..., D] to its output, which is held fixed."""
    return F.mse_loss(input, output.detach())
