"""Hospitals in this process behind a carrier that loses, doubles, delays and refuses, in the way a seed says."""

import random
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from omnifm.data.words import Discretion
from omnifm.deploy.hospital import Hospital
from omnifm.engines.parcels import Arrival, Node
from omnifm.errors import FederationError

FAULTS = ("lost", "twice", "late", "refused", "restarted", "error")


@dataclass
class Bay:
    """One hospital as the carrier knows it."""

    hospital: Hospital
    node: Node


@dataclass
class Post:
    """A carrier to hospitals of this process. Most parcels meet a fault, until `faults` have happened."""

    bays: dict[str, Bay]
    faults: int = 0
    seed: int = 0
    met: list[str] = field(default_factory=list)
    _waiting: dict[str, list[tuple[int, Arrival]]] = field(default_factory=dict)
    _looks: int = 0
    _sent: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def nodes(self) -> list[Node]:
        return [bay.node for bay in self.bays.values()]

    def send(self, node: int, blob: bytes) -> str:
        client, bay = next((c, b) for c, b in self.bays.items() if b.node.address == node)
        fault = self._random.choice(FAULTS) if len(self.met) < self.faults and self._random.random() < 0.7 else ""
        self.met += [fault] if fault else []
        self._sent += 1
        parcel = f"p{self._sent}"
        if fault == "refused":
            raise FederationError("the carrier takes nothing")
        if fault in ("lost", "restarted"):
            if fault == "restarted" or bay.node.since:  # what is lost shows by a restart alone
                bay.hospital.answer(blob)  # it had answered; the answer went with the node
            self.bays[client] = Bay(bay.hospital, Node(node, bay.node.key, since=f"{self._sent}"))
            return parcel
        if fault == "error":
            self._waiting[parcel] = [(0, Arrival(parcel, error="node unavailable"))]
            return parcel
        arrival = Arrival(parcel, bay.hospital.answer(blob))
        self._waiting[parcel] = [(self._looks + (5 if fault == "late" else 0), arrival)] * (2 if fault == "twice" else 1)
        return parcel

    def take(self, parcels: Collection[str]) -> list[Arrival]:
        self._looks += 1
        due: list[Arrival] = []
        for parcel in parcels:
            waiting = self._waiting.get(parcel, [])
            due += [arrival for at, arrival in waiting if at <= self._looks]
            self._waiting[parcel] = [item for item in waiting if item[0] > self._looks]
        return due


def open_bays(data: Path, folder: Path, clients: Collection[str], discretion: Discretion | None = None) -> dict[str, Bay]:
    """Return a hospital for each client; its private state goes below `folder`."""

    def hospital(client: str) -> Hospital:
        return Hospital(data / client.partition("-")[0], client, folder / client, str(data / "cache"), discretion=discretion)

    return {client: Bay(hospital(client), Node(10 + number)) for number, client in enumerate(clients)}


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing wait between two looks."""
    for name in ("_POLL_SECONDS", "_RESEND_SECONDS", "_CHECK_SECONDS"):
        monkeypatch.setattr(f"omnifm.engines.remote.{name}", 0.0)
    for name in ("_PAUSE_SECONDS", "_AGAIN_SECONDS"):
        monkeypatch.setattr(f"omnifm.deploy.roster.{name}", 0.0)
