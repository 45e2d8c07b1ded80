"""Frames between the forwarder and the worker: whole, bounded, and only for who knows the token."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnifm.engines.calls import Call, pack, unpack
from omnifm.engines.loopback import Listener, ask, read_frame, write_frame
from omnifm.errors import FederationError


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    listener = Listener(lambda blob: b"re:" + blob, tmp_path / "worker.json")
    yield tmp_path / "worker.json"
    listener.close()


def test_what_is_closed_answers_nobody_and_leaves_no_thread(tmp_path: Path) -> None:
    """A closed socket does not wake who waits in accept: one more connection was taken, and answered."""
    place = tmp_path / "worker.json"
    listener = Listener(lambda blob: b"re:" + blob, place)
    port = json.loads(place.read_text())["port"]
    assert ask(place, b"x") == b"re:x"
    time.sleep(0.2)  # it waits for the next one
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=2)
    assert not listener._thread.is_alive()
    listener.close()  # twice is once


@pytest.mark.parametrize("size", [0, 1, 3 * 2**20 + 7])
def test_frames_come_back_whole(place: Path, size: int) -> None:
    blob = bytes(range(256)) * (size // 256 + 1)
    assert ask(place, blob[:size]) == b"re:" + blob[:size]


def test_the_token_is_for_this_user_alone(place: Path) -> None:
    assert place.stat().st_mode & 0o077 == 0


def test_a_wrong_token_is_refused_on_both_sides(place: Path, tmp_path: Path) -> None:
    found = json.loads(place.read_text())
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({**found, "token": "00" * 32}))
    with pytest.raises(FederationError, match=r"token|cannot be reached|cut short"):
        ask(wrong, b"x")
    assert ask(place, b"y") == b"re:y"


def test_the_forwarder_tells_nothing_to_who_does_not_know_the_token(tmp_path: Path) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    heard: list[bytes] = []

    def impostor() -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(bytes(32))
            connection.sendall(bytes(32))
            connection.settimeout(2)
            while part := connection.recv(4096):
                heard.append(part)

    thread = threading.Thread(target=impostor)
    thread.start()
    place = tmp_path / "worker.json"
    place.write_text(json.dumps({"port": server.getsockname()[1], "token": "11" * 32}))
    with pytest.raises(FederationError, match="does not know the worker's token"):
        ask(place, b"secret")
    thread.join()
    server.close()
    assert b"secret" not in b"".join(heard)


def test_who_says_nothing_keeps_nobody_waiting(place: Path) -> None:
    with socket.create_connection(("127.0.0.1", json.loads(place.read_text())["port"])):
        started = time.monotonic()
        assert ask(place, b"z") == b"re:z"
        assert time.monotonic() - started < 5


def test_without_a_worker_it_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="the worker of this client cannot be reached"):
        ask(tmp_path / "worker.json", b"x")


def test_a_frame_that_is_too_large_or_cut_short_is_refused() -> None:
    one, other = socket.socketpair()
    with one, other:
        write_frame(one, bytes(100))
        with pytest.raises(FederationError, match="a frame of 100 bytes is refused, 99 are allowed"):
            read_frame(other, 99)
    one, other = socket.socketpair()
    with other:
        one.sendall((50).to_bytes(8, "big") + bytes(20))
        one.close()
        with pytest.raises(FederationError, match="cut short, 30 of 50 bytes are missing"):
            read_frame(other)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=5)


@given(st.text(), st.dictionaries(st.text(), JSON), st.binary())
def test_a_call_is_unpacked_as_it_was_packed(kind: str, header: dict[str, object], body: bytes) -> None:
    assert unpack(pack(Call(kind, header, body))) == Call(kind, header, body)


@given(st.binary())
def test_bytes_that_are_no_call_are_one_line(blob: bytes) -> None:
    try:
        unpack(blob)
    except FederationError as error:
        assert "\n" not in str(error)
