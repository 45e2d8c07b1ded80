"""Which runs the published tables are made of. A table is a list of parts; a part is one config run as several strategies."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnifm.compare import Cell, Variant, plan_cells, read_variants
from omnifm.config import load
from omnifm.data.cohort import Cohort

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
SEEDS = (0, 1, 2)
FIVE = ("local", "centralised", "fedavg", "fedper", "omnifm")


@dataclass(frozen=True)
class Part:
    """Variants of one config at one participation (None: the config's own), perhaps with keys that are changed for all."""

    config: Path
    variants: Callable[[], list[Variant]]
    participation: float | None = None
    changes: tuple[str, ...] = ()

    def cells(self) -> list[Cell]:
        """Return its cells, all seeds."""
        levels = () if self.participation is None else (self.participation,)
        return plan_cells(self.config, self.variants(), SEEDS, levels, self.changes)


@dataclass(frozen=True)
class Table:
    """One CSV file. `scores`: what its Markdown table shows, the main one first."""

    parts: dict[str, Part]
    scores: tuple[str, ...]
    digits: int = 1
    factor: float = 100.0


def _plain(*strategies: str, name: str = "", changes: tuple[str, ...] = ()) -> Callable[[], list[Variant]]:
    return lambda: [Variant(strategy, name, changes) for strategy in strategies]


def _own_federations() -> list[Variant]:
    """Return the mixed config once per task, with that task's cohorts and settings alone.

    The networks' initial weights differ too, but for the first task in the alphabet: they are drawn one after the other.
    """
    config = load(CONFIGS / "mixed.toml")
    by_task: dict[str, list[str]] = {}
    for entry in config.federation.cohorts:
        by_task.setdefault(Cohort.read(Path(entry.path)).spec.task, []).append(entry.path)
    settings = config.tasks["mixed"]["set"]
    changes = {
        task: (
            f"federation.cohorts={_toml([{'path': path} for path in paths])}",
            f"tasks.mixed.set={_toml({task: settings[task]} if task in settings else {})}",
        )
        for task, paths in by_task.items()
    }
    return [Variant(name, f"own-{task}", own) for task, own in changes.items() for name in ("fedavg", "fedper", "omnifm")]


def _toml(value: Any) -> str:
    """Return a value as it stands behind `=` in TOML, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def _named(name: str) -> Path:
    return CONFIGS / f"{name}.toml"


def _tuned(name: str) -> Callable[[], list[Variant]]:
    """Return what `omnifm tune` chose for every strategy, with what a strategy cannot do without (FedBN's BatchNorm)."""
    return lambda: read_variants(CONFIGS / f"{name}_tuned.toml")


_BESIDES = {"equal": "federation.weighting='equal'", "batch": "model.norm='batch'"}


def _beside_fedavg(name: str, *besides: str) -> Callable[[], list[Variant]]:
    """Return FedAvg as tuned with what some strategies have besides their rule: all clients of one weight, or BatchNorm."""

    def variants() -> list[Variant]:
        fedavg = next(v for v in _tuned(name)() if v.strategy == "fedavg")
        return [Variant("fedavg", beside, (*fedavg.overrides, _BESIDES[beside])) for beside in besides]

    return variants


def _compressed() -> list[Variant]:
    """Return the uploads that are compared, each as FedAvg and as OmniFM."""
    changes: dict[str, tuple[str, ...]] = {
        "": (),
        "bf16": ("compression.upload='bf16'",),
        "int8": ("compression.upload='int8'",),
        "top10": ("compression.upload='topk'", "compression.topk_share=0.1"),
        "top1": ("compression.upload='topk'", "compression.topk_share=0.01"),
        "top1-forgets": ("compression.upload='topk'", "compression.topk_share=0.01", "compression.error_feedback=false"),
    }
    return [Variant(strategy, name, own) for name, own in changes.items() for strategy in ("fedavg", "omnifm")]


_SEGMENTATION = {  # images as small as those of the searches; 7.5 and 10 visits to each of twelve clients
    "20": (0.2, ("federation.rounds=30", "federation.evaluate_every=30")),
    "100": (1.0, ("federation.rounds=10", "federation.evaluate_every=10")),
}
_CLASSIFICATION = ("local", "centralised", "fedavg", "fedprox", "fedper", "omnifm")
TABLES = {
    "classification": Table(
        {
            "main20": Part(_named("classification"), _plain(*_CLASSIFICATION), 0.2),
            "ablation": Part(_named("classification"), lambda: read_variants(_named("classification_ablation")), 0.2),
            "main100": Part(_named("classification"), _plain(*_CLASSIFICATION), 1.0),
        },
        ("accuracy",),
    ),
    "classification_all": Table(
        {
            "p20": Part(_named("classification"), _tuned("classification"), 0.2),
            "beside20": Part(_named("classification"), _beside_fedavg("classification", *_BESIDES), 0.2),
            "p100": Part(_named("classification"), _tuned("classification"), 1.0),
            "beside100": Part(_named("classification"), _beside_fedavg("classification", *_BESIDES), 1.0),
        },
        ("accuracy",),
    ),
    "compression": Table({"main": Part(_named("classification"), _compressed, 0.2)}, ("accuracy",)),
    "segmentation": Table(
        {
            "main": Part(_named("segmentation"), _plain(*FIVE)),
            "binary": Part(
                _named("segmentation"),
                _plain("fedavg", "omnifm", name="binary", changes=("tasks.segmentation.head_space='binary'",)),
            ),
        },
        ("dice", "hd95", "missed"),
        digits=3,
        factor=1,
    ),
    "segmentation_all": Table(
        {
            f"{name}{level}": Part(_named("segmentation"), variants, *settings)
            for level, settings in _SEGMENTATION.items()
            for name, variants in (("p", _tuned("segmentation")), ("beside", _beside_fedavg("segmentation", "batch")))
        },
        ("dice", "hd95", "missed"),
        digits=3,
        factor=1,
    ),
    "super_resolution": Table(
        {
            "main": Part(_named("super_resolution"), _plain(*FIVE)),
            "scales": Part(_named("super_resolution_scales"), _plain("local", "fedavg", "fedper", "omnifm", name="scales")),
        },
        ("psnr", "ssim", "psnr_rgb", "legacy_psnr", "legacy_ssim"),
        digits=3,
        factor=1,
    ),
    "fusion": Table(
        {"main": Part(_named("fusion"), _plain(*FIVE))}, ("vif", "vif_least", "ssim", "qabf", "scd", "mi"), digits=3, factor=1
    ),
    "vqa": Table(
        {
            "main": Part(_named("vqa"), _plain(*FIVE)),
            "blind": Part(_named("vqa"), _plain("omnifm", "local", name="blind", changes=("tasks.vqa.blind=true",))),
        },
        ("accuracy", "closed_accuracy", "open_exact", "open_f1", "disjoint_accuracy", "forced_accuracy"),
    ),
    "mixed": Table(
        {
            "mixed": Part(_named("mixed"), _plain("local", "fedavg", "fedper", "omnifm")),
            "own": Part(_named("mixed"), _own_federations),
        },
        (
            "score",
            "classification/accuracy",
            "segmentation/dice",
            "super_resolution/psnr",
            "vqa/accuracy",
            "fusion/vif",
        ),
        digits=3,
        factor=1,
    ),
}
