import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Script = Callable[[str], ModuleType]


def test_spread_is_median_lowest_highest(script: Script) -> None:
    found = script("measure").Spread.of([3.0, 1.0, 10.0])
    assert (found.median, found.low, found.high, found.repeats) == (3.0, 1.0, 10.0, 3)


@pytest.mark.parametrize(
    ("value", "at_least", "met"), [(1.0, False, True), (1.1, False, False), (1.0, True, True), (0.9, True, False)]
)
def test_a_goal_is_met_on_its_own_side_of_the_limit(script: Script, value: float, at_least: bool, met: bool) -> None:
    assert script("measure").goal("speed", value, 1.0, at_least=at_least)["met"] is met


def test_rows_are_appended_below_one_header(script: Script, tmp_path: Path) -> None:
    measure = script("measure")
    for value in (1.0, 2.0):
        measure.append_rows(tmp_path / "r.csv", [measure.row("job", "omnifm", "time", "ms", value)], seed=7)
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["value"] for row in rows] == ["1.0", "2.0"]
    assert {(row["system"], row["unit"], row["seed"]) for row in rows} == {("omnifm", "ms", "7")}
    assert rows[0]["machine"] and rows[0]["commit"]


def test_rows_never_go_below_another_header(script: Script, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RuntimeError, match=r"r\.csv: has other columns"):
        script("measure").append_rows(tmp_path / "r.csv", [], seed=0)


def test_peak_memory_is_the_childs_own(script: Script, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; b = bytearray(150 << 20); b[::4096] = b'1' * len(b[::4096]); time.sleep(1.2)"]
    done = script("measure").run_process(command, {}, tmp_path / "log", watch_memory=True)
    assert 150 < done.peak_rss_mib < 250
    assert 150 < done.peak_pss_mib < 250
    assert 150 < done.peak_own_mib < done.peak_rss_mib
    assert done.end - done.begin > 1.2


def test_a_failing_process_is_told_with_the_end_of_its_log(script: Script, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('the reason', flush=True); raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match=r"ended with 3;(.|\n)*the reason"):
        script("measure").run_process(command, {}, tmp_path / "log", watch_memory=False)


def test_memory_of_a_tree_counts_children(script: Script) -> None:
    code = "b = bytearray(b'1') * (100 << 20); print(1, flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        measure = script("measure")
        alone = measure.tree_pss_mib(child.pid)
        together = measure.tree_pss_mib(os.getpid())
    finally:
        child.communicate(b"\n")
    assert alone > 100
    assert together > alone


@pytest.mark.parametrize("name", ["engine", "flower", "memory", "soak", "step", "strategies", "workers"])
def test_help_names_the_quick_look(
    script: Script, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0
    assert "--quick" in capsys.readouterr().out
