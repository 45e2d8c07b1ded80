"""Flower's simulation: the rounds run inside its ServerApp, the clients in a ClientApp that Ray's actors run.

Cohorts are here, so nobody has to introduce himself; a client's private state is in the run's store on disk, as with
`engines/workers.py`, because any actor may answer for any client. Ray pickles what actors need (`make_site`) and the messages
round our bytes, between processes of one user. Only `engines/flower.py` imports Flower and Ray.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import NamedTuple, TypeVar

from omnifm.engines.calls import Call, pack, unpack
from omnifm.engines.parcels import Arrival, Carrier
from omnifm.engines.remote import plain, reply_in
from omnifm.engines.stage import Stage
from omnifm.errors import ConfigError, FederationError, OmnifmError
from omnifm.federation.client import Site
from omnifm.federation.messages import Reply, Request, decode, encode
from omnifm.seeds import secret

T = TypeVar("T")

_LOOK_SECONDS = 0.02
# As in engines/workers.py: an actor that is done finds its next request waiting.
_IN_FLIGHT = 2
_GRACE_SECONDS = 3.0
_END_SECONDS = 60.0
"""What the server does between two looks for a reply takes no longer."""
_DEATHS = ("ActorDied", "ActorUnavailable", "RayActorError", "WorkerCrashed", "OutOfMemory", "NodeDied")
"""Parts of the names of Ray's exceptions that mean that a process is gone."""


class EndedError(FederationError):
    """The simulation is over while somebody still waits for it."""


@dataclass(frozen=True)
class _Cast:
    """How an actor gets its site: at the first request of a run, whose number is `run`."""

    run: str
    make_site: Callable[[], Site] = field(compare=False)


@lru_cache(maxsize=1)
def _site(cast: _Cast) -> Site:
    return cast.make_site()


def answer(cast: _Cast, blob: bytes) -> bytes:
    """Answer one packed call in an actor; whatever goes wrong is an answer too."""
    try:
        request = decode(unpack(blob).body)
        if not isinstance(request, Request):
            raise FederationError("an actor was sent a reply")
        return pack(Call("reply", {}, encode(_site(cast).handle(request))))
    except OmnifmError as error:
        return pack(Call("mistake", {"message": str(error)}))
    except Exception as error:  # the server says so in one line and keeps the traceback as the cause
        return pack(Call("crash", {"message": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}))


def require_simulation() -> None:
    """Raise ConfigError unless Flower and Ray are installed."""
    if find_spec("flwr") is None or find_spec("ray") is None:
        raise ConfigError("engine.kind = 'flower-simulation' needs an extra: pip install 'omnifm[flower-simulation]'")


def _happens(event: threading.Event, seconds: float) -> bool:
    """Wait for an event, or for Ctrl-C; return whether it happened."""
    try:
        return event.wait(seconds)
    except KeyboardInterrupt:
        return False


class _Sent(NamedTuple):
    """A request on its way."""

    request: Request
    parcel: str


class SimulationEngine:
    """Carries requests over the grid of Flower's simulation, while `host` runs.

    Args:
        make_site: builds the site, here or in an actor.
        clients: ids; each has a simulated node.
        stage: what Ray is told.
    """

    def __init__(self, make_site: Callable[[], Site], clients: Sequence[str], stage: Stage) -> None:
        self._cast = _Cast(secret(16).hex(), make_site)
        self._clients, self._stage = tuple(clients), stage
        self._over = threading.Event()
        self._carrier: Carrier | None = None
        self._nodes: dict[str, int] = {}

    def host(self, work: Callable[[], T]) -> T:
        """Run `work` inside Flower's ServerApp; return what it returns, raise what it raises.

        This thread waits, so that Ctrl-C finds code of ours; `work` then ends at its next look for a reply.

        Raises:
            FederationError: Ray or Flower's simulation does not start, or breaks down.
        """
        from omnifm.engines.flower import Simulation

        outcome: Future[T] = Future()
        show = Simulation(partial(self._program, work, outcome), partial(answer, self._cast), len(self._clients), self._stage)
        broken: list[Exception] = []
        # Not the thread is waited for: Python 3.11 takes it for ended when Ctrl-C comes in between.
        ended = threading.Event()
        try:
            threading.Thread(target=self._play, args=(show.run, broken, ended), daemon=True).start()
            while not ended.wait(_LOOK_SECONDS) and not outcome.done():
                pass
        finally:
            self._over.set()
            # Flower waits for every client that still trains; nobody else does, least of all who pressed Ctrl-C twice.
            if not _happens(ended, _GRACE_SECONDS):
                show.kill_actors()
                ended.wait()
        return self._result(outcome, broken)

    def _program(self, work: Callable[[], T], outcome: Future[T], carrier: Carrier) -> None:
        """Do the server's work, in a thread of Flower's. What it raises is the waiting thread's to raise."""
        try:
            self._carrier = carrier
            self._nodes = self._seats(carrier)
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    def _play(self, run: Callable[[], None], broken: list[Exception], ended: threading.Event) -> None:
        """Run the simulation, in a thread of its own, to its end."""
        try:
            run()
        except Exception as error:  # whatever Flower or Ray raises is one line, with the cause kept
            broken.append(error)
        finally:
            self._over.set()
            ended.set()

    def _seats(self, carrier: Carrier) -> dict[str, int]:
        """Return the node of each client, once all nodes are there."""
        while len(nodes := carrier.nodes()) < len(self._clients):
            self._require_going()
            time.sleep(_LOOK_SECONDS)
        return dict(zip(self._clients, sorted(node.address for node in nodes), strict=True))

    def _result(self, outcome: Future[T], broken: list[Exception]) -> T:
        """Return what the server's work gave; what broke the simulation goes before what it broke."""
        wait([outcome], timeout=_END_SECONDS)
        if outcome.done() and not (broken and isinstance(outcome.exception(), EndedError)):
            return outcome.result()
        cause: BaseException = broken[0] if broken else TimeoutError("the server's program does not end")
        while cause.__cause__ is not None:
            cause = cause.__cause__
        words = plain(f"{type(cause).__name__}: {cause}")
        raise FederationError(f"Flower's simulation broke down ({words}); see {self._stage.log}") from cause

    def _require_going(self) -> None:
        if self._over.is_set():
            raise EndedError("Flower's simulation is over")

    # ------------------------------------------------------------------ messages
    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Yield the replies in request order. At most two requests per actor are on their way or wait to be yielded.

        Raises:
            FederationError: a client could not answer, or its actor died; names the client.
        """
        source = iter(requests)
        waiting: deque[_Sent] = deque()
        arrived: dict[str, Arrival] = {}
        while True:
            while len(waiting) < _IN_FLIGHT * self._stage.workers and (request := next(source, None)) is not None:
                waiting.append(self._send(request))
            if not waiting:
                return
            self._wait(waiting, arrived)
            sent = waiting.popleft()
            yield self._reply(sent.request, arrived.pop(sent.parcel))

    def _send(self, request: Request) -> _Sent:
        assert self._carrier is not None, "requests are sent while the engine hosts the rounds"
        # Whoever is no client of the config (all data pooled) has no node of its own; any node will do.
        node = self._nodes.get(request.client, self._nodes[self._clients[0]])
        try:
            return _Sent(request, self._carrier.send(node, pack(Call("answer", {}, encode(request)))))
        except FederationError as error:
            raise FederationError(f"client {request.client}: {error}") from None

    def _wait(self, waiting: deque[_Sent], arrived: dict[str, Arrival]) -> None:
        """Wait for the answer to the first request."""
        assert self._carrier is not None
        while waiting[0].parcel not in arrived:
            self._require_going()
            found = self._carrier.take([sent.parcel for sent in waiting if sent.parcel not in arrived])
            arrived.update((arrival.parcel, arrival) for arrival in found)
            if not found:
                time.sleep(_LOOK_SECONDS)

    def _reply(self, request: Request, arrival: Arrival) -> Reply:
        who = f"client {request.client}"
        if arrival.error:
            gone = any(name in arrival.error for name in _DEATHS)
            reason = "its Ray actor has died (killed, or out of memory)" if gone else f"not reached ({plain(arrival.error)})"
            raise FederationError(f"{who}: {reason}") from RuntimeError(arrival.error)
        call = unpack(arrival.blob)
        if call.kind == "crash":
            message = f"{who}: its actor failed ({plain(call.header.get('message'))}; engine.kind = 'local' shows where)"
            raise FederationError(message) from RuntimeError(call.header.get("trace"))
        return reply_in(arrival.blob, request)

    def close(self) -> None:
        """Nothing to let go of: Ray ends with `host`."""
