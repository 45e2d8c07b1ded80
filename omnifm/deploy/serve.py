"""`omnifm serve`: a SuperLink, the hospitals' keys, the server's program, and a look after all of them until the run is over."""

import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omnifm.config import Config, dump
from omnifm.deploy.app import CONNECTION, superlink_command, write_app, write_home, write_server_programs
from omnifm.deploy.certs import Folder, require_cryptography
from omnifm.deploy.data import public
from omnifm.deploy.processes import Child, environment, is_open, last_words, program, require_flower, require_loopback
from omnifm.deploy.server import CONFIG, JOB, Job
from omnifm.errors import CheckpointError, ConfigError, FederationError
from omnifm.run import require_usable
from omnifm.track.folder import read_json, write_config, write_text
from omnifm.track.lock import is_locked, locked

log = logging.getLogger(__name__)

_START_SECONDS = 60.0
_LOOK_SECONDS = 1.0
_SOON_SECONDS = 30.0
_PATIENCE_SECONDS = 180.0
"""Time that the server's program may take to start before it is started again."""
_MOST_RESTARTS = 5
_LEAST_DISK = 2**20


@dataclass
class Server:
    """What runs while a federation is served.

    Attributes:
        config: the run, as it travels.
        out: its folder.
        clients: ids of the hospitals that are waited for.
        certs: folder of certificates; None: on this machine alone.
        host, port: where hospitals reach the SuperLink.
        say: called with a line for people now and then.
    """

    config: Config
    out: Path
    clients: Sequence[str]
    certs: Path | None
    host: str
    port: int
    say: Callable[[str], None] = log.info
    _superlink: Child | None = field(default=None, init=False)
    _restarts: int = field(default=0, init=False)
    _deadline: float = field(default=0.0, init=False)

    @property
    def folder(self) -> Path:
        """Where everything of Flower's is."""
        return self.out / "flower"

    @property
    def job(self) -> Job:
        """What the server's program is told."""
        return Job(out=self.out, clients=tuple(self.clients), certs=self.certs)

    def run(self) -> None:
        """Serve until the run is over.

        Raises:
            OmnifmError: it cannot start, or the run ended in an error.
        """
        self._make_folder()
        with locked(self.job.serving, "server"):
            try:
                self._prepare()
                self._start_superlink()
                while not self.job.outcome.is_file():
                    time.sleep(_LOOK_SECONDS)
                    self._look_after()
            finally:
                if self._superlink is not None:
                    self._superlink.stop()
        outcome = read_json(self.job.outcome)
        if not outcome["ok"]:
            raise FederationError(str(outcome["message"]))

    def _make_folder(self) -> None:
        """Make the run folder this run's."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be made ({error.strerror})") from None
        if not (self.out / CONFIG).is_file():
            write_config(self.out / CONFIG, dump(self.config))

    def _prepare(self) -> None:
        """Wait for who worked here before, and write what Flower needs."""
        # Programs of a server that was killed a moment ago may still be on their way out.
        if not _soon(lambda: not is_locked(self.job.lock)):
            raise CheckpointError(f"{self.out}: another server works in this folder")
        if not _soon(lambda: not is_open(self._here, self.port)):
            raise ConfigError(f"--port {self.port}: another program listens there")
        self.job.outcome.unlink(missing_ok=True)
        write_text(self.folder / "job.json", self.job.model_dump_json())
        write_app(self.folder / "app")
        write_server_programs(self.folder / "programs")
        write_home(self.folder / "home", f"{self._here}:{self.port}", Folder(self.certs).authority if self.certs else None)

    @property
    def _here(self) -> str:
        return "127.0.0.1" if self.host in ("0.0.0.0", "localhost") else self.host

    @property
    def _env(self) -> dict[str, str]:
        env = environment(self.folder / "home", **{JOB: str(self.folder / "job.json")}, FORWARDED_ALLOW_IPS="127.0.0.1")
        return env | {"PATH": f"{self.folder / 'programs'}{os.pathsep}{env['PATH']}"}

    def _start_superlink(self) -> None:
        write_text(self.job.ticket, f"{time.time_ns()}\n")
        _soon(lambda: not is_locked(self.job.lock))  # the program of a SuperLink before ends with its ticket
        command = [*superlink_command(), "--host", self.host, "--port", str(self.port)]
        command += ["--database", str(self.folder / "superlink.db"), "--disable-runtime-dependency-installation"]
        if self.certs:
            files = Folder(self.certs)
            command += ["--ssl-ca-certfile", str(files.authority), "--ssl-certfile", str(files.certificate)]
            command += ["--ssl-keyfile", str(files.key), "--enable-supernode-auth"]
        else:
            command += ["--insecure"]
        self._superlink = Child(command, self._env, self.folder / "superlink.log")
        end = time.monotonic() + _START_SECONDS
        while not is_open(self._here, self.port):
            if not self._superlink.alive() or time.monotonic() > end:
                words = last_words(self.folder / "superlink.log", 3)
                raise FederationError(f"the SuperLink does not start ({words}); see {self.folder / 'superlink.log'}")
            time.sleep(0.2)
        self._register()
        self._submit()

    def _register(self) -> None:
        """Tell the SuperLink the hospitals' keys; one it knows already is fine."""
        if self.certs is None:
            return
        files = Folder(self.certs)
        commands = [["supernode", "register", str(files.node_public(c)), CONNECTION, "--name", c] for c in self.clients]
        for client, (code, said) in zip(self.clients, self._flwr(commands), strict=True):
            if code and "already" not in said.lower():
                raise FederationError(f"client {client}: the SuperLink does not take its key ({' '.join(said.split())[-300:]})")

    def _submit(self) -> None:
        """Start the server's program, and say which run it is for; it serves no other."""
        self.job.run.unlink(missing_ok=True)
        code, said = self._flwr([["run", str(self.folder / "app"), CONNECTION, "--format", "json"]])[0]
        number = re.search(r'"run-id": "(\d+)"', said)
        if code or number is None:
            raise FederationError(f"the SuperLink does not take the run ({' '.join(said.split())[-300:]})")
        write_text(self.job.run, number[1])
        self._deadline = time.monotonic() + _PATIENCE_SECONDS
        self.say(f"serving on {self.host}:{self.port}, waiting for {', '.join(self.clients)}")

    def _flwr(self, commands: list[list[str]]) -> list[tuple[int, str]]:
        """Run Flower's command side by side; return exit codes and what was said."""
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        running = [subprocess.Popen([program("flwr"), *c], env=self._env, text=True, **pipe) for c in commands]  # type: ignore[call-overload]
        said = [process.communicate(timeout=_START_SECONDS)[0] for process in running]
        return [(process.returncode, text) for process, text in zip(running, said, strict=True)]

    def _look_after(self) -> None:
        """Start again what has died: a SuperLink takes its run with it, and the run goes on from its last round."""
        assert self._superlink is not None
        if not self._superlink.alive():
            self._count_restart("the SuperLink died")
            self._superlink.stop()
            self._start_superlink()
        elif is_locked(self.job.lock):
            self._deadline = 0.0  # it runs
        elif time.monotonic() > self._deadline and not self.job.outcome.is_file():
            self._count_restart("the server's program died")
            self._submit()

    def _count_restart(self, what: str) -> None:
        if shutil.disk_usage(self.out).free < _LEAST_DISK:  # what dies of it cannot write down why
            raise CheckpointError(f"{self.out}: {what}, and the disk is full; free some, then go on with --resume")
        self._restarts += 1
        if self._restarts > _MOST_RESTARTS:
            words = last_words(self.folder / "superlink.log", 3)
            raise FederationError(f"{what} {self._restarts} times, the last time saying: {words}")
        self.say(f"{what}; going on from the last round")


def _soon(condition: Callable[[], bool]) -> bool:
    """Wait a little until something is so; return whether it is."""
    end = time.monotonic() + _SOON_SECONDS
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.5)
    return found


def make_server(
    config: Config, out: Path, certs: Path | None, host: str, port: int, clients: Sequence[str], *, resume: bool
) -> Server:
    """Check everything that can be checked before a program is started.

    Raises:
        OmnifmError: the first thing that is wrong.
    """
    require_flower()
    config = public(config)
    if certs is None:
        require_loopback(host, "--host")
        if not clients:
            raise ConfigError("--clients: without --certs nobody knows who is to join; name them, with commas between")
    else:
        require_cryptography()
        files = Folder(certs)
        if missing := [path for path in (files.authority, files.certificate, files.key) if not path.is_file()]:
            raise ConfigError(f"{missing[0]}: missing; make it with omnifm certs {certs} --host NAME")
        clients = clients or files.clients()
        if not clients:
            raise ConfigError(f"{certs}: holds no hospital's key; put ID.pub files into its folder nodes/")
        for client in clients:
            if not files.node_public(client).is_file():
                raise ConfigError(f"{files.node_public(client)}: missing; make it with omnifm certs --client {client}")
    if config.federation.min_replies > len(clients):
        raise ConfigError(f"federation.min_replies = {config.federation.min_replies}: only {len(clients)} clients join")
    require_usable(config, out, resume=resume)
    return Server(config, out.resolve(), clients, certs.resolve() if certs else None, host, port)


def clients_in(text: str) -> list[str]:
    """Return the ids in a list with commas between."""
    return [part.strip() for part in text.split(",") if part.strip()]
