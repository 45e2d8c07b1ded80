"""The examples in deploy/: systemd takes the units, and what they and the container start are commands that omnifm has."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from omnifm.cli import main

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
UNITS = ("omnifm-serve", "omnifm-join")
# What a reader changes, by what stands there.
CHANGED = {"/COHORT": "/tmp", "SERVER:": "fl.example.org:", "--client ID": "--client clinic_a-0", "CONFIG.toml": "job.toml"}


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    if not main.app.registered_commands:
        main._register()


def filled(name: str) -> str:
    text = (DEPLOY / f"{name}.service").read_text(encoding="utf-8")
    for word, other in CHANGED.items():
        text = text.replace(word, other)
    return text


def require_command(line: str) -> dict[str, object]:
    """Parse a command line as omnifm would, and run nothing; return its options."""
    program, name, *words = shlex.split(line)
    assert program.endswith("omnifm")
    command = get_command(main.app).commands[name]  # type: ignore[attr-defined]
    return dict(command.make_context(name, words).params)


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_starts_a_command_with_options_that_it_has(unit: str) -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", filled(unit), re.MULTILINE)
    options = require_command(line)
    assert options["certs"] == "certs"
    assert options["resume"] is True if unit == "omnifm-serve" else options["state"] == "state"


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_takes_a_unit(unit: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed here")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "omnifm").symlink_to(sys.executable)
    path = tmp_path / f"{unit}.service"
    path.write_text(filled(unit).replace("/VENV", str(tmp_path)), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_the_container_is_run_with_commands_that_omnifm_has() -> None:
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    lines = re.findall(r"podman run .* omnifm (serve|join) (.*)$", text, re.MULTILINE)
    assert len(lines) == 2 and 'ENTRYPOINT ["omnifm"]' in text
    for name, rest in lines:
        for word, other in CHANGED.items():
            rest = rest.replace(word, other)
        assert require_command(f"omnifm {name} {rest}")["certs"] == "certs"
