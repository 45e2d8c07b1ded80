"""Runs of `omnifm` as a user would start them, on a cohort of noise images written on the spot."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from PIL import Image

from omnifm.data.cohort import CohortSpec, Row, write_cohort
from omnifm.seeds import numpy_generator

from measure import ONE_THREAD, Finished, run_process

SPLITS = ("train",) * 14 + ("val",) * 3 + ("test",) * 3
CLASSES = ("a", "b", "c", "d")


def noise_cohort(folder: Path, rows: int, side: int = 64) -> Path:
    """Write a classification cohort of grey noise: 70 % train, 15 % val, 15 % test in every 20 rows. Kept if it is there."""
    if (folder / "cohort.toml").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    pixels = numpy_generator(0, "noise", rows).integers(0, 256, (rows, side, side), dtype=np.uint8)
    found = []
    for number in range(rows):
        name = f"images/{number:05d}.png"
        Image.fromarray(pixels[number]).save(folder / name)
        split, label = SPLITS[number % len(SPLITS)], CLASSES[number // len(SPLITS) % len(CLASSES)]
        found.append(Row(id=f"r{number}", split=split, image=name, label=label))
    spec = CohortSpec.model_validate(
        {
            "format": 1,
            "name": folder.name,
            "task": "classification",
            "title": "Noise (simulated)",
            "modality": "CT",
            "classes": CLASSES,
            "licence": "CC0-1.0",
            "redistribution": "allowed",
            "source": "written by benchmarks/runs.py",
            "citation": "",
            "notes": "",
        }
    )
    return write_cohort(folder, spec, found)


def run_omnifm(config: Mapping[str, Any], out: Path) -> tuple[dict[str, Any], Finished]:
    """Run a config in a fresh process; return its metrics.json and what the process took. A finished run is not repeated.

    Raises:
        RuntimeError: the run failed.
    """
    kept = out.with_suffix(".json")
    if kept.is_file():
        record = json.loads(kept.read_text(encoding="utf-8"))
        if record["config"] == config:
            return record["metrics"], Finished(**record["finished"])
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".toml")
    path.write_text(tomli_w.dumps(dict(config)), encoding="utf-8")
    command = [sys.executable, "-m", "omnifm", "run", str(path), "--out", str(out)]
    finished = run_process(command, ONE_THREAD, out.with_suffix(".log"), watch_memory=False)
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    record = {"config": config, "metrics": metrics, "finished": vars(finished)}
    kept.write_text(json.dumps(record), encoding="utf-8")
    return metrics, finished
