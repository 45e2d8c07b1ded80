"""Flower (flwr 1.41 or 1.42), which carries the bytes between machines: the one file that imports it.

At a node every message has a process of its own. What that process runs is `forward`, so this file, and all it imports,
is free of torch and MONAI. No code that the server sends is ever loaded at a node. At the server the round loop runs inside a
ServerApp of Flower's and sends through its grid.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import httpx
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from omnifm.engines.calls import MOST_BYTES
from omnifm.engines.loopback import PLACE, ask
from omnifm.engines.parcels import Arrival, Node
from omnifm.errors import FederationError

if TYPE_CHECKING:
    from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult

_RECORD, _ARRAY = "omnifm", "call"
_STYPE = "omnifm.call"
_LOOK_SECONDS = 0.5
_SECONDS_TO_LIVE = 7 * 24 * 3600.0


def wrapped(blob: bytes) -> RecordDict:
    """Return bytes as Flower carries them: one packed array, which travels in chunks whatever its size."""
    return RecordDict({_RECORD: ArrayRecord({_ARRAY: Array("uint8", (len(blob),), _STYPE, blob)})})


def unwrapped(content: RecordDict) -> bytes:
    """Return the bytes that `wrapped` took. Raises FederationError if something else came."""
    record = content.get(_RECORD)
    array = record.get(_ARRAY) if isinstance(record, ArrayRecord) else None
    if array is None or array.stype != _STYPE:
        raise FederationError("a message holds no call")
    if len(array.data) > MOST_BYTES:
        raise FederationError(f"a message of {len(array.data)} bytes is refused, {MOST_BYTES} are allowed")
    return bytes(array.data)


def forward(message: Message, context: Context) -> Message:
    """Hand a call to this client's worker, and its answer back; the program at a node does nothing else."""
    del context
    answer = ask(Path(os.environ[PLACE]), unwrapped(message.content))
    return Message(wrapped(answer), reply_to=message)


def client_app() -> ClientApp:
    """Return the program of a node."""
    app = ClientApp()
    app.query()(forward)
    return app


def node_executor_program() -> None:
    """Run in place of Flower's `flower-superexec`, which starts a new program for every message, with the app the server sent.

    Ours forks a process in which everything is imported, with our app. Tasks of any other kind are refused.

    Raises:
        FederationError: this Flower has not the parts that are replaced.
    """
    import flwr.supernode.runtime.run_clientapp as runtime
    from flwr.supercore.cli import flower_superexec
    from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor

    _replace(runtime, "install_from_fab", lambda *_, **__: None)
    _replace(runtime, "get_load_client_app_fn", lambda **_: lambda *__: client_app())
    _replace(SubprocessExecutor, "launch", lambda _, spec: _launch(spec))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forked ones
    flower_superexec()


def _launch(spec: "ExecutionSpec") -> "LaunchResult":
    """Fork a process for one message."""
    from flwr.supercore.constant import TaskType
    from flwr.supercore.superexec.executor.types import LaunchResult
    from flwr.supernode.cli import flwr_clientapp

    if spec.task_type != TaskType.CLIENT_APP:
        return LaunchResult.failed(f"omnifm: a hospital runs no {spec.task_type}")
    if os.fork():
        return LaunchResult.accepted()
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        safe = ["--insecure"] if spec.insecure else ["--root-certificates", str(spec.root_certificates_path)]
        sys.argv = ["omnifm-message", "--runtime-api-address", spec.runtime_api_address, "--token", spec.token, *safe]
        sys.argv += ["--parent-pid", str(os.getppid())]
        flwr_clientapp()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what the parent opened is the parent's to close


def node_program() -> None:
    """Run Flower's `flower-supernode`, which looks for messages every three seconds, and look twice a second.

    Raises:
        FederationError: this Flower has not the part that is replaced.
    """
    import flwr.supernode.start_client_internal as loop
    from flwr.supernode.cli import flower_supernode

    _replace(loop, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, _LOOK_SECONDS))))
    flower_supernode()


def _replace(place: ModuleType | type, name: str, value: object) -> None:
    if name not in vars(place):
        raise FederationError(f"this version of Flower ({version('flwr')}) is not known: {place.__name__} has no {name}")
    setattr(place, name, value)


def server_app(main: Callable[["GridCarrier"], None]) -> ServerApp:
    """Return the server's program: `main`, on the nodes of this grid."""
    # Every poll of the grid is a line of httpx's otherwise.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    app = ServerApp()

    def run(grid: Grid, context: Context) -> None:
        del context
        main(GridCarrier(grid))

    app.main()(run)
    return app


@dataclass
class GridCarrier:
    """Carries bytes over Flower's grid. Messages that the grid loses come back as errors, never as exceptions."""

    grid: Grid

    def nodes(self) -> list[Node]:
        """Return the nodes that are connected now. Raises FederationError if the SuperLink does not answer."""
        try:
            return [Node(n.node_id, n.public_key, n.last_activated_at) for n in self.grid.get_nodes() if n.status == "online"]
        except (httpx.HTTPError, OSError) as error:
            raise FederationError(f"the SuperLink does not answer ({type(error).__name__})") from None

    def send(self, node: int, blob: bytes) -> str:
        """Send bytes to a node. Raises FederationError if the SuperLink does not take them."""
        message = Message(wrapped(blob), node, MessageType.QUERY, ttl=_SECONDS_TO_LIVE)
        try:
            parcel: str | None = next(iter(self.grid.push_messages([message])), None)
        except (httpx.HTTPError, OSError) as error:
            raise FederationError(f"the SuperLink does not answer ({type(error).__name__})") from None
        if not parcel:
            raise FederationError("the SuperLink does not take a message for it")
        return parcel

    def take(self, parcels: Collection[str]) -> list[Arrival]:
        """Return what has come back for these parcels."""
        try:
            return [_arrival(message) for message in self.grid.pull_messages(list(parcels))] if parcels else []
        except (httpx.HTTPError, OSError):
            return []  # it is asked again


def _arrival(message: Message) -> Arrival:
    parcel = message.metadata.reply_to_message_id
    if message.has_error():
        return Arrival(parcel, error=f"Flower says: {message.error.reason or message.error.code}")
    try:
        return Arrival(parcel, unwrapped(message.content))
    except FederationError as error:
        return Arrival(parcel, error=str(error))
