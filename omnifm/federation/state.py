"""What is remembered: by the server between rounds, by a client between its rounds, and what never changes during a run."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omnifm.federation.release import Release
from omnifm.tasks.base import ClientData, Model


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client: nothing of its images."""

    id: str
    modality: str


@dataclass(frozen=True)
class Context:
    """Facts of the federation that do not change during a run. Clients and modalities are numbered by their place here.

    `budgeted`: what clients tell of their images' spectra has a privacy budget (`LocalJob.release`). `epochs` and `per_round`:
    passes of a client's round over its examples, or, where a round is counted in steps, how many it shows (0: it is not).
    """

    clients: tuple[ClientInfo, ...]
    seed: int
    rounds: int
    buffers: str = "average"
    one_label_space: bool = True
    weighting: str = "examples"
    label_count: int = 0
    budgeted: bool = False
    epochs: int = 1
    per_round: int = 0

    def shown(self, num_examples: int) -> int:
        """Return how many examples a client with `num_examples` of its own is shown in a round; repeated ones count again."""
        return self.per_round or self.epochs * num_examples

    def weight(self, num_examples: int) -> int:
        """Return a client's weight in a mean: its number of training examples, or 1."""
        return num_examples if self.weighting == "examples" else 1

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities of all clients, sorted."""
        return tuple(sorted({client.modality for client in self.clients}))

    def client_index(self, client: str) -> int:
        """Return the number of a client."""
        return next(i for i, info in enumerate(self.clients) if info.id == client)

    def modality_index(self, client: str) -> int:
        """Return the number of a client's modality."""
        return self.modalities.index(self.clients[self.client_index(client)].modality)


@dataclass
class ServerState:
    """All that the server remembers between rounds; saved whole with every round.

    Attributes:
        shared: the global model, shared tensors alone.
        extra: the strategy's tensors (bank, neighbourhood means, control variates), by name.
        meta: plain values that go with them.
    """

    shared: dict[str, Tensor]
    extra: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def settle(self, asked: Iterable[str], counted: Collection[str], round_index: int) -> None:
        """Remember for whom of those `asked` a round did not count: refused, or late."""
        void: dict[str, list[int]] = self.meta.get("void", {})
        for client in asked:
            if client in counted:
                void.pop(client, None)  # it was told so, and what it keeps now is of this round
            else:
                void.setdefault(client, []).append(round_index)
        if void:
            self.meta["void"] = void
        else:
            self.meta.pop("void", None)

    def told(self, client: str) -> dict[str, Any]:
        """Return what a request tells a client of rounds that did not count, as a setting; empty: nothing."""
        void = self.meta.get("void", {}).get(client)
        return {"void": void} if void else {}


@dataclass
class LocalJob:
    """One client at work, from `begin` to `finish`.

    Attributes:
        client: who.
        round: rounds completed before this one.
        model: the model, with the request's shared and the client's private tensors in place.
        data: the client's splits.
        received: the request's extra tensors.
        anchor: the shared tensors as received (theta^t).
        state: the strategy's private tensors of this client; what `finish` leaves here is kept.
        seed: root of all randomness.
        device: where the model is.
        labels: of the training examples, where the task has some.
        lr: learning rate of this round.
        training: whether this is a round of training; False: an evaluation, perhaps after fine-tuning.
        phase: number of the phase that is trained.
        steps: optimiser steps taken so far, all phases together.
        release: how spectra of this client's images may leave; None: as they are.
        released: rounds in which they did, those that did not count too, and this one if it is done again after a crash.
    """

    client: str
    round: int
    model: Model
    data: ClientData
    received: Mapping[str, Tensor]
    anchor: Mapping[str, Tensor]
    state: dict[str, Tensor]
    seed: int
    device: torch.device
    labels: Tensor | None = None
    lr: float = 0.0
    training: bool = True
    phase: int = 0
    steps: int = 0
    release: Release | None = None
    released: frozenset[int] = frozenset()
