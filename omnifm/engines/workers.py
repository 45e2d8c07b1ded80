"""Several sites, one process each; the bits are those of one process.

Messages are safetensors files in memory (a folder of this run alone); pipes carry their names. The shared tensors of requests are
files of their own: most strategies send the same ones to all clients, so they are written once per round, not once per client.
Every process has the same number of threads whatever the number of workers, so no reduction changes its order.
"""

import itertools
import multiprocessing
import shutil
import signal
import tempfile
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import Tensor

from omnifm.errors import FederationError, OmnifmError
from omnifm.federation.client import Site
from omnifm.federation.messages import Reply, Request, read, write

T = TypeVar("T")

_OK, _USER_ERROR, _CRASH = b"r", b"e", b"c"
# A worker that is done finds its next request waiting, while the server still adds up the last reply.
_IN_FLIGHT = 2
_ROOM = 4 * 2**30


def _spool() -> Path:
    """Make a folder for messages, in memory where there is room: nobody else can read it."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > _ROOM
    return Path(tempfile.mkdtemp(prefix="omnifm-", dir=memory if roomy else None))


def _take(path: Path) -> Request | Reply:
    """Read a message and remove its file."""
    message = read(path)
    path.unlink()
    return message


def _serve(connection: Connection, make_site: Callable[[], Site], spool: Path) -> None:
    """Answer requests until the pipe closes; then the server is done or dead, and its messages are of no use."""
    # Ctrl-C reaches every process of the terminal; the parent ends us by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    site: Site | None = None
    held = ""
    tensors: Mapping[str, Tensor] = {}
    while True:
        try:
            blob = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            shutil.rmtree(spool, ignore_errors=True)
            return
        try:
            if site is None:
                site = make_site()
            name, source = blob.decode().split("/")
            if source != held:
                held, tensors = source, read(spool / source).tensors
            request = _take(spool / name)
            if not isinstance(request, Request):
                raise FederationError("a worker was sent a reply")
            write(site.handle(replace(request, tensors=tensors)), spool / f"reply-{name}")
            answer = _OK + f"reply-{name}".encode()
        except OmnifmError as error:
            answer = _USER_ERROR + str(error).encode()
        except Exception:  # the parent says so in one line and keeps the traceback as the cause
            answer = _CRASH + traceback.format_exc().encode()
        try:
            connection.send_bytes(answer)
        except (BrokenPipeError, ConnectionResetError):
            return


class _SharedFile:
    """Shared tensors in a file of the spool; it stays while a request on its way needs it."""

    def __init__(self, path: Path, request: Request) -> None:
        write(replace(request, extra={}, settings={}), path)
        self.path = path
        self.waiting = 0
        # Weak, to keep no model alive; with torch's count of changes in place, since the same object may hold other numbers.
        self._written = {name: (weakref.ref(tensor), tensor._version) for name, tensor in request.tensors.items()}

    def holds(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these very tensors, unchanged, are in the file."""
        if tensors.keys() != self._written.keys():
            return False
        return all((written := self._written[n])[0]() is t and written[1] == t._version for n, t in tensors.items())


class _Sent(NamedTuple):
    """A request that a worker has: its place in the order of replies, its client, and the shared tensors it needs."""

    number: int
    client: str
    file: _SharedFile


class _Outbox:
    """Writes requests into the spool. The newest shared tensors stay there for the next request, others until all answered."""

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self._numbers = itertools.count()
        self._files: list[_SharedFile] = []

    def put(self, request: Request) -> tuple[str, _SharedFile]:
        """Write a request; return what to tell a worker, and the file to release when the reply is there."""
        number = next(self._numbers)
        file = next((file for file in self._files if file.holds(request.tensors)), None)
        if file is None:
            file = _SharedFile(self._spool / f"shared-{number}.safetensors", request)
            self._files.append(file)
        file.waiting += 1
        name = f"{number}.safetensors"
        write(replace(request, tensors={}), self._spool / name)
        return f"{name}/{file.path.name}", file

    def release(self, file: _SharedFile) -> None:
        """A request that needed the file is answered."""
        file.waiting -= 1
        for old in [old for old in self._files[:-1] if not old.waiting]:
            old.path.unlink()
            self._files.remove(old)


class WorkerEngine:
    """Keeps `workers` processes busy; each builds its site once, with a function that travels to a child of this process."""

    def __init__(self, make_site: Callable[[], Site], workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._spool = _spool()
        self._outbox = _Outbox(self._spool)
        self._connections: list[Connection] = []
        self._processes = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make_site, self._spool), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Yield the replies in request order. At most two requests per worker are on their way or wait to be yielded.

        Raises:
            FederationError: a client could not answer, or its worker died; names the client.
        """
        source = enumerate(requests)
        busy: dict[Connection, deque[_Sent]] = {connection: deque() for connection in self._connections}
        ready: dict[int, Reply] = {}
        due, exhausted = 0, False
        while not exhausted or any(busy.values()) or ready:
            while not exhausted and len(ready) + sum(map(len, busy.values())) < _IN_FLIGHT * len(busy):
                connection = min(busy, key=lambda c: len(busy[c]))
                if len(busy[connection]) == _IN_FLIGHT:
                    break
                exhausted = not self._send_next(source, connection, busy[connection])
            # Waiting for nobody would be for ever.
            for answered in wait(asked) if (asked := [c for c, waiting in busy.items() if waiting]) else ():
                assert isinstance(answered, Connection)
                sent = busy[answered].popleft()
                ready[sent.number] = _receive(answered, sent.client, self._spool)
                self._outbox.release(sent.file)
            while due in ready:
                yield ready.pop(due)
                due += 1

    def _send_next(self, source: Iterator[tuple[int, Request]], connection: Connection, waiting: deque[_Sent]) -> bool:
        item = next(source, None)
        if item is None:
            return False
        number, request = item
        message, file = self._outbox.put(request)
        waiting.append(_Sent(number, request.client, file))
        try:
            connection.send_bytes(message.encode())
        except (BrokenPipeError, ConnectionResetError):
            raise FederationError(f"client {request.client}: its worker process has died") from None
        return True

    def host(self, work: Callable[[], T]) -> T:
        """Run the server's work where this engine wants it: here."""
        return work()

    def close(self) -> None:
        """End the workers."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        shutil.rmtree(self._spool, ignore_errors=True)


def _receive(connection: Connection, client: str, spool: Path) -> Reply:
    try:
        answer = connection.recv_bytes()
    except (EOFError, ConnectionResetError):
        raise FederationError(f"client {client}: its worker process has died (killed, or out of memory)") from None
    kind, body = answer[:1], answer[1:]
    if kind == _USER_ERROR:
        raise FederationError(body.decode())
    if kind == _CRASH:
        trace = body.decode()
        message = f"client {client}: its worker failed ({trace.strip().splitlines()[-1]}; engine.workers = 1 shows where)"
        raise FederationError(message) from RuntimeError(trace)
    reply = _take(spool / body.decode())
    if not isinstance(reply, Reply):
        raise FederationError(f"client {client}: its worker sent a request")
    return reply
