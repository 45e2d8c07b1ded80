"""The convolutions of VGG-16 (K. Simonyan and A. Zisserman, ICLR 2015), to measure how much there is to see in a picture.

Weights come from a safetensors file in the layout of the public checkpoints: `features.N.weight` and `features.N.bias`, N the
position among convolutions, ReLUs and poolings. Two kinds go by these names: the authors' Caffe weights, which want blue, green,
red on the scale 0 to 255, and those trained on standardised RGB. Nothing is downloaded.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d, relu

from omnifm.errors import ConfigError

VggInput = Literal["caffe", "imagenet"]

BLOCKS: Sequence[Sequence[tuple[int, int]]] = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
"""Position and output channels of the convolutions of each block; a block ends before its pooling."""

# What is subtracted, and then what is divided by, per channel in the network's order.
_SCALES: Mapping[str, tuple[Sequence[float], Sequence[float]]] = {
    "caffe": ((103.939 / 255, 116.779 / 255, 123.68 / 255), (1 / 255, 1 / 255, 1 / 255)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Vgg16Features(nn.Module):
    """The five maps before the poolings, of grey pictures. Its tensors are constants: nothing is trained or averaged.

    Args:
        weights: the tensors of `features.*`.
        scale: what the weights were trained on.
    """

    def __init__(self, weights: Mapping[str, Tensor], scale: VggInput) -> None:
        super().__init__()
        for position, _ in (layer for block in BLOCKS for layer in block):
            for kind in ("weight", "bias"):
                self.register_buffer(f"{kind}{position}", weights[f"features.{position}.{kind}"].float(), persistent=False)
        for name, values in zip(("mean", "std"), _SCALES[scale], strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, grey: Tensor) -> list[Tensor]:
        """Return the maps of `(b, 1, h, w)` in [0, 1]: 64, 128, 256, 512 and 512 channels, each half as large as the last."""
        found = (grey.expand(-1, 3, -1, -1) - self.get_buffer("mean")) / self.get_buffer("std")
        maps: list[Tensor] = []
        for number, block in enumerate(BLOCKS):
            found = max_pool2d(found, 2) if number else found
            for position, _ in block:
                weight, bias = self.get_buffer(f"weight{position}"), self.get_buffer(f"bias{position}")
                found = relu(conv2d(found, weight, bias, padding=1))
            maps.append(found)
        return maps


def load_vgg16(path: Path, scale: VggInput) -> Vgg16Features:
    """Read the weights. Raises ConfigError that names the file and the first tensor that is missing or of another shape."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"tasks.fusion.vgg: {path} cannot be read ({error})") from None
    for name, shape in _shapes().items():
        if name not in found:
            raise ConfigError(f"tasks.fusion.vgg: {path} lacks tensor {name}: not the weights of VGG-16")
        if tuple(found[name].shape) != shape:
            raise ConfigError(f"tasks.fusion.vgg: {path}: tensor {name} has shape {tuple(found[name].shape)}, not {shape}")
    return Vgg16Features(found, scale)


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    inputs = 3
    for position, outputs in (layer for block in BLOCKS for layer in block):
        shapes |= {f"features.{position}.weight": (outputs, inputs, 3, 3), f"features.{position}.bias": (outputs,)}
        inputs = outputs
    return shapes
