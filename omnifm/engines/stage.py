"""What Ray is told when Flower's simulation runs on it. Free of torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnifm.engines.quiet import QUIET

HERE = "127.0.0.1"
_QUIET = {
    # Every use of a Ray that is not there would start one.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Actors see the GPUs of this machine, as the processes of `engine.workers` do.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_ALONE = {
    # The name says more than it does: Ray takes 127.0.0.1 for this machine's address, and does not look up how others see it.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Actors are no less urgent than the processes of `engine.workers`; Ray's own 15 lets any other program go first.
    "RAY_worker_niceness": "0",
}


@dataclass(frozen=True)
class Stage:
    """Where the clients of a simulation are trained.

    Attributes:
        workers: actors of a Ray that is started here.
        threads: CPUs of an actor.
        gpus: GPUs of an actor, in a cluster.
        address: of a cluster that runs already; empty: Ray is started for this run, on this machine alone.
        log: file for what Flower and Ray say.
    """

    workers: int
    threads: int
    gpus: float
    address: str
    log: Path

    def backend(self, folder: Path) -> dict[str, Any]:
        """Return the `backend_config` of Flower's simulation; `folder` is for Ray's sockets and logs."""
        quiet = {"log_to_driver": False, "logging_level": "error"}
        if self.address:
            resources = {"num_cpus": self.threads, "num_gpus": self.gpus}
            return {"init_args": {"address": self.address, **quiet}, "client_resources": resources}
        here = {"address": "local", "num_cpus": self.workers * self.threads, "_node_ip_address": HERE, "_temp_dir": str(folder)}
        resources = {"num_cpus": self.threads, "num_gpus": 0.0}
        return {"init_args": {**here, "include_dashboard": False, **quiet}, "client_resources": resources}

    def environment(self, folder: Path) -> dict[str, str]:
        """Return the environment variables that Flower, Ray and Ray's processes are to find."""
        return {**QUIET, **_QUIET, **({} if self.address else _ALONE), "FLWR_HOME": str(folder / "flower")}


Answer = Callable[[bytes], bytes]
"""From packed call to packed call, in an actor."""
