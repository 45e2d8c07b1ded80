"""From the config's `[model]` to a backbone."""

from pathlib import Path

from torch import Tensor, nn

from omnifm.backbones.efficientnet import EfficientNetLite0Trunk
from omnifm.backbones.resnet import ResNet18Trunk
from omnifm.config import ModelConfig
from omnifm.errors import ConfigError


def build_trunk(config: ModelConfig, channels: int) -> tuple[nn.Module, int]:
    """Return a network that maps `(b, c, h, w)` to tokens `(b, l, d)`, and d.

    Raises:
        ConfigError: a package or weight file is missing or does not fit.
    """
    trunk: ResNet18Trunk | EfficientNetLite0Trunk
    if config.backbone == "resnet18":
        trunk = ResNet18Trunk(channels, config.width, config.stem_stride, config.norm)
    else:
        trunk = EfficientNetLite0Trunk(channels, imagenet=config.weights == "imagenet")
    if config.weights not in ("", "imagenet"):
        load_weights(trunk, Path(config.weights))
    return trunk, trunk.token_dim


def load_weights(trunk: nn.Module, path: Path) -> None:
    """Load a safetensors file into `trunk`. Every tensor of the trunk must be there, with its shape.

    A file of a whole omnifm model works too: its `backbone.trunk.` tensors are taken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.weights: {path} cannot be read ({error})") from None
    prefix = "backbone.trunk."
    inner = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)} or found
    own = trunk.state_dict()
    wrong = [n for n, t in own.items() if n not in inner or inner[n].shape != t.shape]
    if wrong:
        raise ConfigError(f"model.weights: {path} lacks tensor {wrong[0]}, or it has another shape")
    trunk.load_state_dict({name: inner[name] for name in own})
