"""`omnifm join`: a worker that keeps data and model loaded, and a SuperNode that is started again whenever it ends."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from omnifm.data.cache import default_cache_dir
from omnifm.data.words import Discretion
from omnifm.deploy.app import node_command, write_programs
from omnifm.deploy.certs import Folder, require_cryptography
from omnifm.deploy.hospital import Hospital
from omnifm.deploy.policy import Policy, read_policy
from omnifm.deploy.processes import Child, complaint, environment, free_port, require_flower, require_loopback
from omnifm.deploy.tls import refusal
from omnifm.engines.loopback import PLACE, Listener
from omnifm.errors import CheckpointError, ConfigError
from omnifm.federation.wire import CLIENT
from omnifm.track.lock import locked

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_PAUSES = (1.0, 2.0, 5.0, 10.0)
"""Seconds before a SuperNode is started again, the last one for ever after. One that was killed is let in after a minute."""
_STEADY_SECONDS = 120.0
_NO_KEY = "[code: 2004]"


@dataclass
class Member:
    """One hospital's side.

    Attributes:
        server: HOST:PORT of the SuperLink.
        cohort: folder of the data.
        client: id.
        certs: folder with ca.crt and nodes/ID.key; None: on this machine alone.
        state: folder of private state and of Flower's files; nothing else is written.
        cache: folder of decoded images; empty: the user's.
        policy: what the hospital insists on.
        discretion: what may be told of answers.
        say: called with a line for people now and then.
    """

    server: str
    cohort: Path
    client: str
    certs: Path | None
    state: Path
    cache: str = ""
    policy: Policy = field(default_factory=Policy)
    discretion: Discretion = field(default_factory=Discretion)
    say: Callable[[str], None] = log.info
    _node: Child | None = field(default=None, init=False)
    _failures: int = field(default=0, init=False)
    _started: float = field(default=0.0, init=False)

    @property
    def log(self) -> Path:
        """What the SuperNode says."""
        return self.state / "supernode.log"

    def run(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Answer the server until `stop` says so, or for ever.

        Raises:
            ConfigError: the server is not whom the certificates say.
            CheckpointError: the disk refuses, or another one works in the state folder.
        """
        if said := self._refusal():
            raise ConfigError(said)
        for folder in (self.state, Path(self.cache) if self.cache else default_cache_dir()):
            _make_own(folder)
        with locked(self.state / "join.lock", "omnifm join"):  # two would count what leaves in one ledger, each over the other
            self._answer(stop)

    def _answer(self, stop: Callable[[], bool]) -> None:
        private = self.state / "private"
        hospital = Hospital(self.cohort, self.client, private, self.cache, policy=self.policy, discretion=self.discretion)
        listener = Listener(hospital.answer, self.state / "worker.json")
        try:
            self._start()
            while not stop():
                time.sleep(_LOOK_SECONDS)
                self._look_after(stop)
        finally:
            if self._node is not None:
                self._node.stop()
            listener.close()

    def _refusal(self) -> str:
        return refusal(self.server, Folder(self.certs).authority if self.certs else None)

    def _reason(self) -> str:
        """Why the SuperNode ended. Flower does not tell a hospital that its key is none of those that the server has."""
        said = complaint(self.log)
        if _NO_KEY in said:
            return f"the server does not have the key of {self.client}, or still waits for the node that had it before"
        return said

    def _start(self) -> None:
        # The port is for this machine's own programs; whoever takes it in between makes the node fail, and it is started again.
        command = [*node_command(), "--superlink", self.server, "--host", "127.0.0.1", "--port", str(free_port())]
        if self.certs:
            files = Folder(self.certs)
            command += ["--root-certificates", str(files.authority)]
            command += ["--auth-supernode-private-key", str(files.node_key(self.client))]
        else:
            command += ["--insecure"]
        env = environment(self.state / "flower", **{PLACE: str(self.state / "worker.json")})
        env["PATH"] = f"{write_programs(self.state / 'programs')}{os.pathsep}{env['PATH']}"
        self._node = Child(command, env, self.log)
        self._started = time.monotonic()

    def _look_after(self, stop: Callable[[], bool]) -> None:
        """Start the SuperNode again if it has ended."""
        assert self._node is not None
        if self._node.alive():
            return
        self._node.stop()
        self._failures = 0 if time.monotonic() - self._started > _STEADY_SECONDS else self._failures + 1
        pause = _PAUSES[min(self._failures, len(_PAUSES) - 1)]
        self.say(f"the SuperNode ended ({self._refusal() or self._reason()}); trying again in {pause:.0f} s")
        end = time.monotonic() + pause
        while time.monotonic() < end and not stop():
            time.sleep(_LOOK_SECONDS)
        self._start()


def _make_own(folder: Path) -> None:
    """Make a folder this user's alone: patients' data, or what was learnt from them, are in it. Raises CheckpointError if not."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made this user's alone ({error.strerror})") from None


def make_member(server: str, cohort: Path, client: str, certs: Path | None, state: Path, policy: Path | None = None) -> Member:
    """Check everything that can be checked before a program is started.

    Raises:
        OmnifmError: the first thing that is wrong.
    """
    from omnifm.data.cohort import Cohort

    require_flower()
    host, _, port = server.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--server {server}: expected HOST:PORT")
    if not CLIENT.fullmatch(client):
        raise ConfigError(f"--client {client!r}: an id has letters, digits, '_', '-' and '.' only")
    if certs is None:
        require_loopback(host, "--server")
    else:
        require_cryptography()
        files = Folder(certs)
        if missing := [path for path in (files.authority, files.node_key(client)) if not path.is_file()]:
            raise ConfigError(f"{missing[0]}: missing; the server's side has ca.crt, and omnifm certs --client makes keys")
        if files.node_key(client).stat().st_mode & 0o077:
            raise ConfigError(f"{files.node_key(client)}: others can read it; chmod 600 it")
    Cohort.read(cohort)  # what is wrong with it shows now, not when the server asks
    if state.exists() and not state.is_dir():
        raise CheckpointError(f"{state}: is a file, not a folder")
    insists = read_policy(policy) if policy else Policy()
    return Member(server, cohort.resolve(), client, certs.resolve() if certs else None, state.resolve(), policy=insists)
