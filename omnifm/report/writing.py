"""Files of a report, whole or not at all."""

from contextlib import suppress
from pathlib import Path

from omnifm.errors import CheckpointError


def write(path: Path, text: str) -> Path:
    """Replace `path` by `text` and return it; a reader never meets half of it. Raises CheckpointError if the disk refuses."""
    draft = path.with_name(path.name + ".part")
    try:
        draft.write_text(text, encoding="utf-8")
        return draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None
