"""What the tests of a deployment share: the tiny federation, and a hospital of it."""

from pathlib import Path

import pytest

from omnifm.deploy.hospital import Hospital
from tests.run import jobs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.data_folder(tmp_path_factory.getbasetemp())


@pytest.fixture
def hospital(data: Path, tmp_path: Path) -> Hospital:
    return Hospital(data / "scan", "scan-0", tmp_path / "private", str(data / "cache"))
