"""A federation on loopback as people start it: commands in processes of their own, ended at the end of a test in any case."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
START, ROUND = 300.0, 120.0
"""Seconds that may pass: many times what it takes on a machine that has nothing else to do."""


@dataclass
class Loopback:
    """Processes that were started, and where their output is."""

    folder: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def omnifm(self, *arguments: str, name: str = "", machine: str = "") -> subprocess.Popen[bytes]:
        """Start the command, in the folder that stands for a machine; its output goes to NAME.out."""
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        with (self.folder / f"{name or arguments[0]}.out").open("ab") as out:
            command = [sys.executable, "-m", "omnifm", *arguments]
            process = subprocess.Popen(command, cwd=self.folder / machine, env=env, stdout=out, stderr=subprocess.STDOUT)
        self.started.append(process)
        return process

    def said(self, name: str) -> str:
        """Return what a command has said."""
        return (self.folder / f"{name}.out").read_text(encoding="utf-8", errors="replace")

    def wait(self, until: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until something is so; fail with everybody's last words if it never is."""
        end = time.monotonic() + seconds
        while not until():
            words = {path.name: path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.rglob("*.out"))}
            assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s; {words}"
            time.sleep(0.2)


@dataclass(frozen=True)
class Served:
    """The folder of a run that is being served."""

    run: Path

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of one kind so far."""
        path = self.run / "events.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in found if event["event"] == kind]

    def committed(self) -> int:
        """Return how many rounds are on the disk."""
        path = self.run / "checkpoint" / "last.json"
        return int(json.loads(path.read_text())["rounds_completed"]) if path.is_file() else 0


def program_of(serving: subprocess.Popen[bytes], name: str) -> psutil.Process:
    """Return the process in which one of Flower's programs runs, which is not the leash it is on."""
    found = [(p, p.cmdline()) for p in relatives(serving) if p.status() != psutil.STATUS_ZOMBIE]
    return next(p for p, words in found if "omnifm.deploy.leash" not in words and any(w.endswith(f"/{name}") for w in words))


def relatives(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return a process's children of any degree."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def living(processes: Sequence[psutil.Process]) -> list[str]:
    """Return the commands of those that still run; one that nobody has reaped is dead."""
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:200])
        except psutil.NoSuchProcess:
            continue
    return found


@contextmanager
def loopback(folder: Path) -> Iterator[Loopback]:
    """A place to start commands in; ends them, and everything that they started."""
    place = Loopback(folder)
    try:
        yield place
    finally:
        kin = [child for process in place.started for child in relatives(process)]
        for process in place.started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(kin, timeout=20)
        for straggler in alive:
            straggler.kill()
        for process in place.started:
            process.kill()
            process.wait()
