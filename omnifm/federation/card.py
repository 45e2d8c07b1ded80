"""What a strategy says of itself: `omnifm list strategies` prints it, `omnifm tune` searches it, a test holds it to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Card:
    """A strategy in a line.

    Attributes:
        paper: authors, venue and year.
        private: what stays at a client; empty: nothing.
        up: what a client sends beside the model's shared tensors; empty: nothing.
        down: what it gets beside them.
        server: what the server remembers beside the model.
        needs: what must be there for the method to be defined; empty: it runs on every task.
        search: the values that a search tries, by option; one, two or four combinations in all.
    """

    paper: str
    private: str = ""
    up: str = ""
    down: str = ""
    server: str = ""
    needs: str = ""
    search: Mapping[str, Sequence[Any]] = field(default_factory=dict)
