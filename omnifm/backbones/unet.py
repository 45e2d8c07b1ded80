"""U-Net (Ronneberger et al., MICCAI 2015) from MONAI's blocks, cut in two at its bottleneck.

encoder: two convolutions, then three times max-pooling and two convolutions; channels w, 2w, 4w, 8w; side / 8 at the bottleneck
decoder: three times up-convolution, concatenation with the encoder's map, two convolutions; then a 1x1 convolution
"""

from collections.abc import Sequence

from torch import Tensor, nn

from omnifm.backbones.monai_parts import monai_part
from omnifm.backbones.norms import replace_batch_norms

_ACT = ("LeakyReLU", {"negative_slope": 0.1, "inplace": True})
STEPS = 3


class UNetEncoder(nn.Module):
    """The half that goes down.

    Args:
        channels: image channels.
        width: w, channels of the first stage.
        norm: `group` or `batch`.
    """

    def __init__(self, channels: int, width: int, norm: str) -> None:
        super().__init__()
        parts = monai_part("monai.networks.nets.basic_unet")
        self.token_dim = width * 2**STEPS
        self.first = parts.TwoConv(2, channels, width, _ACT, "batch", bias=True)
        self.downs = nn.ModuleList(
            parts.Down(2, width * 2**k, width * 2 ** (k + 1), _ACT, "batch", bias=True) for k in range(STEPS)
        )
        if norm == "group":
            replace_batch_norms(self)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the bottleneck `(b, 8w, h/8, w/8)` and the maps on the way, finest first."""
        maps = [self.first(image)]
        for down in self.downs:
            maps.append(down(maps[-1]))
        return maps[-1], maps[:-1]


class UNetDecoder(nn.Module):
    """The half that goes up.

    Args:
        width: w.
        outputs: channels of the answer.
        norm: `group` or `batch`.
    """

    def __init__(self, width: int, outputs: int, norm: str) -> None:
        super().__init__()
        parts = monai_part("monai.networks.nets.basic_unet")

        def up(k: int) -> nn.Module:
            stage: nn.Module = parts.UpCat(2, width * 2 ** (k + 1), width * 2**k, width * 2**k, _ACT, "batch", bias=True)
            return stage

        self.ups = nn.ModuleList(up(k) for k in reversed(range(1, STEPS)))
        # Together, so that they can be declared one client's own.
        self.last = nn.ModuleDict({"up": up(0), "classify": nn.Conv2d(width, outputs, 1)})
        if norm == "group":
            replace_batch_norms(self)

    def forward(self, bottleneck: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Return `(b, outputs, h, w)` from what the encoder returned."""
        found = bottleneck
        for up, skip in zip(self.ups, reversed(maps[1:]), strict=True):
            found = up(found, skip)
        answer: Tensor = self.last["classify"](self.last["up"](found, maps[0]))
        return answer
