"""Validate a cohort once, not at every start: one whose files are as they were then needs no second look."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from omnifm.data.cohort import Cohort
from omnifm.data.validate import require_valid


def require_vetted(cohorts: Iterable[Cohort], cache_dir: Path) -> None:
    """Validate the cohorts that changed since they were last found sound.

    Raises:
        DataError: a cohort has a problem.
    """
    for cohort in cohorts:
        marker = cache_dir / f"sound-{_stamp(cohort)}"
        if not marker.is_file():
            require_valid([cohort])
            cache_dir.mkdir(parents=True, exist_ok=True)
            marker.touch()


def _stamp(cohort: Cohort) -> str:
    """Digest of the text files and of every named file's size and time of change."""
    digest = hashlib.sha256((cohort.folder / "cohort.toml").read_bytes())
    digest.update((cohort.folder / "manifest.csv").read_bytes())
    for row in cohort.rows:
        for relative in (row.image, row.image_b, row.mask, row.mask_b):
            path = cohort.folder / relative
            if relative and path.exists():
                facts = path.stat()
                digest.update(f"{relative}|{facts.st_size}|{facts.st_mtime_ns}\n".encode())
    digest.update(str(cohort.folder.resolve()).encode())
    return digest.hexdigest()[:32]
