"""A lock on a file that ends with the process that holds it, however that ends."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omnifm.errors import CheckpointError


@contextmanager
def locked(path: Path, who: str) -> Iterator[None]:
    """Hold a lock. The file stays: whoever removed it would let a second one in.

    Args:
        path: the file, made if need be.
        who: may hold it, in words.

    Raises:
        CheckpointError: another one holds it, or the file system has no locks.
    """
    try:
        file = path.open("a")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{path}: another {who} works in this folder") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be locked ({error.strerror}); name a folder on another disk") from None
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock."""
    if not path.is_file():
        return False
    try:
        with locked(path, ""):
            return False
    except CheckpointError:
        return True
