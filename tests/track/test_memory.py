"""The peak of a run is its own, not that of the run before it in the same process."""

import sys

import numpy as np
import pytest

from omnifm.track.memory import forget_peak, peak_rss_mib

_MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_a_peak_is_forgotten() -> None:
    forget_peak()
    before = peak_rss_mib(1)
    block = np.ones(300 * _MIB // 8)
    assert peak_rss_mib(1) > before + 250
    del block
    forget_peak()
    assert peak_rss_mib(1) < before + 150
