"""Several sites, one process each. Messages are safetensors over pipes; the bits are those of one process.

Every process has the same number of threads whatever the number of workers, so no reduction changes its order.
"""

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait

from omnifm.errors import FederationError, OmnifmError
from omnifm.federation.client import Site
from omnifm.federation.messages import Reply, Request, decode, encode

_OK, _USER_ERROR, _CRASH = b"r", b"e", b"c"


def _serve(connection: Connection, make_site: Callable[[], Site]) -> None:
    """Answer requests until the pipe closes."""
    # Ctrl-C reaches every process of the terminal; the parent ends us by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    site: Site | None = None
    while True:
        try:
            blob = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            return
        try:
            if site is None:
                site = make_site()
            request = decode(blob)
            if not isinstance(request, Request):
                raise FederationError("a worker was sent a reply")
            answer = _OK + encode(site.handle(request))
        except OmnifmError as error:
            answer = _USER_ERROR + str(error).encode()
        except Exception:  # the parent says so in one line and keeps the traceback as the cause
            answer = _CRASH + traceback.format_exc().encode()
        try:
            connection.send_bytes(answer)
        except (BrokenPipeError, ConnectionResetError):
            return


class WorkerEngine:
    """Keeps `workers` processes busy; each builds its site once, with a function that travels to a child of this process."""

    def __init__(self, make_site: Callable[[], Site], workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make_site), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Yield the replies in request order. At most one request per worker is in flight, and as many replies wait.

        Raises:
            FederationError: a client could not answer, or its worker died; names the client.
        """
        source = enumerate(requests)
        idle = deque(self._connections)
        busy: dict[Connection, tuple[int, str]] = {}
        ready: dict[int, Reply] = {}
        due, exhausted = 0, False
        while not exhausted or busy or ready:
            while idle and not exhausted and len(busy) + len(ready) < 2 * len(self._connections):
                exhausted = not self._send_next(source, idle, busy)
            for connection in wait(list(busy)) if busy else ():
                assert isinstance(connection, Connection)
                number, client = busy.pop(connection)
                ready[number] = _receive(connection, client)
                idle.append(connection)
            while due in ready:
                yield ready.pop(due)
                due += 1

    @staticmethod
    def _send_next(
        source: Iterator[tuple[int, Request]], idle: deque[Connection], busy: dict[Connection, tuple[int, str]]
    ) -> bool:
        item = next(source, None)
        if item is None:
            return False
        number, request = item
        connection = idle.popleft()
        busy[connection] = (number, request.client)
        try:
            connection.send_bytes(encode(request))
        except (BrokenPipeError, ConnectionResetError):
            raise FederationError(f"client {request.client}: its worker process has died") from None
        return True

    def close(self) -> None:
        """End the workers."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def _receive(connection: Connection, client: str) -> Reply:
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
    reply = decode(body)
    if not isinstance(reply, Reply):
        raise FederationError(f"client {client}: its worker sent a request")
    return reply
