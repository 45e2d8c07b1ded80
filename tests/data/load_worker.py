"""The other process of the test in which two build one cache: a module of its own, as a spawned process imports it whole."""

from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

from omnifm.data.cache import load_images
from omnifm.data.cohort import Cohort


def load(folder: Path, cache_dir: Path, start: Barrier, results: "Queue[float]") -> None:
    cohort = Cohort.read(folder)
    start.wait(60)
    results.put(float(load_images(cohort, 8, 1, cache_dir).pixels.sum()))
