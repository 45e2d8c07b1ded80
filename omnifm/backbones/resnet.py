"""ResNet-18 (He et al., CVPR 2016) by MONAI, in two dimensions, as a maker of tokens.

r = flatten( layer4( ... maxpool(act(norm(conv1(x)))) ) ),   (b, l, d),   d = 8 * width
"""

from torch import Tensor, nn

from omnifm.backbones.norms import replace_batch_norms


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
        from monai.networks.nets.resnet import ResNet

        planes = [width, 2 * width, 4 * width, 8 * width]
        net = ResNet(
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
        if norm == "group":
            # MONAI's own `norm=` reaches the stem only: the blocks would keep BatchNorm.
            replace_batch_norms(self)

    def forward(self, image: Tensor) -> Tensor:
        """Map `(b, c, h, w)` to `(b, h/32 * w/32, d)` with stem stride 2, four times as many tokens with 1."""
        features: Tensor = self.layers(self.stem(image))
        return features.flatten(2).transpose(1, 2)
