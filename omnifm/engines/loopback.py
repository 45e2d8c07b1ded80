"""Frames between two programs of one machine: the forwarder that Flower starts for every message, and the worker that stays.

TCP on 127.0.0.1. Each side proves that it knows a random token (HMAC-SHA-256 over the other's random challenge) before a frame is
read; the token itself never travels. A frame is its length in eight bytes, then that many bytes. One frame goes each way.
"""

import hashlib
import hmac
import json
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from omnifm.engines.calls import MOST_BYTES
from omnifm.errors import CheckpointError, FederationError

PLACE = "OMNIFM_WORKER"
"""Environment variable with the file that says where the worker listens."""
_HOST = "127.0.0.1"
_NONCE = 32
_GREETING_SECONDS = 10.0
_CHUNK = 2**20


def _recv(connection: socket.socket, size: int) -> bytes:
    parts, missing = [], size
    while missing:
        part = connection.recv(min(missing, _CHUNK))
        if not part:
            raise FederationError(f"a frame was cut short, {missing} of {size} bytes are missing")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def read_frame(connection: socket.socket, most: int = MOST_BYTES) -> bytes:
    """Read one frame. Raises FederationError if it is cut short or larger than `most`."""
    size = int.from_bytes(_recv(connection, 8), "big")
    if size > most:
        raise FederationError(f"a frame of {size} bytes is refused, {most} are allowed")
    return _recv(connection, size)


def write_frame(connection: socket.socket, blob: bytes) -> None:
    """Write one frame."""
    connection.sendall(len(blob).to_bytes(8, "big"))
    connection.sendall(blob)


def _proof(token: bytes, role: bytes, challenge: bytes) -> bytes:
    return hmac.new(token, role + challenge, hashlib.sha256).digest()


def _shake(connection: socket.socket, token: bytes, mine: bytes, theirs: bytes) -> None:
    """Prove to each other that both know the token. Raises FederationError if the other does not."""
    connection.settimeout(_GREETING_SECONDS)
    challenge = os.urandom(_NONCE)
    connection.sendall(challenge)
    connection.sendall(_proof(token, mine, _recv(connection, _NONCE)))
    if not hmac.compare_digest(_recv(connection, hashlib.sha256().digest_size), _proof(token, theirs, challenge)):
        raise FederationError("the other program does not know the worker's token")
    connection.settimeout(None)


def ask(place: Path, blob: bytes) -> bytes:
    """Send one frame to the worker that `place` tells of; return its answer.

    Raises:
        FederationError: no worker is there, it is another one, or it hung up.
    """
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        with socket.create_connection((_HOST, int(found["port"])), timeout=_GREETING_SECONDS) as connection:
            _shake(connection, bytes.fromhex(found["token"]), b"forwarder", b"worker")
            write_frame(connection, blob)
            return read_frame(connection)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FederationError(f"the worker of this client cannot be reached ({error})") from None


class Listener:
    """Answers frames one at a time, in a thread of its own, until closed.

    Args:
        answer: from frame to frame; it must not raise.
        place: file that will tell the port and the token, readable by this user alone; removed at the end.
    """

    def __init__(self, answer: Callable[[bytes], bytes], place: Path) -> None:
        self._answer, self._place = answer, place
        self._token = os.urandom(_NONCE)
        self._socket = socket.create_server((_HOST, 0))
        self._one_at_a_time = threading.Lock()
        self._closed = False
        self._write_place()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _write_place(self) -> None:
        partial = self._place.with_name(f".{self._place.name}.{os.getpid()}.part")
        text = json.dumps({"port": self._socket.getsockname()[1], "token": self._token.hex()})
        try:
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(text)
            partial.replace(self._place)
        except OSError as error:
            raise CheckpointError(f"{self._place}: cannot be written ({error.strerror})") from None

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            if self._closed:
                connection.close()
                return
            # A program that connects and says nothing must not keep the others waiting.
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                _shake(connection, self._token, b"worker", b"forwarder")
                blob = read_frame(connection)
                with self._one_at_a_time:
                    answer = self._answer(blob)
                write_frame(connection, answer)
        except (OSError, FederationError):
            return  # who hangs up or does not know the token gets no answer

    def close(self) -> None:
        """Take no more frames."""
        self._closed = True
        with suppress(OSError):  # to close a socket wakes nobody who waits in accept, and the port stays open: a last caller does
            socket.create_connection(self._socket.getsockname(), timeout=1.0).close()
        self._thread.join(_GREETING_SECONDS)
        self._socket.close()
        self._place.unlink(missing_ok=True)
