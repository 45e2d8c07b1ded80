"""Every option of every strategy is used: changing it changes the result, or is refused."""

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from omnifm.build import STRATEGIES, lookup
from omnifm.errors import ConfigError
from omnifm.federation.strategy import OneMeanOptions
from tests.support import NEIGHBOURS, differing, make_lab

MEAN = {"aggregation": "mean"}
# By option: what else must be set for it to matter, and another value. An option of a new strategy needs a line here.
CHANGES: dict[str, tuple[dict[str, Any], Any]] = {
    "aggregation": (MEAN, "neighbours"),
    "server_step": ({}, 0.5),
    "max_neighbourhoods": (NEIGHBOURS, 1),
    "neighbourhood_threshold": (NEIGHBOURS, 0.999),
    "neighbourhood_weights": (NEIGHBOURS, "hard"),
    "neighbourhood_temperature": (NEIGHBOURS, 5.0),
    "neighbourhood_shrinkage": (NEIGHBOURS, 0.0),
    "neighbourhood_alone": ({**NEIGHBOURS, "neighbourhood_threshold": 0.999}, "own"),
    "neighbourhood_band": (NEIGHBOURS, 2),
    "mu": ({}, 1.0),
    "preset": ({}, "paper"),
    "personal_pull": ({}, 0.1),
    "head_share": ({}, 0.3),
    "beta": ({}, 0.0),
    "beta1": ({}, 0.0),
    "beta2": ({}, 0.5),
    "amplitude_norm": ({}, False),
    "window": ({}, 0.2),
    "log_mean": ({}, True),
    "perturbation": ({}, 0.5),
    "interpolate": ({}, True),
    "styles": ({}, 2),
    "bank_share": ({}, 1.0),
    "inner_lr": ({}, 0.1),
    "inner_clip": ({"inner_lr": 0.1}, 1e-3),
    "predicts": ({}, "modality"),
    "upload": ({}, "features"),
    "prototypes": ({}, 2),
    "hidden": ({}, 32),
    "discriminator_lr": ({}, 0.1),
    "discriminator_epochs": ({}, 1),
    "rank": ({}, 2),
    "alpha": ({}, 32.0),
    "scored": ({}, "mean"),
    "average": ({}, "exact"),
    "layers": ({}, 1),
    "search": ({}, "greedy"),
    "spread": ({"search": "greedy"}, 2.0),
    "reduction": ({}, 4),
    "temperature": ({}, 1.0),
    "hostile": ({}, 0.0),
    "chosen": ({}, 1),
    "bound": ({}, 0.01),
    "tau": ({"tau": 1.0}, 0.4),
    "rescale": ({}, False),
    "penalty": ({}, 0.1),
    "ema": ({}, 0.5),
    "head": ({}, "shared"),
    "private_block": ({}, False),
    "private_norms": ({}, True),
    "gskr": ({}, False),
    "eca": ({}, False),
    "psp": ({}, False),
    "spalign": ({}, False),
    "top_k": ({}, 1),
    "band": ({}, 4),
    "patch": ({}, 2),
    "width": ({}, 6),
    "dim": ({}, 6),
    "mixing": ({}, "identity"),
    "rho": ({}, 0.5),
    "normalise": ({}, False),
    "lam": ({"lam": 0.5}, 1.0),
    "variance_floor": ({}, 0.2),
    "head_dim": ({}, 6),
    "heads": ({}, 4),
    "mlp_ratio": ({}, 1.0),
    "identity": ({}, True),
    "prefix": ({}, "zero"),
    "bank_source": ({}, "random"),
    "bank.capacity": ({}, 6),
    "bank.policy": ({}, "fifo"),
    "bank.prototypes": ({}, 2),
    "bank.per_class": ({}, True),
    "bank.young_rounds": ({}, 1),
    "bank.delta": ({"bank": {"policy": "lfu", "capacity": 30}}, 1.0),
    "bank.ageing": ({}, 1.0),
    "bank.ema": ({"bank": {"policy": "ema", "capacity": 30}}, 1.0),
}


def fields(options: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in options.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


CASES = [(s, option) for s in sorted(STRATEGIES) for option in fields(lookup(STRATEGIES, "strategy", s).Options)]


@cache
def outcome(strategy: str, text: str) -> tuple[dict[str, torch.Tensor], str]:
    """Return all that a run remembers, and its events. `text` is the options as JSON, so that base runs are run once."""
    folder = Path(mkdtemp())
    lab = make_lab(folder, strategy, json.loads(text), federation__rounds=3)
    found = {n: t.clone() for n, t in lab.snapshot(lab.run()).items()}
    shutil.rmtree(folder)
    return found, repr(lab.events)


def changed(base: dict[str, Any], option: str, value: Any) -> dict[str, Any]:
    table, _, inner = option.rpartition(".")
    return {**base, table: {**base.get(table, {}), inner: value}} if table else {**base, option: value}


@pytest.mark.parametrize(("strategy", "option"), CASES, ids=[f"{s}-{o}" for s, o in CASES])
def test_every_option_is_used(strategy: str, option: str) -> None:
    assert option in CHANGES, f"{option} is new: add to CHANGES a value that makes a difference"
    base, value = CHANGES[option]
    try:
        before = outcome(strategy, json.dumps(base))
        after = outcome(strategy, json.dumps(changed(base, option, value)))
    except ConfigError as refusal:
        found = lookup(STRATEGIES, "strategy", strategy)
        assert not found.averages or (
            issubclass(found.Options, OneMeanOptions) and ("aggregation" in {option, *base} or "neighbours" in f"{base} {value}")
        )
        assert "\n" not in str(refusal) and f"strategies.{strategy}" in str(refusal)
        return
    assert differing(before[0], after[0]) or before[1] != after[1]


def test_no_line_of_the_table_is_left_over() -> None:
    assert set(CHANGES) == {option for _, option in CASES}
