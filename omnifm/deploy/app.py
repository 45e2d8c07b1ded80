"""What Flower is given: at the server an app that names our programs, at a hospital programs in place of its own."""

import shlex
import sys
from pathlib import Path

import tomli_w

from omnifm import __version__
from omnifm.track.folder import write_text

_PACKAGE = "omnifm_app"
_SERVER = """from omnifm.deploy.server import main
from omnifm.engines.flower import server_app

app = server_app(main)
"""
_CLIENT = """from omnifm.engines.flower import client_app

app = client_app()
"""
_REFUSED = ("agentapp", "clientapp", "connector", "model", "serverapp", "simulation")
CONNECTION = "omnifm"
"""Name of the connection in Flower's config."""


def write_app(folder: Path) -> Path:
    """Write the app into `folder`; return it. Raises CheckpointError if the disk refuses."""
    package = folder / _PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    components = {"serverapp": f"{_PACKAGE}.server:app", "clientapp": f"{_PACKAGE}.client:app"}
    project = {
        "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
        "project": {"name": "omnifm-app", "version": __version__, "license": {"file": "LICENSE"}, "dependencies": []},
        "tool": {"flwr": {"app": {"publisher": "omnifm", "components": components, "config": {}}}},
    }
    write_text(folder / "pyproject.toml", tomli_w.dumps(project))
    write_text(folder / "LICENSE", "Apache-2.0\n")
    write_text(package / "__init__.py", '"""Names the programs of omnifm."""\n')
    write_text(package / "server.py", _SERVER)
    write_text(package / "client.py", _CLIENT)
    return folder


def write_programs(folder: Path) -> Path:
    """Write what a SuperNode finds in place of Flower's programs; return the folder. Nothing runs there but ours.

    Raises:
        CheckpointError: the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours = shlex.join([sys.executable, "-c", "from omnifm.engines.flower import node_executor_program as run; run()"])
    programs = {f"flwr-{kind}": f"echo 'omnifm: a hospital runs no flwr-{kind}; refused' >&2\nexit 1" for kind in _REFUSED}
    for name, script in {**programs, "flower-superexec": f'exec {ours} "$@"'}.items():
        write_text(folder / name, f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o700)
    return folder


def node_command() -> list[str]:
    """Return the command that runs a SuperNode."""
    return [sys.executable, "-c", "from omnifm.engines.flower import node_program as run; run()"]


def write_home(home: Path, address: str, authority: Path | None) -> Path:
    """Write Flower's config into its home folder; return the folder.

    Args:
        home: the folder.
        address: HOST:PORT of the SuperLink.
        authority: certificate to check the SuperLink with; None: without TLS.
    """
    home.mkdir(parents=True, exist_ok=True)
    safe = {"root-certificates": str(authority.resolve())} if authority else {"insecure": True}
    connection = {"default": CONNECTION, CONNECTION: {"address": address, **safe}}
    write_text(home / "config.toml", tomli_w.dumps({"superlink": connection}))
    return home
