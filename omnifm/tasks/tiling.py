"""Pictures of any size through an enlarging network: tile by tile, with overlap, blended."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from omnifm.data.resample import resize
from omnifm.tasks.base import Inputs, Model

AT_ONCE = 4
"""Tiles that go through the network together; a map of 128 x 128 pixels and 64 channels is 4 MB, and there are dozens."""


def overview(image: Tensor, side: int) -> Tensor:
    """Return a picture `(b, c, h, w)` as the spectral path sees it: whole, `(b, c, side, side)`, bicubic."""
    return resize(image, (side, side)).clamp(0, 1)


def enlarge(model: Model, image: Tensor, scale: int, *, tile: int = 128, overlap: int = 16, view: int = 64) -> Tensor:
    """Return the enlargement of low-resolution pictures of any size.

    A picture that is no larger than a tile goes through the network whole. Otherwise tiles of equal size cover it, evenly spaced,
    and each pixel is the mean of the tiles it is in, weighted by 2 d / overlap - 1/2, cut to 0..1, d the distance to the tile's
    nearest edge inside the picture. A quarter of the overlap, which a network gets wrong for want of context, is not used, half
    of it blends, and in the last quarter the tile stands alone. Every tile comes with the same overview of the whole picture.

    Args:
        model: of the super-resolution task, in the mode it is to be used in.
        image: `(b, c, h, w)` in [0, 1].
        scale: one the model has an upsampler for.
        tile: largest side of what goes through the network at once, low-resolution pixels.
        overlap: least overlap of neighbouring tiles, low-resolution pixels; below `tile`.
        view: side of the overview.

    Returns:
        `(b, c, scale h, scale w)`, not clipped.
    """
    seen = overview(image, view)
    height, width = image.shape[-2:]
    tops, lefts = starts(height, tile, overlap), starts(width, tile, overlap)
    if len(tops) == len(lefts) == 1:
        return _run(model, seen, image, scale)
    total = image.new_zeros(*image.shape[:2], scale * height, scale * width)
    weight = image.new_zeros(scale * height, scale * width)
    for top in tops:
        for left in lefts:
            piece = image[..., top : top + tile, left : left + tile]
            found = _run(model, seen, piece, scale)
            rows, columns = (
                _ramp(length, start, whole, scale, overlap).to(found)
                for length, start, whole in ((piece.shape[2], top, height), (piece.shape[3], left, width))
            )
            share = rows[:, None] * columns
            place = (slice(scale * top, scale * top + found.shape[2]), slice(scale * left, scale * left + found.shape[3]))
            total[..., place[0], place[1]] += found * share
            weight[place] += share
    return total / weight


def starts(length: int, tile: int, overlap: int) -> Sequence[int]:
    """Return where tiles begin that cover `length` pixels, evenly spaced, neighbours sharing at least `overlap`."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(k * (length - tile) / (count - 1)) for k in range(count)]


def _ramp(length: int, start: int, whole: int, scale: int, overlap: int) -> Tensor:
    """Return the weights `(scale * length,)` of a tile along one axis: less towards edges that lie inside the picture."""
    place = torch.arange(scale * length) + 0.5
    distance = torch.full_like(place, math.inf)
    if start > 0:
        distance = torch.minimum(distance, place)
    if start + length < whole:
        distance = torch.minimum(distance, scale * length - place)
    # Never quite 0: where rounding left neighbours less overlap than they should have, a pixel may have nothing else.
    return (2 * distance / max(1, scale * overlap) - 0.5).clamp(1e-6, 1.0)


def _run(model: Model, seen: Tensor, piece: Tensor, scale: int) -> Tensor:
    """Enlarge pieces of pictures, a few at a time."""
    route = f"x{scale}"
    chunks = zip(seen.split(AT_ONCE), piece.split(AT_ONCE), strict=True)
    return torch.cat([model(Inputs(view, {"low": low}, route)).prediction for view, low in chunks])
