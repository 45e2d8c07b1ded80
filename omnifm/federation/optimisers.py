"""The optimiser of a round of local training, and its rate."""

import math

import torch
from torch import nn

from omnifm.config import OptimiserConfig


def learning_rate(optimiser: OptimiserConfig, round_index: int, rounds: int) -> float:
    """Return the rate of a round: constant, or lr (1 + cos(pi r / R)) / 2."""
    if optimiser.schedule == "constant":
        return optimiser.lr
    return optimiser.lr * 0.5 * (1 + math.cos(math.pi * min(round_index, rounds) / rounds))


def build_optimiser(model: nn.Module, config: OptimiserConfig, lr: float) -> torch.optim.Optimizer:
    """Return a fresh optimiser over the parameters that train. Parameters that no loss reaches keep no gradient and stay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay)
