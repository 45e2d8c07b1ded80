"""Who takes part in which round, drawn once up front, so that every strategy sees the same clients."""

import math
from collections.abc import Sequence

import torch

from omnifm import seeds


def draw_schedule(clients: Sequence[str], rounds: int, participation: float, seed: int) -> tuple[tuple[str, ...], ...]:
    """Draw `ceil(participation * clients)` distinct clients for each round, in the order of their ids.

    The draw of a round depends on the seed, the round and the set of clients alone: not on their order in the config, nor on the
    strategy, nor on the number of rounds.
    """
    # A tolerance keeps .2 of 10 at 2: the product is 2.0000000000000004 for some fractions.
    size = max(1, math.ceil(participation * len(clients) - 1e-9))
    ordered = sorted(clients)
    schedule = []
    for number in range(rounds):
        order = torch.randperm(len(ordered), generator=seeds.generator(seed, "schedule", number))
        schedule.append(tuple(ordered[i] for i in sorted(order[:size].tolist())))
    return tuple(schedule)
