"""Over Flower on loopback, without certificates: rounds that go on when programs are killed, and what travels."""

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from omnifm.deploy.app import CONNECTION, write_app, write_home
from omnifm.deploy.processes import environment, free_port, program
from omnifm.errors import FederationError
from tests.engines.federation import ROOT, ROUND, START, Loopback, Served, living, loopback, program_of, relatives
from tests.run import jobs

if find_spec("flwr") is None:
    pytest.skip("flwr is not installed: pip install 'omnifm[flower]'", allow_module_level=True)

CLIENTS = ("scan-0", "scan-1", "echo-0")


def raw(data: Path, **federation: Any) -> dict[str, Any]:
    cohorts = [{"path": str(data / "scan"), "clients": 2}, {"path": str(data / "echo")}]
    changes = {"cohorts": cohorts, "rounds": 2, "participation": 1.0, "finetune_epochs": 0, **federation}
    return jobs.raw_config(data, "fedper", federation=changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.data_folder(tmp_path_factory.getbasetemp())


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Loopback]:
    with loopback(tmp_path) as found:
        yield found


def serve_words() -> list[str]:
    """Return how a federation without certificates is served."""
    return ["serve", "job.toml", "--clients", ",".join(CLIENTS), "--out", "run"]


def join_words(client: str, port: int, cohort: Path) -> list[str]:
    """Return how a hospital joins it."""
    return ["join", "--server", f"127.0.0.1:{port}", "--cohort", str(cohort), "--client", client]


def start_foreign_run(place: Loopback, port: int) -> None:
    """Start a run of one's own over the SuperLink's control interface, with an app whose code leaves a file."""
    app, home = write_app(place.folder / "foreign"), write_home(place.folder / "foreign-home", f"127.0.0.1:{port}", None)
    code = f"open({str(place.folder / 'owned')!r}, 'w')\nfrom flwr.serverapp import ServerApp\n\napp = ServerApp()\n"
    (app / "omnifm_app" / "server.py").write_text(code)
    command = [program("flwr"), "run", str(app), CONNECTION, "--format", "json"]
    done = subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=ROUND)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_rounds_go_on_without_a_node_and_after_a_server_program_that_were_killed(place: Loopback, data: Path) -> None:
    job = raw(data, rounds=3, min_replies=2, deadline=8, evaluate_every=3)
    jobs.write_toml(place.folder / "job.toml", job)
    served, port = Served(place.folder / "run"), free_port()
    serving = place.omnifm(*serve_words(), "--port", str(port))
    place.wait(lambda: "serving on" in place.said("serve"), START, "a SuperLink")
    start_foreign_run(place, port)
    said = served.run / "flower" / "server.log"
    place.wait(lambda: said.is_file() and "is not the one that omnifm serve has started" in said.read_text(), START, "a refusal")
    assert not (place.folder / "owned").exists(), "the code of an app that came with a run was run"
    hospitals = {
        client: place.omnifm(*join_words(client, port, data / client.partition("-")[0]), name=client) for client in CLIENTS
    }
    place.wait(lambda: served.committed() >= 1, START + ROUND, "a first round")
    kin = relatives(hospitals["echo-0"])
    hospitals["echo-0"].kill()
    place.wait(lambda: served.committed() >= 2, 2 * ROUND, "a second round")
    program_of(serving, "flwr-serverapp").kill()
    place.wait(lambda: serving.poll() is not None, START + 5 * ROUND, "the end of the run")
    assert serving.returncode == 0, place.said("serve")
    rounds = served.events("round")
    assert len(rounds) == 3 and rounds[1]["missing"] == ["echo-0"]
    assert "the server's program died; going on from the last round" in place.said("serve")
    trained = [(e["round"], e["client"]) for e in served.events("client")]
    assert len(trained) == len(set(trained))
    psutil.wait_procs(kin, timeout=20)
    assert living(kin) == [], "what a killed hospital had started outlives it"


def test_what_a_node_runs_imports_neither_torch_nor_monai() -> None:
    check = (
        "import sys, omnifm.engines.flower; print(sorted({'torch', 'monai', 'omnifm.build', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bytes_are_wrapped_and_unwrapped_and_nothing_else_is_taken() -> None:
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    from omnifm.engines.flower import unwrapped, wrapped

    blob = bytes(range(256)) * 100
    assert unwrapped(wrapped(blob)) == blob and unwrapped(wrapped(b"")) == b""
    other = RecordDict({"omnifm": ArrayRecord({"call": Array("float32", (1,), "numpy.ndarray", b"1234")})})
    for strange in (RecordDict(), RecordDict({"omnifm": ConfigRecord({"call": b"x"})}), other):
        with pytest.raises(FederationError, match="a message holds no call"):
            unwrapped(strange)


def test_the_parts_of_flower_that_are_replaced_are_there() -> None:
    import flwr.supernode.runtime.run_clientapp as runtime
    import flwr.supernode.start_client_internal as loop
    from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor

    from omnifm.engines.flower import _replace

    assert {"install_from_fab", "get_load_client_app_fn"} <= vars(runtime).keys() and "time" in vars(loop)
    assert "launch" in vars(SubprocessExecutor)
    server = vars(import_module("flwr.superlink.runtime.run_serverapp")).keys()
    assert {
        "install_from_fab",
        "get_fab_metadata",
        "get_project_dir",
        "get_project_config",
        "get_fused_config_from_dir",
    } <= server
    assert "run_" in server and "get_middleware" in vars(import_module("flwr.superlink.extensions"))
    with pytest.raises(FederationError, match=r"this version of Flower .* is not known: types has no no_such_part"):
        _replace(__import__("types"), "no_such_part", SimpleNamespace())
