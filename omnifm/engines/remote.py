"""Clients on other machines: requests go out all at once, replies come back in any order and are handed on in the order asked.

Nothing here knows what carries the bytes. A reply counts once, for the request it answers: one that comes after its round is
over, or a second time, is dropped and counted in the ledger.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from omnifm.engines.calls import Call, pack, unpack
from omnifm.engines.parcels import Arrival, Carrier, Node
from omnifm.errors import FederationError
from omnifm.federation.messages import Reply, Request, decode, encode

T = TypeVar("T")
log = logging.getLogger(__name__)

_RESEND_SECONDS = 3.0
"""Pause before a request is sent again to a client that could not be reached."""
_POLL_SECONDS = 0.2
_CHECK_SECONDS = 5.0
"""Time between two looks whether a client that is waited for was restarted."""


@dataclass
class Account:
    """What passed between the server and one client.

    Attributes:
        replies: that counted.
        late: that came after their round was over.
        repeated: that came a second time.
        errors: times that the client could not be reached or could not answer.
        bytes_down, bytes_up: of packed calls.
        seconds: of the last reply, from request to reply.
        waiting: for what the server waits now, in words; nothing if it does not.
        trouble: the last thing that went wrong, in words.
    """

    replies: int = 0
    late: int = 0
    repeated: int = 0
    errors: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    waiting: str = ""
    trouble: str = ""


@dataclass(frozen=True)
class Patience:
    """How long a round waits: until `enough` replies are there, once `deadline` seconds have passed; 0: for all of them."""

    enough: int = 0
    deadline: float = 0.0


@dataclass
class _Errand:
    """One request on its way."""

    request: Request
    started: float
    node: Node | None = None
    parcels: set[str] = field(default_factory=set)
    reply: Reply | None = None
    answered: bool = False
    failed: str = ""
    resend_at: float | None = None

    @property
    def open(self) -> bool:
        return not self.answered and not self.failed


class RemoteEngine:
    """Carries requests to clients on other machines.

    Args:
        carrier: of the bytes.
        clients: ids.
        find: where a client is; raises FederationError if it is not connected.
        header: what a hospital needs to answer: the config and everybody's introduction.
        patience: with rounds and evaluations; descriptions are needed from all.
        watch: called with the accounts whenever one changed.
        clock: in seconds; never runs backwards.
    """

    def __init__(
        self,
        carrier: Carrier,
        clients: Iterable[str],
        find: Callable[[str], Node],
        header: Mapping[str, Any],
        patience: Patience,
        watch: Callable[[Mapping[str, Account]], None] = lambda accounts: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._carrier, self._find, self._header = carrier, find, header
        self._patience, self._watch, self._clock = patience, watch, clock
        self.accounts = {client: Account() for client in clients}
        self._checked = clock()
        self._stale: dict[str, str] = {}
        """Client of every parcel that nobody waits for any more."""

    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Send all requests, then yield the replies in request order; late ones are left out as `patience` allows.

        Raises:
            FederationError: a client cannot answer, and the round cannot do without it.
        """
        errands = [self._send(_Errand(request, self._clock())) for request in requests]
        over = False
        for errand in errands:
            while errand.open and not over:
                self._collect(errands)
                over = self._enough(errands)
            if errand.reply is not None:
                reply, errand.reply = errand.reply, None
                yield reply
        for errand in errands:
            self._stale |= dict.fromkeys(errand.parcels, errand.request.client)
            self.accounts[errand.request.client].waiting = ""
        self._watch(self.accounts)

    def host(self, work: Callable[[], T]) -> T:
        """Run the server's work where this engine wants it: here."""
        return work()

    def close(self) -> None:
        """Nothing to let go of."""

    # ------------------------------------------------------------------ out
    def _send(self, errand: _Errand) -> _Errand:
        request = errand.request
        account = self.accounts[request.client]
        blob = pack(Call("answer", self._header, encode(request)))
        errand.resend_at = None
        try:
            errand.node = self._find(request.client)
            errand.parcels.add(self._carrier.send(errand.node.address, blob))
        except FederationError as error:
            self._trouble(errand, str(error))
            return errand
        account.bytes_down += len(blob)
        account.waiting = f"{request.kind}, round {request.round}"
        self._watch(self.accounts)
        return errand

    def _trouble(self, errand: _Errand, reason: str) -> None:
        """Note that a client was not reached; it is tried again."""
        account = self.accounts[errand.request.client]
        if account.trouble != reason:
            log.warning("client %s: %s; trying again", errand.request.client, reason)
        account.errors, account.trouble = account.errors + 1, reason
        errand.resend_at = self._clock() + _RESEND_SECONDS
        self._watch(self.accounts)

    # ------------------------------------------------------------------ back
    def _collect(self, errands: list[_Errand]) -> None:
        """Take what has come; wait a little if nothing has."""
        by_parcel = {parcel: errand for errand in errands for parcel in errand.parcels}
        arrivals = self._carrier.take([*by_parcel, *self._stale])
        for arrival in arrivals:
            if arrival.parcel in by_parcel:
                by_parcel[arrival.parcel].parcels.discard(arrival.parcel)
                self._arrived(by_parcel[arrival.parcel], arrival)
            elif (client := self._stale.pop(arrival.parcel, None)) and not arrival.error:
                self.accounts[client].late += 1
                log.warning("client %s: a late reply is dropped", client)
        if self._clock() >= self._checked + _CHECK_SECONDS:
            self._checked = self._clock()
            self._look_for_restarts(errands)
        for errand in errands:
            if errand.open and errand.resend_at is not None and self._clock() >= errand.resend_at:
                self._send(errand)
        if not arrivals:
            time.sleep(_POLL_SECONDS)
        else:
            self._watch(self.accounts)

    def _look_for_restarts(self, errands: list[_Errand]) -> None:
        """What a node had taken when it was killed is lost, and nobody says so: it is sent again."""
        for errand in errands:
            if errand.open and errand.resend_at is None:
                try:
                    node = self._find(errand.request.client)
                except FederationError as error:
                    self.accounts[errand.request.client].trouble = str(error)
                    continue
                if node != errand.node:
                    self._trouble(errand, "was restarted")

    def _arrived(self, errand: _Errand, arrival: Arrival) -> None:
        account = self.accounts[errand.request.client]
        if not errand.open:
            account.repeated += not arrival.error
        elif arrival.error:
            self._trouble(errand, plain(arrival.error))
        else:
            account.bytes_up += len(arrival.blob)
            try:
                # The parcel was taken from the node that was asked: its key says who that is.
                errand.reply = replace(reply_in(arrival.blob, errand.request), sender=errand.request.client)
            except FederationError as error:
                errand.failed = account.trouble = str(error)
                account.errors += 1
                log.warning("%s", error)
                return
            errand.answered = True
            account.replies, account.waiting, account.trouble = account.replies + 1, "", ""
            account.seconds = self._clock() - errand.started

    def _enough(self, errands: list[_Errand]) -> bool:
        """Whether the round may end without those that have not answered. Raises FederationError if it cannot end at all."""
        enough = self._patience.enough if errands[0].request.kind != "describe" else 0
        failed = [errand.failed for errand in errands if errand.failed]
        if failed and (not enough or len(errands) - len(failed) < min(enough, len(errands))):
            raise FederationError(failed[0])
        late = self._clock() - errands[0].started >= self._patience.deadline
        return bool(enough) and late and sum(errand.answered for errand in errands) >= min(enough, len(errands))


def reply_in(blob: bytes, request: Request) -> Reply:
    """Return the reply in a call. Raises FederationError, naming the client, if it is none, or not one to `request`."""
    who = f"client {request.client}"
    try:
        call = unpack(blob)
        if call.kind == "mistake":
            raise FederationError(plain(call.header.get("message")))
        if call.kind != "reply":
            raise FederationError(f"its worker failed ({plain(call.header.get('message'))})")
        reply = decode(call.body)
    except FederationError as error:
        line = str(error)
        raise FederationError(line if line.startswith(who) else f"{who}: {line}") from None
    if not isinstance(reply, Reply):
        raise FederationError(f"{who}: sent a request")
    if (reply.client, reply.kind, reply.round) != (request.client, request.kind, request.round):
        raise FederationError(f"{who}: the reply is {reply.client}'s, for {reply.kind} in round {reply.round}")
    return reply


def plain(text: object) -> str:
    """Return text from elsewhere as one line of printable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)[:500]).split())
