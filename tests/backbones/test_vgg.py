"""VGG-16's maps from a safetensors file in the public layout."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from omnifm.backbones.vgg import BLOCKS, Vgg16Features, load_vgg16
from omnifm.errors import ConfigError

# The layers of `features`, as the paper's table D has them: numbers are convolutions, M is a pooling.
CONFIGURATION = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


def reference() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for entry in CONFIGURATION:
        if isinstance(entry, int):
            layers += [nn.Conv2d(channels, entry, 3, padding=1), nn.ReLU()]
            channels = entry
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"features.{name}": tensor for name, tensor in reference().state_dict().items()}


def test_maps_are_those_before_the_poolings(weights: dict[str, Tensor]) -> None:
    net = reference()
    net.load_state_dict({name.removeprefix("features."): tensor for name, tensor in weights.items()})
    grey = torch.rand(2, 1, 32, 48)
    found = (grey.expand(-1, 3, -1, -1) - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    expected = []
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.MaxPool2d):
                expected.append(found)
            found = layer(found)
        answer = Vgg16Features(weights, "imagenet")(grey)
    assert [m.shape[1] for m in answer] == [64, 128, 256, 512, 512] and len(expected) == 5
    for one, other in zip(answer, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_caffe_weights_see_grey_levels_in_the_order_of_blue_green_red(weights: dict[str, Tensor]) -> None:
    seen = {n: torch.zeros_like(t) for n, t in weights.items()}
    for channel in range(3):
        seen["features.0.weight"][channel, channel, 1, 1] = 1
        seen["features.2.weight"][channel, channel, 1, 1] = 1
    first = Vgg16Features(seen, "caffe")(torch.ones(1, 1, 32, 32))[0]
    torch.testing.assert_close(first[0, :3, 16, 16], torch.tensor([255 - 103.939, 255 - 116.779, 255 - 123.68]))


def test_nothing_of_it_is_trained_or_averaged(weights: dict[str, Tensor]) -> None:
    net = Vgg16Features(weights, "caffe")
    assert not list(net.parameters()) and not net.state_dict()
    assert sum(len(block) for block in BLOCKS) == 13


def test_files_that_are_not_vgg16(weights: dict[str, Tensor], tmp_path: Path) -> None:
    small = {n: t for n, t in weights.items() if n != "features.10.bias"}
    save_file(small, tmp_path / "lacks.safetensors")
    with pytest.raises(ConfigError, match=r"lacks\.safetensors lacks tensor features\.10\.bias: not the weights of VGG-16"):
        load_vgg16(tmp_path / "lacks.safetensors", "caffe")
    save_file(weights | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, tmp_path / "grey.safetensors")
    with pytest.raises(ConfigError, match=r"features\.0\.weight has shape \(64, 1, 3, 3\), not \(64, 3, 3, 3\)"):
        load_vgg16(tmp_path / "grey.safetensors", "caffe")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    for name in ("x.safetensors", "gone.safetensors"):
        with pytest.raises(ConfigError, match=rf"{name} cannot be read"):
            load_vgg16(tmp_path / name, "caffe")


def test_a_whole_checkpoint_does_too(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(weights | {"classifier.6.bias": torch.zeros(1000)}, tmp_path / "vgg16.safetensors")
    assert len(load_vgg16(tmp_path / "vgg16.safetensors", "imagenet")(torch.rand(1, 1, 32, 32))) == 5
