"""Which replies count: the one place where the server judges what a client sent, before anything is made of it.

Who sent a reply is not what the reply says. An engine whose clients are strangers knows the sender (by its key, its connection)
and puts the name into `Reply.sender`; here it is compared with the reply's own word. Every request has a nonce from the system's
generator, and a reply that does not repeat it answers something else: it is old, or another run's.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeGuard

from torch import Tensor

from omnifm import seeds
from omnifm.errors import FederationError, NotFiniteError
from omnifm.federation.aggregation import update_norm
from omnifm.federation.compression import Compression
from omnifm.federation.messages import Kind, Reply, Request, size_by_group
from omnifm.federation.state import ServerState
from omnifm.federation.strategy import Strategy
from omnifm.metrics.base import MOST

log = logging.getLogger(__name__)

RESERVED = frozenset({"event", "round", "client", "num_examples", "seconds", "bytes_up", "bytes_down", "discarded"})
"""What the round loop writes into a client's event; a metric of that name would overwrite it."""
_NUMBERS = frozenset({"loss", "penalty", "effective_rank", "spread", "out_of_range", "masked_bytes"})
_TABLES = frozenset({"retrieval"})
_NONCE_BYTES = 16


@dataclass(frozen=True)
class Asked:
    """A request under way, without its tensors."""

    kind: Kind
    round: int
    nonce: str
    sizes: Mapping[str, int]


class Post:
    """The requests of one exchange that were not answered yet, by client."""

    def __init__(self) -> None:
        self._asked: dict[str, Asked] = {}

    def send(self, request: Request) -> Request:
        """Note a request; return it with a nonce."""
        nonce = seeds.secret(_NONCE_BYTES).hex()
        sizes = size_by_group(request.tensors, request.extra)
        self._asked[request.client] = Asked(request.kind, request.round, nonce, sizes)
        return replace(request, nonce=nonce)

    def settle(self, reply: Reply) -> Asked | None:
        """Return what the sender of a reply was asked, and wait for it no longer; None: nobody waits."""
        return self._asked.pop(sender(reply), None)

    def missing(self) -> list[str]:
        """Return the clients that did not answer, in order."""
        return sorted(self._asked)


def sender(reply: Reply) -> str:
    """Return who sent a reply: by the engine's knowledge, else by its own word."""
    return reply.client if reply.sender is None else reply.sender


def label(reply: Reply, round_index: int) -> str:
    """Return how a complaint about a reply begins."""
    return f"client {sender(reply)}, round {round_index}"


def ask(
    exchange: Callable[[Iterable[Request]], Iterator[Reply]],
    requests: Iterable[Request],
    judge: Callable[[Reply], None] = lambda reply: None,
    *,
    skips: bool = False,
) -> Iterator[Reply]:
    """Send requests and yield the replies, each known to come from whom it says and to answer what was asked.

    Args:
        exchange: the engine's.
        requests: to clients.
        judge: raises FederationError, in words without a name, if what is in a reply does not fit.
        skips: whether a reply that is refused is left out, with a line in the log; otherwise it is an error.

    Raises:
        FederationError: naming the client, if a reply is refused.
    """
    post = Post()
    for reply in exchange(post.send(request) for request in requests):
        try:
            check_origin(reply, post.settle(reply), reply.round)
            _judged(reply, judge)
        except FederationError as error:
            if not skips:
                raise
            log.warning("%s; its reply is discarded", error)
            continue
        yield reply


def _judged(reply: Reply, judge: Callable[[Reply], None]) -> None:
    try:
        judge(reply)
    except FederationError as error:
        raise FederationError(f"{label(reply, reply.round)}: {error}") from None


def check_origin(reply: Reply, asked: Asked | None, round_index: int) -> None:
    """Raise FederationError unless `reply` comes from whom it says and answers what its sender was asked."""
    who = label(reply, round_index)
    if asked is None:
        raise FederationError(f"{who}: a reply that nobody waits for")
    if reply.client != sender(reply):
        raise FederationError(f"{who}: the reply says that it is from client {reply.client}")
    if (reply.kind, reply.round) != (asked.kind, asked.round):
        raise FederationError(f"{who}: the reply is for {reply.kind} in round {reply.round}")
    if reply.nonce != asked.nonce:
        raise FederationError(f"{who}: the reply answers another request; it is old, or of another run")


def restored(reply: Reply, round_index: int, sent: Mapping[str, Tensor], compression: Compression) -> Reply:
    """Return a reply to a training request with its shared tensors in full.

    Args:
        reply: its origin is known.
        round_index: the round.
        sent: the shared tensors that the client was sent.
        compression: how they were made smaller.

    Raises:
        FederationError: naming the client, if what it sent does not fit, or has values that no such client sends.
    """
    who = label(reply, round_index)
    _check_fit(reply, who, compression.outline(sent))
    try:
        return replace(reply, tensors=compression.restore(reply.tensors, sent))
    except FederationError as error:
        raise FederationError(f"{who}: {error}") from None


def check_upload(reply: Reply, round_index: int, sent: Mapping[str, Tensor], longest: float) -> None:
    """Check a reply to a training request.

    Args:
        reply: its origin is known.
        round_index: the round.
        sent: the shared tensors that the client was sent.
        longest: largest norm of its update; 0: any.

    Raises:
        NotFiniteError: the loss, a tensor or a metric is not.
        FederationError: it does not fit what was sent, is too long, or has no loss.
    """
    who = label(reply, round_index)
    if reply.num_examples <= 0:
        raise FederationError(f"{who}: the reply stands for {reply.num_examples} examples")
    if not _is_number(loss := reply.metrics.get("loss")):
        raise FederationError(f"{who}: the loss is missing or not finite")
    _check_fit(reply, who, sent)
    if not abs(loss) < MOST:
        raise NotFiniteError(f"{who}: the loss is missing or not finite")
    # A sum is not finite if any element is not; one pass, no mask in memory. Sums overflow only beyond float32's range.
    for name, tensor in reply.tensors.items():
        if tensor.is_floating_point() and not math.isfinite(float(tensor.sum())):
            raise NotFiniteError(f"{who}: tensor {name} is not finite")
    if taken := RESERVED & reply.metrics.keys():
        raise FederationError(f"{who}: a metric is called {min(taken)}, which only the server says")
    _check_metrics(reply, who)
    if longest and (norm := update_norm(reply.tensors, sent)) > longest:
        raise FederationError(f"{who}: an update of norm {norm:.4g}, at most {longest:g} are taken")


def _check_metrics(reply: Reply, who: str) -> None:
    """Metrics that the report shows are numbers, or tables of such; what a strategy of one's own tells is finite."""
    for name, value in reply.metrics.items():
        fits = _is_number(value) if name in _NUMBERS else isinstance(value, Mapping) and all(map(_is_number, value.values()))
        if name in _NUMBERS | _TABLES and not fits:
            raise FederationError(f"{who}: metric {name[:60]!r} is no {'number' if name in _NUMBERS else 'table of numbers'}")
        if not _all_finite(value):
            raise NotFiniteError(f"{who}: metric {name[:60]!r} is not finite")


def check_count(reply: Reply, round_index: int, known: int) -> None:
    """Raise FederationError if a client trains on another number of examples than is known: a volume is one row, and has many."""
    if reply.num_examples != known:
        raise FederationError(
            f"{label(reply, round_index)}: trains on {reply.num_examples} examples, {known} are known of; epsilon would be wrong"
        )


def check_extra(reply: Reply, round_index: int, strategy: Strategy, server: ServerState) -> None:
    """Let the strategy judge what a client sent beside its shared tensors. Raises FederationError naming client and round."""
    try:
        strategy.vet(server, reply)
    except FederationError as error:
        raise FederationError(f"{label(reply, round_index)}: {error}") from None


def _check_fit(reply: Reply, who: str, sent: Mapping[str, Tensor]) -> None:
    if reply.tensors.keys() != sent.keys():
        odd = min(reply.tensors.keys() ^ sent.keys())
        raise FederationError(f"{who}: tensor {odd} is {'unknown' if odd in reply.tensors else 'missing'}")
    for name, tensor in reply.tensors.items():
        if tensor.shape != sent[name].shape:
            raise FederationError(f"{who}: tensor {name} has shape {tuple(tensor.shape)}, not {tuple(sent[name].shape)}")
        if tensor.dtype != sent[name].dtype:
            raise FederationError(f"{who}: tensor {name} is {tensor.dtype}, not {sent[name].dtype}")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _all_finite(value: object) -> bool:
    """Whether a plain value, and all in it, can be written as JSON."""
    if isinstance(value, Mapping):
        return all(map(_all_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_all_finite, value))
    return not _is_number(value) or abs(value) < MOST
