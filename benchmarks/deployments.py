"""Federations on loopback, as the benchmarks start them: omnifm's programs or Flower's own, ended in any case."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from omnifm.deploy.app import CONNECTION, write_home
from omnifm.deploy.processes import Child, environment, free_port, is_open, program

from measure import ONE_THREAD, ROOT

PATIENCE = 1800.0
_LOOK_SECONDS = 0.05
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks" / "peers"), os.environ.get("PYTHONPATH", "")])


@dataclass
class Place:
    """A folder with processes that were started in it, and when the first one was."""

    folder: Path
    begin: float = field(default_factory=time.monotonic)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, command: Sequence[str], name: str, more: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a command; its output goes to NAME.out."""
        env = {**os.environ, **ONE_THREAD, "PYTHONPATH": PYTHONPATH, **(more or {})}
        with (self.folder / f"{name}.out").open("wb") as out:
            process = subprocess.Popen(command, cwd=self.folder, env=env, stdout=out, stderr=subprocess.STDOUT)
        self.started.append(process)
        return process

    def wait(self, process: subprocess.Popen[bytes], until: Path, lost: str = "") -> None:
        """Wait until a process has ended well, or a file is there.

        Raises:
            RuntimeError: it ended badly, takes too long, or a program says that all is `lost`; with the last words of all.
        """
        end = time.monotonic() + PATIENCE
        while process.poll() is None and not until.is_file():
            if time.monotonic() > end:
                raise RuntimeError(f"{self.folder}: not over after {PATIENCE:.0f} s; see its .out files")
            said = (p.read_text(errors="replace") for p in self.folder.glob("*.out")) if lost else ()
            if any(lost in text for text in said) and not until.is_file():
                raise RuntimeError(f"{self.folder}: {lost!r} was said before there was a result; see its .out files")
            time.sleep(_LOOK_SECONDS)
        if process.poll():
            words = "\n".join(f"{p.name}: {p.read_text(errors='replace')[-700:]}" for p in sorted(self.folder.glob("*.out")))
            raise RuntimeError(f"{self.folder}: a program ended with {process.returncode}\n{words}")


@contextmanager
def place(folder: Path) -> Iterator[Place]:
    """Give a folder to start commands in; end them and all that they started."""
    folder.mkdir(parents=True, exist_ok=True)
    found = Place(folder)
    try:
        yield found
    finally:
        kin = [child for p in found.started if p.poll() is None for child in psutil.Process(p.pid).children(recursive=True)]
        for process in reversed(found.started):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs([*kin, *(psutil.Process(p.pid) for p in found.started if p.poll() is None)], timeout=20)
        for straggler in alive:
            straggler.kill()
        for process in found.started:
            process.wait()


@dataclass(frozen=True)
class Members:
    """The commands of a federation of ours: the server's, and by client the hospital's."""

    server: subprocess.Popen[bytes]
    hospitals: Mapping[str, subprocess.Popen[bytes]]


def start_ours(where: Place, config: Mapping[str, Any]) -> Members:
    """Start `omnifm serve` and one `omnifm join` per cohort, without certificates."""
    cohorts = [Path(cohort["path"]) for cohort in config["federation"]["cohorts"]]
    (where.folder / "job.toml").write_text(tomli_w.dumps(dict(config)), encoding="utf-8")
    port, command = free_port(), [sys.executable, "-m", "omnifm"]
    ids = [f"{cohort.name}-0" for cohort in cohorts]
    serve = ["serve", "job.toml", "--clients", ",".join(ids), "--port", str(port), "--out", "run"]
    server = where.start([*command, *serve], "serve")
    join = ["join", "--server", f"127.0.0.1:{port}"]
    joined = {
        client: where.start([*command, *join, "--cohort", str(cohort), "--client", client], client)
        for client, cohort in zip(ids, cohorts, strict=True)
    }
    return Members(server, joined)


def start_flowers(where: Place, config: Mapping[str, Any], clients: int) -> Child:
    """Start Flower's SuperLink and SuperNodes with the app of peers/flower_app.py, and the run; return the SuperLink."""
    (where.folder / "job.json").write_text(json.dumps({"config": config, "out": str(where.folder)}), encoding="utf-8")
    port, home = free_port(), write_home(where.folder / "home", "", None)
    write_home(home, f"127.0.0.1:{port}", None)
    env = environment(home, **ONE_THREAD, PYTHONPATH=PYTHONPATH, OMNIFM_BENCHMARK=str(where.folder / "job.json"))
    for ours in ("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "MALLOC_ARENA_MAX"):
        env.pop(ours)  # Flower's own is measured as it comes
    link = ["--host", "127.0.0.1", "--port", str(port), "--database", str(where.folder / "superlink.db"), "--insecure"]
    command = [program("flower-superlink"), *link, "--disable-runtime-dependency-installation"]
    superlink = Child(command, env, where.folder / "superlink.out")
    while not is_open("127.0.0.1", port):
        if not superlink.alive():
            raise RuntimeError(f"{where.folder}: the SuperLink does not start; see superlink.out")
        time.sleep(_LOOK_SECONDS)
    for number in range(clients):
        node = ["--superlink", f"127.0.0.1:{port}", "--insecure", "--host", "127.0.0.1", "--port", str(free_port())]
        node += ["--node-config", f"partition-id={number} num-partitions={clients}"]
        where.start([program("flower-supernode"), *node], f"node-{number}", env)
    submit = [program("flwr"), "run", str(write_flowers_app(where.folder / "app")), CONNECTION, "--format", "json"]
    process = where.start(submit, "submit", env)
    if process.wait(120):
        superlink.stop()
        raise RuntimeError(f"{where.folder}: flwr run failed; see submit.out")
    return superlink


def write_flowers_app(folder: Path) -> Path:
    """Write the bundle that `flwr run` sends; it names the programs of peers/flower_app.py."""
    package = folder / "bench_app"
    package.mkdir(parents=True, exist_ok=True)
    components = {"serverapp": "bench_app.apps:server", "clientapp": "bench_app.apps:client"}
    project = {
        "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
        "project": {"name": "bench-app", "version": "1.0.0", "license": {"file": "LICENSE"}, "dependencies": []},
        "tool": {"flwr": {"app": {"publisher": "omnifm", "components": components, "config": {}}}},
    }
    (folder / "pyproject.toml").write_text(tomli_w.dumps(project), encoding="utf-8")
    (folder / "LICENSE").write_text("Apache-2.0\n", encoding="utf-8")
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "apps.py").write_text(
        "from flower_app import client, server\n\n__all__ = ['client', 'server']\n", encoding="utf-8"
    )
    return folder
