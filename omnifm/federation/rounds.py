"""The one round loop."""

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from omnifm.config import FederationConfig
from omnifm.errors import FederationError
from omnifm.federation.client import POOLED
from omnifm.federation.messages import Reply, Request, size_by_group
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
        num_train: training examples by client.
        evaluate: called with (server, rounds completed) when an evaluation is due.
        holds: names of the tensors that a client has; a client that is not here has all of them.
    """

    strategy: Strategy
    engine: Engine
    schedule: Sequence[Sequence[str]]
    config: FederationConfig
    num_train: Mapping[str, int]
    evaluate: Callable[[ServerState, int], None]
    holds: Mapping[str, frozenset[str]] = field(default_factory=dict)


def run_rounds(federation: Federation, server: ServerState, start: int, recorder: Recorder) -> None:
    """Run rounds `start`, `start + 1`, ... of the schedule, changing `server` in place.

    Raises:
        FederationError: a reply is missing, does not fit, or is not finite and the strategy does not discard it. The last
            committed round is left as it was.
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
    clients = tuple(federation.num_train)
    replies = {reply.client: reply for reply in federation.engine.exchange(Request("describe", 0, c) for c in clients)}
    for reply in replies.values():
        recorder.event({"event": "description", "client": reply.client, "bytes_up": size_by_group({}, reply.extra)})
    federation.strategy.described(server, replies)


def _round(federation: Federation, server: ServerState, index: int, recorder: Recorder) -> None:
    strategy, sampled = federation.strategy, tuple(federation.schedule[index])
    down: dict[str, dict[str, int]] = {}
    losses: dict[str, tuple[float, int]] = {}
    strategy.begin_round(server)
    started, aggregating = time.perf_counter(), 0.0
    for reply in federation.engine.exchange(_requests(federation, server, index, sampled, down)):
        check_reply(reply, index, held(server.shared, federation.holds.get(reply.client)), down)
        if complaint := not_finite(reply):
            if not strategy.tolerates_nonfinite:
                raise FederationError(f"client {reply.client}, round {index}: {complaint}")
            log.warning("client %s, round %d: %s; its reply is discarded", reply.client, index, complaint)
            # Its metrics may be no numbers either.
            told = replace(reply, metrics={"loss": None, "discarded": complaint})
            recorder.event(_client_event(told, index, down.pop(reply.client)))
            continue
        mark = time.perf_counter()
        strategy.receive(server, reply)
        aggregating += time.perf_counter() - mark
        losses[reply.client] = (reply.metrics["loss"], reply.num_examples)
        recorder.event(_client_event(reply, index, down.pop(reply.client)))
    if down and not federation.config.min_replies:
        raise FederationError(f"round {index}: no reply from client {min(down)}")
    if not losses:
        raise FederationError(f"round {index}: no client's reply is finite")
    mark = time.perf_counter()
    facts = strategy.end_round(server, index)
    if down:
        facts["missing"] = sorted(down)
    if strategy.tolerates_nonfinite:
        facts["discarded"] = len(sampled) - len(losses) - len(down)
    aggregating += time.perf_counter() - mark
    total = sum(count for _, count in losses.values())
    seconds = {"train": time.perf_counter() - started - aggregating, "aggregate": aggregating}
    loss = sum(value * count for value, count in losses.values()) / total
    recorder.event({"event": "round", "round": index, "clients": list(sampled), "loss": loss, "seconds": seconds, **facts})


def _requests(
    federation: Federation, server: ServerState, index: int, sampled: Sequence[str], down: dict[str, dict[str, int]]
) -> Iterator[Request]:
    strategy = federation.strategy
    config = federation.config
    settings: dict[str, Any] = {"epochs": config.local_epochs, "steps": config.local_steps, "keep": server.meta.get("keep", [])}
    clients = sampled
    if strategy.pooled:
        # As many examples as the sampled clients would have seen, drawn from everybody's.
        settings["budget"] = sum(federation.num_train[c] for c in sampled)
        settings["steps"] = config.local_steps * len(sampled)
        clients = (POOLED,)
    for client in clients:
        tensors = held(strategy.start_for(server, client), federation.holds.get(client))
        extra = strategy.extra_for(server, client)
        down[client] = size_by_group(tensors, extra)
        yield Request("train", index, client, tensors, extra, settings)


def held(tensors: Mapping[str, Tensor], names: frozenset[str] | None) -> Mapping[str, Tensor]:
    """Return the tensors that a client has: those called `names`, or all."""
    return tensors if names is None else {name: tensor for name, tensor in tensors.items() if name in names}


def check_reply(reply: Reply, round_index: int, shared: Mapping[str, Tensor], asked: Collection[str]) -> None:
    """Raise FederationError unless `reply` is one of this round's, has a loss, and its tensors fit the model."""
    who = f"client {reply.client}, round {round_index}"
    if reply.client not in asked:
        raise FederationError(f"{who}: a reply that nobody waits for")
    if reply.kind != "train" or reply.round != round_index:
        raise FederationError(f"{who}: the reply is for {reply.kind} in round {reply.round}")
    if reply.num_examples <= 0:
        raise FederationError(f"{who}: the reply stands for {reply.num_examples} examples")
    if "loss" not in reply.metrics:
        raise FederationError(f"{who}: the loss is missing or not finite")
    if reply.tensors.keys() != shared.keys():
        odd = min(reply.tensors.keys() ^ shared.keys())
        raise FederationError(f"{who}: tensor {odd} is {'unknown' if odd in reply.tensors else 'missing'}")
    for name, tensor in reply.tensors.items():
        if tensor.shape != shared[name].shape:
            raise FederationError(f"{who}: tensor {name} has shape {tuple(tensor.shape)}, not {tuple(shared[name].shape)}")
        if tensor.dtype != shared[name].dtype:
            raise FederationError(f"{who}: tensor {name} is {tensor.dtype}, not {shared[name].dtype}")


def not_finite(reply: Reply) -> str:
    """Return what is not finite in a reply to a training request, in words; nothing if all is."""
    if not math.isfinite(reply.metrics["loss"]):
        return "the loss is missing or not finite"
    # A sum is not finite if any element is not; one pass, no mask in memory. Sums overflow only beyond float32's range.
    odd = (n for n, t in reply.tensors.items() if t.is_floating_point() and not math.isfinite(float(t.sum())))
    name = next(odd, None)
    return "" if name is None else f"tensor {name} is not finite"


def _client_event(reply: Reply, index: int, down: Mapping[str, int]) -> dict[str, Any]:
    return {
        "event": "client",
        "round": index,
        "client": reply.client,
        "num_examples": reply.num_examples,
        "seconds": reply.seconds,
        "bytes_up": size_by_group(reply.tensors, reply.extra),
        "bytes_down": dict(down),
        **reply.metrics,
    }
