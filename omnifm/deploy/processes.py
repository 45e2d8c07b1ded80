"""Programs of Flower that `serve` and `join` start: their environment, their logs, and that they end."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from omnifm.engines.quiet import QUIET
from omnifm.errors import CheckpointError, ConfigError

_POLL = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}
_MEMORY = {"MALLOC_ARENA_MAX": "2"}
"""Flower fetches every message in threads of its own, and glibc gives each a heap that grows and is not given back."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_END_SECONDS = 15
_START, _EXIT, _MORE = "Starting Flower SuperNode", "Exit Code: ", "For more information"
"""What a SuperNode says at its start, and round the reason of its end."""


def require_flower() -> None:
    """Raise ConfigError unless Flower is installed."""
    if find_spec("flwr") is None:
        raise ConfigError("across machines needs the extra flower: pip install 'omnifm[flower]'")


def require_loopback(host: str, option: str) -> None:
    """Raise ConfigError unless `host` is this machine: without certificates nothing leaves it."""
    if host not in _LOOPBACK:
        raise ConfigError(f"{option} {host}: without --certs only 127.0.0.1 works; make certificates with omnifm certs")


def environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of Flower's programs: its own folder, our programs first, everything quiet."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **_POLL, **QUIET, **_MEMORY, "FLWR_HOME": str(home), "PATH": path, **more}


def program(name: str) -> str:
    """Return the path of a program of Flower's that lies beside this Python."""
    return str(Path(sys.executable).parent / name)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def is_open(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


class Child:
    """A program on a leash: it and all that it started end with this object's `stop`, or with this process, however that ends."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "omnifm.deploy.leash", *command],
                    env=dict(env),
                    stdin=subprocess.PIPE,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
        except OSError as error:
            raise CheckpointError(f"{log}: {command[0]} cannot be started ({error.strerror})") from None

    @property
    def pid(self) -> int:
        """Number of the leash's process, which leads the group."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End it and wait for the end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()


def last_words(log: Path, count: int = 1) -> str:
    """Return the last lines of a log that are not empty, as one line."""
    try:
        found = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return " ".join([line.strip() for line in found if line.strip()][-count:])


def complaint(log: Path) -> str:
    """Return why a program of Flower's ended the last time, as one line: what it said with its exit code, or its last words."""
    try:
        said = log.read_text(encoding="utf-8", errors="replace").rpartition(_START)[2]
    except OSError:
        return ""
    lines = said.partition(_EXIT)[2].partition(_MORE)[0].splitlines()[1:]
    return " ".join(line.strip() for line in lines if line.strip()) or last_words(log)
