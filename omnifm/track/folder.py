"""The files of a run folder and how they are written: whole or not at all."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w

from omnifm.errors import CheckpointError

_PACKAGES = ("torch", "monai", "numpy", "scipy", "safetensors", "pydantic", "scikit-learn")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`; a crash leaves the old file or the new one. Raises CheckpointError if the disk refuses.

    Half a surrogate pair, which text from elsewhere may hold and UTF-8 has no bytes for, becomes a question mark.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None


def sync_folder(folder: Path) -> None:
    """Wait until names in a folder are on the disk: after a power cut a renamed file may otherwise be the old one again."""
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def remove_partials(folder: Path) -> None:
    """Remove what killed writes left below `folder`, those of `federation.store` too. For a folder that nobody else writes to."""
    for path in folder.rglob(".*.part"):
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON, whole. Numbers that are not finite are an error: undefined is null."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError naming the file when it is missing, cut short or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return value


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write the resolved config as TOML."""
    write_text(path, tomli_w.dumps(dict(config)))


def environment() -> dict[str, Any]:
    """Return versions and machine, for `environment.json`. Nothing that names a person or a network."""
    from omnifm import __version__

    return {
        "omnifm": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": machine(),
        "cores": os.cpu_count(),
        "argv": [Path(sys.argv[0]).name, *(_without_home(argument) for argument in sys.argv[1:])],
        "packages": {name: version(name) for name in _PACKAGES},
    }


def note_commit(path: Path) -> None:
    """Add this tree's commit to an `environment.json` that names another: `OLD..NEW` have a part in the run's numbers."""
    record, here = read_json(path), commit()
    if here not in str(record.get("commit")).split(".."):
        write_json(path, {**record, "commit": f"{record.get('commit')}..{here}"})


def _without_home(argument: str) -> str:
    """Write `~` for the home folder, which often holds a person's name."""
    home = str(Path.home())
    return argument.replace(home, "~") if len(home) > 1 else argument


def machine() -> str:
    """Return the processor's name and the number of cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name} x{os.cpu_count()}"


def commit() -> str:
    """Return the commit of the source tree, with `+` if it has changes; `unknown` outside a checkout."""
    revision = _git("rev-parse", "--short=12", "HEAD")
    if revision is None:
        return "unknown"
    return revision + ("+" if _git("status", "--porcelain", "--untracked-files=no", "--", ".") else "")


def _git(*arguments: str) -> str | None:
    """Return what git says of the folder this file is in; None if it says nothing."""
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
