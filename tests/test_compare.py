"""Strategies x participation x seeds: every cell once, the table always up to date, no cell lost to another's failure."""

import csv
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import omnifm.run
from omnifm.build import STRATEGIES
from omnifm.compare import Cell, Variant, compare, plan_cells, read_variants, reference_rows, run_cells
from omnifm.errors import CheckpointError, ConfigError
from tests.run import jobs, killed

Rows = list[dict[str, str]]
VARIANTS = """
[wild]
strategy = "fedavg"
set = ["optimiser.lr=1e30"]

[slow]
strategy = "fedavg"
set = ["optimiser.lr=0.001", "federation.local_epochs=2"]
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of a comparison of one round."""
    data = jobs.data_folder(tmp_path_factory.getbasetemp())
    raw = jobs.raw_config(data, "fedavg", federation={"rounds": 1})
    return jobs.write_toml(tmp_path_factory.mktemp("compare") / "job.toml", raw)


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The folders of the cells that are really run."""
    names: list[str] = []
    execute = omnifm.run.execute

    def note(config: object, out: Path, **keywords: bool) -> object:
        names.append(out.name)
        return execute(config, out, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(omnifm.run, "execute", note)
    yield names


def cells_of(job: Path, *names: str, seeds: tuple[int, ...] = (0,), levels: tuple[float, ...] = ()) -> list[Cell]:
    return plan_cells(job, [Variant(name) for name in names], seeds, levels, [])


def table(out: Path) -> Rows:
    with (out / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def done(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison: two strategies, two levels of participation."""
    out = tmp_path_factory.mktemp("done") / "compare"
    status = compare(cells_of(job, "local", "fedavg", levels=(0.5, 1.0)), out)
    assert set(status.values()) == {"ok"}
    return out


def test_cells_are_the_product_and_differ_in_what_they_are_named_after(job: Path) -> None:
    cells = cells_of(job, "local", "fedavg", seeds=(0, 3), levels=(0.2, 1.0))
    assert len(cells) == 8
    assert {c.name for c in cells} >= {"local-p0.2-s0", "fedavg-p1-s3"}
    for cell in cells:
        found = (cell.config.strategy, cell.config.seed, cell.config.federation.participation)
        assert found == (cell.variant.strategy, cell.seed, cell.participation)
    assert {c.participation for c in cells_of(job, "local")} == {0.75}, "the config's own, where none is asked for"


def test_the_table_says_what_the_cells_say(done: Path) -> None:
    rows = table(done)
    assert [row["cell"] for row in rows] == ["local-p0.5-s0", "fedavg-p0.5-s0", "local-p1-s0", "fedavg-p1-s0"]
    for row in rows:
        found = json.loads((done / "cells" / row["cell"] / "metrics.json").read_text())
        assert row["status"] == "ok"
        assert float(row["personal_accuracy"]) == pytest.approx(found["test"]["personal"]["accuracy"], abs=1e-6)
        assert float(row["best_worst_accuracy"]) == pytest.approx(found["best"]["test"]["worst"]["accuracy"], abs=1e-6)
        assert int(row["bytes_up"]) == found["bytes"]["up"]
        assert row["config_hash"] == found["config_hash"]
        assert row["rounds"] == "1"
    assert [row["global_accuracy"] == "" for row in rows] == [True, False, True, False], "undefined is empty, not 0"
    assert (done / "report.html").stat().st_size > 10_000


def test_the_summary_has_a_line_per_group_and_score(done: Path) -> None:
    with (done / "summary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    text = (done / "summary.csv").read_text()
    assert "local" in text
    assert "fedavg" in text


def test_finished_cells_are_not_run_again(done: Path, job: Path, tmp_path: Path, executed: list[str]) -> None:
    out = Path(shutil.copytree(done, tmp_path / "compare"))
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and "cells" in p.parts}
    status = compare(cells_of(job, "local", "fedavg", levels=(0.5, 1.0)), out)
    assert executed == []
    assert set(status.values()) == {"ok"}
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert table(out) == table(done)


def test_a_further_seed_runs_that_seed_alone(done: Path, job: Path, tmp_path: Path, executed: list[str]) -> None:
    out = Path(shutil.copytree(done, tmp_path / "compare"))
    compare(cells_of(job, "fedavg", seeds=(0, 5), levels=(1.0,)), out)
    assert executed == ["fedavg-p1-s5"]
    assert [row["seed"] for row in table(out)] == ["0", "5"]


def test_a_failing_cell_is_a_row_and_the_others_finish(job: Path, tmp_path: Path, executed: list[str]) -> None:
    (tmp_path / "v.toml").write_text(VARIANTS)
    cells = plan_cells(job, [*read_variants(tmp_path / "v.toml"), Variant("local")], [0], [], ["federation.rounds=2"])
    shown: list[tuple[str, str]] = []
    status = compare(cells, tmp_path / "out", show=lambda cell, outcome: shown.append((cell.name, outcome)))
    names = ["fedavg-wild-p0.75-s0", "fedavg-slow-p0.75-s0", "local-p0.75-s0"]
    assert executed == [name for name, _ in shown] == list(status) == names
    assert "not finite" in status[names[0]] and "client " in status[names[0]] and "round " in status[names[0]]
    assert (status[names[1]], status[names[2]]) == ("ok", "ok")
    wild, slow, _ = table(tmp_path / "out")
    assert wild["status"] == status[names[0]]
    assert (wild["personal_accuracy"], wild["variant"], slow["variant"]) == ("", "wild", "slow")
    # Asked again, only the failure is tried again.
    executed.clear()
    assert compare(cells, tmp_path / "out") == status
    assert executed == names[:1]


def test_when_all_cells_fail_there_is_a_table_and_no_report(job: Path, tmp_path: Path) -> None:
    cells = plan_cells(job, [Variant("fedavg")], [0], [], ["optimiser.lr=1e30", "federation.rounds=2"])
    assert "not finite" in compare(cells, tmp_path / "out")["fedavg-p0.75-s0"]
    assert len(table(tmp_path / "out")) == 1
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_damaged_finished_cell_is_a_row_that_names_the_file(done: Path, job: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done, tmp_path / "compare"))
    broken = out / "cells" / "fedavg-p1-s0" / "metrics.json"
    broken.write_text(broken.read_text()[:100])
    outcomes = {cell.name: outcome for cell, outcome in run_cells(cells_of(job, "local", "fedavg", levels=(1.0,)), out)}
    assert outcomes["local-p1-s0"] == "ok"
    assert str(broken) in outcomes["fedavg-p1-s0"]


def test_a_cell_of_another_config_is_not_taken_for_this_one(done: Path, job: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done, tmp_path / "compare"))
    cells = plan_cells(job, [Variant("local")], [0], [1.0], ["optimiser.lr=0.5"])
    assert "was started with another config" in compare(cells, out)["local-p1-s0"]


def test_an_interrupted_cell_is_resumed(job: Path, tmp_path: Path) -> None:
    raw = jobs.raw_config(jobs.data_folder(tmp_path), "local", federation={"participation": 0.5})
    path = jobs.write_toml(tmp_path / "job.toml", raw)
    (cell,) = plan_cells(path, [Variant("local")], [0], [], [])
    folder = tmp_path / "out" / "cells" / cell.name
    assert killed.dies(killed.run, raw, folder, "last.json", 2) == -9
    assert compare([cell], tmp_path / "out") == {cell.name: "ok"}
    omnifm.run.execute(cell.config, tmp_path / "straight")
    assert jobs.left_behind(folder) == jobs.left_behind(tmp_path / "straight")


@pytest.fixture
def quick_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a pool's processes come from a fork server that has imported torch already."""
    context = killed.processes()
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: context)


def without_cost(rows: Rows) -> Rows:
    # The checkout may move on while its tests run, hence no commit.
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_rss_mib", "commit")} for row in rows]


@pytest.mark.usefixtures("quick_processes")
def test_two_jobs_give_the_table_of_one(done: Path, job: Path, tmp_path: Path) -> None:
    status = compare(cells_of(job, "local", "fedavg", levels=(0.5, 1.0)), tmp_path / "out", jobs=2)
    assert set(status.values()) == {"ok"}
    assert without_cost(table(tmp_path / "out")) == without_cost(table(done))


@pytest.mark.usefixtures("quick_processes")
def test_a_process_that_dies_costs_its_own_cell_alone(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnifm.compare._run_cell", killed.cell_or_death)
    cells = cells_of(job, "local", seeds=(0, 1, 2, 3))
    found = {cell.seed: outcome for cell, outcome in run_cells(cells, tmp_path, jobs=2)}
    assert found == {0: "ok", 1: "its process has died (killed, or out of memory)", 2: "ok", 3: "ok"}


BAD_VARIANTS: dict[str, tuple[str | bytes, str]] = {
    "no strategy": ('[a]\nset = ["seed=1"]', r"v\.toml: \[a\] needs the key strategy"),
    "unknown key": ('[a]\nstrategy = "local"\nsets = []', r"\[a\] needs the key strategy"),
    "no table": ("a = 1", r"\[a\] needs the key strategy"),
    "text for a list": ('[a]\nstrategy = "local"\nset = "seed=1"', r"\[a\] needs"),
    "numbers in the list": ('[a]\nstrategy = "local"\nset = [1]', r"\[a\] needs"),
    "strategy is a number": ("[a]\nstrategy = 1", r"\[a\] needs"),
    "a name that is a path": ('["../a"]\nstrategy = "local"', r"'../a'\] names a folder"),
    "no TOML": ("[a", r"v\.toml: not a TOML file"),
    "no text": (b"\xff\xfe", r"v\.toml: not a TOML file"),
}


@pytest.mark.parametrize("case", BAD_VARIANTS)
def test_bad_variants_are_one_line(case: str, tmp_path: Path) -> None:
    content, message = BAD_VARIANTS[case]
    path = tmp_path / "v.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_variants(path)
    assert "\n" not in str(caught.value)


def test_missing_variants_and_good_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read \(No such file"):
        read_variants(tmp_path / "none.toml")
    (tmp_path / "v.toml").write_text(VARIANTS)
    wild, slow = read_variants(tmp_path / "v.toml")
    assert wild == Variant("fedavg", "wild", ("optimiser.lr=1e30",))
    assert slow.overrides == ("optimiser.lr=0.001", "federation.local_epochs=2")


def one(job: Path, *overrides: str, seeds: tuple[int, ...] = (0,), levels: tuple[float, ...] = ()) -> list[Cell]:
    return plan_cells(job, [Variant("fedavg", "x", overrides)], seeds, levels, [])


def test_a_variants_own_participation_is_what_its_rows_say(job: Path) -> None:
    (cell,) = one(job, "federation.participation=0.5")
    assert (cell.participation, cell.config.federation.participation, cell.name) == (0.5, 0.5, "fedavg-x-p0.5-s0")


TABLE = "federation={participation=0.2, cohorts=[{path='a'}]}"
KNOWN = ", ".join(sorted(STRATEGIES))
BAD_PLANS: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown strategy": (lambda job: cells_of(job, "fedavgg"), f"strategy = 'fedavgg': unknown; known are {KNOWN}"),
    "participation of 0": (lambda job: cells_of(job, "local", levels=(0.0,)), "participation: Input should be greater than 0"),
    "participation above 1": (lambda job: cells_of(job, "local", levels=(1.5,)), "participation: Input should be less than"),
    "not a number": (lambda job: cells_of(job, "local", levels=(float("nan"),)), "participation: "),
    "negative seed": (lambda job: cells_of(job, "local", seeds=(-1,)), "seed: Input should be greater"),
    "no seed": (lambda job: cells_of(job, "local", seeds=()), "nothing to compare"),
    "no strategy": (lambda job: cells_of(job), "nothing to compare"),
    "twice a strategy": (lambda job: cells_of(job, "local", "local"), "local-p0.75-s0 is asked for twice"),
    "twice a level": (lambda job: cells_of(job, "local", levels=(0.5, 0.50)), "local-p0.5-s0 is asked for twice"),
    "a variant's seed": (lambda job: one(job, "seed=7", seeds=(0, 1)), "variant x: leave seed out of its set"),
    "a variant's strategy": (lambda job: one(job, "strategy='local'"), "variant x: leave strategy out of its set"),
    "a variant's participation": (
        lambda job: one(job, "federation.participation=0.2", levels=(1.0,)),
        "variant x: leave federation.participation out of its set",
    ),
    "the same in a table": (lambda job: one(job, TABLE, levels=(1.0,)), "variant x: leave federation.participation out"),
    "two names for one run": (
        lambda job: plan_cells(job, [Variant("fedavg"), Variant("fedavg", "x", ("federation.rounds=1",))], [0], [], []),
        "cells fedavg-p0.75-s0 and fedavg-x-p0.75-s0 are one and the same run",
    ),
    "an option of another strategy": (
        lambda job: plan_cells(job, [Variant("fedprox")], [0], [], ["strategies.fedprox.nu=1"]),
        "strategies.fedprox.nu: unknown key",
    ),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_bad_plan_fails_before_the_first_cell(case: str, job: Path) -> None:
    make, message = BAD_PLANS[case]
    with pytest.raises(ConfigError) as caught:
        make(job)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def references_of(cells: list[Cell], out: Path, psnr: Callable[[Cell], float]) -> list[tuple[str, int, float]]:
    """Variant, seed and score of each line of a reference that has these scores."""
    for cell in cells:
        cell.folder(out).mkdir(parents=True)
        views = {"bicubic": {"personal": {"psnr": psnr(cell)}, "worst": {"psnr": 0.0}}}
        (cell.folder(out) / "metrics.json").write_text(json.dumps({"references": views}))
    rows = reference_rows(cells, out)
    assert all(
        (row["cell"], row["strategy"], row["status"], row["worst_psnr"]) == ("", "bicubic", "reference", 0) for row in rows
    )
    return [(row["variant"], row["seed"], row["personal_psnr"]) for row in rows]


def test_references_have_a_line_per_variant_where_variants_have_other_data(job: Path, tmp_path: Path) -> None:
    two, eight = ("data.image_size=48",), ("data.image_size=64",)
    variants = [Variant("local"), Variant("fedavg", "x2", two), Variant("local", "x2", two), Variant("local", "x8", eight)]
    cells = plan_cells(job, variants, [0, 1], [], [])
    scores = {"": 30.0, "x2": 36.0, "x8": 27.0}
    found = references_of(cells, tmp_path / "1", lambda cell: scores[cell.variant.name] + cell.seed)
    assert found == [(name, seed, score + seed) for name, score in scores.items() for seed in (0, 1)]
    # The same name for other data: the strategy's name tells them apart.
    found = references_of(cells[1:3], tmp_path / "2", lambda cell: 1.0 if cell.variant.strategy == "fedavg" else 2.0)
    assert found == [("x2", 0, 1.0), ("local-x2", 0, 2.0)]


def test_references_have_one_line_where_all_agree_even_if_cells_failed(job: Path, tmp_path: Path) -> None:
    cells = plan_cells(
        job, [Variant("local"), Variant("fedavg"), Variant("fedavg", "slow", ("optimiser.lr=0.001",))], [0, 1], [], []
    )
    assert references_of(cells, tmp_path / "1", lambda cell: 30.0 + cell.seed) == [("", 0, 30.0), ("", 1, 31.0)]
    # Local has no seed 1, FedAvg no seed 0.
    some = [cells[0], cells[4]]
    assert references_of(some, tmp_path / "2", lambda cell: 30.0) == [("", 0, 30.0), ("", 1, 30.0)]


def test_an_output_that_is_a_file_is_refused(job: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises((ConfigError, CheckpointError), match="out: cannot be made"):
        compare(cells_of(job, "local"), tmp_path / "out")
