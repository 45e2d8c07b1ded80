"""One process at a time works in a folder."""

import errno
from pathlib import Path

import pytest

from omnifm.errors import CheckpointError
from omnifm.track.lock import is_locked, locked


def test_two_do_not_share_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "server.lock"
    assert not is_locked(path)
    with locked(path, "server"):
        assert is_locked(path)
        with pytest.raises(CheckpointError, match=r"server\.lock: another server works in this folder"), locked(path, "server"):
            pass
    assert not is_locked(path)


def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with (
        pytest.raises(CheckpointError, match=r"run\.lock: cannot be locked \(No locks available\)"),
        locked(tmp_path / "run.lock", "run"),
    ):
        pass


def test_a_folder_that_takes_no_file_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"run\.lock: cannot be written \(No such file"),
        locked(tmp_path / "no" / "run.lock", "run"),
    ):
        pass
