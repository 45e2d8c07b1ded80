"""ResNet-18 (He et al., CVPR 2016) by MONAI, in two dimensions, as a maker of tokens.

r = flatten( layer4( ... maxpool(act(norm(conv1(x)))) ) ),   (b, l, d),   d = 8 * width
"""

from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.nn.utils import skip_init

from omnifm.backbones.monai_parts import monai_part
from omnifm.backbones.norms import replace_batch_norms

_BLOCK = 8
"""Channels that oneDNN's AVX2 kernels take at a time."""


class _Shortcut(nn.Conv2d):
    """A strided 1x1 convolution that first leaves out the places it does not read: the same map, the same gradients.

    With fewer input channels than a block and an image in channels-last order (one channel is always in it), oneDNN's own
    strided backward pass writes past its workspace on CPUs without AVX-512: wrong gradients, or a process that is aborted
    (uxlfoundation/oneDNN issue 6035, in torch 2.13).
    """

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        return conv2d(x[..., ::rows, ::columns], self.weight, self.bias)


def _mend_shortcuts(module: nn.Module) -> None:
    """Replace the strided 1x1 convolutions that oneDNN gets wrong, and no other: the bits of wider networks stay."""
    for name, child in list(module.named_children()):
        if not isinstance(child, nn.Conv2d):
            _mend_shortcuts(child)
        elif child.kernel_size == (1, 1) and child.stride != (1, 1) and child.in_channels < _BLOCK:
            # Without the draws of an initialisation: what is made after this keeps its numbers.
            mended = skip_init(_Shortcut, child.in_channels, child.out_channels, 1, child.stride, bias=child.bias is not None)
            mended.load_state_dict(child.state_dict())
            setattr(module, name, mended)


class ResNet18Trunk(nn.Module):
    """ResNet-18 without pooling and classifier.

    Args:
        channels: image channels.
        width: channels of the first stage; 64 is the published network (11.2 M parameters), 16 has .7 M.
        stem_stride: stride of the 7x7 convolution; 2 is the published network.
        norm: `group` or `batch`.
    """

    def __init__(self, channels: int, width: int, stem_stride: int, norm: str) -> None:
        super().__init__()
        planes = [width, 2 * width, 4 * width, 8 * width]
        net = monai_part("monai.networks.nets.resnet").ResNet(
            "basic",
            [2, 2, 2, 2],
            planes,
            spatial_dims=2,
            n_input_channels=channels,
            conv1_t_stride=stem_stride,
            feed_forward=False,
        )
        self.stem = nn.Sequential(net.conv1, net.bn1, net.act, net.maxpool)
        self.layers = nn.Sequential(net.layer1, net.layer2, net.layer3, net.layer4)
        self.token_dim = planes[-1]
        _mend_shortcuts(self)
        if norm == "group":
            # MONAI's own `norm=` reaches the stem only: the blocks would keep BatchNorm.
            replace_batch_norms(self)

    def forward(self, image: Tensor) -> Tensor:
        """Map `(b, c, h, w)` to `(b, h/32 * w/32, d)` with stem stride 2, four times as many tokens with 1."""
        features: Tensor = self.layers(self.stem(image))
        return features.flatten(2).transpose(1, 2)
