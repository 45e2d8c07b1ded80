"""Clients elsewhere: replies in order, each counted once, late ones dropped, k of n as the config allows."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from omnifm.engines.calls import Call, pack, unpack
from omnifm.engines.parcels import Arrival, Node
from omnifm.engines.remote import Patience, RemoteEngine
from omnifm.errors import FederationError
from omnifm.federation.client import Site
from omnifm.federation.messages import Reply, Request, decode, encode
from tests.support import HOSPITALS, differing, make_lab

IDS = tuple(h.id for h in HOSPITALS)


class Post:
    """A carrier in memory. `deliver` says for each parcel what comes back at the n-th look for it."""

    def __init__(self, answer: Callable[[bytes], bytes], deliver: Callable[["Post", str, int], Sequence[Arrival] | None]) -> None:
        self.answer, self._deliver = answer, deliver
        self.sent: dict[str, tuple[int, bytes]] = {}
        self.looks: dict[str, int] = {}
        self.restarted: dict[str, str] = {}

    def find(self, client: str) -> Node:
        return Node(IDS.index(client), since=self.restarted.get(client, ""))

    def nodes(self) -> list[Node]:
        return [self.find(client) for client in IDS]

    def send(self, node: int, blob: bytes) -> str:
        parcel = f"p{len(self.sent)}"
        self.sent[parcel] = (node, blob)
        return parcel

    def take(self, parcels: Collection[str]) -> list[Arrival]:
        found: list[Arrival] = []
        for parcel in parcels:
            self.looks[parcel] = self.looks.get(parcel, 0) + 1
            found += self._deliver(self, parcel, self.looks[parcel]) or ()
        return found

    def reply(self, parcel: str) -> Arrival:
        return Arrival(parcel, self.answer(self.sent[parcel][1]))


class Ticking:
    """A clock that a second passes on at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnifm.engines.remote._POLL_SECONDS", 0.0)


def echo(blob: bytes) -> bytes:
    request = decode(unpack(blob).body)
    assert isinstance(request, Request)
    return pack(Call("reply", {}, encode(Reply(request.kind, request.round, request.client, 3, metrics={"loss": 0.5}))))


def engine(post: Post, patience: Patience = Patience()) -> RemoteEngine:  # noqa: B008
    return RemoteEngine(post, IDS, post.find, {"config": {}}, patience, clock=Ticking())


def ask(e: RemoteEngine, round_index: int = 0, kind: str = "train", clients: Sequence[str] = IDS) -> list[str]:
    return [reply.client for reply in e.exchange(Request(kind, round_index, c) for c in clients)]  # type: ignore[arg-type]


def test_replies_come_in_request_order_whatever_the_order_of_arrival() -> None:
    post = Post(echo, lambda p, parcel, look: [p.reply(parcel)] if look == 5 - int(parcel[1:]) else None)
    e = engine(post)
    assert ask(e) == list(IDS)
    assert [account.replies for account in e.accounts.values()] == [1, 1, 1, 1]


def test_it_trains_as_in_process(tmp_path: Path) -> None:
    def remote(site: Site) -> RemoteEngine:
        def answer(blob: bytes) -> bytes:
            request = decode(unpack(blob).body)
            assert isinstance(request, Request)
            return pack(Call("reply", {}, encode(site.handle(request))))

        return engine(Post(answer, lambda p, parcel, look: [p.reply(parcel)] if look == 1 + int(parcel[1:]) % 3 else None))

    one, other = make_lab(tmp_path / "a", "omnifm"), make_lab(tmp_path / "b", "omnifm", engine=remote)
    assert differing(one.snapshot(one.run()), other.snapshot(other.run())) == []


def test_a_round_goes_on_with_k_of_n_after_the_deadline_and_late_replies_are_dropped_and_counted() -> None:
    late = {"p3"}  # the last client's first parcel comes when the next round is on

    def deliver(post: Post, parcel: str, look: int) -> list[Arrival] | None:
        if parcel in late:
            return [post.reply(parcel)] if len(post.sent) > len(IDS) else None
        return [post.reply(parcel)]

    e = engine(Post(echo, deliver), Patience(enough=3, deadline=20))
    assert ask(e, 0) == list(IDS[:3])
    assert ask(e, 1) == list(IDS)
    account = e.accounts[IDS[3]]
    assert (account.replies, account.late) == (1, 1)


def test_before_the_deadline_it_waits_for_all_and_without_enough_for_ever() -> None:
    def after(look: int) -> Callable[[Post, str, int], list[Arrival] | None]:
        return lambda p, parcel, n: [p.reply(parcel)] if parcel == "p0" or n >= look else None

    assert ask(engine(Post(echo, after(5)), Patience(enough=1, deadline=1000))) == list(IDS)
    assert ask(engine(Post(echo, after(50)), Patience(enough=4, deadline=1))) == list(IDS)


def test_descriptions_are_waited_for() -> None:
    post = Post(echo, lambda p, parcel, look: [p.reply(parcel)] if parcel == "p0" or look > 60 else None)
    assert ask(engine(post, Patience(1, 1)), kind="describe") == list(IDS)


def test_a_reply_that_comes_twice_counts_once() -> None:
    def deliver(post: Post, parcel: str, look: int) -> list[Arrival] | None:
        if parcel == "p0":  # lost once, so it is sent again; then both come
            return [Arrival(parcel, error="node unavailable")] if look == 1 else None
        if parcel == "p4":
            return [post.reply(parcel), post.reply("p4")]
        return [post.reply(parcel)] if look > 12 else None

    e = engine(Post(echo, deliver))
    assert ask(e) == list(IDS)
    assert e.accounts[IDS[0]].replies == 1 and e.accounts[IDS[0]].errors == 1


def test_a_client_that_cannot_answer_ends_the_run_in_one_line_unless_enough_others_can() -> None:
    def answer(blob: bytes) -> bytes:
        request = decode(unpack(blob).body)
        return pack(Call("mistake", {"message": "no space\nleft"})) if request.client == IDS[1] else echo(blob)

    post = lambda: Post(answer, lambda p, parcel, look: [p.reply(parcel)])  # noqa: E731
    with pytest.raises(FederationError, match=f"^client {IDS[1]}: no space left$"):
        ask(engine(post()))
    assert ask(engine(post(), Patience(3, 1))) == [IDS[0], *IDS[2:]]
    with pytest.raises(FederationError, match="no space left"):
        ask(engine(post(), Patience(4, 1)))


def change(**changes: object) -> Callable[[bytes], bytes]:
    def answer(blob: bytes) -> bytes:
        reply = decode(unpack(echo(blob)).body)
        return pack(Call("reply", {}, encode(replace(reply, **changes))))  # type: ignore[arg-type]

    return answer


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (lambda blob: b"", "a call is cut short"),
        (lambda blob: b"\x00\x00\x00\x02[]", "a call cannot be read"),
        (lambda blob: pack(Call("reply", {}, b"nonsense")), "a message could not be read"),
        (lambda blob: pack(Call("reply", {}, unpack(blob).body)), "sent a request"),
        (lambda blob: pack(Call("crash", {"message": "ZeroDivisionError: x"})), r"its worker failed \(ZeroDivisionError: x\)"),
        (change(client="b"), "the reply is b's"),
        (change(round=9), "for train in round 9"),
        (change(kind="evaluate"), "for evaluate in round 0"),
    ],
)
def test_what_is_no_reply_is_refused_and_named(answer: Callable[[bytes], bytes], line: str) -> None:
    post = Post(answer, lambda p, parcel, look: [p.reply(parcel)])
    with pytest.raises(FederationError, match=f"^client a: .*{line}"):
        ask(engine(post), clients=["a"])


def test_where_the_carrier_takes_nothing_it_is_tried_again() -> None:
    class Busy(Post):
        refused = 0

        def send(self, node: int, blob: bytes) -> str:
            if self.refused < 2:
                self.refused += 1
                raise FederationError("nobody is there")
            return super().send(node, blob)

    e = engine(Busy(echo, lambda p, parcel, look: [p.reply(parcel)]))
    assert ask(e) == list(IDS)
    assert sum(account.errors for account in e.accounts.values()) == 2


def test_it_says_for_what_it_waits() -> None:
    seen: list[str] = []
    post = Post(echo, lambda p, parcel, look: [p.reply(parcel)])
    e = RemoteEngine(post, "a", post.find, {}, Patience(), lambda accounts: seen.append(accounts["a"].waiting), Ticking())
    ask(e, 4, clients=["a"])
    assert seen[0] == "train, round 4" and seen[-1] == ""


def test_what_a_killed_node_had_taken_is_sent_again() -> None:
    def deliver(post: Post, parcel: str, look: int) -> list[Arrival] | None:
        if parcel == "p1":
            post.restarted[IDS[1]] = "later" if look > 3 else ""
            return None
        return [post.reply(parcel)]

    post = Post(echo, deliver)
    assert ask(engine(post)) == list(IDS)
    assert len(post.sent) == len(IDS) + 1
