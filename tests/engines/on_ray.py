"""Runs in Flower's simulation, in one process for all: `python -m tests.engines.on_ray FOLDER`.

FOLDER holds NAME.toml for `omnifm`, `scaffold` and `failing`. The first run starts a Ray of its own, as people's runs do. The
others use one that is started here, as a cluster is: a run that Ctrl-C reaches in its second round, its continuation, and one
with a client that fails. What was seen on the way goes into FOLDER/seen.json.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch

from omnifm.config import load
from omnifm.engines.quiet import QUIET
from omnifm.errors import OmnifmError
from omnifm.run import execute

PORT = 6399
SIMULATED = ("engine.kind=flower-simulation", "engine.workers=2")


def listening() -> list[str]:
    """Return the addresses on which this process and its descendants listen."""
    me = psutil.Process()
    found = [c for p in (me, *me.children(recursive=True)) for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return sorted({c.laddr.ip.removeprefix("::ffff:") for c in found})


def offspring() -> list[str]:
    return [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def cluster() -> Iterator[str]:
    """Start Ray as on the first machine of a cluster; yield its address."""
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        words = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={PORT}", "--num-cpus=1"]
        words += ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}"]
        command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", *words]
        environment = {**os.environ, **QUIET, "RAY_worker_niceness": "0"}
        head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while PORT not in {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}:
                assert head.poll() is None, "Ray does not start"
                time.sleep(0.1)
            yield f"127.0.0.1:{PORT}"
        finally:
            for process in (*psutil.Process(head.pid).children(recursive=True), head):
                process.kill()
            head.wait()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}

    def look(record: Mapping[str, Any]) -> None:
        if record["event"] == "round" and "listening" not in seen:
            seen["listening"], seen["programs"] = listening(), offspring()

    before = dict(os.environ)
    execute(load(folder / "omnifm.toml", SIMULATED), folder / "omnifm-ray", watch=look)
    ours = [name for name in {*before, *os.environ} if name.startswith(("RAY", "FLWR", "PYTHONPATH"))]
    seen["left"], seen["environment"] = offspring(), [name for name in ours if before.get(name) != os.environ.get(name)]
    with cluster() as address:
        there = (*SIMULATED, f"engine.ray_address={json.dumps(address)}")

        def interrupt(record: Mapping[str, Any]) -> None:
            if record["event"] == "client" and record["round"] == 1 and not seen.setdefault("signalled", False):
                seen["signalled"] = True
                os.kill(os.getpid(), signal.SIGINT)

        try:
            execute(load(folder / "scaffold.toml", there), folder / "scaffold-ray", watch=interrupt)
        except KeyboardInterrupt:
            state = json.loads((folder / "scaffold-ray" / "checkpoint" / "last.json").read_text())
            seen["interrupted"] = state["rounds_completed"]
        execute(load(folder / "scaffold.toml", there), folder / "scaffold-ray", resume=True)
        try:
            execute(load(folder / "failing.toml", there), folder / "failing-ray")
        except OmnifmError as error:
            seen["failure"] = str(error)
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
