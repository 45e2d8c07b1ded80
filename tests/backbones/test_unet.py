import pytest
import torch
from torch import nn

from omnifm import seeds
from omnifm.backbones.unet import UNetDecoder, UNetEncoder


def halves(norm: str = "group", width: int = 4) -> tuple[UNetEncoder, UNetDecoder]:
    with seeds.scope(0, "net"):
        return UNetEncoder(1, width, norm), UNetDecoder(width, 3, norm)


def test_the_two_halves_are_monais_network() -> None:
    """With the same weights, four stages of MONAI's BasicUNet give the same answer as our two halves."""
    from monai.networks.nets.basic_unet import Down, TwoConv, UpCat

    encoder, decoder = halves("batch")
    parts = list(encoder.modules()) + list(decoder.modules())
    kinds = [type(part) for part in parts]
    assert (kinds.count(Down), kinds.count(UpCat)) == (3, 3) and kinds.count(TwoConv) == 7
    x = torch.rand(2, 1, 16, 24)
    bottleneck, maps = encoder(x)
    assert bottleneck.shape == (2, 32, 2, 3) and [m.shape[1] for m in maps] == [4, 8, 16]
    found = decoder.ups[0](bottleneck, maps[2])
    found = decoder.last["up"](decoder.ups[1](found, maps[1]), maps[0])
    assert torch.equal(decoder(bottleneck, maps), decoder.last["classify"](found))
    assert decoder(bottleneck, maps).shape == (2, 3, 16, 24)


@pytest.mark.parametrize(
    ("norm", "there", "gone"), [("group", nn.GroupNorm, nn.BatchNorm2d), ("batch", nn.BatchNorm2d, nn.GroupNorm)]
)
def test_every_normalisation_is_of_the_kind_asked_for(norm: str, there: type[nn.Module], gone: type[nn.Module]) -> None:
    modules = [module for half in halves(norm) for module in half.modules()]
    assert sum(isinstance(m, there) for m in modules) == 14 and not any(isinstance(m, gone) for m in modules)


def test_every_parameter_gets_a_gradient() -> None:
    encoder, decoder = halves()
    decoder(*encoder(torch.rand(2, 1, 16, 16))).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for half in (encoder, decoder) for p in half.parameters())


def test_odd_maps_are_no_problem() -> None:
    encoder, decoder = halves()
    assert decoder(*encoder(torch.rand(1, 1, 24, 40))).shape == (1, 3, 24, 40)
