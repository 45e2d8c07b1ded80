"""Validate a cohort once, not at every start: one whose files are as they were then needs no second look."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from omnifm.data.cohort import Cohort
from omnifm.data.dicom import series_files
from omnifm.data.validate import require_valid

# Another number where the check finds more than it did: every cohort is looked at again.
_FORMAT = 4


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
    digest = hashlib.sha256(f"{_FORMAT}".encode())
    digest.update((cohort.folder / "cohort.toml").read_bytes())
    digest.update((cohort.folder / "manifest.csv").read_bytes())
    for row in cohort.rows:
        for relative in (row.image, row.image_b, row.mask, row.mask_b):
            path = cohort.folder / relative
            # A folder's own time does not tell that a slice in it was written anew.
            for file in series_files(path) if relative and path.is_dir() else [path] if relative and path.exists() else ():
                facts = file.stat()
                times = f"{facts.st_mtime_ns}|{facts.st_ctime_ns}"
                digest.update(f"{relative}|{file.name}|{facts.st_size}|{times}\n".encode())
    digest.update(str(cohort.folder.resolve()).encode())
    return digest.hexdigest()[:32]
