"""A site that travels to worker processes: it answers what its test needs, without images or a network."""

import os
import signal
import time
from pathlib import Path
from typing import cast

import torch

from omnifm.errors import FederationError
from omnifm.federation.client import Site
from omnifm.federation.messages import Reply, Request


class ScriptedSite:
    """The client's name says what happens: `slow` waits, `dies` is killed, `mistaken` and `broken` raise."""

    def handle(self, request: Request) -> Reply:
        if request.client.startswith("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        if request.client.startswith("mistaken"):
            raise FederationError(f"client {request.client}: no training examples")
        if request.client.startswith("broken"):
            raise ZeroDivisionError("a bug\nin two lines")
        if request.client.startswith("slow"):
            time.sleep(float(request.settings.get("wait", 0.3)))
        tensors = {name: tensor * 2 for name, tensor in request.tensors.items()}
        return Reply(request.kind, request.round, request.client, 7, tensors, {"pid": torch.tensor(os.getpid())}, {"loss": 0.1})


def make_site() -> Site:
    return cast(Site, ScriptedSite())


def make_broken_site() -> Site:
    raise FileNotFoundError("cohort.toml")


def make_site_once(folder: Path) -> Site:
    """Note each call as a file."""
    (folder / str(os.getpid())).touch(exist_ok=False)
    return make_site()
