"""The engines carry requests and replies: in order, whole, and with a name when something breaks."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnifm.engines.inprocess import InProcessEngine
from omnifm.engines.workers import WorkerEngine
from omnifm.errors import FederationError
from omnifm.federation.client import Site
from omnifm.federation.messages import Request
from tests.engines import sites
from tests.run import killed

Start = Callable[..., WorkerEngine]


@pytest.fixture(scope="module")
def engine() -> Iterator[WorkerEngine]:
    """Two workers for the tests that leave them alive."""
    started = WorkerEngine(sites.make_site, 2)
    yield started
    started.close()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start engines whose workers come from a fork server: those that are to die need not import torch each."""
    context = killed.processes()
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: context)
    engines: list[WorkerEngine] = []

    def begin(make_site: Callable[[], Site] = sites.make_site, workers: int = 2) -> WorkerEngine:
        engines.append(WorkerEngine(make_site, workers))
        return engines[-1]

    yield begin
    for started in engines:
        started.close()


def request(client: str, wait: float = 0.3) -> Request:
    return Request("train", 3, client, {"w": torch.arange(3.0)}, settings={"wait": wait})


def pids(engine: WorkerEngine) -> list[int]:
    return [int(reply.extra["pid"]) for reply in engine.exchange([request("slow-a"), request("slow-b")])]


def test_replies_come_in_request_order_whoever_is_first(engine: WorkerEngine) -> None:
    clients = ["slow-0", "1", "2", "slow-3", "4", "5"]
    replies = list(engine.exchange(request(client) for client in clients))
    assert [reply.client for reply in replies] == clients
    for reply in replies:
        assert (reply.kind, reply.round, reply.num_examples, reply.metrics) == ("train", 3, 7, {"loss": 0.1})
        assert torch.equal(reply.tensors["w"], torch.tensor([0.0, 2.0, 4.0]))
    assert len({int(reply.extra["pid"]) for reply in replies} - {os.getpid()}) == 2


def test_both_engines_answer_alike(engine: WorkerEngine) -> None:
    alone = InProcessEngine(sites.make_site())
    ours, theirs = (list(e.exchange(request(c) for c in "abc")) for e in (alone, engine))
    assert [(r.client, r.tensors["w"].tolist()) for r in ours] == [(r.client, r.tensors["w"].tolist()) for r in theirs]
    alone.close()


def test_a_thousand_requests_are_never_all_in_memory(engine: WorkerEngine) -> None:
    drawn = 0

    def count() -> Iterator[Request]:
        nonlocal drawn
        for number in range(60):
            drawn += 1
            yield request(f"c{number}")

    ahead = [drawn - done for done, _ in enumerate(engine.exchange(count()), 1)]
    assert len(ahead) == 60
    assert max(ahead) <= 2 * 2


def shared_files(engine: WorkerEngine) -> set[str]:
    return {path.name for path in engine._spool.glob("shared-*")}


def values(engine: WorkerEngine, models: list[dict[str, torch.Tensor]], seen: set[str] | None = None) -> list[float]:
    """Send each of `models` to a client; return what came back, halved (a scripted site doubles)."""
    found = []
    for reply in engine.exchange(Request("train", 0, f"c{number}", model) for number, model in enumerate(models)):
        found.append(float(reply.tensors["w"]) / 2)
        if seen is not None:
            seen |= shared_files(engine)
    return found


def test_tensors_that_all_clients_get_are_written_once(engine: WorkerEngine) -> None:
    shared, seen = torch.tensor(5.0), set[str]()
    # Some strategies make a mapping per client; the tensors in it are the same.
    assert values(engine, [{"w": shared} for _ in range(8)], seen) == [5.0] * 8
    assert len(seen - shared_files(engine)) <= 1  # that of an earlier exchange
    assert len(shared_files(engine)) == 1
    assert values(engine, [{"w": shared}], seen) == [5.0]
    assert len(shared_files(engine) - seen) == 0


def test_tensors_of_two_groups_of_clients_arrive_where_they_belong(engine: WorkerEngine) -> None:
    one, two = {"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)}
    assert values(engine, [one, two] * 5) == [1.0, 2.0] * 5


def test_tensors_that_were_changed_in_place_are_written_again(engine: WorkerEngine) -> None:
    model = {"w": torch.tensor(1.0)}
    assert values(engine, [model]) == [1.0]
    model["w"].add_(2)
    assert values(engine, [model, {"w": model["w"], "v": torch.zeros(1)}, model]) == [3.0] * 3


def test_tensors_are_known_by_what_they_are_not_by_their_place_in_memory(engine: WorkerEngine) -> None:
    # Each is freed before the next is made, which often gets its address.
    assert [values(engine, [{"w": torch.tensor(float(n))}])[0] for n in range(10)] == [float(n) for n in range(10)]


def test_tensors_of_each_client_do_not_pile_up(engine: WorkerEngine) -> None:
    most = 0
    models = [{"w": torch.tensor(float(n))} for n in range(30)]
    for number, reply in enumerate(engine.exchange(Request("train", 0, f"c{n}", m) for n, m in enumerate(models))):
        assert float(reply.tensors["w"]) == 2 * number
        most = max(most, len(list(engine._spool.iterdir())))
    # Four requests on their way, each with its tensors, a reply that is being written for each worker, and the newest.
    assert most <= 11
    assert len(list(engine._spool.iterdir())) == 1


def test_the_in_process_engine_draws_a_request_when_its_turn_comes() -> None:
    drawn: list[str] = []

    def draw() -> Iterator[Request]:
        for client in "ab":
            drawn.append(client)
            yield request(client)

    replies = InProcessEngine(sites.make_site()).exchange(draw())
    assert next(replies).client == "a"
    assert drawn == ["a"]


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=6))
def test_any_list_of_clients_even_none_even_twice_the_same(engine: WorkerEngine, clients: list[str]) -> None:
    assert [reply.client for reply in engine.exchange(map(request, clients))] == clients


def test_a_worker_that_is_killed_is_one_line_with_the_client(start: Start) -> None:
    with pytest.raises(FederationError, match=r"^client dies-2: its worker process has died \(killed, or out of memory\)$"):
        list(start().exchange(request(c) for c in ("a", "slow-b", "dies-2", "c", "d")))


def test_a_worker_that_died_between_rounds_is_one_line_with_the_client(start: Start) -> None:
    engine = start()
    victims = pids(engine)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    _wait_until_gone(victims)
    with pytest.raises(FederationError, match=r"^client next: its worker process has died"):
        list(engine.exchange([request("next")]))


@pytest.mark.parametrize(
    ("client", "message"),
    [
        ("mistaken-1", r"^client mistaken-1: no training examples$"),
        ("broken-1", r"^client broken-1: its worker failed \(.*in two lines.*; engine.workers = 1 shows where\)$"),
    ],
)
def test_an_error_in_a_worker_is_one_line_with_the_client(start: Start, client: str, message: str) -> None:
    with pytest.raises(FederationError, match=message) as caught:
        list(start().exchange(request(c) for c in ("a", client, "b")))
    assert "\n" not in str(caught.value)
    if client.startswith("broken"):  # the traceback is kept for who asks
        assert 'raise ZeroDivisionError("a bug' in str(caught.value.__cause__)


def test_a_site_that_cannot_be_built_is_one_line(start: Start) -> None:
    with pytest.raises(FederationError, match=r"^client a: its worker failed \(FileNotFoundError: cohort.toml"):
        list(start(sites.make_broken_site).exchange([request("a")]))


def test_each_worker_builds_its_site_once(start: Start, tmp_path: Path) -> None:
    engine = start(partial(sites.make_site_once, tmp_path))
    for _ in range(3):
        assert len(pids(engine)) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_close_ends_busy_workers_quietly(capfd: pytest.CaptureFixture[str]) -> None:
    engine = WorkerEngine(sites.make_site, 2)  # not from the fork server, whose stderr is an older one
    running = pids(engine)
    replies = engine.exchange(request(c, wait=1.0) for c in ("a", "slow-b", "slow-c"))
    assert next(replies).client == "a"
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 10
    _wait_until_gone(running)
    assert capfd.readouterr().err == ""


def test_ctrl_c_is_for_the_parent_alone(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    engine = start()
    before = sorted(pids(engine))
    for pid in before:
        os.kill(pid, signal.SIGINT)
    assert sorted(pids(engine)) == before
    assert capfd.readouterr().err == ""


def _wait_until_gone(gone: list[int]) -> None:
    deadline = time.monotonic() + 20
    while left := [p for p in gone if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, f"still alive: {left}"
        time.sleep(0.02)
