"""A small convolutional network, for digits alone."""

from dataclasses import dataclass

from torch import Tensor, nn

from nsm_support.checks import check, check_shape, check_sizes
from nsm_support.data import from_patches
from nsm_support.models import PretrainedModel, Trace


@dataclass(frozen=True, kw_only=True, slots=True)
class CNNConfig:
    """Everything that makes a `SmallCNN`; raises ValueError for fields that do not fit."""

    channels: int = 16  # of the first convolution; the second has twice as many
    output_dim: int = 10  # C
    side: int = 28  # pixels along one side of an image, a multiple of 4

    def __post_init__(self) -> None:
        check_sizes(self, "channels", "output_dim", "side")
        check(self, not self.side % 4, "a multiple of 4", "side")


class SmallCNN(PretrainedModel):
    """Two convolutions with pooling and a linear classifier, for digits as images or as square patches."""

    Config = CNNConfig

    def __init__(self, config: CNNConfig):
        super().__init__()
        self.config, channels = config, config.channels
        first, second = nn.Conv2d(1, channels, 5, padding=2), nn.Conv2d(channels, 2 * channels, 5, padding=2)
        self.features = nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(2 * channels * (config.side // 4) ** 2, config.output_dim)

    def forward(self, inputs: Tensor) -> Tensor:
        """Images [B,side,side], or their patches [B,n²,size²] as `data.to_patches` makes them → [B,C]."""
        return self.trace(inputs).outputs

    def trace(self, inputs: Tensor) -> Trace:
        """`forward`, and what each of the two convolutions makes after pooling: [B,channels,side/2,side/2], and half of it."""
        side = self.config.side
        images = inputs if inputs.ndim != 3 or inputs.shape[1:] == (side, side) else from_patches(inputs)
        check_shape(self, "images (or the patches of such)", images, "B H W", H=side, W=side)
        first = self.features[:3](images[:, None])
        second = self.features[3:](first)
        return Trace(self.head(second.flatten(1)), (first, second))
