"""Over Flower on loopback: what is started with the commands of docs/deployment.md leaves what a run in one process leaves."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from omnifm.deploy.processes import free_port
from omnifm.errors import FederationError
from tests.engines.federation import ROOT, Loopback, living, loopback, relatives
from tests.run import jobs

if find_spec("flwr") is None:
    pytest.skip("flwr is not installed: pip install 'omnifm[flower]'", allow_module_level=True)

CLIENTS = ("scan-0", "scan-1", "echo-0")
START, ROUND = 300.0, 120.0
"""Seconds that may pass: many times what it takes on a machine that has nothing else to do."""


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


@dataclass
class Served:
    """A federation that is being served."""

    place: Loopback
    port: int
    data: Path
    safe: bool

    @property
    def run(self) -> Path:
        return self.place.folder / "run"

    def serve(self, *more: str) -> subprocess.Popen[bytes]:
        certs = ["--certs", "certs"] if self.safe else ["--clients", ",".join(CLIENTS)]
        return self.place.omnifm("serve", "job.toml", *certs, "--port", str(self.port), "--out", "run", *more)

    def join(self, client: str) -> subprocess.Popen[bytes]:
        certs = ["--certs", "certs"] if self.safe else []
        cohort = str(self.data / client.partition("-")[0])
        server = f"127.0.0.1:{self.port}"
        return self.place.omnifm("join", "--server", server, "--cohort", cohort, "--client", client, *certs, name=client)

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.run / "events.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in found if event["event"] == kind]

    def committed(self) -> int:
        path = self.run / "checkpoint" / "last.json"
        return int(json.loads(path.read_text())["rounds_completed"]) if path.is_file() else 0


def program_of(serving: subprocess.Popen[bytes], name: str) -> psutil.Process:
    """Return the process in which one of Flower's programs runs, which is not the leash it is on."""
    found = [(p, p.cmdline()) for p in relatives(serving)]
    return next(p for p, words in found if "omnifm.deploy.leash" not in words and any(w.endswith(f"/{name}") for w in words))


@pytest.mark.slow
def test_the_tutorial_with_killed_servers_leaves_what_one_process_leaves(place: Loopback, data: Path) -> None:
    from omnifm.config import parse
    from omnifm.run import execute

    job = raw(data, rounds=3)
    jobs.write_toml(place.folder / "job.toml", job)
    keys = [word for client in CLIENTS for word in ("--client", client)]
    assert place.omnifm("certs", "certs", "--host", "localhost", *keys).wait() == 0
    served = Served(place, free_port(), data, safe=True)
    serving = served.serve()
    hospitals = [served.join(client) for client in CLIENTS]
    execute(parse(job), place.folder / "one")
    place.wait(lambda: served.committed() >= 1, START + ROUND, "a first round")
    program_of(serving, "flower-superlink").kill()
    place.wait(lambda: served.committed() >= 2, START + ROUND, "a second round")
    assert "the SuperLink died; going on from the last round" in place.said("serve")
    serving.kill()
    serving.wait()
    serving = served.serve("--resume")
    place.wait(lambda: serving.poll() is not None, START + 5 * ROUND, "the end of the run")
    assert serving.returncode == 0, place.said("serve")
    assert "fedper, test split" in place.said("serve") and (served.run / "report.html").is_file()
    for name in ("last.json", "best.json"):
        one, other = (json.loads((run / "checkpoint" / name).read_text()) for run in (served.run, place.folder / "one"))
        found, expected = (
            jobs.contents(run / "checkpoint" / r["file"]) for run, r in ((served.run, one), (place.folder / "one", other))
        )
        assert found == expected
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (served.run, place.folder / "one")]
    assert metrics[0]["clients"] == metrics[1]["clients"] and metrics[0]["test"] == metrics[1]["test"]
    for client in CLIENTS:
        ours = sorted((place.folder / f"hospital-{client}" / "private" / client).glob("*"))[-1]
        assert jobs.contents(ours) == jobs.contents(place.folder / "one" / "checkpoint" / "clients" / client / ours.name)
    assert place.omnifm("status", "run").wait() == 0
    assert "finished, round 3 of 3" in place.said("status")
    trained = [(e["round"], e["client"]) for e in served.events("client")]
    assert len(trained) == len(set(trained)) == 9
    kin = [child for hospital in hospitals for child in relatives(hospital)]
    for hospital in hospitals:
        hospital.terminate()
    for hospital in hospitals:
        hospital.wait(timeout=30)
    psutil.wait_procs(kin, timeout=20)
    assert living(kin) == []
    assert all("image" not in path.name for path in served.run.rglob("*")), "pictures at the server"


@pytest.mark.slow
def test_rounds_go_on_without_a_node_and_after_a_server_program_that_were_killed(place: Loopback, data: Path) -> None:
    job = raw(data, rounds=3, min_replies=2, deadline=8, evaluate_every=3)
    jobs.write_toml(place.folder / "job.toml", job)
    served = Served(place, free_port(), data, safe=False)
    serving = served.serve()
    hospitals = {client: served.join(client) for client in CLIENTS}
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
    with pytest.raises(FederationError, match=r"this version of Flower .* is not known: types has no no_such_part"):
        _replace(__import__("types"), "no_such_part", SimpleNamespace())
