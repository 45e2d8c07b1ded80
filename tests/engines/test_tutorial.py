"""From two empty machines to a trained model, over Flower with TLS and node keys, by the very commands that the page gives."""

import json
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from omnifm.deploy.processes import free_port
from tests.engines.federation import ROUND, START, Loopback, Served, living, loopback, program_of, relatives
from tests.engines.tutorial import CLINICS, Tutorial, real_cohorts, renamed, with_names
from tests.run import jobs

if find_spec("flwr") is None:
    pytest.skip("flwr is not installed: pip install 'omnifm[flower]'", allow_module_level=True)

# What the page leaves to the defaults, so small that a round takes seconds; and fewer rounds.
SMALL: dict[str, Any] = {
    "data": {"image_size": 32},
    "model": {"width": 4, "stem_stride": 1},
    "optimiser": {"batch_size": 8},
    "strategies": {"omnifm": {"dim": 8, "band": 8, "bank": {"prototypes": 2}}},
}
FEWER = {"rounds": 3, "local_steps": 2, "finetune_epochs": 0}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Loopback]:
    with loopback(tmp_path) as found:
        yield found


@pytest.fixture
def cohorts(tmp_path: Path) -> list[Path]:
    """Three real cohorts where they are; three that are drawn where not."""
    drawn = (("scan", "MRI"), ("echo", "US"), ("slice", "CT"))
    return real_cohorts() or [jobs.write_images(tmp_path / "drawn" / name, name, modality) for name, modality in drawn]


@dataclass
class Machines:
    """A machine for the server and one for each hospital: folders, each with what the page says is there."""

    place: Loopback
    cohorts: list[Path]
    port: int

    @property
    def page(self) -> Tutorial:
        return Tutorial.read()

    def names(self, hospital: int) -> dict[str, str]:
        """Return what stands for the page's names where one hospital follows it; the server reads it as the first."""
        others = {clinic: path.name for clinic, path in zip(CLINICS, self.cohorts, strict=True)}
        here = {"clinic_a": self.cohorts[hospital].name}
        return {"fl.example.org": "localhost", "9443": str(self.port), **others, **here}

    def folder(self, name: str) -> Path:
        made = self.place.folder / name
        made.mkdir(exist_ok=True)
        return made

    def at_server(self, words: list[str], *more: str) -> subprocess.Popen[bytes]:
        self.folder("server")
        return self.place.omnifm(*with_names(words, self.names(0)), *more, machine="server")

    def at_hospital(self, hospital: int, words: list[str]) -> subprocess.Popen[bytes]:
        machine = self.cohorts[hospital].name
        self.folder(machine)
        return self.place.omnifm(*with_names(words, self.names(hospital)), name=f"{words[0]}-{machine}", machine=machine)

    def certify(self) -> None:
        """Follow steps 1 and 2: authority, keys, and the files that people send each other."""
        assert self.at_server(self.page.authority).wait() == 0, self.place.said("certs")
        for number, cohort in enumerate(self.cohorts):
            assert self.at_hospital(number, self.page.key).wait() == 0
            server, here = self.folder("server") / "certs", self.folder(cohort.name)
            (server / "nodes").mkdir(exist_ok=True)
            shutil.copy(here / "certs" / "nodes" / f"{cohort.name}-0.pub", server / "nodes")
            shutil.copy(server / "ca.crt", here / "certs")
            (here / "cohorts").mkdir()
            (here / "cohorts" / cohort.name).symlink_to(cohort)

    def write_job(self) -> dict[str, Any]:
        """Write the page's config, made small; return it as one machine with all cohorts would run it."""
        raw = {**tomllib.loads(renamed(self.page.job, self.names(0))), **SMALL}
        raw["federation"] |= FEWER
        jobs.write_toml(self.folder("server") / "job.toml", raw)
        here = [{"path": str(path)} for path in self.cohorts]
        return {**raw, "federation": {**raw["federation"], "cohorts": here}}


@pytest.mark.slow
def test_its_commands_with_killed_servers_leave_what_one_process_leaves(
    place: Loopback, cohorts: list[Path], tmp_path: Path
) -> None:
    from omnifm.config import parse
    from omnifm.run import execute

    machines, one = Machines(place, cohorts, free_port()), tmp_path / "one"
    page, served = machines.page, Served(machines.folder("server") / "run")
    machines.certify()
    alone = machines.write_job()
    serving = machines.at_server(page.serve)
    # A hospital looks first; the server has to be there to be looked at.
    place.wait(lambda: "waiting" in place.said("serve") or serving.poll() is not None, START, "the server")
    assert machines.at_hospital(0, page.doctor).wait() == 0, place.said(f"doctor-{cohorts[0].name}")
    hospitals = [machines.at_hospital(number, page.join) for number in range(3)]
    execute(parse(alone), one)
    place.wait(lambda: served.committed() >= 1, START + ROUND, "a first round")
    program_of(serving, "flower-superlink").kill()
    place.wait(lambda: served.committed() >= 2, START + ROUND, "a second round")
    assert "the SuperLink died; going on from the last round" in place.said("serve")
    serving.kill()
    serving.wait()
    serving = machines.at_server(page.serve, "--resume")
    place.wait(lambda: serving.poll() is not None, START + 5 * ROUND, "the end of the run")
    assert serving.returncode == 0, place.said("serve")
    assert "omnifm, test split" in place.said("serve") and (served.run / "report.html").is_file()
    require_same_weights(served.run, one)
    for cohort in cohorts:
        client = f"{cohort.name}-0"
        ours = sorted((machines.folder(cohort.name) / f"hospital-{client}" / "private").glob(f"run-*/{client}/*"))[-1]
        assert jobs.contents(ours) == jobs.contents(one / "checkpoint" / "clients" / client / ours.name)
    assert machines.at_server(page.status).wait() == 0
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


def require_same_weights(run: Path, one: Path) -> None:
    """Compare shared tensors, at the last round and the best, and the test scores."""
    for name in ("last.json", "best.json"):
        ours, other = (json.loads((folder / "checkpoint" / name).read_text()) for folder in (run, one))
        assert jobs.contents(run / "checkpoint" / ours["file"]) == jobs.contents(one / "checkpoint" / other["file"])
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (run, one)]
    assert metrics[0]["clients"] == metrics[1]["clients"] and metrics[0]["test"] == metrics[1]["test"]


def test_the_way_without_certificates_is_the_one_that_is_tested_too() -> None:
    """test_flower.py runs it; here the page's words are held against its own."""
    from tests.engines.test_flower import CLIENTS, join_words, serve_words

    page = Tutorial.read()
    names = {f"{clinic}-0": client for clinic, client in zip(CLINICS, CLIENTS, strict=True)} | {"cohorts/clinic_a": "scan"}
    assert with_names(page.open_serve, names) == serve_words()
    assert with_names(page.open_join, names) == join_words(CLIENTS[0], 9443, Path("scan"))
