"""The contract of a mergeable metric."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import ClassVar, Self

from torch import Tensor

from omnifm.errors import FederationError

MOST = 1e30
"""No score, loss or other number that a client tells of is as large: sums of such numbers stay far from overflowing."""
Scores = dict[str, float | None]
"""Scores by name; None is a score that is undefined."""
NOTHING: Mapping[str, Tensor] = MappingProxyType({})
"""No facts besides prediction, target and row."""


class Metric(ABC):
    """A score whose state merges across clients exactly: merging states, then computing, equals computing on the union."""

    counts: frozenset[str] = frozenset()
    """Names among the scores that count something: those of the clients are added up, and there is no worst of them."""
    by_row: ClassVar[bool] = False
    """True: the state has one line for each row of the manifest, slices of a volume together."""

    @abstractmethod
    def update(self, prediction: Tensor, target: Tensor, row: Tensor, side: Mapping[str, Tensor] = NOTHING) -> None:
        """Add a batch: predictions, targets, the manifest rows they belong to, and what else the task knows of them."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return all that was added, as tensors that concatenate."""

    def vet(self, state: Mapping[str, Tensor], rows: int) -> None:
        """Raise FederationError, in words without a name, if `state` is none that a client with so many rows can have.

        Names, types and shapes are those of this metric, which is a fresh one; values are finite. A metric whose `compute`
        asks for more of its values says so in a `vet` of its own.
        """
        outline = self.state()
        if odd := outline.keys() ^ state.keys():
            raise FederationError(f"score {min(odd)[:60]} is {'missing' if min(odd) in outline else 'unknown'}")
        for name, like in outline.items():
            found = state[name]
            if found.dtype != like.dtype or found.ndim != like.ndim or found.shape[1:] != like.shape[1:]:
                raise FederationError(f"score {name} is {found.dtype} of shape {tuple(found.shape)}, which does not fit")
            if found.is_floating_point() and not bool((found.abs() < MOST).all()):
                raise FederationError(f"score {name} is not finite")
        lengths = {len(found) for found in state.values()}
        if len(lengths) != 1 or 0 in lengths or (self.by_row and lengths != {rows}):
            raise FederationError(f"scores of {', '.join(map(str, sorted(lengths)))} lines for {rows} rows")

    @staticmethod
    def require_within(state: Mapping[str, Tensor], name: str, least: float, most: float) -> None:
        """Raise FederationError if a value is not within a range."""
        if not bool(((state[name] >= least) & (state[name] <= most)).all()):
            raise FederationError(f"score {name} has a value that is not within {least:g} to {most:g}")

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
