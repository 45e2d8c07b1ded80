"""Help, versions, exit codes, `omnifm compare` and `omnifm report`; and the real command in processes of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

import omnifm as package
from omnifm.build import STRATEGIES, lookup
from omnifm.cli.listing import strategy_rows
from omnifm.config import load
from omnifm.federation.strategy import StrategyOptions
from omnifm.run import execute
from tests.cli.command import Command
from tests.run.jobs import left_behind, raw_config, write_toml

ROOT = Path(__file__).resolve().parents[2]
Finished = Callable[[str], Path]


def test_help_of_every_command(omnifm: Command) -> None:
    for words in ([], ["run"], ["compare"], ["tune"], ["report"], ["data"], ["data", "check"], ["data", "make", "atlas"]):
        ended = omnifm(*words, "--help")
        assert (ended.code, ended.err) == (0, "")
        assert "Usage: " in ended.out
    for command in ("run", "compare", "report", "data"):
        assert command in omnifm("--help").out


def test_the_version(omnifm: Command) -> None:
    assert omnifm("--version").out == f"omnifm {package.__version__}\n"


@pytest.mark.parametrize(
    "words", [["runn"], ["run"], ["run", "a.toml", "--outt", "x"], ["compare", "a.toml", "--jobs", "0"], ["report"]]
)
def test_misuse_is_exit_code_2_and_no_traceback(words: list[str], omnifm: Command) -> None:
    ended = omnifm(*words)
    assert ended.code == 2
    assert ended.out == ""
    assert "Usage" in ended.err
    assert "Traceback" not in ended.err


def test_what_the_system_refuses_is_one_line(omnifm: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **named: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "images/1.png"))

    monkeypatch.setattr("omnifm.data.importers.folder.import_folder", full)
    words = ("data", "import", "folder", str(tmp_path), str(tmp_path / "c"), "--modality", "CT")
    assert omnifm(*words).complaint.endswith("images/1.png: No space left on device")


def test_no_command_shows_the_help(omnifm: Command) -> None:
    ended = omnifm()
    assert ended.code in (0, 2)
    assert "Usage: " in ended.out + ended.err


def test_strategies_are_listed_with_what_they_keep_and_send(omnifm: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ended = omnifm("list", "strategies")
    printed = {line.split()[0]: " ".join(line.split()) for line in ended.out.splitlines()[2:] if line[0] != " "}
    assert ended.code == 0 and printed.keys() == STRATEGIES.keys()
    assert printed["fedper"] == "fedper Arivazhagan et al., 2019 head - every task"
    assert "the control variate's change; down: the server's" in printed["scaffold"]


def own_options(options: type[StrategyOptions]) -> list[str]:
    """Return what a strategy has besides the options of all, with its defaults and, of a choice, what else there is."""
    texts = []
    for name, field in options.model_fields.items():
        if name not in StrategyOptions.model_fields or field.default != StrategyOptions.model_fields[name].default:
            others = (
                [c for c in get_args(field.annotation) if c != field.default] if get_origin(field.annotation) is Literal else []
            )
            texts.append(f"`{name}` {json.dumps(field.default)}" + "".join(f" or {json.dumps(other)}" for other in others))
    return texts


def test_the_documents_table_of_strategies_is_the_commands() -> None:
    """What a reader of docs/strategies.md is told is what the classes say."""
    lines = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8").splitlines()
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    assert [[row[0].strip("`"), *row[1:5]] for row in shown] == strategy_rows()
    for name, *_, options, searched in shown:
        found = lookup(STRATEGIES, "strategy", name.strip("`"))
        card = found.card
        many = name == "`omnifm`"
        assert options == ("[its page](configuration.md#strategiesomnifm)" if many else "; ".join(own_options(found.Options)))
        assert searched == "; ".join(f"`{k}` {', '.join(map(json.dumps, v))}" for k, v in card.search.items())


def test_tune_prints_and_writes_what_it_chose(omnifm: Command, job: Path) -> None:
    ended = omnifm("tune", job, "--strategies", "fedprox", "--seed", "7", "--set", "federation.rounds=1", "--out", "t")
    assert ended.code == 0 and "strategies.fedprox.mu=" in ended.out and "t/tuned.toml" in ended.out
    assert len(Path("t/trials.csv").read_text(encoding="utf-8").splitlines()) == 13


def test_tune_of_nothing_or_of_the_unknown(omnifm: Command, job: Path) -> None:
    assert "nothing to tune" in omnifm("tune", job, "--out", "t").complaint
    assert "'fedbest': unknown" in omnifm("tune", job, "--strategies", "fedavg,fedbest", "--out", "t").complaint
    assert not Path("t").exists()


def test_report_is_written_anew(omnifm: Command, finished: Finished, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished("omnifm"), tmp_path / "run"))
    before = (run / "report.html").read_text(encoding="utf-8")
    (run / "report.html").unlink()
    ended = omnifm("report", run)
    assert (ended.code, ended.out) == (0, f"report: {run / 'report.html'}\n")
    assert (run / "report.html").read_text(encoding="utf-8") == before


def test_report_of_what_is_no_run(omnifm: Command, finished: Finished, tmp_path: Path) -> None:
    assert "there is no such run folder" in omnifm("report", tmp_path / "none").complaint
    run = Path(shutil.copytree(finished("fedavg"), tmp_path / "run"))
    for name in ("metrics.json", "events.jsonl", "split.json", "environment.json", "config.toml"):
        (run / name).rename(tmp_path / "aside")
        assert name in omnifm("report", run).complaint
        (tmp_path / "aside").rename(run / name)
    (run / "metrics.json").write_text("{")
    assert "metrics.json: not JSON" in omnifm("report", run).complaint


def test_compare_prints_means_and_skips_what_is_done(omnifm: Command, job: Path) -> None:
    words = ("compare", job, "--strategies", "local, fedavg", "--seeds", "0,1", "--participation", "0.5", "--out", "c")
    first = omnifm(*words)
    assert first.code == 0, first.err
    for text in ("local", "fedavg", "±", "table: c/table.csv", "report: c/report.html"):
        assert text in first.out
    started = time.perf_counter()
    assert omnifm(*words).out == first.out
    assert time.perf_counter() - started < 10
    assert omnifm("report", "c").out == "report: c/report.html\n"


def test_compare_with_a_failing_cell_ends_with_1_and_says_which(omnifm: Command, job: Path, tmp_path: Path) -> None:
    (tmp_path / "v.toml").write_text('[big]\nstrategy = "omnifm"\nset = ["strategies.omnifm.band=64"]\n')
    ended = omnifm("compare", job, "--strategies", "local", "--variants", "v.toml", "--out", "c")
    assert ended.code == 1
    assert "table: c/table.csv" in ended.out
    assert "omnifm: 1 of 2 cells failed, the first: omnifm-big-p0.75-s0: the model cannot be built" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to compare: give --strategies or --variants"),
        (["--strategies", "fedavgg"], "strategy = 'fedavgg': unknown"),
        (["--strategies", "local", "--seeds", "0,one"], "--seeds '0,one': expected values with commas between"),
        (["--strategies", "local", "--seeds", ","], "nothing to compare"),
        (["--strategies", "local", "--seeds", "1,1"], "asked for twice"),
        (["--strategies", "local", "--participation", "2"], "participation: Input should be less than or equal to 1"),
        (["--strategies", "local", "--participation", "half"], "--participation 'half': expected values"),
        (["--variants", "none.toml"], "none.toml: cannot be read"),
        (["--strategies", "local", "--set", "federation.round=1"], "federation.round: unknown key"),
    ],
)
def test_comparisons_that_cannot_be(words: list[str], message: str, omnifm: Command, job: Path) -> None:
    assert message in omnifm("compare", job, *words, "--out", "c").complaint
    assert not Path("c").exists()


# --------------------------------------------------------------------------- processes of their own
BLOCKED = """
import sys
def refuse(event, arguments):
    # Unix sockets stay: they are no network, and worker processes talk through them.
    if event in ("socket.getaddrinfo", "socket.gethostbyname") or (event == "socket.connect" and isinstance(arguments[1], tuple)):
        print("NETWORK", event, arguments, file=sys.stderr)
        sys.stderr.flush()
        import os
        os._exit(99)
sys.addaudithook(refuse)
"""


def environment(folder: Path) -> dict[str, str]:
    """An environment in which every Python process dies at its first attempt to reach a network, and may not warn."""
    (folder / "sitecustomize.py").write_text(BLOCKED)
    path = os.pathsep.join([str(folder), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def start(folder: Path, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "omnifm", *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=pipe, stderr=pipe, text=True)


def test_the_block_blocks(tmp_path: Path) -> None:
    code = "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)"
    shown = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True)
    assert shown.returncode == 99
    assert "NETWORK" in shown.stderr


HEAVY = ("torch", "monai", "numpy", "pydantic", "plotly", "sklearn", "scipy")


def test_help_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.argv = ['omnifm', '--help']\nfrom omnifm.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    shown = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, timeout=60)
    assert shown.stderr == "[]\n"
    assert "compare" in shown.stdout


def test_an_error_before_any_data_needs_no_torch(tmp_path: Path, data: Path) -> None:
    path = write_toml(tmp_path / "job.toml", raw_config(data, "fedavg", federation={"round": 1}))
    code = (
        f"import sys\nsys.argv = ['omnifm', 'run', {str(path)!r}]\nfrom omnifm.cli.main import main\n"
        "try: main()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, timeout=60)
    assert shown.stdout == "1 False\n"
    assert shown.stderr == "omnifm: federation.round: unknown key\n"


def test_a_real_run_interrupted_by_ctrl_c_then_killed_then_resumed_without_a_network(
    tmp_path: Path, data: Path, finished: Finished
) -> None:
    """Three starts of the real command: SIGINT, SIGKILL from outside, and to the end."""
    path = write_toml(tmp_path / "job.toml", raw_config(data, "local", federation={"rounds": 24, "evaluate_every": 8}))
    run = tmp_path / "run"
    events = run / "events.jsonl"
    first = start(tmp_path, "run", path, "--out", run)
    _wait_for_rounds(first, run, 1)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    assert err.splitlines()[-1] == "omnifm: interrupted; what is finished is on disk (continue with --resume)"
    assert "Traceback" not in err
    assert out == ""
    done = events.read_text().count('"event": "round"')
    second = start(tmp_path, "run", path, "--out", run, "--resume")
    _wait_for_rounds(second, run, done + 2)
    second.kill()
    second.communicate(timeout=60)
    assert not (run / "metrics.json").exists()
    execute(load(path), run, resume=True)
    execute(load(path), tmp_path / "straight")
    assert left_behind(run) == left_behind(tmp_path / "straight")


def _wait_for_rounds(process: subprocess.Popen[str], run: Path, rounds: int) -> None:
    deadline = time.monotonic() + 120
    while not list((run / "checkpoint").glob(f"server-{rounds:06d}.*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_whole_run_with_workers_needs_no_network_and_no_warning(tmp_path: Path, data: Path) -> None:
    raw = raw_config(data, "omnifm", federation={"rounds": 1}, engine={"workers": 2})
    process = start(tmp_path, "run", write_toml(tmp_path / "job.toml", raw), "--out", tmp_path / "run")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "omnifm, test split" in out
    assert len(err.splitlines()) == 1, err
    assert (tmp_path / "run" / "report.html").is_file()
