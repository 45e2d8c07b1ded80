"""U2Fusion's network (H. Xu et al., IEEE TPAMI 44 (2022) 502-518): a dense encoder of both sources, a convolutional decoder.

    e_0 = f(conv(x)),  e_k = [ f(conv(e_(k-1))) || e_(k-1) ],  k = 1..5        x: (b, 2, h, w);  e_5: (b, 6 n, h, w)
    F = tanh(conv(f(conv(f(conv(f(conv(e_5)))))))) / 2 + 1/2                   to 128, 64, 32 and 1 channels

f is a leaky ReLU of slope 0.2; all convolutions are 3 x 3, of stride 1, over a picture mirrored at its border: nothing is
downsampled, so nothing can leave a checkerboard, and no black frame is drawn in. n = 44 in the paper; with another n the decoder
becomes wider or narrower in proportion. There are no normalisation layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

PUBLISHED_WIDTH = 44
_DENSE = 5
_DECODER = (128, 64, 32)
_SLOPE = 0.2


class MirroredConv(nn.Sequential):
    """A 3 x 3 convolution over a mirrored border, then the leaky ReLU unless it is `last`: `(b, i, h, w)` to `(b, o, h, w)`."""

    def __init__(self, inputs: int, outputs: int, *, last: bool = False) -> None:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="reflect")
        # He's variance for the leaky ReLU, at any width; the paper draws from a normal of 0.05, which fits its own alone.
        nn.init.kaiming_normal_(conv.weight, a=1.0 if last else _SLOPE)
        assert conv.bias is not None  # as built
        nn.init.zeros_(conv.bias)
        super().__init__(conv, *([] if last else [nn.LeakyReLU(_SLOPE)]))


class U2FusionEncoder(nn.Module):
    """The dense encoder. Args: n, the channels of each convolution (an even number)."""

    def __init__(self, width: int = PUBLISHED_WIDTH) -> None:
        super().__init__()
        self.token_dim = (_DENSE + 1) * width
        self.first = MirroredConv(2, width)
        self.dense = nn.ModuleList(MirroredConv(width * (k + 1), width) for k in range(_DENSE))

    def forward(self, image: Tensor) -> Tensor:
        """Map two sources `(b, 2, h, w)` in [0, 1] to `(b, 6 n, h, w)`."""
        found: Tensor = self.first(image)
        for layer in self.dense:
            found = torch.cat([layer(found), found], dim=1)
        return found


class U2FusionDecoder(nn.Module):
    """The decoder. `tail` are its last two convolutions. Args: channels of the map it reads, 6 n."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        a, b, c = decoder_channels(channels)
        self.body = nn.Sequential(MirroredConv(channels, a), MirroredConv(a, b))
        self.tail = nn.Sequential(MirroredConv(b, c), MirroredConv(c, 1, last=True))

    def forward(self, feature_map: Tensor) -> Tensor:
        """Map `(b, 6 n, h, w)` to the fused picture `(b, 1, h, w)` in (0, 1)."""
        fused: Tensor = self.tail(self.body(feature_map))
        return fused.tanh() / 2 + 0.5


def decoder_channels(channels: int) -> Sequence[int]:
    """Return the channels between the decoder's convolutions: 128, 64, 32 where the map has 264."""
    share = channels / ((_DENSE + 1) * PUBLISHED_WIDTH)
    return [max(1, round(width * share)) for width in _DECODER]
