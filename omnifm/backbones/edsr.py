"""EDSR (B. Lim et al., CVPR Workshops 2017): a residual trunk without normalisation at low resolution, sub-pixel enlargement.

    f_0 = conv(x - 1/2),   f_k = f_(k-1) + conv(relu(conv(f_(k-1)))),  k = 1..N,   f = f_0 + conv(f_N)
    y = bicubic(x) + conv(shuffle(conv(f')) ...)                     one convolution and shuffle for each factor of 2

x: `(b, c, h, w)` in [0, 1]; f: `(b, n, h, w)`; y: `(b, c, s h, s w)`; all convolutions are 3 x 3. Normalisation would wash out
the contrast that is to be restored, hence none. The paper predicts y itself; here the network predicts what bicubic enlargement
misses (as VDSR does), and its last convolution starts at 0. So an untrained network is the bicubic one, a client whose head was
never trained is no worse than that, and the few steps of a federated round are not spent on learning to copy.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from omnifm.data.resample import enlarged


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 3 x 3 convolution that keeps the size of a map."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))) on `(b, n, h, w)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = conv(width, width), conv(width, width)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Return a map of the same shape."""
        change: Tensor = self.second(torch.relu(self.first(feature_map)))
        return feature_map + change


class EdsrTrunk(nn.Module):
    """The trunk.

    Args:
        channels: of the pictures, 1 or 3.
        width: n, 64 in EDSR-baseline.
        blocks: N, 16 in EDSR-baseline.
    """

    def __init__(self, channels: int, width: int = 64, blocks: int = 16) -> None:
        super().__init__()
        self.token_dim = width
        self.enter = conv(channels, width)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.leave = conv(width, width)

    def forward(self, image: Tensor) -> Tensor:
        """Map `(b, c, h, w)` in [0, 1] to `(b, n, h, w)`."""
        start = self.enter(image - 0.5)
        found: Tensor = start + self.leave(self.blocks(start))
        return found


class SubPixelTail(nn.Sequential):
    """From the trunk's map `(b, n, h, w)` to what bicubic enlargement misses, `(b, c, s h, s w)`. Zero before training.

    Args:
        width: n.
        channels: of the pictures.
        scale: s, a power of 2.
    """

    def __init__(self, width: int, channels: int, scale: int) -> None:
        steps: list[nn.Module] = []
        for _ in range(scale.bit_length() - 1):
            steps += [conv(width, 4 * width), nn.PixelShuffle(2)]
        last = conv(width, channels)
        nn.init.zeros_(last.weight)
        assert last.bias is not None  # as built
        nn.init.zeros_(last.bias)
        super().__init__(*steps, last)


class Enlarger(nn.Module):
    """One `SubPixelTail` for each scale, called x2, x4, ...; the pictures of a batch are all enlarged by one of them.

    Args:
        width: n.
        channels: of the pictures.
        scales: those that occur.
    """

    def __init__(self, width: int, channels: int, scales: Iterable[int]) -> None:
        super().__init__()
        self.scales = {f"x{scale}": scale for scale in sorted(set(scales))}
        self.tails = nn.ModuleDict({name: SubPixelTail(width, channels, scale) for name, scale in self.scales.items()})

    def forward(self, feature_map: Tensor, image: Tensor, name: str) -> Tensor:
        """Enlarge `image` `(b, c, h, w)`, of which the trunk made `feature_map`, by the scale called `name`."""
        missing: Tensor = self.tails[name](feature_map)
        # Bicubic is done in the picture's own precision, also where autocast computes the rest in less.
        return enlarged(image, self.scales[name]) + missing
