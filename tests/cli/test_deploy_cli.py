"""The commands of a federation across machines: their help, their mistakes in one line, and what they show."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from omnifm.deploy.board import Board
from tests.cli.command import Command

without_flower = pytest.mark.skipif(find_spec("flwr") is not None, reason="flwr is installed")


@pytest.mark.parametrize("command", ["certs", "serve", "join", "status", "doctor"])
def test_each_command_says_what_it_does(omnifm: Command, command: str) -> None:
    assert omnifm(command, "--help").code == 0
    assert command in omnifm("--help").out


@without_flower
def test_without_the_extra_it_is_one_line(omnifm: Command, job: Path, data: Path, tmp_path: Path) -> None:
    extra = "across machines needs the extra flower: pip install 'omnifm[flower]'"
    assert omnifm("serve", job, "--clients", "a", "--out", tmp_path / "run").complaint == extra
    assert omnifm("join", "--server", "localhost:1", "--cohort", data / "scan", "--client", "a").complaint == extra
    assert not (tmp_path / "run").exists()


def test_certs_with_nothing_to_make_says_so(omnifm: Command, tmp_path: Path) -> None:
    complaint = omnifm("certs", tmp_path / "certs").complaint
    assert complaint.startswith("nothing to make" if find_spec("cryptography") else "keys need the extra flower")


def test_status_shows_every_client_and_of_nothing_is_one_line(omnifm: Command, tmp_path: Path) -> None:
    assert "holds no status.json" in omnifm("status", tmp_path).complaint
    Board(tmp_path, ["clinic-0", "clinic-1"]).write()
    shown = omnifm("status", tmp_path)
    assert shown.code == 0 and "waiting for hospitals" in shown.out and "clinic-1" in shown.out


def test_the_doctor_says_each_problem_with_its_mend(omnifm: Command, data: Path, tmp_path: Path) -> None:
    ended = omnifm("doctor", "--cohort", tmp_path / "attic", "--server", "127.0.0.1:1")
    assert ended.code == 1
    assert "problem: 127.0.0.1:1 does not answer" in ended.out and "is omnifm serve running there" in ended.out
    fine = omnifm("doctor", "--cohort", data / "scan")
    assert "fine: cohort scan: classification, 40 rows" in fine.out
