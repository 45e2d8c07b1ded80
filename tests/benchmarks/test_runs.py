import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file

from omnifm.config import parse
from omnifm.data.cohort import Cohort
from omnifm.data.validate import validate

Script = Callable[[str], ModuleType]


def test_noise_cohort_is_sound_and_split(script: Script, tmp_path: Path) -> None:
    folder = script("runs").noise_cohort(tmp_path / "noise_2", 40, side=16)
    assert validate(folder) == []
    assert [len(Cohort.read(folder).indices(split)) for split in ("train", "val", "test")] == [28, 6, 6]


def test_configs_are_ones_omnifm_accepts(script: Script, tmp_path: Path) -> None:
    memory, workers, step = script("memory"), script("workers"), script("step")
    memory.noise_cohort = lambda folder, rows: folder
    (tmp_path / "atlas-5" / "atlas_cls_ct").mkdir(parents=True)
    configs = [
        memory.many_clients(200, 4000, 3, tmp_path),
        memory.one_round(1000, 5, tmp_path),
        step.config_of("omnifm", tmp_path, tmp_path, 64, rounds=2),
    ]
    found = [parse(config) for config in configs]
    assert found[0].federation.participation * 200 == 10
    assert found[1].federation.cohorts[0].clients == 200
    workers.noise_cohort = lambda folder, rows: folder
    assert parse(workers.config(2, 8, 4, 64, tmp_path)).engine.workers == 2


def test_memory_is_judged_against_both_small_runs(script: Script) -> None:
    memory = script("memory")
    peaks = {
        (10, 200): memory.Peaks([100.0], [90.0]),
        (10, 4000): memory.Peaks([120.0], [95.0]),
        (200, 4000): memory.Peaks([126.0], [96.0]),
    }
    rows, goals = memory.judge(peaks, (200, 4000), {"same images": (10, 4000), "same rows": (10, 200)})
    assert [(item["value"], item["met"]) for item in goals] == [(1.05, True), (1.26, False)]
    assert len(rows) == 3 * 2 + 2


def _run_with(folder: Path, value: float) -> Path:
    (folder / "checkpoint").mkdir(parents=True)
    save_file({"w": torch.tensor([1.0, value])}, folder / "checkpoint" / "server-000001.safetensors")
    (folder / "checkpoint" / "last.json").write_text(json.dumps({"file": "server-000001.safetensors"}))
    return folder


def test_weights_are_the_same_only_bit_for_bit(script: Script, tmp_path: Path) -> None:
    workers = script("workers")
    one, two, other = (_run_with(tmp_path / name, value) for name, value in (("a", 0.5), ("b", 0.5), ("c", 0.50000006)))
    assert workers.same_weights(one, two)
    assert not workers.same_weights(one, other)
