"""Secure aggregation on the round loop: an engine round an engine, and what a site does about it.

    Delta_i = p_i (theta_i - theta^t), p_i = w_i / max_j w_j          theta^{t+1} = theta^t + sum_i Delta_i / sum_i p_i

The protocol is in `omnifm.privacy.secagg`; here its four steps become messages. Shared tensors go up as one masked vector, which
the server can read as part of a sum alone. To the round loop every client that stayed then seems to have sent the mean: the mean
of equal models is that model bit for bit, so a strategy whose server needs no more (`Strategy.mean_suffices`) notices nothing.
The mean is off by at most m q / (2 sum_i p_i), q: the quantum of `omnifm.privacy.ring`, m: clients that stayed.

What is not masked: losses and other metrics, numbers of examples, times, what a strategy sends besides, answers to evaluations.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from omnifm import seeds
from omnifm.config import PrivacyConfig
from omnifm.errors import FederationError
from omnifm.federation import guard
from omnifm.federation.messages import Reply, Request, size_by_group
from omnifm.privacy.ring import Reals, Ring
from omnifm.privacy.secagg import Client, Plan, Server

T = TypeVar("T")
log = logging.getLogger(__name__)

LEAST = 3
"""Clients of a round: of a sum of two, each knows the other's part."""
_PARTY, _BYTES, _MASKED = "secagg/party", "secagg/bytes", "secagg/masked"


class Inner(Protocol):
    """The engine inside."""

    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Send requests; yield the replies."""


def threshold(privacy: PrivacyConfig, parties: int) -> int:
    """Return how many of a round's clients must stay to the end: the configured share, more than half, and never two."""
    return max(LEAST, parties // 2 + 1, math.ceil(privacy.secure_threshold * parties - 1e-9))


def ring(privacy: PrivacyConfig, parties: int) -> Ring:
    """Return the numbers in which a round of `parties` clients is added up."""
    return Ring(privacy.secure_range, parties)


# ---------------------------------------------------------------------- the client
class Parties:
    """The client half, for all clients of a site. What it knows of the rules is its own config, not the server's word."""

    def __init__(self, privacy: PrivacyConfig, weight: Callable[[int], int]) -> None:
        self._privacy, self._weight = privacy, weight
        self._at_work: dict[str, Client] = {}

    def answer(self, request: Request) -> Reply:
        """Answer a request of kind `secagg`. Raises FederationError naming the client."""
        settings = request.settings.get("secagg", {})
        try:
            if settings.get("step") == "advertise":
                self._at_work[request.client] = Client(self._plan(settings), int(settings["number"]))
                sent = {int(settings["number"]): self._at_work[request.client].advertise()}
            elif settings.get("step") == "share":
                sent = self._client(request).share(unpack(request.extra))
            elif settings.get("step") == "unmask":
                sent = self._client(request).unmask(settings["survivors"])
                self._at_work.pop(request.client)
            else:
                raise FederationError("secure aggregation has no such step")
        except (FederationError, KeyError, TypeError, ValueError) as error:
            raise FederationError(f"client {request.client}, round {request.round}: {error}") from None
        return Reply(request.kind, request.round, request.client, 0, extra=pack(sent))

    def hide(self, request: Request, reply: Reply) -> Reply:
        """Put the masked vector in the place of a reply's shared tensors. Raises FederationError naming the client."""
        if not self._privacy.secure_aggregation:
            return reply
        try:
            scale = float(request.settings["secagg"]["scale"])
            share = self._weight(reply.num_examples) / scale
            if share > 1:
                raise FederationError(
                    "it has more training examples than the server knows of; set federation.weighting = 'equal'"
                )
            vector = flat(reply.tensors, request.tensors) * share
            masked = self._client(request).mask(unpack(request.extra), vector)
        except (FederationError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            # A server that leaves the protocol out gets nothing.
            raise FederationError(
                f"client {request.client}, round {request.round}: no masked sum was agreed on ({error})"
            ) from None
        out_of_range = int((np.abs(vector) > self._privacy.secure_range).sum())
        extra = {**reply.extra, _MASKED: torch.from_numpy(masked.view(np.int32))}
        return replace(reply, tensors={}, extra=extra, metrics={**reply.metrics, "out_of_range": out_of_range})

    def _client(self, request: Request) -> Client:
        if request.client not in self._at_work:
            raise FederationError("secure aggregation was not begun here")
        return self._at_work[request.client]

    def _plan(self, settings: Mapping[str, Any]) -> Plan:
        parties = int(settings["parties"])
        if parties < LEAST:
            raise FederationError(f"secure aggregation of {parties} clients")
        return Plan(bytes.fromhex(settings["session"]), parties, threshold(self._privacy, parties), ring(self._privacy, parties))


# ---------------------------------------------------------------------- the server
@dataclass
class _Sum:
    """One round's sum: the training requests by party, and the protocol's server."""

    requests: Sequence[Request]
    plan: Plan
    scale: float
    server: Server

    def settings(self, number: int, step: str, **more: Any) -> dict[str, Any]:
        plan = self.plan
        told = {"step": step, "session": plan.session.hex(), "parties": plan.parties, "number": number, "scale": self.scale}
        return {"secagg": {**told, **more}}

    def step(self, name: str, sent: Mapping[int, Mapping[int, bytes]], **more: Any) -> dict[int, Request]:
        """Return the requests of a step, to the parties in `sent`."""
        return {
            number: Request(
                "secagg",
                self.requests[number].round,
                self.requests[number].client,
                {},
                pack(parts),
                self.settings(number, name, **more),
            )
            for number, parts in sent.items()
        }


class SecureEngine:
    """Sends training requests through the protocol, all others as they are.

    Args:
        inner: carries the messages. It may leave out replies of clients that are late or gone.
        privacy: range and threshold.
        weight: of a client in the mean, from its number of examples.
        num_train: training examples by client.
        skip: whether a client whose message is refused has dropped out; otherwise it ends the run.
    """

    def __init__(
        self,
        inner: Inner,
        privacy: PrivacyConfig,
        weight: Callable[[int], int],
        num_train: Mapping[str, int],
        *,
        skip: bool = False,
    ) -> None:
        self._inner, self._privacy, self._weight, self._num_train, self._skip = inner, privacy, weight, num_train, skip

    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Yield the replies of all clients that stayed; those to training requests carry the mean of the shared tensors.

        Raises:
            FederationError: fewer clients stayed than the threshold, or one broke the protocol and `skip` is off.
        """
        listed = list(requests)  # who takes part must be known before the first is asked
        if any(request.kind != "train" for request in listed) or not listed:
            yield from self._inner.exchange(listed)
            return
        if len(listed) < LEAST:
            raise FederationError(
                f"round {listed[0].round}: secure aggregation of {len(listed)} clients, at least {LEAST} are needed"
            )
        plan = Plan(seeds.secret(16), len(listed), threshold(self._privacy, len(listed)), ring(self._privacy, len(listed)))
        scale = float(max(self._weight(self._num_train[request.client]) for request in listed))
        yield from self._sum(_Sum(listed, plan, scale, Server(plan)))

    def _sum(self, job: _Sum) -> Iterator[Reply]:
        nobody: dict[int, Mapping[int, bytes]] = {number: {} for number in range(len(job.requests))}
        keys = _at(job, job.server.keys, self._gather(job, job.step("advertise", nobody), _key(job)))
        sealed = self._gather(job, job.step("share", dict.fromkeys(keys, keys)), _table(job.server.check_shares))
        shares = _at(job, job.server.shares, sealed)
        replies = self._gather(job, {n: self._training(job, n, parts) for n, parts in shares.items()}, _take(job, self._weight))
        survivors = sorted(_at(job, job.server.survivors))
        asked = job.step("unmask", {number: {} for number in survivors}, survivors=survivors)
        total = _at(job, job.server.total, self._gather(job, asked, _table(job.server.check_answer)))
        weights = sum(self._weight(reply.num_examples) for reply in replies.values()) / job.scale
        mean = restored(total / weights, job.requests[0].tensors)
        for number, reply in replies.items():
            yield replace(reply, tensors=mean, nonce=job.requests[number].nonce)

    def _training(self, job: _Sum, number: int, parts: Mapping[int, bytes]) -> Request:
        request = job.requests[number]
        extra, settings = {**request.extra, **pack(parts)}, {**request.settings, **job.settings(number, "mask")}
        return replace(request, extra=extra, settings=settings)

    def _gather(self, job: _Sum, requests: Mapping[int, Request], read: Callable[[int, Reply], T]) -> dict[int, T]:
        """Ask some parties; return what `read` makes of their replies. Who is missing has dropped out."""
        numbers = {request.client: number for number, request in enumerate(job.requests)}
        post, found = guard.Post(), {}
        for reply in self._inner.exchange(post.send(request) for request in requests.values()):
            index = job.requests[0].round
            try:
                guard.check_origin(reply, post.settle(reply), index)
                if reply.kind == "train":  # once it is in the sum nobody can take it out
                    guard.check_upload(replace(reply, tensors={}), index, {}, 0.0)
                found[numbers[reply.client]] = self._read(reply, index, numbers[reply.client], read)
            except FederationError as error:
                if not self._skip:
                    raise
                log.warning("%s; it has dropped out", error)
        return found

    @staticmethod
    def _read(reply: Reply, index: int, number: int, read: Callable[[int, Reply], T]) -> T:
        try:
            return read(number, reply)
        except (FederationError, KeyError) as error:
            raise FederationError(f"{guard.label(reply, index)}: {error}") from None


def _at(job: _Sum, step: Callable[..., T], *given: Any) -> T:
    """Return what a step of the protocol's server gives. Raises FederationError naming the round if too few clients are left."""
    try:
        return step(*given)
    except FederationError as error:
        raise FederationError(f"round {job.requests[0].round}: {error}") from None


def _key(job: _Sum) -> Callable[[int, Reply], bytes]:
    """Return what reads the keys that a client advertises."""
    seen: set[bytes] = set()

    def read(number: int, reply: Reply) -> bytes:
        sent = unpack(reply.extra)
        if sent.keys() != {number}:
            raise FederationError("secure aggregation, step advertise: it did not send its own keys and no others")
        job.server.check_key(sent[number])
        if sent[number] in seen:
            raise FederationError("secure aggregation, step advertise: its keys are another client's")
        seen.add(sent[number])
        return sent[number]

    return read


def _table(check: Callable[[int, Mapping[int, bytes]], None]) -> Callable[[int, Reply], dict[int, bytes]]:
    """Return what reads a table of shares that `check` finds whole."""

    def read(number: int, reply: Reply) -> dict[int, bytes]:
        sent = unpack(reply.extra)
        check(number, sent)
        return sent

    return read


def _take(job: _Sum, weight: Callable[[int], int]) -> Callable[[int, Reply], Reply]:
    """Return what adds a masked vector to the sum and keeps the rest of the reply."""
    length = sum(tensor.numel() for tensor in job.requests[0].tensors.values())

    def take(number: int, reply: Reply) -> Reply:
        masked = reply.extra.get(_MASKED)
        if masked is None or masked.dtype is not torch.int32 or masked.shape != (length,) or reply.tensors:
            raise FederationError("the reply to secure aggregation is no masked vector")
        if weight(reply.num_examples) > job.scale:
            raise FederationError(f"the reply stands for {reply.num_examples} examples, more than the server knows of")
        job.server.add(number, masked.numpy().view(np.uint32))
        extra = {name: tensor for name, tensor in reply.extra.items() if name != _MASKED}
        sizes = size_by_group({}, {_MASKED: masked})
        return replace(reply, extra=extra, metrics={**reply.metrics, "masked_bytes": sizes["secagg"]})

    return take


# ---------------------------------------------------------------------- on the wire
def pack(parts: Mapping[int, bytes]) -> dict[str, Tensor]:
    """Return bytes by party as tensors: (m,) int64 and (m, length) uint8; all have one length."""
    if not parts:
        return {}
    rows = np.frombuffer(b"".join(parts.values()), dtype=np.uint8).reshape(len(parts), -1)
    return {_PARTY: torch.tensor(list(parts)), _BYTES: torch.from_numpy(rows.copy())}


def unpack(extra: Mapping[str, Tensor]) -> dict[int, bytes]:
    """Undo `pack`; other names are left alone. Raises FederationError if the tensors are not such a table."""
    if _PARTY not in extra and _BYTES not in extra:
        return {}
    numbers, rows = extra.get(_PARTY, torch.empty(0)), extra.get(_BYTES, torch.empty(0))
    fits = numbers.dtype is torch.int64 and rows.dtype is torch.uint8 and rows.ndim == 2 and numbers.shape == rows.shape[:1]
    if not fits or len(set(numbers.tolist())) < len(numbers):
        raise FederationError("a table of secure aggregation is malformed")
    return {number: row.tobytes() for number, row in zip(numbers.tolist(), rows.numpy(), strict=True)}


def flat(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Reals:
    """Return theta_i - theta^t as one vector in float64, tensors in the order of their names."""
    return torch.cat([(tensors[n].double() - start[n].double()).flatten() for n in sorted(tensors)]).numpy()


def restored(change: Reals, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return theta^t plus a vector such as `flat` gives. Raises FederationError if it has another length."""
    sizes = [start[name].numel() for name in sorted(start)]
    if sum(sizes) != len(change):
        raise FederationError(f"secure aggregation: a vector of {len(change)} numbers for a model of {sum(sizes)}")
    parts = torch.from_numpy(change).split(sizes)
    named = zip(sorted(start), parts, strict=True)
    return {n: (start[n].double() + part.view(start[n].shape)).to(start[n].dtype) for n, part in named}
