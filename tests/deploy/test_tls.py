"""What is said of a server before it is trusted. What a real SuperLink makes of it is in `test_intrusions.py`."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from omnifm.deploy.processes import free_port
from omnifm.deploy.tls import refusal, speaks_tls

pytest.importorskip("cryptography", reason="cryptography is not installed: pip install 'omnifm[flower]'")

from omnifm.deploy.certs import Folder, make_certs


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    make_certs(tmp_path, ["localhost"], [])
    return Folder(tmp_path).authority


@pytest.fixture
def plain() -> Iterator[str]:
    """A web server without TLS, as it answers what it does not understand."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=listen, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def test_a_server_without_tls_is_refused_where_there_should_be_some(plain: str, authority: Path) -> None:
    said = refusal(plain, authority)
    assert said.startswith(f"{plain} does not speak TLS (") and "\n" not in said
    assert refusal(plain, None) == ""


def test_a_server_that_says_nothing_speaks_no_tls() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not speaks_tls("127.0.0.1", server.getsockname()[1])


def test_where_nobody_answers_nothing_speaks_against_it(authority: Path) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    assert refusal(nobody, authority) == refusal(nobody, None) == ""
