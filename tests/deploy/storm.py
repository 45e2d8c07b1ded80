"""Carriers to hospitals of this process: one that meets faults of every kind, in the order that a seed says, and one without."""

import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from omnifm.deploy.hospital import Hospital
from omnifm.engines.calls import unpack
from omnifm.engines.parcels import Arrival, Node
from omnifm.errors import FederationError
from omnifm.federation.messages import Request, decode

LOSING = ("request lost", "reply lost", "late", "reply cut", "reply corrupted", "request cut", "full disk")
"""After these the client's reply does not count in its round."""
MENDED = ("twice", "refused", "away", "restarted", "error", "server killed")
FAULTS = LOSING + MENDED


class Killed(Exception):
    """The end of the server's process."""


@contextmanager
def full_disk() -> Iterator[None]:
    """Every write of tensors ends as on a full disk."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("omnifm.federation.store.save_file", refuse)
        yield


def training(blob: bytes) -> Request | None:
    """Return the request in a packed call, if it asks for training."""
    call = unpack(blob)
    request = decode(call.body) if call.kind == "answer" else None
    return request if isinstance(request, Request) and request.kind == "train" else None


@dataclass
class Calm:
    """Of what is asked, `trained` was done, and of that `counted` comes back; both are pairs of round and client. None: all."""

    hospitals: dict[str, Hospital]
    trained: Collection[tuple[int, str]] | None = None
    counted: Collection[tuple[int, str]] | None = None
    arrived: dict[str, list[Arrival]] = field(default_factory=dict)
    sent: int = 0

    def __post_init__(self) -> None:
        self.places = {client: Node(10 + number) for number, client in enumerate(self.hospitals)}

    def nodes(self) -> list[Node]:
        return list(self.places.values())

    def client_at(self, node: int) -> str:
        return next(client for client, place in self.places.items() if place.address == node)

    def parcel(self, *blobs: bytes, error: str = "") -> str:
        """Return a new parcel, with what comes back for it."""
        self.sent += 1
        name = f"p{self.sent}"
        self.arrived[name] = [Arrival(name, blob) for blob in blobs] + ([Arrival(name, error=error)] if error else [])
        return name

    def send(self, node: int, blob: bytes) -> str:
        client = self.client_at(node)
        key = (request.round, client) if (request := training(blob)) else None
        if key and self.trained is not None and key not in self.trained:
            return self.parcel()
        answer = self.hospitals[client].answer(blob)
        return self.parcel() if key and self.counted is not None and key not in self.counted else self.parcel(answer)

    def take(self, parcels: Collection[str]) -> list[Arrival]:
        return [arrival for parcel in parcels for arrival in self.arrived.pop(parcel, [])]


@dataclass
class Storm(Calm):
    """Most requests for training meet a fault, until there are none left; at least `least` clients of a round get through."""

    fresh: Callable[[str], Hospital] = lambda client: pytest.fail(client)
    faults: int = 30
    seed: int = 0
    least: int = 2
    met: list[str] = field(default_factory=list)
    done: set[tuple[int, str]] = field(default_factory=set)
    _lost: dict[int, set[str]] = field(default_factory=dict)
    _late: list[tuple[int, str, bytes]] = field(default_factory=list)
    _away: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._random = random.Random(self.seed)
        whole, rest = divmod(self.faults, len(FAULTS))
        self._ahead = [*FAULTS * whole, *self._random.sample(FAULTS, rest)]
        self._random.shuffle(self._ahead)

    def nodes(self) -> list[Node]:
        """Who is away comes back after three looks, and nobody knows what became of what it was sent."""
        for client in list(self._away):
            self._away[client] -= 1
            if not self._away[client]:
                del self._away[client]
                self._since(client)
        return [place for client, place in self.places.items() if client not in self._away]

    def _since(self, client: str) -> None:
        self.places[client] = Node(self.places[client].address, since=f"after parcel {self.sent}")

    def _next(self, request: Request) -> str:
        lost = self._lost.setdefault(request.round, set())
        spare = len(lost | {request.client}) <= len(self.places) - self.least
        found = next((f for f in self._ahead if spare or f in MENDED), "") if self._random.random() < 0.9 else ""
        if found:
            self._ahead.remove(found)
            self.met.append(found)
            lost |= {request.client} if found in LOSING else set()
        return found

    def send(self, node: int, blob: bytes) -> str:
        request = training(blob)
        if request is None:
            return super().send(node, blob)
        for number, parcel, late in self._late:
            if number < request.round:
                self.arrived[parcel] = [Arrival(parcel, late)]
        self._late = [item for item in self._late if item[0] >= request.round]
        return self._meet(self._next(request), request, blob)

    def _meet(self, fault: str, request: Request, blob: bytes) -> str:
        client = request.client
        if fault == "server killed":
            self._lost.pop(request.round, None)
            raise Killed
        if fault == "refused":
            raise FederationError("the carrier takes nothing")
        if fault == "error":
            return self.parcel(error="node unavailable")
        if fault == "request lost":
            return self.parcel()
        if fault == "away":
            self._away[client] = 3
            return self.parcel()
        if fault == "request cut":
            return self.parcel(self.hospitals[client].answer(blob[: self._random.randrange(len(blob))]))
        if fault == "full disk":
            with full_disk():
                return self.parcel(self.hospitals[client].answer(blob))
        return self._answer(fault, request, blob)

    def _answer(self, fault: str, request: Request, blob: bytes) -> str:
        client = request.client
        if fault == "restarted":
            self.hospitals[client].answer(blob)  # it had answered; the answer went with the node
            self.hospitals[client] = self.fresh(client)
            self._since(client)
            self.done.add((request.round, client))
            return self.parcel()
        answer = self.hospitals[client].answer(blob)
        self.done.add((request.round, client))
        place = self._random.randrange(len(answer))
        if fault == "late":
            self._late.append((request.round, parcel := self.parcel(), answer))
            return parcel
        if fault == "reply corrupted":
            return self.parcel(answer[:place] + bytes([answer[place] ^ 1 << self._random.randrange(8)]) + answer[place + 1 :])
        blobs = {"reply lost": [], "twice": [answer, answer], "reply cut": [answer[:place]]}
        return self.parcel(*blobs.get(fault, [answer]))
