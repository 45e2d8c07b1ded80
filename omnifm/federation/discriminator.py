"""A small network that says whose a vector is, and how well it is kept from knowing."""

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

_BATCH = 32


def discriminator(width: int, hidden: int, outputs: int, state: Mapping[str, Tensor]) -> nn.Sequential:
    """Return two hidden layers with BatchNorm and ReLU and one that decides, all without bias; in `state`, if there is one."""
    layers: list[nn.Module] = []
    for before, after in ((width, hidden), (hidden, hidden)):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    judge = nn.Sequential(*layers, nn.Linear(hidden, outputs, bias=False))
    if state:
        judge.load_state_dict(dict(state))
    return judge


def learn(
    judge: nn.Module, vectors: Tensor, target: Tensor, counts: Tensor, *, lr: float, epochs: int, generator: torch.Generator
) -> float:
    """Train by SGD on vectors `(p, d)` that stand for `counts` `(p,)`; return the accuracy on them."""
    judge.train()
    optimiser = torch.optim.SGD(judge.parameters(), lr=lr)
    orders = (torch.randperm(len(vectors), generator=generator) for _ in range(epochs))
    for index in itertools.chain.from_iterable(order.split(_BATCH) for order in orders):
        if len(index) == 1:
            continue  # BatchNorm cannot train on one
        optimiser.zero_grad()
        loss = functional.cross_entropy(judge(vectors[index]), target[index], reduction="none")
        ((loss * counts[index]).sum() / counts[index].sum()).backward()
        optimiser.step()
    with torch.no_grad():
        return float((judge.eval()(vectors).argmax(dim=1) == target).float().mean())


def divergence_from_uniform(logits: Tensor) -> Tensor:
    """Return KL(u || softmax(logits)), the mean over rows `(b, N)`."""
    return -(functional.log_softmax(logits.float(), dim=1).mean() + math.log(logits.shape[1]))
