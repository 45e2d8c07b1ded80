"""Low-rank changes of a frozen backbone's layers, for the strategies that train nothing else of it: W' = W + (alpha / r) B A.

Hu et al., "LoRA: Low-rank adaptation of large language models", ICLR 2022. W: (out, in), frozen; A: (r, in); B: (out, r) = 0 at
first. Every linear layer and convolution gets a change, a convolution's kernel read as (out, the rest), and r is at most what
the layer has.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from omnifm.errors import ConfigError
from omnifm.tasks.base import Model

DOWN, UP = ".parametrizations.weight.0.down", ".parametrizations.weight.0.up"
"""What follows a layer's name in the names of its A and B."""
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LowRank(nn.Module):
    """A layer's weight with its change."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        outputs, inputs = weight.flatten(1).shape
        rank = min(rank, outputs, inputs)
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return W'."""
        change = self.scale * (self.up @ self.down)
        return weight + change.view_as(weight).to(weight.dtype)


def add_changes(model: Model, rank: int, alpha: float) -> list[LowRank]:
    """Freeze the backbone and give every layer a change; return the changes. Raises ConfigError if it has no layer."""
    layers = [module for module in model.backbone.modules() if isinstance(module, _LAYERS)]
    if not layers:
        raise ConfigError("low-rank changes: the backbone has neither linear layers nor convolutions")
    model.backbone.requires_grad_(False)
    changes = [LowRank(layer.weight, rank, alpha) for layer in layers]
    for layer, change in zip(layers, changes, strict=True):
        parametrize.register_parametrization(layer, "weight", change)
    return changes


def changed_layers(names: Iterable[str]) -> list[str]:
    """Return the layers that have a change, sorted, from names of tensors."""
    return sorted(name.removesuffix(UP) for name in names if name.endswith(UP))
