"""Large pictures, tile by tile."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from omnifm import seeds
from omnifm.backbones.edsr import EdsrTrunk, Enlarger
from omnifm.data.resample import enlarged
from omnifm.tasks.base import Backbone, Features, Head, Inputs, Model, Reading
from omnifm.tasks.super_resolution import SuperResolutionBackbone, SuperResolutionHead
from omnifm.tasks.tiling import enlarge, overview, starts


def network(scale: int, blocks: int = 1, channels: int = 1) -> Model:
    with seeds.scope(0, "tiling"):
        model = Model(
            SuperResolutionBackbone(EdsrTrunk(channels, 4, blocks), 8), SuperResolutionHead(Enlarger(4, channels, [scale]))
        )
        for tail in model.head.enlarger.tails.values():  # type: ignore[union-attr]
            nn.init.normal_(tail[-1].weight, std=0.1)
    return model.eval()


class Seen(Backbone):
    """Remembers what it was shown."""

    token_dim = 1

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Inputs] = []

    def forward(self, inputs: Inputs) -> Features:
        self.inputs.append(inputs)
        return Features(inputs.side["low"].flatten(2).mT[..., :1])


class Nearest(Head):
    """Repeats pixels."""

    def forward(self, reading: Reading) -> torch.Tensor:
        return reading.inputs.side["low"].repeat_interleave(2, -1).repeat_interleave(2, -2)


@given(st.integers(1, 300), st.integers(2, 64), st.data())
def test_tiles_cover_a_line_and_overlap_enough(length: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile // 2))
    found = starts(length, tile, overlap)
    assert found[0] == 0 and found[-1] + tile >= length
    if length <= tile:
        assert found == [0]
        return
    assert found[-1] + tile == length
    # Rounding may take one pixel of what neighbours share.
    assert all(0 < b - a <= tile - overlap + (overlap > 0) for a, b in itertools.pairwise(found))


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 8))
def test_every_pixel_is_covered_and_belongs_to_itself(height: int, width: int, overlap: int) -> None:
    image = torch.rand(1, 1, height, width, generator=seeds.generator(0, "tile", height, width))
    found = enlarge(Model(Seen(), Nearest()), image, 2, tile=16, overlap=overlap, view=8)
    torch.testing.assert_close(found, image.repeat_interleave(2, -1).repeat_interleave(2, -2))


@pytest.mark.parametrize("scale", [2, 4])
def test_tiles_give_what_the_whole_gives(scale: int) -> None:
    """With an overlap beyond what the network reaches the seams cannot be seen at all; the error falls with the overlap."""
    model = network(scale)
    image = torch.rand(2, 1, 75, 90, generator=seeds.generator(0, "whole"))
    with torch.no_grad():
        whole = model(Inputs(overview(image, 16), {"low": image}, f"x{scale}")).prediction
        errors = [(enlarge(model, image, scale, tile=40, overlap=n, view=16) - whole).abs() for n in (0, 4, 20)]
    # Four convolutions of 3 x 3 and one of bicubic do not see a quarter of 20 pixels far, two more are at high resolution.
    assert errors[0].max() > 1e-2 and errors[0].max() > errors[1].max() > errors[2].max()
    assert errors[2].max() < 1e-4
    # Away from seams nothing differs: the first tile's pixels that no other tile reaches.
    inside = errors[1][..., : scale * 20, : scale * 20]
    assert inside.max() < 1e-5


def test_a_picture_that_fits_goes_through_whole() -> None:
    model = network(2)
    image = torch.rand(5, 1, 24, 20, generator=seeds.generator(0, "fits"))
    with torch.no_grad():
        found = enlarge(model, image, 2, tile=24, overlap=4, view=16)
        torch.testing.assert_close(found, model(Inputs(image, {}, "x2")).prediction)


def test_every_tile_comes_with_the_overview_of_the_whole() -> None:
    net = Seen()
    image = torch.rand(2, 3, 40, 30, generator=seeds.generator(0, "view"))
    enlarge(Model(net, Nearest()), image, 2, tile=16, overlap=4, view=8)
    assert len(net.inputs) == len(starts(40, 16, 4)) * len(starts(30, 16, 4)) and {i.route for i in net.inputs} == {"x2"}
    assert {tuple(i.side["low"].shape) for i in net.inputs} == {(2, 3, 16, 16)}
    assert all(torch.equal(i.image, overview(image, 8)) for i in net.inputs)


def test_an_untrained_network_makes_bicubic_tiles_without_seams() -> None:
    """Also where the tiles' own borders are mirrored: the ramp gives them no weight."""
    model = Model(SuperResolutionBackbone(EdsrTrunk(1, 4, 1), 8), SuperResolutionHead(Enlarger(4, 1, [2])))
    smooth = torch.linspace(0, 1, 100).expand(1, 1, 60, 100).contiguous()
    with torch.no_grad():
        found = enlarge(model, smooth, 2, tile=40, overlap=16, view=16)
    torch.testing.assert_close(found, enlarged(smooth, 2), atol=2e-4, rtol=0)
