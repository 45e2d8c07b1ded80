"""Shared by the tests of the command line."""

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
    monkeypatch.setenv("COLUMNS", "200")
    return Command(monkeypatch, capsys)


@pytest.fixture
def job(data: Path, tmp_path: Path) -> Path:
    """A config file of a run of one round."""
    return jobs.write_toml(tmp_path / "job.toml", jobs.raw_config(data, "fedavg", federation={"rounds": 1}))
