"""EDSR's trunk and upsamplers."""

import pytest
import torch

from omnifm import seeds
from omnifm.backbones.edsr import EdsrTrunk, Enlarger, SubPixelTail
from omnifm.data.resample import enlarged


def picture(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=seeds.generator(0, "edsr"))


def test_the_published_baseline_has_its_published_size() -> None:
    """EDSR-baseline x2 (64 channels, 16 blocks, colour): 1.37 million parameters."""
    count = sum(p.numel() for part in (EdsrTrunk(3), Enlarger(64, 3, [2])) for p in part.parameters())
    conv = 64 * 64 * 9 + 64
    assert count == (3 * 64 * 9 + 64) + 33 * conv + 4 * conv + (64 * 3 * 9 + 3) == 1_369_859


@pytest.mark.parametrize(("channels", "scale"), [(1, 2), (3, 4), (1, 8)])
def test_an_untrained_network_is_the_bicubic_one(channels: int, scale: int) -> None:
    trunk, enlarger = EdsrTrunk(channels, 8, 2), Enlarger(8, channels, [2, 4, 8])
    image = picture(2, channels, 9, 7)
    answer = enlarger(trunk(image), image, f"x{scale}")
    assert torch.equal(answer, enlarged(image, scale)) and answer.shape == (2, channels, 9 * scale, 7 * scale)


def test_the_tail_is_sub_pixel_convolution_twice_for_x4() -> None:
    """Shuffling by hand: channel 4 k + 2 i + j of the convolution is pixel (2 y + i, 2 x + j) of channel k."""
    tail = SubPixelTail(4, 1, 2)
    found = picture(1, 4, 5, 6)
    convolved = tail[0](found)
    by_hand = torch.zeros(1, 4, 10, 12)
    for k in range(4):
        for i in range(2):
            for j in range(2):
                by_hand[:, k, i::2, j::2] = convolved[:, 4 * k + 2 * i + j]
    assert torch.equal(tail[1](convolved), by_hand)
    assert [type(layer).__name__ for layer in SubPixelTail(4, 1, 4)] == [
        "Conv2d",
        "PixelShuffle",
        "Conv2d",
        "PixelShuffle",
        "Conv2d",
    ]


def test_the_trunk_by_hand() -> None:
    trunk = EdsrTrunk(1, 4, 2)
    image = picture(2, 1, 6, 8)
    start = trunk.enter(image - 0.5)
    found = start
    for block in trunk.blocks:
        found = found + block.second(block.first(found).clamp(min=0))
    torch.testing.assert_close(trunk(image), start + trunk.leave(found))


def test_only_the_upsampler_of_the_scale_learns() -> None:
    with seeds.scope(0, "edsr"):
        trunk, enlarger = EdsrTrunk(1, 4, 1), Enlarger(4, 1, [2, 4])
    image = picture(1, 1, 6, 6)
    with torch.no_grad():
        enlarger.tails["x2"][-1].weight.fill_(0.1)
    enlarger(trunk(image), image, "x2").square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (*trunk.parameters(), *enlarger.tails["x2"].parameters()))
    assert all(p.grad is None for p in enlarger.tails["x4"].parameters())


def test_bicubic_keeps_float32_under_autocast() -> None:
    trunk, enlarger = EdsrTrunk(1, 8, 1), Enlarger(8, 1, [2])
    image = picture(1, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        answer = enlarger(trunk(image), image, "x2")
    assert answer.dtype == torch.float32 and torch.equal(answer, enlarged(image, 2))
