"""What Flower is given: an app, since a run has to have one, and programs in place of its own, which load no app."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import tomli_w

from omnifm import __version__
from omnifm.deploy.processes import program
from omnifm.track.folder import write_text

_PACKAGE = "omnifm_app"
_SERVER = """from flwr.serverapp import ServerApp

app = ServerApp()  # never loaded: the server runs its own program
"""
_CLIENT = """from omnifm.engines.flower import client_app

app = client_app()
"""
_PROGRAMS = ("agentapp", "clientapp", "connector", "model", "serverapp", "simulation")
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
    ours = shlex.join(_python("from omnifm.engines.flower import node_executor_program as run; run()"))
    return _write_programs(folder, "a hospital", {"flower-superexec": f'exec {ours} "$@"'})


def write_server_programs(folder: Path) -> Path:
    """Write what a SuperLink finds in place of Flower's programs; return the folder. Whatever app a run came with, ours runs.

    Flower's own `flower-superexec`, which fetches the runs, stays: it installs nothing where the SuperLink is told so.

    Raises:
        CheckpointError: the disk refuses.
    """
    ours = shlex.join(_python("from omnifm.engines.flower import server_program as run; run('omnifm.deploy.server:main_of_run')"))
    return _write_programs(folder, "a server", {"flwr-serverapp": f'exec {ours} "$0" "$@"'})


def _write_programs(folder: Path, who: str, own: Mapping[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    refused = {f"flwr-{kind}": f"echo 'omnifm: {who} runs no flwr-{kind}; refused' >&2\nexit 1" for kind in _PROGRAMS}
    for name, script in {**refused, **own}.items():
        write_text(folder / name, f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o700)
    return folder


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def node_command() -> list[str]:
    """Return the command that runs a SuperNode."""
    return _python("from omnifm.engines.flower import node_program as run; run()")


def superlink_command() -> list[str]:
    """Return the command that runs a SuperLink; its last word is the name by which people know it."""
    return [*_python("from omnifm.engines.flower import superlink_program as run; run()"), program("flower-superlink")]


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
