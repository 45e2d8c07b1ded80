"""A federation so small that a whole run takes a second, and what a run leaves, in a form that can be compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from safetensors import safe_open

from omnifm.config import Config, parse
from omnifm.data.cohort import Row, write_cohort
from omnifm.seeds import numpy_generator
from tests.data.builders import noise, save_png, spec

SIDE = 32
COUNTS = {"train": 24, "val": 8, "test": 8}
DEPTH, VOLUMES = 5, {"train": 4, "val": 1, "test": 1}
MODALITIES = {"scan": "MRI", "echo": "US"}


def write_images(folder: Path, name: str, modality: str, counts: dict[str, int] = COUNTS) -> Path:
    """Write a cohort of two classes that differ in the direction of their stripes; the modalities differ in their frequency."""
    rng = numpy_generator(0, "tiny-cohort", name)
    period = 4 if modality == "MRI" else 8
    rows = []
    for split, count in counts.items():
        for i in range(count):
            wave = 90 * np.sin(2 * np.pi * (np.arange(SIDE) + rng.integers(period)) / period)
            stripes = np.broadcast_to(wave[:, None] if i % 2 else wave, (SIDE, SIDE))
            pixels = np.clip(128 + stripes + rng.normal(0, 20, (SIDE, SIDE)), 0, 255).astype(np.uint8)
            save_png(folder / f"images/{split}{i}.png", pixels)
            rows.append(Row(id=f"{split}{i}", split=split, image=f"images/{split}{i}.png", label="ab"[i % 2]))
    return write_cohort(folder, spec(name=name, modality=modality, title=f"Stripes, {name}"), rows)


def write_federation(folder: Path) -> Path:
    """Write two cohorts of two modalities below `folder`."""
    for name, modality in MODALITIES.items():
        write_images(folder / name, name, modality)
    return folder


def write_volumes(folder: Path) -> Path:
    """Write two cohorts of two modalities below `folder`, whose rows are volumes of `DEPTH` slices of noise."""
    for name, modality in MODALITIES.items():
        rows = []
        (folder / name).mkdir()
        for split, count in VOLUMES.items():
            for i in range(count):
                np.save(folder / name / f"{split}{i}.npy", noise(DEPTH, SIDE, SIDE, stream=i))
                rows.append(Row(id=f"{split}{i}", split=split, image=f"{split}{i}.npy", label="ab"[i % 2]))
        write_cohort(folder / name, spec(name=name, modality=modality, slice_axis=0), rows)
    return folder


def raw_config(data: Path, strategy: str = "omnifm", **changes: Any) -> dict[str, Any]:
    """Return the config of a run on the cohorts in `data`: four clients, three rounds; `changes` go into the sections."""
    raw: dict[str, Any] = {
        "task": "classification",
        "strategy": strategy,
        "federation": {
            "cohorts": [{"path": str(data / name), "clients": 2} for name in MODALITIES],
            "rounds": 3,
            "participation": 0.75,
        },
        "data": {"image_size": SIDE, "cache": str(data / "cache")},
        "model": {"width": 4, "stem_stride": 1},
        "optimiser": {"lr": 0.02, "batch_size": 4},
        "strategies": {"omnifm": {"dim": 8, "band": 8, "neighbourhood_band": 8, "bank": {"prototypes": 2, "capacity": 12}}},
    }
    for section, values in changes.items():
        raw[section] = {**raw.get(section, {}), **values} if isinstance(values, dict) else values
    return raw


def config(data: Path, strategy: str = "omnifm", **changes: Any) -> Config:
    return parse(raw_config(data, strategy, **changes))


def write_toml(path: Path, raw: dict[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(raw), encoding="utf-8")
    return path


def without_time(value: Any) -> Any:
    """Return a JSON value without what may differ between two equal runs: times, memory, and where it ran."""
    if isinstance(value, dict):
        return {k: without_time(v) for k, v in value.items() if k not in ("seconds", "peak_rss_mib", "events_bytes")}
    return [without_time(v) for v in value] if isinstance(value, list) else value


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def left_behind(run: Path) -> dict[str, Any]:
    """Return all that counts of a finished run: tensors as bytes; JSON and events without times."""
    found: dict[str, Any] = {"events": [without_time(event) for event in lines(run / "events.jsonl")]}
    for path in sorted(run.rglob("*.json")):
        if path.name != "environment.json":
            found[str(path.relative_to(run))] = without_time(json.loads(path.read_text(encoding="utf-8")))
    found |= {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.png"))}
    return found | {str(path.relative_to(run)): contents(path) for path in sorted(run.rglob("*.safetensors"))}


def contents(path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file as type and bytes, with the metadata (which lie in the file in any order)."""
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        return {"metadata": file.metadata(), **{name: (str(t.dtype), t.shape, t.tobytes()) for name, t in tensors.items()}}


def data_folder(base: Path) -> Path:
    """Return the federation's folder below pytest's `base`, written at the first call."""
    folder = base / "tiny-federation"
    return folder if folder.is_dir() else write_federation(folder)


def finished(base: Path, strategy: str) -> Path:
    """Return the folder of an uninterrupted run, made at the first call. Tests that change files copy it."""
    from omnifm.run import execute

    run = base / f"uninterrupted-{strategy}"
    if not run.is_dir():
        execute(config(data_folder(base), strategy), run)
    return run
