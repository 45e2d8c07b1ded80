"""Seeded run and comparison folders as a real run leaves them, for the tests of the report."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

MODALITIES = {"mri": "MRI", "ct": "CT", "xr": "X-ray", "us": "ultrasound", "hist": "histology"}
METRICS = ("accuracy", "auc", "f1_union", "f1_present")


def client_ids(per_modality: int = 2) -> list[str]:
    return [f"{prefix}-{i}" for prefix in MODALITIES for i in range(per_modality)]


def modality_of(client: str) -> str:
    return MODALITIES.get(client.rsplit("-", 1)[0], "MRI")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def scores(level: float, rng: np.random.Generator) -> dict[str, float | None]:
    accuracy = float(np.clip(level + rng.normal(0, 0.01), 0, 1))
    return {"accuracy": accuracy, "auc": min(1.0, accuracy + 0.06), "f1_union": accuracy * 0.7, "f1_present": accuracy * 0.97}


def views(level: float, rng: np.random.Generator, has_global: bool) -> dict[str, Any]:
    return {
        "personal": scores(level, rng),
        "global": scores(level - 0.25, rng) if has_global else None,
        "worst": scores(level - 0.15, rng),
        "finetuned": scores(level + 0.02, rng),
    }


def write_run(
    folder: Path,
    *,
    strategy: str = "omnifm",
    seed: int = 0,
    rounds: int = 12,
    clients: list[str] | None = None,
    participation: float = 0.4,
    level: float = 0.85,
    config_hash: str = "0123abcd4567",
    simulated: bool = True,
) -> Path:
    """Write a run folder; a strategy called omnifm has a bank and neighbourhoods, one called local no global model."""
    rng = np.random.default_rng([seed, len(strategy)])
    names = client_ids() if clients is None else clients
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(f'task = "classification"\nseed = {seed}\n\n[strategy]\nname = "{strategy}"\n')
    write_json(folder / "environment.json", {"python": "3.11.2", "torch": "2.13", "commit": "abc1234def", "cores": 2})
    sizes = {name: int(rng.integers(60, 400)) for name in names}
    write_json(folder / "split.json", split(names, sizes, seed, simulated))
    lines: list[dict[str, Any]] = []
    if strategy == "omnifm":
        lines += [{"event": "description", "client": name, "bytes_up": {"description": 256}} for name in names]
    lines += [
        line for index in range(rounds) for line in events(index, rounds, names, sizes, participation, level, strategy, rng)
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if strategy == "omnifm":
        for index in range(rounds):
            write_bank(folder / "bank" / f"round-{index:04d}.safetensors", names, index, rng)
    write_examples(folder / "examples", names, rng)
    found = metrics(strategy, seed, rounds, names, sizes, participation, level, rng)
    write_json(folder / "metrics.json", found | {"config_hash": config_hash, "simulated": simulated})
    return folder


def split(names: list[str], sizes: dict[str, int], seed: int, simulated: bool) -> dict[str, Any]:
    rows = [
        {
            "id": name,
            "cohort": f"{modality_of(name)} cohort",
            "modality": modality_of(name),
            "train": list(range(sizes[name])),
            "val": list(range(sizes[name] // 5)),
            "test": list(range(sizes[name] // 4)),
        }
        for name in names
    ]
    numbers = {"h_mod": 1.0, "h_lab": 0.31, "h_size": 0.27, "h_ls": None}
    return {"sha256": f"{seed:064x}", "heterogeneity": numbers, "clients": rows, "simulated": simulated}


def events(
    index: int,
    rounds: int,
    names: list[str],
    sizes: dict[str, int],
    participation: float,
    level: float,
    strategy: str,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    taking_part = sorted(rng.choice(names, max(1, round(participation * len(names))), replace=False).tolist())
    progress = 1 - np.exp(-4 * (index + 1) / rounds)
    has_bank = strategy == "omnifm"
    lines: list[dict[str, Any]] = []
    for name in taking_part:
        same = float(rng.uniform(0.4, 0.8))
        line = {
            "event": "client",
            "round": index,
            "client": name,
            "num_examples": sizes[name],
            "loss": float(2.1 - 1.7 * progress + rng.normal(0, 0.05)),
            "seconds": 1.3,
            "bytes_up": {"backbone": 1_128_000, "head": 5_200} | ({"prototypes": 4_096} if has_bank else {}),
            "bytes_down": {"backbone": 1_128_000, "head": 5_200} | ({"bank": 65_536} if has_bank else {}),
            "penalty": 0.05 * float(1 - progress) if has_bank else None,
            "retrieval": {"own": 0.0, "same": same, "other": 1 - same} if has_bank and index else None,
            "effective_rank": float(3 + 6 * progress + rng.normal(0, 0.3)) if has_bank else None,
            "spread": 0.4 * 0.8**index if has_bank else None,
        }
        lines.append(line)
    by_modality = {modality_of(name): 8 * (index + 1) for name in names}
    lines.append(
        {
            "event": "round",
            "round": index,
            "clients": taking_part,
            "loss": float(2.1 - 1.7 * progress),
            "seconds": {"train": 4.0, "aggregate": 0.1, "evaluate": 1.0},
            "bank": {"rows": sum(by_modality.values()), "by_modality": by_modality} if has_bank else None,
            "neighbourhoods": {name: list(MODALITIES.values()).index(modality_of(name)) for name in names} if has_bank else None,
        }
    )
    if index % 2 == 1 or index == rounds - 1:
        found = views(0.2 + (level - 0.2) * float(progress), rng, strategy != "local")
        lines.append({"event": "evaluation", "round": index, "split": "val", "clients": {}} | found)
    return lines


def write_bank(path: Path, names: list[str], index: int, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = np.repeat(np.arange(len(names)), 1 + index // 2)
    modalities = sorted({modality_of(name) for name in names})
    modality = np.array([modalities.index(modality_of(names[i])) for i in owner], dtype=np.int64)
    centres = np.random.default_rng(5).normal(size=(len(modalities), 16))
    vectors = (centres[modality] + rng.normal(0, 0.35, (len(owner), 16))).astype(np.float32)
    tensors = {"vectors": vectors, "client": owner.astype(np.int64), "modality": modality, "round": np.full(len(owner), index)}
    save_file(tensors, path, metadata={"clients": json.dumps(names), "modalities": json.dumps(modalities)})


def write_examples(folder: Path, names: list[str], rng: np.random.Generator) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, name in enumerate(names[:8]):
        y, x = np.mgrid[-1:1:64j, -1:1:64j]
        picture = 200 * np.exp(-3 * ((x - rng.uniform(-0.4, 0.4)) ** 2 + y**2)) + rng.normal(0, 8, x.shape)
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(folder / f"{index}.png")
        truth = "lesion" if index % 2 else "healthy"
        rows.append(
            {
                "client": name,
                "modality": modality_of(name),
                "file": f"{index}.png",
                "truth": truth,
                "prediction": truth if index % 3 else "oedema",
                "confidence": 0.91,
                "correct": bool(index % 3),
            }
        )
    write_json(folder / "examples.json", rows)


def metrics(
    strategy: str,
    seed: int,
    rounds: int,
    names: list[str],
    sizes: dict[str, int],
    participation: float,
    level: float,
    rng: np.random.Generator,
) -> dict[str, Any]:
    has_global = strategy != "local"
    rows = []
    for name in names:
        here = level + float(rng.uniform(-0.12, 0.1))
        test = {"personal": scores(here, rng), "finetuned": scores(here + 0.02, rng)}
        test["global"] = scores(here - 0.25, rng) if has_global else None  # type: ignore[assignment]
        test["personal"]["auc"] = None if name == names[0] else test["personal"]["auc"]
        row = {"id": name, "cohort": f"{modality_of(name)} cohort", "modality": modality_of(name), "test": test}
        rows.append(row | {"num_train": sizes[name], "num_test": sizes[name] // 4})
    return {
        "task": "classification",
        "strategy": strategy,
        "seed": seed,
        "rounds": rounds,
        "primary": "accuracy",
        "participation": participation,
        "clients": rows,
        "test": views(level, rng, has_global),
        "best": {"round": rounds - 2, "test": views(level + 0.01, rng, has_global), "clients": rows} if rounds > 1 else None,
        "best_validation_round": rounds - 2 if rounds > 1 else None,
        "bytes": {"up": 54_600_000, "down": 56_000_000, "bank_up": 196_608, "bank_down": 3_145_728},
        "seconds": {"total": 61.2, "train": 48.0, "aggregate": 1.2, "evaluate": 12.0},
        "peak_rss_mib": 812.4,
    }


LEVELS = {"local": 0.8, "fedavg": 0.56, "fedper": 0.74, "omnifm": 0.86}


def write_compare(
    folder: Path,
    *,
    methods: tuple[str, ...] = ("local", "fedavg", "fedper", "omnifm", "omnifm:no-eca"),
    seeds: tuple[int, ...] = (0, 1, 2),
    participations: tuple[float, ...] = (0.2, 1.0),
    rounds: int = 10,
) -> Path:
    """Write a comparison folder with a cell per method, seed and participation."""
    rows: list[dict[str, Any]] = []
    for method in methods:
        strategy, _, variant = method.partition(":")
        for share in participations:
            for seed in seeds:
                level = LEVELS[strategy] + (0.04 if share == 1.0 else 0.0) - (0.03 if variant else 0.0)
                name = f"{method.replace(':', '-')}-p{share:g}-s{seed}"
                digest = f"hash-{method}-{share:g}-{seed}"
                found = {"strategy": strategy, "seed": seed, "participation": share, "level": level, "config_hash": digest}
                write_run(folder / "cells" / name, rounds=rounds, **found)  # type: ignore[arg-type]
                rows.append(table_row(folder / "cells" / name, variant))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / "table.csv").write_text(text.getvalue())
    return folder


def table_row(cell: Path, variant: str) -> dict[str, Any]:
    found = json.loads((cell / "metrics.json").read_text())
    row = {"strategy": found["strategy"], "variant": variant, "participation": found["participation"], "seed": found["seed"]}
    row |= {
        f"{view}_{m}": (found["test"][view] or {}).get(m)
        for view in ("personal", "global", "worst", "finetuned")
        for m in METRICS
    }
    row |= {"best_personal_accuracy": found["best"]["test"]["personal"]["accuracy"]}
    row |= {"bytes_up": found["bytes"]["up"], "bytes_down": found["bytes"]["down"], "seconds": found["seconds"]["total"]}
    row |= {"bank_up": found["bytes"]["bank_up"], "bank_down": found["bytes"]["bank_down"]}
    row |= {"peak_rss_mib": found["peak_rss_mib"], "commit": "abc1234def", "config_hash": found["config_hash"], "status": "ok"}
    return row
