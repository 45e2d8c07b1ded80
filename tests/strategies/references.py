"""One small problem for references: slow rewritings of the papers' algorithms that share no code with omnifm.

What a reference takes from omnifm is where it starts, its images, and the order in which they come. Clients are
visited backwards.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from omnifm import seeds
from tests.support import BATCH, CLASSES, HOSPITALS, Hospital, Lab, Spy, make_lab

Array = npt.NDArray[np.float64]

LR, EPOCHS = 0.1, 2
# Everybody is absent once, and nobody always.
SOME = (("a", "b", "c"), ("d", "b"), ("c", "a", "d"))
FIVE = (*HOSPITALS, Hospital("e", "MRI", 7))
ALL = (("a", "b", "c", "d", "e"),) * 3
WEIGHT, BIAS = "head.linear.weight", "head.linear.bias"


def lab_of(
    folder: Path, strategy: str, options: Mapping[str, Any], hidden: int | None = 0, everybody: bool = False, **more: Any
) -> Lab:
    """Three rounds of plain SGD, over a softmax regression, `hidden` tanh units, or a convolution (None)."""
    changes: dict[str, Any] = {
        "optimiser__lr": LR,
        "optimiser__momentum": 0.0,
        "optimiser__weight_decay": 0.0,
        "federation__local_epochs": EPOCHS,
        "federation__rounds": 3,
    }
    hospitals, schedule = (FIVE, ALL) if everybody else (HOSPITALS, SOME)
    return make_lab(
        folder, strategy, options, hospitals=hospitals, schedule=schedule, hidden=hidden, engine=Spy, **(changes | more)
    )


def order(lab: Lab, client: str, t: int, epochs: Sequence[int] = range(EPOCHS), phase: int = 0) -> Iterator[Tensor]:
    """Yield the places of each batch's examples."""
    count = len(lab.task.client_data(client).train)
    for epoch in epochs:
        names = ("batches", t, client, epoch, *(("phase", phase) if phase else ()))
        yield from torch.randperm(count, generator=seeds.generator(lab.config.seed, *names)).split(BATCH)


def images(lab: Lab, client: str) -> Array:
    """Return a client's training images `(n, h, w)`."""
    train = lab.task.client_data(client).train
    return train.batch(torch.arange(len(train))).image[:, 0].double().numpy()


def features(image: Array) -> Array:
    """Return 16 averages and a one, `(n, 17)`."""
    means = (image - 0.5).reshape(len(image), 4, 4, 4, 4).mean(axis=(2, 4)).reshape(len(image), 16)
    return np.hstack([means, np.ones((len(image), 1))])


class Regression:
    """The softmax regression of a lab, as one matrix `(classes, 17)`."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.start = matrix(lab.untrained)
        self.x = {h.id: features(images(lab, h.id)) for h in lab.hospitals}
        self.y = {h.id: np.eye(CLASSES)[lab.task.labels(h.id).numpy()] for h in lab.hospitals}
        self.size = {h.id: h.train for h in lab.hospitals}

    def rounds(self) -> Iterator[tuple[int, list[str]]]:
        for t, sampled in enumerate(self.lab.schedule):
            yield t, [*reversed(sampled)]

    def batches(self, client: str, t: int, phase: int = 0) -> Iterator[tuple[Array, Array]]:
        for index in order(self.lab, client, t, phase=phase):
            yield self.x[client][index.numpy()], self.y[client][index.numpy()]

    def mean(self, ends: Mapping[str, Array]) -> Array:
        """Return FedAvg's mean."""
        return np.average([*ends.values()], axis=0, weights=[self.size[i] for i in ends])

    def sgd(self, theta: Array, client: str, t: int) -> Array:
        """Return FedAvg's local model."""
        w = theta
        for x, y in self.batches(client, t):
            w = w - LR * slope(w, x, y)
        return w

    def ends(self, theta: Array, t: int, sampled: Sequence[str]) -> dict[str, Array]:
        """Return FedAvg's local models."""
        return {i: self.sgd(theta, i, t) for i in sampled}


def slope(w: Array, x: Array, y: Array) -> Array:
    """Return the gradient of the mean cross-entropy of softmax(w x)."""
    p = np.exp(x @ w.T)
    p /= p.sum(axis=1, keepdims=True)
    return (p - y).T @ x / len(x)


def matrix(tensors: Mapping[str, Tensor], prefix: str = "") -> Array:
    """Return weight and bias side by side."""
    return np.hstack([tensors[prefix + WEIGHT].double().numpy(), tensors[prefix + BIAS].double().numpy()[:, None]])


def assert_same(found: Array, expected: Array) -> None:
    """Both are within 1e-5, element by element."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5
