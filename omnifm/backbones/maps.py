"""Between a feature map and tokens, for networks whose heads need the map back.

    r = flatten( pool(f) ),   (b, l, d), l <= `most`            f: (b, d, h, w)
    f' = f + upsample( unflatten(content - r) )                 content: what the path made of r

Where no path changes the tokens, f' = f bit for bit: the network is then the published one.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

MOST_TOKENS = 256
"""A block over 2l + 1 tokens costs l^2; 256 are a 16 x 16 grid."""


def token_grid(height: int, width: int, most: int = MOST_TOKENS) -> tuple[int, int]:
    """Return the finest grid of at most `most` cells that keeps the shape of a `height` x `width` map, each side at least 1."""
    if height * width <= most:
        return height, width
    scale = math.sqrt(most / (height * width))
    rows = max(1, min(most, math.floor(height * scale)))
    return rows, max(1, min(width, most // rows, math.ceil(width * scale)))


def to_tokens(feature_map: Tensor, most: int = MOST_TOKENS) -> tuple[Tensor, tuple[int, int]]:
    """Average-pool a map `(b, d, h, w)` to at most `most` tokens `(b, l, d)`; return them and their grid."""
    grid = token_grid(feature_map.shape[2], feature_map.shape[3], most)
    pooled = feature_map if grid == tuple(feature_map.shape[2:]) else adaptive_avg_pool2d(feature_map, grid)
    return pooled.flatten(2).transpose(1, 2), grid


def add_back(feature_map: Tensor, change: Tensor, grid: tuple[int, int]) -> Tensor:
    """Add to a map `(b, d, h, w)` what happened to its tokens, `(b, l, d)` on `grid`, bilinearly enlarged."""
    plane = change.transpose(1, 2).unflatten(2, grid)
    if grid != tuple(feature_map.shape[2:]):
        plane = interpolate(plane, size=feature_map.shape[2:], mode="bilinear", align_corners=False)
    return torch.add(feature_map, plane)
