"""Shared by the tests of a whole run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.run import jobs


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.data_folder(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda strategy: jobs.finished(tmp_path_factory.getbasetemp(), strategy)
