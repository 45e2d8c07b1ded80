"""How long a client trains in a round, and which parts of its model in which order."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from omnifm.errors import ConfigError


@dataclass(frozen=True)
class Effort:
    """How long a client trains.

    Attributes:
        epochs: passes over its training examples.
        budget: examples of each pass, drawn anew; None: all.
        steps: optimiser steps, however many passes that takes; 0: as many as `epochs` passes have.
    """

    epochs: int
    budget: int | None = None
    steps: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Effort":
        """Read a training request's settings."""
        return cls(int(settings["epochs"]), settings.get("budget"), int(settings.get("steps", 0)))


@dataclass(frozen=True)
class Phase:
    """A stretch of local training with an optimiser of its own. Most strategies have one.

    Attributes:
        effort: how long.
        trains: names of the parameters that train; None: all that the task trains.
        before: called at its start, with the model as the phase before left it.
    """

    effort: Effort
    trains: frozenset[str] | None = None
    before: Callable[[], None] | None = None

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Freeze what does not train in this phase; thaw it afterwards. Raises ConfigError if nothing is left to train."""
        if self.before:
            self.before()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        rest = [p for name, p in trained.items() if self.trains is not None and name not in self.trains]
        if len(rest) == len(trained):
            raise ConfigError("a phase of local training selects no parameter that trains")
        for parameter in rest:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in rest:
                parameter.requires_grad_(True)


def steps_of(effort: Effort, examples: int, batch_size: int) -> int:
    """Return the optimiser steps of an effort whose batches are drawn, not dealt out: as many as whole epochs would have."""
    return effort.steps or effort.epochs * -(-examples // batch_size)
