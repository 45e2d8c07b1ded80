"""Paths in a config: where relative ones begin."""

from pathlib import Path
from typing import Any

from omnifm.errors import ConfigError


def anchor(raw: dict[str, Any], folder: Path) -> None:
    """Make relative paths absolute. Absolute ones stay, so a second call with another folder changes nothing.

    Args:
        raw: a config as TOML has it, of any shape; changed in place.
        folder: where relative paths begin.

    Raises:
        ConfigError: a text that is no path.
    """
    federation = raw.get("federation")
    cohorts = federation.get("cohorts") if isinstance(federation, dict) else None
    for number, cohort in enumerate(cohorts if isinstance(cohorts, list) else ()):
        if isinstance(cohort, dict) and isinstance(cohort.get("path"), str):
            cohort["path"] = _absolute(cohort["path"], folder, f"federation.cohorts.{number}.path")
    for table, key in (("model", "weights"), ("data", "cache")):
        _anchor_key(raw.get(table), key, folder, f"{table}.{key}")
        # A mixture may have them for each of its tasks, there as `set` writes them.
        for task, changes in _tables(raw, "tasks", "mixed", "set"):
            _anchor_key(changes, f"{table}.{key}", folder, f"tasks.mixed.set.{task}.{table}.{key}")


def _tables(raw: Any, *keys: str) -> list[tuple[str, Any]]:
    for key in keys:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return list(raw.items()) if isinstance(raw, dict) else []


def _anchor_key(section: Any, key: str, folder: Path, name: str) -> None:
    value = section.get(key) if isinstance(section, dict) else None
    if isinstance(value, str) and value not in ("", "imagenet"):
        section[key] = _absolute(value, folder, name)


def _absolute(path: str, folder: Path, key: str) -> str:
    try:
        return str((folder / Path(path).expanduser()).resolve())
    except (RuntimeError, ValueError, OSError) as error:  # an unknown ~user; a character that no path has; a loop of links
        raise ConfigError(f"{key}: {path!r} is no path ({error})") from None
