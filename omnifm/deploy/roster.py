"""Which node is which hospital: by its key, or, on one machine without keys, by what it says."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omnifm.engines.calls import Call, pack, unpack
from omnifm.engines.parcels import Arrival, Carrier, Node
from omnifm.engines.remote import plain
from omnifm.errors import FederationError
from omnifm.federation.introduction import Introduction, read_introduction

log = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.5
_AGAIN_SECONDS = 10.0
"""Pause before a node that could not introduce itself is asked again."""

_AWAY = Node(0, since="before the server was started again")

Heard = Callable[..., None]


class Roster:
    """Knows the nodes of the clients that are expected, and no others.

    Args:
        carrier: to the nodes.
        keys: by client, its public key; empty on one machine without keys.
        config: what a hospital needs to introduce itself.
        heard: called with a client, `connected` and `said`.
        before: what clients said before the server was started again; who is away now need not say it again.
    """

    def __init__(
        self,
        carrier: Carrier,
        keys: Mapping[str, bytes],
        config: Mapping[str, Any],
        heard: Heard,
        before: Sequence[Introduction] = (),
    ) -> None:
        self._carrier, self._keys, self._heard = carrier, dict(keys), heard
        self._client_of_key = {key: client for client, key in keys.items() if key}
        self._question = pack(Call("introduce", {"config": config}))
        self._asked: dict[Node, float] = {}
        self._parcels: dict[str, Node] = {}
        self._known = {one.client: (_AWAY, one) for one in before if one.client in keys}

    def gather(self) -> list[Introduction]:
        """Wait until every expected client has introduced itself; return the introductions."""
        while missing := self._keys.keys() - self._known.keys():
            self._look()
            if missing == self._keys.keys() - self._known.keys():
                time.sleep(_PAUSE_SECONDS)
        return [self._known[client][1] for client in self._keys]

    def find(self, client: str) -> Node:
        """Return where a client is now. Raises FederationError if it is not connected."""
        nodes = self._carrier.nodes()
        if key := self._keys[client]:
            found = next((node for node in nodes if node.key == key), None)
        else:
            found = self._known[client][0]
            if found not in nodes:  # without a key a restarted node is a new one, which has to say who it is
                self._look()
                found = self._known[client][0]
            found = found if found in nodes else None
        self._heard(client, connected=found is not None)
        if found is None:
            raise FederationError("is not connected")
        return found

    def _look(self) -> None:
        """Ask nodes that are new, or that could not answer a while ago, and take the answers that have come."""
        now = time.monotonic()
        for node in self._carrier.nodes():
            if now - self._asked.get(node, -_AGAIN_SECONDS) >= _AGAIN_SECONDS and not self._is_stranger(node):
                self._asked[node] = now
                try:
                    self._parcels[self._carrier.send(node.address, self._question)] = node
                except FederationError as error:
                    log.warning("a node: %s; asking it again", error)
        for arrival in self._carrier.take(list(self._parcels)):
            if arrival.parcel not in self._parcels:
                continue  # it came twice
            node = self._parcels.pop(arrival.parcel)
            try:
                self._take(node, arrival)
            except FederationError as error:
                self._complain(node, str(error))

    def _is_stranger(self, node: Node) -> bool:
        """Whether a node's key is none that is expected, or it is known already."""
        known = any(node == at for at, _ in self._known.values())
        return known or (bool(self._client_of_key) and node.key not in self._client_of_key)

    def _take(self, node: Node, arrival: Arrival) -> None:
        if arrival.error:
            raise FederationError(plain(arrival.error))
        call = unpack(arrival.blob)
        if call.kind != "introduction":
            raise FederationError(plain(call.header.get("message", "says nothing it should")))
        found = read_introduction(json.dumps(call.header))
        expected = self._client_of_key.get(node.key, found.client)
        if found.client != expected:
            raise FederationError(f"introduces itself as {found.client}, and is refused")
        if found.client not in self._keys:
            raise FederationError(f"client {found.client} is not expected, and is refused")
        before = self._known.get(found.client)
        if before is not None and before[1] != found:
            raise FederationError(f"client {found.client}: introduces itself otherwise than before, and is refused")
        if before is not None and not node.key and before[0] in self._carrier.nodes():
            raise FederationError(f"a second node introduces itself as {found.client}, and is refused")
        self._known[found.client] = (node, found)
        log.info("client %s is here: %d training examples", found.client, found.train)
        self._heard(found.client, connected=True)

    def _complain(self, node: Node, reason: str) -> None:
        client = self._client_of_key.get(node.key, "")
        log.warning("%s: %s", f"client {client}" if client else f"node {node.address}", reason)
        self._heard(client, connected=True, said=reason)
