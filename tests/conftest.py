"""What every test shares: one CPU thread, repeatable hypothesis draws in CI, the folder of real images."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("local", deadline=None)
# In CI a draw must not differ between two runs of one commit, and there is no database of earlier failures.
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# A shell's background job ignores Ctrl-C, and so do its children: tests of Ctrl-C would then wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Give torch one thread: sums keep their order, and the worker processes of pytest do not fight for cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real image cohorts beside the checkout; skip the test where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside this checkout: the real cohorts are not part of the repository")
    return folder
