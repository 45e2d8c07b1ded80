"""Our half of Flower's simulation, on a carrier in memory; test_on_ray.py has whole runs."""

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from omnifm import build
from omnifm.engines import simulation
from omnifm.engines.calls import Call, pack, unpack
from omnifm.engines.parcels import Arrival, Node
from omnifm.engines.simulation import EndedError, SimulationEngine, answer
from omnifm.engines.stage import Stage
from omnifm.errors import ConfigError, FederationError
from omnifm.federation.messages import Reply, Request, decode, encode
from tests.engines import sites
from tests.run import jobs

CLIENTS = ("a", "b", "c", "d")
STAGE = Stage(workers=2, threads=1, gpus=0.0, address="", log=Path("simulation.log"))


class Actors:
    """A carrier in memory that answers as actors do, the newest parcel first, one at each look."""

    def __init__(self, answering: Callable[[bytes], bytes]) -> None:
        self._answering = answering
        self.sent: list[tuple[int, str]] = []
        self._open: dict[str, bytes] = {}
        self.most = 0

    def nodes(self) -> list[Node]:
        return [Node(address) for address in (40, 30, 20, 10)]

    def send(self, node: int, blob: bytes) -> str:
        request = decode(unpack(blob).body)
        parcel = f"p{len(self.sent)}"
        self.sent.append((node, request.client))
        self._open[parcel] = blob
        self.most = max(self.most, len(self._open))
        return parcel

    def take(self, parcels: Collection[str]) -> list[Arrival]:
        newest = [parcel for parcel in self._open if parcel in parcels][-1:]
        return [Arrival(parcel, self._answering(self._open.pop(parcel))) for parcel in newest]


class Lost(Actors):
    """A carrier whose parcels come back as errors."""

    def __init__(self, error: str) -> None:
        super().__init__(lambda blob: blob)
        self._error = error

    def take(self, parcels: Collection[str]) -> list[Arrival]:
        return [Arrival(parcel, error=self._error) for parcel in parcels]


def cast(make_site: Callable[[], Any] = sites.make_site, run: str = "1") -> simulation._Cast:
    return simulation._Cast(run, make_site)


class Played:
    """What stands in for Flower's simulation: the server's program in a thread, on a carrier."""

    def __init__(self, carrier: Actors, main: Callable[[Actors], None], *_: object) -> None:
        self._carrier, self._main = carrier, main
        self.killed = 0

    def run(self) -> None:
        thread = threading.Thread(target=self._main, args=(self._carrier,))
        thread.start()
        thread.join()

    def kill_actors(self) -> None:
        self.killed += 1


def play(carrier: Actors, work: Callable[[SimulationEngine], Any], monkeypatch: pytest.MonkeyPatch, stage: Stage = STAGE) -> Any:
    """Host `work` on a carrier in place of Flower's."""
    pytest.importorskip("flwr")
    monkeypatch.setattr("omnifm.engines.flower.Simulation", partial(Played, carrier))
    engine = SimulationEngine(sites.make_site, CLIENTS, stage)
    return engine.host(lambda: work(engine))


def requests(*clients: str) -> Iterator[Request]:
    return (Request("train", 3, client, {"w": torch.arange(3.0)}) for client in clients)


def test_replies_come_in_request_order_from_the_client_s_own_node(monkeypatch: pytest.MonkeyPatch) -> None:
    carrier = Actors(partial(answer, cast()))
    found = play(carrier, lambda engine: list(engine.exchange(requests(*"abcd", *"dcba", "pooled"))), monkeypatch)
    assert [reply.client for reply in found] == [*"abcd", *"dcba", "pooled"]
    assert all(torch.equal(reply.tensors["w"], torch.tensor([0.0, 2.0, 4.0])) for reply in found)
    seats = {"a": 10, "b": 20, "c": 30, "d": 40, "pooled": 10}
    assert carrier.sent == [(seats[reply.client], reply.client) for reply in found]
    # Two actors: more requests than twice that are never written down at once.
    assert carrier.most == 4


def test_what_the_rounds_raise_is_raised_and_what_they_return_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert play(Actors(bytes), lambda engine: 7, monkeypatch) == 7
    for error in (FederationError("round 3: no reply"), TimeoutError("a bug"), KeyError("x")):

        def broken(engine: SimulationEngine, error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            play(Actors(bytes), broken, monkeypatch)
        assert caught.value is error


@pytest.mark.parametrize(
    ("client", "message"),
    [
        ("mistaken-1", r"^client mistaken-1: no training examples$"),
        (
            "broken-1",
            r"^client broken-1: its actor failed \(ZeroDivisionError: a bug in two lines; engine.kind = 'local' shows where\)$",
        ),
    ],
)
def test_an_error_of_a_client_is_one_line_with_its_name(client: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FederationError, match=message) as caught:
        play(Actors(partial(answer, cast())), lambda engine: list(engine.exchange(requests("a", client, "b"))), monkeypatch)
    if client.startswith("broken"):  # the traceback is kept for who asks
        assert 'raise ZeroDivisionError("a bug' in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "Flower says: <class 'ray.exceptions.ActorDiedError'>:<'it\ndied'>",
            r"^client a: its Ray actor has died \(killed, or out of memory\)$",
        ),
        ("Flower says: 3\n4", r"^client a: not reached \(Flower says: 3 4\)$"),
    ],
)
def test_an_actor_that_is_gone_is_one_line_with_the_client(error: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FederationError, match=message):
        play(Lost(error), lambda engine: list(engine.exchange(requests("a"))), monkeypatch)


def test_a_reply_for_another_request_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(blob: bytes) -> bytes:
        return pack(Call("reply", {}, encode(Reply("train", 2, "b", 1))))

    with pytest.raises(FederationError, match=r"^client a: the reply is b's, for train in round 2$"):
        play(Actors(other), lambda engine: list(engine.exchange(requests("a"))), monkeypatch)


def test_a_site_is_built_once_in_a_run_and_anew_in_the_next(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> Any:
        made.append(1)
        return sites.make_site()

    blob = pack(Call("answer", {}, encode(next(requests("a")))))
    for run in ("x", "x", "y"):
        assert unpack(answer(cast(make, run), blob)).kind == "reply"
    assert len(made) == 2


def test_a_simulation_that_breaks_down_is_one_line_and_ends_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flwr")
    ended: list[BaseException] = []

    class Broken(Played):
        def run(self) -> None:
            threading.Thread(target=self._main, args=(self._carrier,)).start()
            try:
                raise ConnectionError("no Ray\nat 127.0.0.1:1")
            except ConnectionError as error:
                raise RuntimeError("Ending simulation.") from error

    class Silent(Actors):
        def take(self, parcels: Collection[str]) -> list[Arrival]:
            return []

    def work(engine: SimulationEngine) -> None:
        try:
            list(engine.exchange(requests("a")))
        except EndedError as error:
            ended.append(error)
            raise

    monkeypatch.setattr("omnifm.engines.flower.Simulation", partial(Broken, Silent(bytes)))
    engine = SimulationEngine(sites.make_site, CLIENTS, STAGE)
    with pytest.raises(FederationError, match=r"broke down \(ConnectionError: no Ray at 127.0.0.1:1\); see simulation.log$"):
        engine.host(lambda: work(engine))
    assert ended


def test_clients_that_still_train_when_the_rounds_end_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flwr")
    training = threading.Event()

    class Busy(Played):
        def run(self) -> None:
            super().run()
            training.wait(60)

        def kill_actors(self) -> None:
            training.set()

    monkeypatch.setattr("omnifm.engines.flower.Simulation", partial(Busy, Actors(bytes)))
    monkeypatch.setattr(simulation, "_GRACE_SECONDS", 0.1)
    started = time.monotonic()
    assert SimulationEngine(sites.make_site, CLIENTS, STAGE).host(lambda: "done") == "done"
    assert training.is_set() and time.monotonic() - started < 30


@pytest.mark.parametrize("impatient", [False, True])
def test_ctrl_c_ends_the_rounds_at_their_next_look_and_the_simulation_with_them(
    impatient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flwr")
    past: list[str] = []

    class Slow(Played):
        def run(self) -> None:
            super().run()
            if impatient:
                time.sleep(0.2)
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)  # Flower takes a moment to end
            past.append("simulation")

    class Interrupting(Actors):
        def take(self, parcels: Collection[str]) -> list[Arrival]:
            if not past:
                past.append("pressed")
                os.kill(os.getpid(), signal.SIGINT)
            return []

    def work(engine: SimulationEngine) -> None:
        try:
            list(engine.exchange(requests("a")))
        finally:
            past.append("rounds")

    monkeypatch.setattr("omnifm.engines.flower.Simulation", partial(Slow, Interrupting(bytes)))
    engine = SimulationEngine(sites.make_site, CLIENTS, STAGE)
    with pytest.raises(KeyboardInterrupt):
        engine.host(lambda: work(engine))
    assert past == ["pressed", "rounds", "simulation"]


@pytest.mark.parametrize("missing", ["flwr", "ray"])
def test_without_flower_or_ray_the_extra_is_named(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "find_spec", lambda name: None if name == missing else "there")
    config = jobs.config(tmp_path, "fedavg", engine={"kind": "flower-simulation"})
    with pytest.raises(
        ConfigError, match=r"^engine.kind = 'flower-simulation' needs an extra: pip install 'omnifm\[flower-simulation\]'$"
    ):
        build.check_engine(config)
    build.check_engine(jobs.config(tmp_path, "fedavg"))


def test_a_ray_of_our_own_listens_on_loopback_and_a_cluster_is_left_as_it_is(tmp_path: Path) -> None:
    own = Stage(2, 3, 1.0, "", tmp_path / "log")
    init = own.backend(tmp_path)["init_args"]
    assert init["_node_ip_address"] == "127.0.0.1" and init["address"] == "local" and init["include_dashboard"] is False
    assert init["num_cpus"] == 6 and own.backend(tmp_path)["client_resources"] == {"num_cpus": 3, "num_gpus": 0.0}
    cluster = Stage(2, 3, 1.0, "ray.example.org:6379", tmp_path / "log")
    assert cluster.backend(tmp_path)["init_args"].keys() == {"address", "log_to_driver", "logging_level"}
    assert cluster.backend(tmp_path)["client_resources"] == {"num_cpus": 3, "num_gpus": 1.0}
    for stage in (own, cluster):
        found = stage.environment(tmp_path)
        assert (found["FLWR_TELEMETRY_ENABLED"], found["RAY_USAGE_STATS_ENABLED"]) == ("0", "0")
        assert found["FLWR_HOME"].startswith(str(tmp_path))
