"""Small cohorts on disk for the tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from omnifm.data.cohort import Cohort, CohortSpec, Row, write_cohort
from omnifm.seeds import numpy_generator

BASE = {
    "format": 1,
    "name": "tiny",
    "task": "classification",
    "title": "Tiny",
    "modality": "CT",
    "classes": ("a", "b"),
    "licence": "CC0-1.0",
    "redistribution": "allowed",
    "source": "test",
    "citation": "",
    "notes": "",
}


def spec(**changes: Any) -> CohortSpec:
    return CohortSpec.model_validate({k: v for k, v in {**BASE, **changes}.items() if v is not None})


def noise(*shape: int, stream: int = 0) -> np.ndarray:
    return numpy_generator(0, "test-image", stream).integers(0, 256, shape, dtype=np.uint8)


def save_png(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def classification(folder: Path, count: int = 6, *, row: Callable[[int], dict[str, Any]] = lambda i: {}, **changes: Any) -> Path:
    """Write a sound cohort of `count` noise images 8 x 10, labels a and b in turn, two thirds train; `row(i)` overrides cells."""
    rows = []
    for i in range(count):
        save_png(folder / f"images/{i}.png", noise(8, 10, stream=i))
        split = ("train", "train", "train", "train", "val", "test")[i % 6]
        cells = {"id": f"r{i}", "split": split, "image": f"images/{i}.png", "label": "ab"[i % 2], **row(i)}
        rows.append(Row(**cells))
    return write_cohort(folder, spec(**changes), rows)


def in_memory(rows: list[Row], folder: Path = Path("nowhere"), **changes: Any) -> Cohort:
    return Cohort(folder, spec(**changes), tuple(rows))
