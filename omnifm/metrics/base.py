"""The contract of a mergeable metric."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Self

from torch import Tensor

Scores = dict[str, float | None]
"""Scores by name; None is a score that is undefined."""
NOTHING: Mapping[str, Tensor] = MappingProxyType({})
"""No facts besides prediction, target and row."""


class Metric(ABC):
    """A score whose state merges across clients exactly: merging states, then computing, equals computing on the union."""

    counts: frozenset[str] = frozenset()
    """Names among the scores that count something: those of the clients are added up, and there is no worst of them."""

    @abstractmethod
    def update(self, prediction: Tensor, target: Tensor, row: Tensor, side: Mapping[str, Tensor] = NOTHING) -> None:
        """Add a batch: predictions, targets, the manifest rows they belong to, and what else the task knows of them."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return all that was added, as tensors that concatenate."""

    @abstractmethod
    def merge(self, states: Iterable[Mapping[str, Tensor]]) -> Self:
        """Return the metric of the union of `states`."""

    @abstractmethod
    def compute(self) -> Scores:
        """Return the scores; None where a score is undefined (no examples, a class that never occurs)."""

    def shares(self) -> dict[str, Fraction]:
        """Return which share of the examples is behind a score, by name, where it is a mean over some of them alone.

        The mean over clients weights the score of closed questions by how many closed questions each has, not by all of them.
        """
        return {}
