"""What a run was made of beside its config, whose hash has no paths: cohorts, their files, weights; whether they still are."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from omnifm.build import Data, cache_folder, read_cohort
from omnifm.config import Config
from omnifm.data.cache import cohort_contents, sha256
from omnifm.errors import DataError
from omnifm.track.folder import read_json


def source_record(config: Config, data: Data) -> dict[str, Any]:
    """Return digests, for `split.json`, of the cohorts that are here, of the files they name, and of weights that are read.

    Raises:
        DataError: a file cannot be read, or the cache folder cannot be written.
    """
    here = {name: cohort for name, cohort in data.cohorts.items() if cohort.here}
    return {
        "cohorts": {name: cohort.fingerprint for name, cohort in here.items()},
        "files": {name: cohort_contents(cohort, data.cache) for name, cohort in here.items()},
        "weights": {key: sha256(path) for key, path in _weights(config)},
    }


def what_changed(config: Config, out: Path, *, files: bool = True) -> str:
    """Return, in words, what is no longer what it was when the run in `out` began; empty: nothing is known to be.

    What is gone may have been right. An older run has no digests of files.

    Args:
        config: the run's.
        out: its folder.
        files: look into the files too; those that were seen before are read again only if their size or times have changed.
    """
    record = read_json(out / "split.json") if (out / "split.json").is_file() else {}
    for entry in config.federation.cohorts if record.get("cohorts") else ():
        with suppress(DataError):
            cohort = read_cohort(config, Path(entry.path))
            if record["cohorts"].get(cohort.name, cohort.fingerprint) != cohort.fingerprint:
                return f"cohort {entry.path} is not the one this run was started with"
            known = record.get("files", {}).get(cohort.name) if files else None
            if known is not None and cohort_contents(cohort, cache_folder(config)) != known:
                return f"files of cohort {entry.path} are not those this run was started with"
    for key, path in _weights(config):
        if (known := record.get("weights", {}).get(key)) is not None and sha256(path) != known:
            return f"{key} = {str(path)!r} is not the file this run was started with"
    return ""


def _weights(config: Config) -> Iterator[tuple[str, Path]]:
    """Yield the weight files that the config names and that are here, by their keys."""
    changes = config.tasks.get("mixed", {}).get("set", {})
    of_tasks = {f"tasks.mixed.set.{task}": own.get("model.weights") for task, own in changes.items() if isinstance(own, dict)}
    for key, value in {"model.weights": config.model.weights, **of_tasks}.items():
        if isinstance(value, str) and Path(value).is_file():
            yield key, Path(value)
