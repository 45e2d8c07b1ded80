"""Runs in a process of their own that is killed, as by `kill -9`, just before a chosen file operation or after a chosen event."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnifm.compare import Cell

OPERATIONS = ("open", "os.rename", "os.remove", "os.truncate")
# What a run imports anyway; the fork server imports it once for all the processes that are to die.
PRELOAD = [
    "torch._dynamo",
    "omnifm.run",
    "omnifm.tasks.classification",
    "omnifm.report.html",
    "monai.networks.nets",
    "sklearn.metrics",
]


def processes() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _die_at_operation(folder: Path, name: str, count: int) -> None:
    """Kill this process before its `count`th operation on a file called `name` (any file: '') below `folder`."""
    left = count

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in OPERATIONS:
            return
        # A rename is known by its target; of the files that are opened, those to be written count.
        target = arguments[1] if event == "os.rename" else arguments[0]
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if not isinstance(target, str | os.PathLike) or not Path(target).is_relative_to(folder):
            return
        if name in ("", Path(target).name):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def run(raw: dict[str, Any], out: Path, name: str, count: int) -> None:
    """Run or resume `raw` in `out` until the chosen operation."""
    import torch

    from omnifm.config import parse
    from omnifm.run import execute

    torch.set_num_threads(1)
    _die_at_operation(out, name, count)
    execute(parse(raw), out, resume=True)


def run_until_reply(raw: dict[str, Any], out: Path, replies: int) -> None:
    """Run `raw` in `out` until that many clients have replied; leave the ids of the worker processes in `workers.json`."""
    import torch

    from omnifm.config import parse
    from omnifm.run import execute

    torch.set_num_threads(1)
    seen = 0

    def watch(record: Mapping[str, Any]) -> None:
        nonlocal seen
        seen += record["event"] == "client"
        if seen == replies:
            workers = [child.pid for child in multiprocessing.active_children()]
            out.with_suffix(".workers").write_text(json.dumps(workers))
            os.kill(os.getpid(), signal.SIGKILL)

    execute(parse(raw), out, resume=True, watch=watch)


def dies(target: Any, *arguments: Any) -> int | None:
    """Return the exit code of a process that calls `target`: -9 if it was killed."""
    process = processes().Process(target=target, args=arguments)
    process.start()
    process.join(timeout=120)
    return process.exitcode


def cell_or_death(cell: Cell, out: Path) -> str:
    """Stand in for a cell of a comparison: seed 1 dies as if memory had run out, the others take a moment and are fine."""
    if cell.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    (out / cell.name).touch()
    return "ok"
