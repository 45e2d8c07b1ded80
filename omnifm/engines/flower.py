"""Flower (flwr 1.41 or 1.42), which carries the bytes between machines, and its simulation on Ray: the one file that imports it.

At a node every message has a process of its own. What that process runs is `forward`, so this file, and all it imports,
is free of torch and MONAI. No app that travels, to a node or to the SuperLink, is ever loaded. At the server, and in the
simulation, the round loop runs inside a ServerApp of Flower's and sends through its grid.
"""

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from omnifm.engines.calls import MOST_BYTES
from omnifm.engines.gate import Gate
from omnifm.engines.loopback import PLACE, ask
from omnifm.engines.parcels import Arrival, Node
from omnifm.engines.stage import Answer, Stage
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


def superlink_program() -> None:
    """Run Flower's `flower-superlink`, open to other machines where nodes call, and nowhere else. Its first word is its name.

    Raises:
        FederationError: this Flower has not the part that is replaced.
    """
    import flwr.superlink.extensions as extensions
    from flwr.superlink.cli import flower_superlink
    from starlette.middleware import Middleware

    _replace(extensions, "get_middleware", lambda: (Middleware(Gate),))
    sys.argv = sys.argv[1:]
    flower_superlink()


def server_program(place: str) -> None:
    """Run in place of Flower's `flwr-serverapp`, which would load the app that came with the run. Its first word is its name.

    Args:
        place: `module:function` of what runs in place of any app, with the grid and the number of the run. It is imported once
            the run is taken: Flower gives up a program that imports torch and MONAI before it says a word.

    Raises:
        FederationError: this Flower has not the parts that are replaced.
    """
    from flwr.superlink.cli import flwr_serverapp

    runtime = import_module("flwr.superlink.runtime.run_serverapp")
    said: dict[str, object] = {  # of the app, which is not looked at
        "install_from_fab": None,
        "get_fab_metadata": ("omnifm", ""),
        "get_project_dir": Path(),
        "get_project_config": {"tool": {"flwr": {"app": {"components": {"serverapp": ""}}}}},
        "get_fused_config_from_dir": {},
    }
    for name, fact in said.items():
        _replace(runtime, name, partial(_always, fact))
    _replace(runtime, "run_", partial(_run_ours, place))
    sys.argv = sys.argv[1:]
    flwr_serverapp()


def _always(value: object, *_: object, **__: object) -> object:
    return value


def _run_ours(place: str, grid: Grid, context: Context, **_: object) -> Context:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # every poll of the grid is a line otherwise
    module, name = place.split(":")
    getattr(import_module(module), name)(GridCarrier(grid), context.run_id)
    return context


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


class Simulation:
    """Flower's simulation on Ray, with our programs.

    `run_simulation` is what Flower has for programs that are at hand. It calls that deprecated, in favour of a command that
    starts a SuperLink, which outlives the run, and installs an app.

    Args:
        main: the server's program.
        answer: what a client's program does with a call; it is pickled.
        nodes: simulated nodes.
        stage: what Ray is told.
    """

    def __init__(self, main: Callable[["GridCarrier"], None], answer: Answer, nodes: int, stage: Stage) -> None:
        self._main, self._answer, self._nodes, self._stage = main, answer, nodes, stage
        self._pools: list[Any] = []

    def run(self) -> None:
        """Run it, until the server's program has ended. Raises FederationError if this Flower or Ray is not known."""
        with _scratch() as folder, _environment(self._stage.environment(folder)), _log_to(self._stage.log):
            import flwr.server.superlink.fleet.vce.backend.raybackend as backend
            import flwr.supercore.telemetry as telemetry
            from flwr.simulation import run_simulation
            from ray._private import services

            _replace(telemetry, "FLWR_TELEMETRY_ENABLED", "0")  # it was read when Flower was imported
            _replace(backend, "BasicActorPool", self._pool)
            if not self._stage.address:
                # Without a dashboard all it does is to report usage, for which it looks which cloud it is in.
                _replace(services, "start_api_server", lambda *_, **__: (None, None))
            app = _simulated_client_app(self._answer)
            run_simulation(server_app(self._main), app, self._nodes, backend_config=self._stage.backend(folder))

    def _pool(self, **arguments: Any) -> Any:
        """Return Flower's pool of actors, and remember it."""
        from flwr.simulation.ray_transport.ray_actor import BasicActorPool

        self._pools.append(BasicActorPool(**arguments))
        return self._pools[-1]

    def kill_actors(self) -> None:
        """End the clients that still train; nobody waits for their replies."""
        import ray

        for pool in self._pools:
            for actor in (*pool.pool, *pool._future_to_actor.values()):
                with suppress(ray.exceptions.RayError):
                    ray.kill(actor)


def _simulated_client_app(answer: Answer) -> ClientApp:
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        del context
        return Message(wrapped(answer(unwrapped(message.content))), reply_to=message)

    app.query()(handle)
    return app


@contextmanager
def _scratch() -> Iterator[Path]:
    """Give a folder for Ray's sockets and logs. Paths of sockets are short: no folder of the run will do, nor macOS's own."""
    short = "/tmp" if Path("/tmp").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="omnifm-", dir=short, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables; put back all that was there, since Flower changes some too."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Let Flower write to a file what it would write on the screen."""
    log = logging.getLogger("flwr")
    before, handler = log.handlers[:], logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.handlers[:] = [handler]
    try:
        yield
    finally:
        log.handlers[:] = before
        handler.close()
