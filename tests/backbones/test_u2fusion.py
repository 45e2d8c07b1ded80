"""U2Fusion's network: the published layers, no artefacts, any width."""

import pytest
import torch
from torch import nn

from omnifm.backbones.u2fusion import U2FusionDecoder, U2FusionEncoder, decoder_channels


def convolutions(module: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_channels, m.out_channels) for m in module.modules() if isinstance(m, nn.Conv2d)]


def test_the_published_layers_are_the_default() -> None:
    encoder = U2FusionEncoder()
    decoder = U2FusionDecoder(encoder.token_dim)
    assert convolutions(encoder) == [(2, 44), (44, 44), (88, 44), (132, 44), (176, 44), (220, 44)]
    assert convolutions(decoder) == [(264, 128), (128, 64), (64, 32), (32, 1)]
    # Weights and biases of Net.py of the authors' code, added by hand.
    encoder_size = 9 * (2 * 44 + 15 * 44 * 44) + 6 * 44
    decoder_size = 9 * (264 * 128 + 128 * 64 + 64 * 32 + 32) + 128 + 64 + 32 + 1
    assert [sum(p.numel() for p in m.parameters()) for m in (encoder, decoder)] == [encoder_size, decoder_size]


def test_the_tail_is_the_last_two_convolutions() -> None:
    assert convolutions(U2FusionDecoder(264).tail) == [(64, 32), (32, 1)]


def test_other_widths_keep_the_proportions() -> None:
    assert decoder_channels(132) == [64, 32, 16] and min(decoder_channels(12)) == 1
    encoder = U2FusionEncoder(8)
    assert encoder(torch.rand(1, 2, 20, 13)).shape == (1, 48, 20, 13)
    assert U2FusionDecoder(48)(torch.rand(1, 48, 20, 13)).shape == (1, 1, 20, 13)


def test_the_encoder_is_dense() -> None:
    """The map ends with the first convolution's answer, untouched, and begins with that of the last."""
    encoder = U2FusionEncoder(4)
    image = torch.rand(2, 2, 12, 12)
    found, first = encoder(image), encoder.first(image)
    torch.testing.assert_close(found[:, -4:], first)
    torch.testing.assert_close(found[:, :4], encoder.dense[-1](found[:, 4:]))


def test_the_fused_picture_is_tanh_over_two_plus_a_half() -> None:
    decoder = U2FusionDecoder(24)
    found = torch.randn(1, 24, 9, 9)
    raw = decoder.tail(decoder.body(found))
    torch.testing.assert_close(decoder(found), raw.tanh() / 2 + 0.5)
    # Not a sigmoid of the same argument, which is half as steep.
    assert not torch.allclose(decoder(found), raw.sigmoid())


@pytest.mark.parametrize("width", [8, 44])
def test_flat_pictures_stay_flat_up_to_the_border(width: int) -> None:
    """No frame from padding with zeros, no checkerboard: of constant pictures every pixel is the same."""
    encoder = U2FusionEncoder(width)
    with torch.no_grad():
        fused = U2FusionDecoder(encoder.token_dim)(encoder(torch.full((1, 2, 24, 24), 0.7)))
    assert float(fused.max() - fused.min()) < 1e-5


def test_a_shifted_picture_gives_a_shifted_answer() -> None:
    """Nothing is downsampled: a shift by one pixel is a shift by one pixel."""
    encoder = U2FusionEncoder(4)
    decoder = U2FusionDecoder(encoder.token_dim)
    image = torch.rand(1, 2, 40, 40)
    with torch.no_grad():
        there, here = (decoder(encoder(picture)) for picture in (image[..., 1:], image[..., :-1]))
    torch.testing.assert_close(there[..., 12:-12, 12:-13], here[..., 12:-12, 13:-12])


def test_signals_neither_die_nor_explode_at_the_start() -> None:
    for width in (8, 44):
        torch.manual_seed(0)
        encoder = U2FusionEncoder(width)
        spread = U2FusionDecoder(encoder.token_dim)(encoder(torch.rand(1, 2, 32, 32))).std()
        assert 1e-3 < float(spread.detach()) < 0.45
