import csv
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from omnifm import build
from omnifm.compare import Variant, plan_cells, run_cells
from tests.run import jobs

Script = Callable[[str], ModuleType]
Call = Callable[..., list[dict[str, str]]]


@pytest.fixture
def call(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the script on a small table of two parts; return the lines of its CSV."""
    data = jobs.data_folder(tmp_path)
    config = jobs.write_toml(tmp_path / "job.toml", jobs.raw_config(data, "fedavg", federation={"rounds": 1}))
    plans, tables = script("plans"), script("tables")
    parts = {
        "main": plans.Part(config, lambda: [Variant("local"), Variant("fedavg")]),
        "wild": plans.Part(config, lambda: [Variant("fedavg", "wild", ("optimiser.lr=1e30",))], 1.0),
    }
    monkeypatch.setattr(plans, "SEEDS", (0,))
    monkeypatch.setitem(plans.TABLES, "small", plans.Table(parts, ("accuracy", "auc")))

    def run(*arguments: str) -> list[dict[str, str]]:
        results = tmp_path / "small.csv"
        line = ["tables.py", "small", "--results", str(results), "--out", str(tmp_path / "runs"), *arguments]
        monkeypatch.setattr(sys, "argv", line)
        tables.main()
        with results.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    return run


def test_finished_cells_are_lines_and_are_not_run_again(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    rows = call("--only", "main")
    assert [(row["cell"], row["status"]) for row in rows] == [("local-p0.75-s0", "ok"), ("fedavg-p0.75-s0", "ok")]
    assert all(row["commit"] and row["machine"] and row["config_hash"] and row["personal_accuracy"] for row in rows)
    assert '"fedavg p=0.75": ' in capsys.readouterr().out
    again = call()
    assert again[:2] == rows and "optimiser.lr" in again[2]["status"]
    assert "1/1 fedavg-wild-p1-s0" in capsys.readouterr().err, "only the cell without a line was run"
    assert call() == again, "a cell that failed is tried again and has one line"
    capsys.readouterr()
    call("--markdown")
    printed = capsys.readouterr().out
    assert "| fedavg | wild | 1.0 | 1 | 0 |  |" in printed, "a seed that failed is none of those behind a mean"
    assert f"| {100 * float(rows[0]['personal_accuracy']):.1f} |" in printed
    cost = [f"{float(rows[1][name]) / unit:.0f}" for name, unit in (("bytes_up", 2**20), ("bytes_down", 2**20), ("seconds", 1))]
    assert f" | {' | '.join(cost)} |\n" in printed


def test_a_part_that_is_not_there_is_one_line(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call("--only", "mian")
    assert caught.value.code == 2 and "the parts of small are main, wild" in capsys.readouterr().err


def test_references_have_one_line_for_each_variant_and_seed(script: Script, tmp_path: Path) -> None:
    """Written by another cell of the same seed, they replace themselves."""
    tables = script("tables")
    raw = jobs.raw_config(jobs.data_folder(tmp_path), "fedavg", federation={"rounds": 1})
    cells = plan_cells(jobs.write_toml(tmp_path / "job.toml", raw), [Variant("local"), Variant("fedavg")], [0], [], ())
    rows: list[dict[str, str]] = []
    for cell, outcome in run_cells(cells, tmp_path / "runs"):
        metrics = tmp_path / "runs" / "cells" / cell.name / "metrics.json"
        text = metrics.read_text().replace('"references": {}', '"references": {"majority": {"personal": {"accuracy": 0.25}}}')
        metrics.write_text(text)
        rows = tables.merged(rows, cell, outcome, tmp_path / "runs")
    assert [(row["strategy"], row["status"]) for row in rows] == [("local", "ok"), ("fedavg", "ok"), ("majority", "reference")]
    assert rows[-1]["personal_accuracy"] == "0.25"


def _row(strategy: str, seed: int, accuracy: float, status: str = "ok", participation: float = 0.2) -> dict[str, str]:
    fixed = {"cell": f"{strategy}-s{seed}", "strategy": strategy, "variant": "", "participation": str(participation)}
    return {**fixed, "seed": str(seed), "status": status, "personal_accuracy": str(accuracy)}


def test_differences_are_paired_by_seed_within_a_participation(script: Script) -> None:
    """Differences .1, .2, .3: mean .2, s = .1; half the interval is .1 * 4.303 / sqrt(3) = .248, and t = 3.464 has p = .0742."""
    plans, tables = script("plans"), script("tables")
    table = plans.Table({}, ("accuracy",))
    rows = [_row("omnifm", seed, 0.7) for seed in (10, 2, 0)] + [_row("local", s, a) for s, a in ((0, 0.6), (2, 0.5), (10, 0.4))]
    rows += [_row("ditto", 0, 0.75), _row("fedper", 1, 0.7), {**_row("gpfl", 0, 0.0, "NonFiniteError"), "personal_accuracy": ""}]
    rows += [
        _row("majority", 0, 0.2, "reference"),
        _row("omnifm", 0, 0.9, participation=1.0),
        _row("local", 0, 0.4, participation=1.0),
        _row("local", 0, 0.4, participation=0.5),
        {**_row("scaffold", 10, 0.4), "variant": "tuned"},
    ]
    assert tables.differences(rows, table, "omnifm").splitlines()[2:] == [
        "| local | 20% | +20.0 ± 24.8 | +10.0, +20.0, +30.0 | 0.074 | 0.074 |",
        "| ditto | 20% | -5.0 | -5.0 |  |  |",
        "| fedper | 20% |  |  |  |  |",
        "| gpfl | 20% |  |  |  |  |",
        "| scaffold:tuned | 20% | +30.0 | +30.0 |  |  |",
        "| local | 50% |  |  |  |  |",
        "| local | 100% | +50.0 | +50.0 |  |  |",
    ]


def test_the_same_difference_on_every_seed_has_neither_interval_nor_p(script: Script) -> None:
    table = script("plans").Table({}, ("accuracy",))
    rows = [_row("omnifm", seed, 0.7) for seed in (0, 1)] + [_row("local", seed, 0.6) for seed in (0, 1)]
    line = "| local | 20% | +10.0 | +10.0, +10.0 |  |  |"
    assert script("tables").differences(rows, table, "omnifm").splitlines()[2:] == [line]


def test_differences_to_what_was_not_run_are_one_line(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    call("--only", "main")
    capsys.readouterr()
    call("--against", "fedavg")
    assert "| local | 75% | " in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        call("--against", "omnifm")
    assert caught.value.code == 2 and "'omnifm' is not in the table; it has local, fedavg" in capsys.readouterr().err


def test_own_federations_differ_from_the_mixed_one_in_their_cohorts_alone(script: Script) -> None:
    plans = script("plans")
    if not (plans.ROOT.parent / "shared" / "data").is_dir():
        pytest.skip("the real cohorts are not beside the project")
    mixed, *own = (part.cells() for part in plans.TABLES["mixed"].parts.values())
    whole = mixed[0].config.federation.cohorts
    alone = {cell.variant.name: cell.config.federation.cohorts for cells in own for cell in cells}
    assert sorted(c.path for cohorts in alone.values() for c in cohorts) == sorted(c.path for c in whole)
    first = own[0][0].config
    same = {"federation": mixed[0].config.federation, "strategy": "local", "tasks": mixed[0].config.tasks}
    assert first.model_copy(update=same) == mixed[0].config
    settings = mixed[0].config.tasks["mixed"]["set"]
    found = {cell.variant.name: cell.config.tasks["mixed"]["set"] for cells in own for cell in cells}
    assert {task: values for each in found.values() for task, values in each.items()} == settings
    # Settings of a task that is not there are a mistake, which only the task can see.
    alone_with_settings = next(cell.config for cells in own for cell in cells if cell.variant.name == "own-fusion")
    data = build.load_data(alone_with_settings, check=False)
    assert build.make_task(alone_with_settings, data).name == "mixed"


def test_every_published_table_can_be_planned(script: Script) -> None:
    plans, tables = script("plans"), script("tables")
    if not (plans.ROOT.parent / "shared" / "data").is_dir():
        pytest.skip("the real cohorts are not beside the project")
    for name, table in plans.TABLES.items():
        cells = tables.plan(table)
        assert len({cell.name for cell in cells}) == len(cells) > 0, name


def test_segmentation_has_what_its_own_searches_chose(script: Script) -> None:
    plans, tables = script("plans"), script("tables")
    if not (plans.ROOT.parent / "shared" / "data").is_dir():
        pytest.skip("the real cohorts are not beside the project")
    cells = tables.plan(plans.TABLES["segmentation_all"])
    tuned = [cell for cell in cells if cell.variant.name == "tuned"]
    assert {cell.variant.strategy for cell in tuned} == set(build.STRATEGIES) - {"fedproto"}, "prototypes are of numbered classes"
    assert len(tuned) == 2 * 3 * (len(build.STRATEGIES) - 1) and len(cells) == len(tuned) + 2 * 3
    assert {(c.config.data.image_size, c.config.engine.precision) for c in cells} == {(64, "fp32")}, "the size of the searches"
    assert {(c.config.federation.participation, c.config.federation.rounds) for c in cells} == {(0.2, 30), (1.0, 10)}
    assert {cell.variant.strategy for cell in tuned if cell.config.model.norm == "batch"} == {"fedbn"}


def test_what_is_chosen_is_what_the_searches_say(script: Script) -> None:
    """The files of chosen options and the lines of all trials are two records of one search."""
    plans = script("plans")
    for task in ("classification", "segmentation"):
        with (plans.ROOT / "benchmarks" / "results" / f"tune_{task}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        variants = {v.strategy: " ".join(v.overrides) for v in plans.read_variants(plans.CONFIGS / f"{task}_tuned.toml")}
        chosen = {row["strategy"]: row for row in rows if row["chosen"] == "True"}
        assert variants.keys() == chosen.keys()
        for strategy, row in chosen.items():
            # FedBN's lines on classification are older than the habit of keeping its BatchNorm with them.
            assert variants[strategy].removeprefix('model.norm="batch" ') == row["set"].removeprefix('model.norm="batch" ')
            scores = {other["set"]: float(other["validation"]) for other in rows if other["strategy"] == strategy}
            assert len(scores) == 12 and scores[row["set"]] == max(scores.values()), strategy


def test_what_some_rules_have_besides_is_tried_on_fedavg_alone(script: Script) -> None:
    """Robust rules weigh clients alike and FedBN has BatchNorm: neither is their rule."""
    plans = script("plans")
    if not (plans.ROOT.parent / "shared" / "data").is_dir():
        pytest.skip("the real cohorts are not beside the project")
    parts = plans.TABLES["classification_all"].parts
    tuned = next(cell.config for cell in parts["p20"].cells() if cell.variant.strategy == "fedavg")
    equal, batch = (cell.config for cell in parts["beside20"].cells()[:2])
    assert equal == tuned.model_copy(update={"federation": tuned.federation.model_copy(update={"weighting": "equal"})})
    assert batch == tuned.model_copy(update={"model": tuned.model.model_copy(update={"norm": "batch"})})
