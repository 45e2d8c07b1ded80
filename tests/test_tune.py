"""A search sees validation alone, tries equally much for everybody, and what it chose can be compared."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

import omnifm.run
import omnifm.tune
from omnifm.build import STRATEGIES, read_cohort
from omnifm.compare import Cell, plan_cells, read_variants
from omnifm.config import load, parse
from omnifm.errors import ConfigError, FederationError
from omnifm.federation.evaluation import Evaluator
from omnifm.tune import SIZE, best, changes, grid, plan, remarks, tune
from tests.run import jobs

RATES = ("0.02", "0.00667", "0.06")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = jobs.data_folder(tmp_path_factory.getbasetemp())
    raw = jobs.raw_config(data, "fedavg", federation={"rounds": 2})
    return jobs.write_toml(tmp_path_factory.mktemp("tune") / "job.toml", raw)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "trials.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_grid_begins_with_the_configs_own_values(job: Path) -> None:
    config = load(job)
    assert grid("fedavg", config)[0] == ("optimiser.lr=0.02", "optimiser.weight_decay=0.0001", 'optimiser.schedule="constant"')
    assert {text for found in grid("fedavg", config) for text in found if "lr=" in text} == {f"optimiser.lr={r}" for r in RATES}
    assert grid("fedprox", config)[0] == ("strategies.fedprox.mu=0.001", "optimiser.lr=0.02")
    assert len(grid("scaffold", config)[0]) == 3, "two options of its own, three rates and two decays"


def test_no_decay_has_another_to_compare_with(job: Path) -> None:
    config = load(job, ["optimiser.weight_decay=0.0"])
    assert {found[1] for found in grid("fedavg", config)} == {"optimiser.weight_decay=0.0", "optimiser.weight_decay=0.01"}


def test_an_unknown_strategy_is_named(job: Path) -> None:
    with pytest.raises(ConfigError, match="'fedbest': unknown"):
        grid("fedbest", load(job))


def test_trials_are_chosen_by_validation_and_no_test_image_is_seen(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits: list[str] = []
    evaluate = Evaluator.evaluate

    def note(self: Evaluator, *arguments: object, **keywords: object) -> object:
        splits.append(str(arguments[2]))
        return evaluate(self, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(Evaluator, "evaluate", note)
    trials = tune(plan(job, ["fedavg", "fedprox"], 5, []), tmp_path / "t")
    assert len(trials) == 2 * SIZE and splits == ["val"] * 2 * SIZE, "one look at each, after the last round"
    table = rows(tmp_path / "t")
    for name in ("fedavg", "fedprox"):
        own = [row for row in table if row["strategy"] == name]
        chosen = [row for row in own if row["chosen"] == "True"]
        assert len(own) == SIZE and len(chosen) == 1
        top = max(float(row["validation"]) for row in own)
        assert chosen[0] == next(row for row in own if float(row["validation"]) == top)
        folder = tmp_path / "t" / "cells" / chosen[0]["trial"]
        events = [e for e in jobs.lines(folder / "events.jsonl") if e["event"] == "evaluation"]
        assert float(chosen[0]["validation"]) == pytest.approx(events[-1]["personal"]["accuracy"], abs=1e-6)
        machine = json.loads((folder / "environment.json").read_text())
        assert (chosen[0]["commit"], chosen[0]["machine"]) == (machine["commit"], machine["machine"])
        assert not (folder / "checkpoint").exists() and not (folder / "metrics.json").exists()


def test_without_a_validation_row_there_is_nothing_to_choose_by(tmp_path: Path) -> None:
    for name, modality in jobs.MODALITIES.items():
        jobs.write_images(tmp_path / name, name, modality, {"train": 24, "test": 4})
    path = jobs.write_toml(tmp_path / "job.toml", jobs.raw_config(tmp_path, "fedavg", federation={"rounds": 1}))
    (trial,) = tune(plan(path, ["fedavg"], 5, [])[:1], tmp_path / "t")
    assert (trial.score, trial.status) == (None, "no client has a row of the validation split to choose by")
    assert best([trial]) == {} and rows(tmp_path / "t")[0]["status"] == trial.status


def test_what_a_search_chooses_by_is_tested_by_no_comparison(tmp_path: Path) -> None:
    """Splits that the manifest leaves open are the same for the seed of a search and for those of a comparison."""
    folder = jobs.write_images(tmp_path / "scan", "scan", "MRI", {"train": 40})
    manifest = folder / "manifest.csv"
    manifest.write_text(manifest.read_text().replace(",train,", ",,"))
    jobs.write_images(tmp_path / "echo", "echo", "US")
    splits = [
        {row.id: row.split for row in read_cohort(jobs.config(tmp_path, seed=seed), folder).rows} for seed in (100, 0, 1, 2)
    ]
    assert all(found == splits[0] for found in splits) and set(splits[0].values()) == {"train", "val", "test"}


def test_what_was_chosen_can_be_compared(job: Path, tmp_path: Path) -> None:
    trials = tune(plan(job, ["fedprox"], 5, []), tmp_path / "t")
    (variant,) = read_variants(tmp_path / "t" / "tuned.toml")
    assert (variant.strategy, variant.name) == ("fedprox", "tuned")
    (cell,) = plan_cells(job, [variant], [0], [], [])
    chosen = best(trials)["fedprox"]
    assert cell.name == "fedprox-tuned-p0.75-s0" and list(variant.overrides) == changes(chosen)
    assert cell.config.optimiser == chosen.cell.config.optimiser
    assert cell.config.strategies["fedprox"] == chosen.cell.config.strategies["fedprox"]
    assert cell.config.federation.evaluate_every == load(job).federation.evaluate_every


def test_it_goes_on_where_it_was(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = plan(job, ["local"], 5, [])
    tune(cells[:3], tmp_path)
    (tmp_path / "cells" / cells[0].name / "validation.json").unlink()
    tried: list[str] = []
    said = omnifm.tune._try
    monkeypatch.setattr(omnifm.tune, "_try", lambda cell, out: tried.append(cell.name) or said(cell, out))  # type: ignore[func-returns-value]
    shown: list[str] = []
    trials = tune(cells[:5], tmp_path, show=lambda cell, outcome: shown.append(cell.name))
    assert tried == [cells[0].name, cells[3].name, cells[4].name] and len(shown) == 5
    assert [trial.cell.name for trial in trials] == [cell.name for cell in cells[:5]] == [row["trial"] for row in rows(tmp_path)]


def test_a_trial_that_fails_is_a_line_and_never_chosen(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = omnifm.run.validate

    def fail(config: omnifm.config.Config, out: Path, **keywords: bool) -> object:
        if config.optimiser.lr == 0.02:
            raise FederationError("client a, round 0: the loss is not finite")
        return validate(config, out, **keywords)

    monkeypatch.setattr(omnifm.tune, "validate", fail)
    trials = tune(plan(job, ["fedavg"], 5, [])[:6], tmp_path)
    assert [trial.score is None for trial in trials] == [True] * 4 + [False] * 2
    table = rows(tmp_path)
    assert table[0]["status"].endswith("the loss is not finite") and table[0]["validation"] == ""
    assert best(trials)["fedavg"].cell.config.optimiser.lr == 0.00667


def test_of_equals_the_first_is_chosen(job: Path) -> None:
    cells = plan(job, ["fedavg"], 5, [])
    scores = [None, 0.25, 0.5, 0.5, math.nextafter(0.5, 0)]
    trials = [omnifm.tune.Trial(cell, "ok", score, 0.0) for cell, score in zip(cells, scores, strict=False)]
    assert best(trials)["fedavg"] is trials[2]
    zero = [omnifm.tune.Trial(cells[0], "ok", None, 0.0), omnifm.tune.Trial(cells[1], "ok", 0.0, 0.0)]
    assert best(zero)["fedavg"] is zero[1] and best(trials[:1]) == {}


def test_processes_give_the_same_trials(job: Path, tmp_path: Path) -> None:
    cells: list[Cell] = plan(job, ["fedper"], 5, [])[:3]
    alone, together = tune(cells, tmp_path / "1"), tune(cells, tmp_path / "2", jobs=2)
    assert [t.score for t in alone] == [t.score for t in together]


def test_every_strategys_search_can_be_planned() -> None:
    raw = {"federation": {"cohorts": [{"path": "nowhere"}]}}
    assert {len(grid(name, parse(raw))) for name in STRATEGIES} == {SIZE}


def test_what_was_set_for_all_trials_is_compared_with_too(job: Path, tmp_path: Path) -> None:
    """A strategy tuned with BatchNorm cannot be compared without; the length and the seed of the search are its own."""
    given = ["model.norm='batch'", "federation.rounds=1", "optimiser.lr=0.01", "seed=9", "federation.local_epochs=2"]
    given += ["federation.participation=0.5", "strategy='local'"]
    trials = tune(plan(job, ["fedbn"], 5, given)[:2], tmp_path)
    assert {(t.cell.config.strategy, t.cell.config.federation.participation) for t in trials} == {("fedbn", 0.5)}
    (variant,) = read_variants(tmp_path / "tuned.toml")
    assert variant.overrides[:2] == ("model.norm='batch'", "federation.local_epochs=2")
    assert [text.partition("=")[0] for text in variant.overrides[2:]] == [
        "optimiser.lr", "optimiser.weight_decay", "optimiser.schedule",
    ]  # fmt: skip
    one, two = plan_cells(job, [variant], [0], [0.75, 1.0], [])
    assert one.config.model.norm == "batch" and one.config.federation.rounds == 2
    assert (one.config.federation.participation, two.config.federation.participation) == (0.75, 1.0)


def test_a_reader_is_told_of_edges_and_of_what_makes_no_difference(job: Path, tmp_path: Path) -> None:
    cells = plan(job, ["trimmed_mean"], 5, [])
    rates = {0.00667: 0.5, 0.02: 0.4, 0.06: 0.3}

    def trials(score: Callable[[Cell], float | None]) -> list[omnifm.tune.Trial]:
        return [omnifm.tune.Trial(cell, "ok", score(cell), 0.0) for cell in cells]

    alike = trials(lambda cell: rates[cell.config.optimiser.lr])
    low = "optimiser.lr = 0.00667 is the lowest tried: there may be better ones"
    same = "strategies.trimmed_mean.beta makes no difference here: all 4 values score alike"
    assert remarks(alike) == {"trimmed_mean": [same, low]}
    omnifm.tune._write(alike, tmp_path)
    assert (tmp_path / "tuned.toml").read_text().startswith(f"# {same}\n# {low}\n[trimmed_mean-tuned]\n")
    assert len(read_variants(tmp_path / "tuned.toml")) == 1
    middle = trials(
        lambda cell: -abs(cell.config.optimiser.lr - 0.02) - abs(cell.config.strategies["trimmed_mean"]["beta"] - 0.2)
    )
    assert remarks(middle) == {"trimmed_mean": []}
    high = trials(lambda cell: -abs(cell.config.optimiser.lr - 0.02) + cell.config.strategies["trimmed_mean"]["beta"])
    assert remarks(high) == {
        "trimmed_mean": ["strategies.trimmed_mean.beta = 0.4 is the highest tried: there may be better ones"]
    }
    assert remarks([*alike[:-1], omnifm.tune.Trial(cells[-1], "ended", None, 0.0)]) == {}, "not all of it was seen"
