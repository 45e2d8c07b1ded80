"""The data of several clients as one client's: what `centralised` trains on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omnifm.errors import FederationError
from omnifm.federation.effort import Effort
from omnifm.metrics.base import NOTHING
from omnifm.tasks.base import Batch, Split


@dataclass(frozen=True)
class JoinedSplit:
    """Several splits one after the other (the pooled client of `centralised`)."""

    parts: Sequence[Split]

    def __len__(self) -> int:
        """Number of examples of all parts."""
        return sum(len(part) for part in self.parts)

    def batch(self, index: Tensor) -> Batch:
        """Return the examples at `index`, in its order. Raises FederationError if they are for different networks or unlike."""
        starts = np.cumsum([0, *(len(part) for part in self.parts)])
        owner = torch.from_numpy(np.searchsorted(starts, index.numpy(), side="right") - 1)
        pieces: list[Batch] = []
        places: list[Tensor] = []
        for number in owner.unique().tolist():
            place = (owner == number).nonzero().flatten()
            pieces.append(self.parts[number].batch(index[place] - int(starts[number])))
            places.append(place)
        return _joined(pieces, torch.cat(places).argsort())

    def in_equal_shares(self, count: int, generator: torch.Generator) -> Tensor:
        """Return `count` places in random order, as many of each part to within one; a part that is used up begins anew."""
        starts = np.cumsum([0, *(len(part) for part in self.parts)])
        full = [number for number, part in enumerate(self.parts) if len(part)]
        # Whose share is one larger is drawn too.
        dealt = torch.randperm(len(full), generator=generator)[torch.arange(count) % len(full)]
        turns = dealt[torch.randperm(count, generator=generator)]
        places = torch.empty(count, dtype=torch.int64)
        for turn, number in enumerate(full):
            mine, size = (turns == turn).nonzero().flatten(), len(self.parts[number])
            passes = [torch.randperm(size, generator=generator) for _ in range(-(-len(mine) // size))]
            places[mine] = int(starts[number]) + torch.cat([*passes, torch.empty(0, dtype=torch.int64)])[: len(mine)]
        return places


def order_of(split: Split, effort: Effort, batch_size: int, generator: torch.Generator) -> Tensor:
    """Return which examples a pass shows, in its order: each once, or as many as the effort's budget.

    Where clients take a number of steps, small and large ones alike, the pooled client's examples are shared out alike too.
    """
    if effort.steps and isinstance(split, JoinedSplit):
        return split.in_equal_shares(effort.steps * batch_size, generator)
    return torch.randperm(len(split), generator=generator)[: effort.budget]


def _joined(pieces: Sequence[Batch], order: Tensor) -> Batch:
    if len({piece.route for piece in pieces}) > 1:
        raise FederationError("examples of clients with different networks cannot be pooled: leave out strategy 'centralised'")
    try:
        image, target, row = (torch.cat(field)[order] for field in zip(*(piece[:3] for piece in pieces), strict=True))
        side = {name: torch.cat([piece.side[name] for piece in pieces])[order] for name in pieces[0].side}
    except (RuntimeError, KeyError) as error:
        raise FederationError(f"examples of different clients cannot be pooled ({str(error).splitlines()[0]})") from None
    return Batch(image, target, row, side or NOTHING, pieces[0].route)
