"""What carries bytes between server and nodes, whatever it is. Free of torch."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Node:
    """A program of a hospital that is connected.

    Attributes:
        address: what the carrier knows it by.
        key: its public key, OpenSSH; empty without authentication.
        since: when it connected. Another text after a restart: what was sent to it before is lost.
    """

    address: int
    key: bytes = b""
    since: str = ""


@dataclass(frozen=True)
class Arrival:
    """What came back for a parcel: a packed call, or why there is none."""

    parcel: str
    blob: bytes = b""
    error: str = ""


class Carrier(Protocol):
    """What carries bytes to a node and back."""

    def nodes(self) -> list[Node]:
        """Return the nodes that are connected now. Raises FederationError if nobody can say."""

    def send(self, node: int, blob: bytes) -> str:
        """Send bytes to a node; return the parcel's id. Raises FederationError if they are not taken."""

    def take(self, parcels: Collection[str]) -> list[Arrival]:
        """Return what has come back for these parcels so far; each arrival is returned once."""
