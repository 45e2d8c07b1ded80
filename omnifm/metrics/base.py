"""The contract of a mergeable metric."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Self

from torch import Tensor

Scores = dict[str, float | None]
"""Scores by name; None is a score that is undefined."""


class Metric(ABC):
    """A score whose state merges across clients exactly: merging states, then computing, equals computing on the union."""

    @abstractmethod
    def update(self, prediction: Tensor, target: Tensor, row: Tensor) -> None:
        """Add a batch of predictions with their targets and the manifest rows they belong to."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return all that was added, as tensors that concatenate."""

    @abstractmethod
    def merge(self, states: Iterable[Mapping[str, Tensor]]) -> Self:
        """Return the metric of the union of `states`."""

    @abstractmethod
    def compute(self) -> Scores:
        """Return the scores; None where a score is undefined (no examples, a class that never occurs)."""
