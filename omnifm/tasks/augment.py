"""Random changes of training images, whole batches at once, all randomness from the generator that is handed in."""

import torch
from torch import Tensor
from torch.nn import functional


def flip_shift(image: Tensor, generator: torch.Generator, part: int = 8, *, mirror: bool = True) -> Tensor:
    """Mirror each image left to right with probability 1/2 and shift it by up to 1/`part` of its side; edges are repeated.

    Args:
        image: `(b, c, h, w)`.
        generator: a CPU generator.
        part: 8 shifts 64-pixel images by up to 8 pixels.
        mirror: False: shift alone.
    """
    b, _, h, w = image.shape
    reach_h, reach_w = h // part, w // part
    flip = (torch.rand(b, generator=generator) < 0.5) & mirror
    down = torch.randint(0, 2 * reach_h + 1, (b, 1), generator=generator)
    right = torch.randint(0, 2 * reach_w + 1, (b, 1), generator=generator)
    padded = functional.pad(image, (reach_w, reach_w, reach_h, reach_h), mode="replicate")
    rows = down + torch.arange(h)
    columns = right + torch.arange(w)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    place = torch.arange(b)[:, None, None]
    # Advanced indices around the channel slice put it last: (b, h, w, c).
    return padded[place, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
