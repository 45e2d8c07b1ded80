"""Shared by the tests of prediction: a tiny run, and the command."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.command import Command
from tests.run import jobs


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.data_folder(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda strategy: jobs.finished(tmp_path_factory.getbasetemp(), strategy)


@pytest.fixture
def omnifm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """The command, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    return Command(monkeypatch, capsys)
