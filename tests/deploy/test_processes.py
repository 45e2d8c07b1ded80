"""Programs that are started end with who started them; what is asked for wrongly is one line before any is started."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from omnifm.cli.deploy import join
from omnifm.config import Config
from omnifm.data.words import Discretion
from omnifm.deploy.app import write_app, write_home, write_programs, write_server_programs
from omnifm.deploy.doctor import Finding, Patient, examine
from omnifm.deploy.join import make_member
from omnifm.deploy.processes import Child, environment, free_port, is_open, last_words
from omnifm.deploy.serve import clients_in, make_server
from omnifm.deploy.server import Job, main_of_run
from omnifm.engines.quiet import QUIET
from omnifm.errors import CheckpointError, ConfigError, DataError, FederationError
from tests.run import jobs

ROOT = Path(__file__).resolve().parents[2]
# A program that starts another one and says which; both ignore a polite request to end.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(other.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.data_folder(tmp_path_factory.getbasetemp())


@pytest.fixture
def config(data: Path) -> Config:
    return jobs.config(data, "fedavg")


def settled(condition: object, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.1)
    return bool(condition())  # type: ignore[operator]


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_a_child_ends_with_what_it_started(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    child = Child([sys.executable, "-c", STUBBORN], env(), log)
    assert settled(lambda: last_words(log).isdigit()) and child.alive()
    child.stop()
    assert settled(lambda: gone(int(last_words(log)))) and not child.alive()


def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    start = f"""
import sys, time
from pathlib import Path
from omnifm.deploy.processes import Child
import os
command = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
child = Child(command, dict(os.environ), Path({str(log)!r}))
print(child.pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", start], env=env(), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    leash = int(parent.stdout.readline())
    assert settled(lambda: last_words(log) == "up")
    kin = [leash, *(p.pid for p in psutil.Process(leash).children(recursive=True))]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert len(kin) == 2 and settled(lambda: all(map(gone, kin)))


def test_a_child_that_ends_by_itself_says_how(tmp_path: Path) -> None:
    child = Child([sys.executable, "-c", "print('a'); print('no luck'); raise SystemExit(3)"], env(), tmp_path / "log")
    assert settled(lambda: not child.alive())
    assert last_words(tmp_path / "log") == "no luck" and last_words(tmp_path / "log", 2) == "a no luck"
    child.stop()
    assert last_words(tmp_path / "nothing") == ""


def test_programs_are_told_to_be_quiet_and_are_ours_first(tmp_path: Path) -> None:
    found = environment(tmp_path / "home", MORE="1")
    assert QUIET.items() <= found.items() and found["MALLOC_ARENA_MAX"] == "2"
    assert found["MORE"] == "1" and found["FLWR_HOME"] == str(tmp_path / "home")
    assert found["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_a_hospital_runs_nothing_but_ours(tmp_path: Path) -> None:
    folder = write_programs(tmp_path / "programs")
    names = sorted(path.name for path in folder.iterdir())
    assert "flower-superexec" in names and len(names) == 7
    for name in names:
        if name == "flower-superexec":
            assert "omnifm.engines.flower" in (folder / name).read_text()
        else:
            done = subprocess.run([folder / name, "--token", "x"], capture_output=True, text=True)
            assert done.returncode == 1 and done.stderr == f"omnifm: a hospital runs no {name}; refused\n"


def test_a_server_runs_nothing_but_ours_whatever_app_a_run_comes_with(tmp_path: Path) -> None:
    folder = write_server_programs(tmp_path / "programs")
    for path in folder.iterdir():
        if path.name == "flwr-serverapp":
            assert "omnifm.deploy.server:main_of_run" in path.read_text() and os.access(path, os.X_OK)
        else:
            done = subprocess.run([path, "--token", "x"], capture_output=True, text=True)
            assert done.returncode == 1 and done.stderr == f"omnifm: a server runs no {path.name}; refused\n"
    assert len(list(folder.iterdir())) == 6


def test_the_server_s_program_serves_the_run_that_serve_has_started_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(out=tmp_path, clients=(), certs=None)
    (tmp_path / "flower").mkdir()
    (tmp_path / "flower" / "job.json").write_text(job.model_dump_json())
    monkeypatch.setenv("OMNIFM_SERVER", str(tmp_path / "flower" / "job.json"))
    monkeypatch.setattr("omnifm.deploy.server._TURN_SECONDS", 0.5)
    served: list[object] = []
    monkeypatch.setattr("omnifm.deploy.server.main", served.append)
    for text in (None, "", "8", "70"):
        if text is not None:
            job.run.write_text(text)
        with pytest.raises(FederationError, match="run 7 is not the one that omnifm serve has started; refused"):
            main_of_run("grid", 7)  # type: ignore[arg-type]
    threading.Timer(0.2, lambda: job.run.write_text("7")).start()
    main_of_run("grid", 7)  # type: ignore[arg-type]
    assert served == ["grid"] and "run 7 is not the one" in job.log.read_text()


def test_the_app_and_the_connection_are_written(tmp_path: Path) -> None:
    import tomllib

    app = tomllib.loads((write_app(tmp_path / "app") / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    for place in app["components"].values():
        module, _, _ = place.partition(":")
        compile((tmp_path / "app" / f"{module.replace('.', '/')}.py").read_text(), module, "exec")
    safe = tomllib.loads((write_home(tmp_path / "a", "h:1", tmp_path / "ca.crt") / "config.toml").read_text())
    assert safe["superlink"]["omnifm"] == {"address": "h:1", "root-certificates": str(tmp_path / "ca.crt")}
    assert tomllib.loads((write_home(tmp_path / "b", "h:1", None) / "config.toml").read_text())["superlink"]["omnifm"]["insecure"]


@pytest.fixture
def _flower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks before a start need not Flower itself."""
    for module in ("serve", "join"):
        monkeypatch.setattr(f"omnifm.deploy.{module}.require_flower", lambda: None)
        monkeypatch.setattr(f"omnifm.deploy.{module}.require_cryptography", lambda: None)


@pytest.mark.usefixtures("_flower")
def test_serving_is_checked_before_anything_starts(config: Config, tmp_path: Path) -> None:
    def serve(certs: Path | None, host: str, clients: str, run: Config = config) -> None:
        make_server(run, tmp_path / "run", certs, host, 9443, clients_in(clients), resume=False)

    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0: without --certs only 127\.0\.0\.1 works"):
        serve(None, "0.0.0.0", "a")
    with pytest.raises(ConfigError, match="--clients: without --certs nobody knows"):
        serve(None, "127.0.0.1", " , ")
    with pytest.raises(ConfigError, match=r"ca\.crt: missing; make it with omnifm certs"):
        serve(tmp_path, "0.0.0.0", "")
    for name in ("ca.crt", "server.crt", "server.key"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="holds no hospital's key"):
        serve(tmp_path, "0.0.0.0", "")
    with pytest.raises(ConfigError, match=r"b\.pub: missing"):
        serve(tmp_path, "0.0.0.0", "b")
    strict = config.model_copy(update={"federation": config.federation.model_copy(update={"min_replies": 3, "deadline": 1.0})})
    with pytest.raises(ConfigError, match="min_replies = 3: only 2 clients join"):
        serve(None, "127.0.0.1", "a,b", strict)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="is not empty and holds no run"):
        serve(None, "127.0.0.1", "a,b")


@pytest.mark.usefixtures("_flower")
def test_joining_is_checked_before_anything_starts(data: Path, tmp_path: Path) -> None:
    def join(server: str, cohort: Path, client: str, certs: Path | None = None, state: Path = tmp_path / "state") -> None:
        make_member(server, cohort, client, certs, state)

    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        join("localhost", data / "scan", "a")
    with pytest.raises(ConfigError, match="an id has letters"):
        join("localhost:1", data / "scan", "a/b")
    with pytest.raises(ConfigError, match=r"--server fl\.example\.org: without --certs only"):
        join("fl.example.org:1", data / "scan", "a")
    with pytest.raises(DataError, match="is not a folder"):
        join("localhost:1", data / "attic", "a")
    with pytest.raises(ConfigError, match=r"ca\.crt: missing"):
        join("fl.example.org:1", data / "scan", "a", tmp_path)
    (tmp_path / "ca.crt").touch()
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "a.key").touch(mode=0o644)
    with pytest.raises(ConfigError, match=r"others can read it; chmod 600 it"):
        join("fl.example.org:1", data / "scan", "a", tmp_path)
    (tmp_path / "f").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        join("localhost:1", data / "scan", "a", state=tmp_path / "f")


def levels(findings: list[Finding], word: str) -> list[str]:
    return [finding.level for finding in findings if word in finding.what]


def test_the_doctor_finds_what_is_wrong_and_says_the_mend(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert is_open("127.0.0.1", port)
        findings = examine(Patient(f"127.0.0.1:{port}", port, None, "a", data / "scan", tmp_path))
    assert levels(findings, "phone home") == ["warning"] and levels(findings, f"port {port}") == ["problem"]
    assert levels(findings, "answers, without TLS") == ["fine"] and levels(findings, "cohort scan: class") == ["fine"]
    nobody = free_port()
    assert not is_open("127.0.0.1", nobody)
    broken = examine(Patient(f"127.0.0.1:{nobody}", nobody, tmp_path, "a", tmp_path / "attic", tmp_path / "new" / "deep"))
    assert levels(broken, "does not answer") == ["problem"] and levels(broken, f"port {nobody} is free") == ["fine"]
    assert levels(broken, "attic") == ["problem"] and levels(broken, "a.key is missing") == ["problem"]
    assert all(finding.mend for finding in [*findings, *broken] if finding.level != "fine")
    assert all("\n" not in finding.what for finding in [*findings, *broken])


class Untouched:
    """Stands for what `join` starts."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def stop(self) -> None: ...

    close = stop


@pytest.mark.usefixtures("_flower")
def test_one_join_works_in_a_state_folder_and_nobody_else_reads_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two would each write the ledger over what the other has counted."""
    monkeypatch.setattr("omnifm.deploy.join.Listener", Untouched)
    monkeypatch.setattr("omnifm.deploy.join.Child", Untouched)
    (tmp_path / "state").mkdir(mode=0o755)
    first, second = (make_member("localhost:1", data / "scan", "a", None, tmp_path / "state") for _ in range(2))
    for member in (first, second):
        member.cache = str(tmp_path / "cache")
    refused: list[str] = []

    def meanwhile() -> bool:
        with pytest.raises(CheckpointError) as caught:
            second.run(lambda: True)
        refused.append(str(caught.value))
        return True

    monkeypatch.setattr(first, "_refusal", lambda: "")
    monkeypatch.setattr(second, "_refusal", lambda: "")
    first.run(meanwhile)
    assert refused == [f"{tmp_path / 'state' / 'join.lock'}: another omnifm join works in this folder"]
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("state", "cache")] == [0o700, 0o700]
    second.run(lambda: True)


class ToldError(Exception):
    """Carries what a hospital was opened with."""


@pytest.mark.usefixtures("_flower")
def test_what_a_hospital_tells_of_answers_is_what_its_command_says(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object, discretion: Discretion, **__: object) -> None:
        raise ToldError(discretion)

    monkeypatch.setattr("omnifm.deploy.join.Hospital", opened)
    monkeypatch.setattr("omnifm.cli.deploy._end_well", lambda: None)
    monkeypatch.setattr("omnifm.deploy.join.default_cache_dir", lambda: tmp_path / "cache")
    masks: list[int] = []
    monkeypatch.setattr("os.umask", masks.append)
    (tmp_path / "answers.txt").write_text("yes\n no \n", encoding="utf-8")
    own = {"answers_least": 2, "answers": tmp_path / "answers.txt"}
    for given, told in (({}, Discretion(5)), (own, Discretion(2, ("yes", "no")))):
        with pytest.raises(ToldError) as caught:
            join("localhost:1", data / "scan", "a", state=tmp_path / "state", **given)  # type: ignore[arg-type]
        assert caught.value.args == (told,)
    assert masks == [0o077, 0o077], "files are for this user alone"
