"""The one round loop."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from omnifm.config import CompressionConfig, FederationConfig
from omnifm.errors import FederationError, NotFiniteError
from omnifm.federation import guard
from omnifm.federation.client import POOLED
from omnifm.federation.compression import Compression
from omnifm.federation.messages import Reply, Request, size_by_group
from omnifm.federation.private import Noise
from omnifm.federation.state import ServerState
from omnifm.federation.strategy import Strategy

log = logging.getLogger(__name__)


class Engine(Protocol):
    """How messages travel."""

    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Send requests; yield the replies in request order.

        Where `federation.min_replies` allows it, replies that are late may be left out.

        Raises:
            FederationError: a client does not answer; names it.
        """


class Recorder(Protocol):
    """Where facts go as they happen."""

    def event(self, record: Mapping[str, Any]) -> None:
        """Take one fact, JSON-able."""

    def commit(self, server: ServerState, rounds_completed: int) -> None:
        """Make everything up to here survive a crash."""


@dataclass(frozen=True)
class Federation:
    """What the loop runs on.

    Attributes:
        strategy: the server half is used here.
        engine: carries requests.
        schedule: client ids of each round.
        config: rounds, epochs, evaluation.
        num_train: training examples by client, as far as the server knows.
        evaluate: called with (server, rounds completed) when an evaluation is due.
        holds: names of the tensors that a client has; a client that is not here has all of them.
        longest: largest norm of a client's update; 0: any.
        skips: whether a round goes on without a client whose reply is refused; otherwise the run ends.
        drops: whether the engine refuses replies by itself, as secure aggregation does, and leaves their clients out.
        counted: whether a statement of privacy rests on `num_train`, so that a client with another number is refused.
        noise: what is added to the mean; None: nothing.
        compression: how clients make what they upload smaller.
    """

    strategy: Strategy
    engine: Engine
    schedule: Sequence[Sequence[str]]
    config: FederationConfig
    num_train: Mapping[str, int]
    evaluate: Callable[[ServerState, int], None]
    holds: Mapping[str, frozenset[str]] = field(default_factory=dict)
    longest: float = 0.0
    skips: bool = False
    drops: bool = False
    counted: bool = False
    noise: Noise | None = None
    compression: Compression = field(default_factory=lambda: Compression(CompressionConfig()))


def run_rounds(federation: Federation, server: ServerState, start: int, recorder: Recorder) -> None:
    """Run rounds `start`, `start + 1`, ... of the schedule, changing `server` in place.

    Raises:
        FederationError: a reply is missing, or is refused and the run does not go on without it. The last committed round is
            left as it was.
    """
    if start == 0:
        introduce(federation, server, recorder)
    for index in range(start, len(federation.schedule)):
        _round(federation, server, index, recorder)
        done = index + 1
        if done % federation.config.evaluate_every == 0 or done == len(federation.schedule):
            federation.evaluate(server, done)
        recorder.commit(server, done)


def introduce(federation: Federation, server: ServerState, recorder: Recorder) -> None:
    """Ask all clients to describe themselves, if the strategy wants to know."""
    if not federation.strategy.needs_description:
        return
    requests = (Request("describe", 0, client) for client in federation.num_train)
    replies = {reply.client: reply for reply in guard.ask(federation.engine.exchange, requests)}
    for reply in replies.values():
        recorder.event({"event": "description", "client": reply.client, "bytes_up": size_by_group({}, reply.extra)})
    federation.strategy.described(server, replies)


def _round(federation: Federation, server: ServerState, index: int, recorder: Recorder) -> None:
    strategy, sampled = federation.strategy, tuple(federation.schedule[index])
    post = guard.Post()
    losses: dict[str, tuple[float, int]] = {}
    discarded = 0
    strategy.begin_round(server)
    started, aggregating = time.perf_counter(), 0.0
    for reply in federation.engine.exchange(_requests(federation, server, index, post)):
        asked = post.settle(reply)
        try:
            accepted = _accepted(federation, server, index, reply, asked)
        except FederationError as error:
            if not _goes_on(federation, error):
                raise
            discarded += 1
            _discard(reply, index, asked, error, recorder)
            continue
        mark = time.perf_counter()
        strategy.receive(server, accepted)
        aggregating += time.perf_counter() - mark
        losses[reply.client] = (reply.metrics["loss"], reply.num_examples)
        recorder.event(_client_event(reply, index, asked))
    missing = post.missing()
    if missing and not (federation.config.min_replies or federation.drops):
        raise FederationError(f"round {index}: no reply from client {missing[0]}")
    if not losses:
        raise FederationError(f"round {index}: no client's reply {'counts' if federation.skips else 'is finite'}")
    mark = time.perf_counter()
    if federation.noise:
        strategy.blur(federation.noise.offsets(server.shared, index, len(losses)))
    facts = strategy.end_round(server, index)
    server.settle(() if strategy.pooled else sampled, losses, index)
    if missing:
        facts["missing"] = missing
    if strategy.tolerates_nonfinite or federation.skips:
        facts["discarded"] = discarded
    aggregating += time.perf_counter() - mark
    total = sum(count for _, count in losses.values())
    seconds = {"train": time.perf_counter() - started - aggregating, "aggregate": aggregating}
    loss = sum(value * count for value, count in losses.values()) / total
    recorder.event({"event": "round", "round": index, "clients": list(sampled), "loss": loss, "seconds": seconds, **facts})


def _requests(federation: Federation, server: ServerState, index: int, post: guard.Post) -> Iterator[Request]:
    strategy = federation.strategy
    config = federation.config
    settings: dict[str, Any] = {"epochs": config.local_epochs, "steps": config.local_steps, "keep": server.meta.get("keep", [])}
    clients = sampled = tuple(federation.schedule[index])
    if strategy.pooled:
        # As many examples as the sampled clients would have seen, drawn from everybody's.
        settings["budget"] = sum(federation.num_train[c] for c in sampled)
        settings["steps"] = config.local_steps * len(sampled)
        clients = (POOLED,)
    for client in clients:
        sent = _sent(federation, server, client)
        extra = strategy.extra_for(server, client)
        yield post.send(Request("train", index, client, sent, extra, {**settings, **server.told(client)}))


def _sent(federation: Federation, server: ServerState, client: str) -> Mapping[str, Tensor]:
    """Return the shared tensors that a client is sent in a round; they stay the same until the round ends."""
    return held(federation.strategy.start_for(server, client), federation.holds.get(client))


def held(tensors: Mapping[str, Tensor], names: frozenset[str] | None) -> Mapping[str, Tensor]:
    """Return the tensors that a client has: those called `names`, or all."""
    return tensors if names is None else {name: tensor for name, tensor in tensors.items() if name in names}


def _accepted(federation: Federation, server: ServerState, index: int, reply: Reply, asked: guard.Asked | None) -> Reply:
    """Return a reply that counts, its tensors in full. Raises FederationError if it does not; nothing was made of it yet."""
    guard.check_origin(reply, asked, index)
    longest, compression = federation.longest, federation.compression
    if longest or compression.on:
        sent = _sent(federation, server, reply.client)
    else:  # only shapes matter, which all clients' tensors have in common
        sent = held(server.shared, federation.holds.get(reply.client))
    if compression.on:
        reply = guard.restored(reply, index, sent, compression)
    guard.check_upload(reply, index, sent, longest)
    if federation.counted:
        guard.check_count(reply, index, federation.num_train[reply.client])
    guard.check_extra(reply, index, federation.strategy, server)
    return reply


def _goes_on(federation: Federation, error: FederationError) -> bool:
    """Whether the round goes on without the reply that an error is about."""
    return federation.skips or (federation.strategy.tolerates_nonfinite and isinstance(error, NotFiniteError))


def _discard(reply: Reply, index: int, asked: guard.Asked | None, error: FederationError, recorder: Recorder) -> None:
    """Log that a reply does not count; of a client that was asked, leave an event too."""
    log.warning("%s; its reply is discarded", error)
    if asked is not None:
        # Nothing that is in it is trusted, not even its metrics: they may be no numbers.
        complaint = str(error).removeprefix(f"{guard.label(reply, index)}: ")
        told = replace(reply, client=guard.sender(reply), metrics={"loss": None})
        recorder.event({**_client_event(told, index, asked), "discarded": complaint})


def _client_event(reply: Reply, index: int, asked: guard.Asked | None) -> dict[str, Any]:
    return {
        "event": "client",
        "round": index,
        "client": reply.client,
        "num_examples": reply.num_examples,
        "seconds": reply.seconds,
        "bytes_up": size_by_group(reply.tensors, reply.extra),
        "bytes_down": dict(asked.sizes) if asked else {},
        **reply.metrics,
    }
