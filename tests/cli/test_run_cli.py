"""`omnifm run` as a user types it: what works, and one line for each of the many ways it cannot."""

import json
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnifm.build import STRATEGIES
from omnifm.engines.device import convolves_bf16
from omnifm.errors import DataError
from omnifm.federation.messages import Request
from omnifm.federation.state import LocalJob
from omnifm.federation.store import read_tensors
from tests.cli.command import Command
from tests.run import jobs
from tests.run.jobs import left_behind, lines, raw_config, write_images, write_toml


def test_a_run_prints_its_scores_and_where_its_report_is(omnifm: Command, job: Path, tmp_path: Path) -> None:
    ended = omnifm("run", job)
    assert ended.code == 0, ended.err
    folder = Path("runs") / "job-fedavg-0"
    assert f"report: {folder}/report.html" in ended.out
    metrics = json.loads((tmp_path / folder / "metrics.json").read_text())
    assert "accuracy" in ended.out
    for view in ("global", "personal", "worst", "finetuned"):
        (line,) = [line for line in ended.out.splitlines() if f"last {view}" in line]
        assert line.split("│")[2].strip() == f"{metrics['test'][view]['accuracy']:.3f}"
    assert "MiB up" in ended.out
    # No terminal here: a line per evaluation instead of a bar.
    assert ended.err.startswith("round 1: loss ")
    assert len(ended.err.splitlines()) == 1


def test_a_bar_on_a_terminal(omnifm: Command, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    ended = omnifm("run", job)
    assert ended.code == 0
    for words in ("fedavg on job.toml", "3 clients", "loss ", "val accuracy "):
        assert words in ended.err
    assert "round 1: loss" not in ended.err
    # An error on a terminal leaves its line whole, below the bar.
    broken = omnifm("run", job, "--set", "optimiser.lr=1e30", "--set", "federation.rounds=3", "--out", "broken")
    assert broken.code == 1
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", broken.err)
    assert plain.splitlines()[-1].startswith("omnifm: client ")


def test_bfloat16_where_the_cpu_has_none_is_said_in_one_line(omnifm: Command, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "omnifm: engine.precision = 'bf16' is several times slower than 'fp32' on this CPU"
    for has_it, precision, said in ((False, "bf16", 1), (True, "bf16", 0), (False, "fp32", 0)):
        monkeypatch.setattr("omnifm.engines.device.convolves_bf16", lambda found=has_it: found)
        ended = omnifm("run", job, "--set", f'engine.precision="{precision}"', "--out", f"{has_it}-{precision}")
        assert ended.code == 0 and ended.err.count(slow) == said


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").is_file(), reason="asks the kernel of an x86 CPU")
def test_the_kernel_agrees_on_what_the_cpu_has() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert convolves_bf16() == ({"avx512bw", "avx512vl", "avx512dq"} <= set(flags))


def test_cohorts_as_a_toml_value_outside_the_repository(omnifm: Command, job: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", "elsewhere", "CT", {"train": 20, "val": 4, "test": 4})
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "far" / "away")
    for path in (str(tmp_path / "far" / "away"), "far/away"):
        value = f'federation.cohorts=[{{path="{path}",clients=2}}]'
        ended = omnifm("run", job, "--set", value, "--set", "federation.min_examples=4", "--out", path.replace("/", "_"))
        assert ended.code == 0, ended.err
        split = json.loads(Path(path.replace("/", "_"), "split.json").read_text())
        assert [client["id"] for client in split["clients"]] == ["elsewhere-0", "elsewhere-1"]


def test_resume_and_its_refusals(omnifm: Command, job: Path) -> None:
    assert omnifm("run", job, "--out", "r").code == 0
    before = {p: p.stat().st_mtime_ns for p in Path("r").rglob("*")}
    assert "r: already holds a run; continue it with --resume" in omnifm("run", job, "--out", "r").complaint
    assert "another config" in omnifm("run", job, "--out", "r", "--resume", "--set", "seed=1").complaint
    again = omnifm("run", job, "--out", "r", "--resume")
    assert again.code == 0
    assert "accuracy" in again.out
    assert {p: p.stat().st_mtime_ns for p in Path("r").rglob("*")} == before


def test_a_loss_that_is_not_finite_names_client_and_round_and_loses_nothing(
    omnifm: Command, job: Path, monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    from omnifm.federation.client import Site

    step = Site._train
    trained: list[Request] = []

    def poisoned(site: Site, request: Request) -> object:
        trained.append(request)
        if request.round == 1 and trained[-2].round == 1:  # in the middle of the second round
            next(site.model.parameters()).data.fill_(float("nan"))
            monkeypatch.setattr(site, "_install", lambda request: ({}, {}))
        return step(site, request)

    raw = raw_config(data, "omnifm")
    path = write_toml(job.with_name("long.toml"), raw)
    with monkeypatch.context() as patch:
        patch.setattr(Site, "_train", poisoned)
        complaint = _last_line(omnifm("run", path, "--out", "r").err)
    assert complaint == f"omnifm: client {trained[-1].client}, round 1: the loss is not finite (lower optimiser.lr?)"
    assert json.loads(Path("r/checkpoint/last.json").read_text())["rounds_completed"] == 1
    assert omnifm("run", path, "--out", "r", "--resume").code == 0
    assert omnifm("run", path, "--out", "straight").code == 0
    assert left_behind(Path("r")) == left_behind(Path("straight"))


def test_a_private_tensor_that_is_not_finite_is_not_kept(omnifm: Command, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omnifm.federation.client import Site

    fit = Site._fit

    def overflow(site: Site, job_: LocalJob, *arguments: Any, **keywords: Any) -> dict[str, float]:
        facts = fit(site, job_, *arguments, **keywords)
        list(site.model.parameters())[-1].data[0] = float("inf")  # the last step's, which no loss has seen
        return facts

    monkeypatch.setattr(Site, "_fit", overflow)
    complaint = omnifm("run", job, "--set", "strategy=local", "--out", "r").complaint
    assert re.fullmatch(r"client \S+, round 0: a private tensor is not finite after training \(lower optimiser.lr\?\)", complaint)
    assert not list(Path("r").rglob("*.safetensors"))


def test_a_prediction_that_is_not_finite_names_the_client(omnifm: Command, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omnifm.federation.client import Site

    install = Site._install

    def overflow(site: Site, request: Request) -> object:
        state = install(site, request)
        if request.kind == "evaluate" and request.client == "echo-0":
            list(site.model.parameters())[-1].data[0] = float("nan")
        return state

    monkeypatch.setattr(Site, "_install", overflow)
    assert omnifm("run", job, "--out", "r").complaint == "client echo-0, round 1: a prediction is not finite"


def _last_line(text: str) -> str:
    return text.splitlines()[-1]


@pytest.mark.parametrize("strategy", ["fedavg", "local", "omnifm", "centralised"])
def test_a_rate_that_is_far_too_high(strategy: str, omnifm: Command, job: Path) -> None:
    sets = ["--set", f"strategy={strategy}", "--set", "optimiser.lr=1e30", "--set", "federation.rounds=3"]
    ended = omnifm("run", job, *sets, "--out", "r")
    assert ended.code == 1
    last = _last_line(ended.err)
    assert last.startswith("omnifm: client ")
    assert ", round " in last
    assert "not finite" in last
    assert not Path("r/metrics.json").exists()
    for path in Path("r/checkpoint").rglob("*.safetensors"):
        assert all(bool(t.isfinite().all()) for t in read_tensors(path).values()), path


KNOWN = ", ".join(sorted(STRATEGIES))
SETTINGS: dict[str, tuple[str, str]] = {
    "unknown key": ("federation.round=3", "federation.round: unknown key"),
    "unknown section": ("federtion.rounds=3", "federtion: unknown key"),
    "a text for a number": ("federation.rounds='three'", "federation.rounds: Input should be a valid integer"),
    "a fraction for a count": ("federation.rounds=2.5", "federation.rounds: Input should be a valid integer"),
    "a number for a text": ("strategy=3", "strategy: Input should be a valid string"),
    "a section that is a value": ("federation=3", "federation: "),
    "out of range": ("federation.participation=0", "federation.participation: Input should be greater than 0"),
    "not a number": ("optimiser.lr=nan", "optimiser.lr: "),
    "unknown strategy": ("strategy=fedavgg", f"strategy = 'fedavgg': unknown; known are {KNOWN}"),
    "unknown option of a strategy": ("strategies.fedprox.nu=1", "strategies.fedprox.nu: unknown key"),
    "options of an unknown strategy": ("strategies.fedpox.mu=1", "strategy = 'fedpox': unknown"),
    "no cohorts": ("federation.cohorts=[]", "federation.cohorts is empty"),
    "a cohort without a path": ("federation.cohorts=[{clients=2}]", "federation.cohorts.0.path: Field required"),
    "imagenet weights of a ResNet": ("model.weights=imagenet", "model.weights = 'imagenet' comes with"),
    "group norm in EfficientNet": ("model.backbone=efficientnet_lite0", "efficientnet_lite0 has norm = 'batch'"),
    "no weights file": ("model.weights=none.safetensors", "none.safetensors"),
    "no GPU": ("engine.device=cuda", "engine.device = 'cuda': this machine has none"),
    "no cohort": ('federation.cohorts=[{path="nowhere"}]', "nowhere"),
    "more clients than rows": ("federation.min_examples=1000", "cohort scan: no draw of"),
    "by_column without a column": (
        "federation.partition=by_column",
        "cohort scan: a partition by_column needs the name of a column",
    ),
    "no value": ("federation.rounds", "--set federation.rounds: expected key=VALUE"),
    "no TOML value": ("federation.rounds=[", "--set federation.rounds=[: '[' is no TOML value"),
    "a key below a value": ("task.name=1", "--set task.name: task is a value, not a table"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be(case: str, omnifm: Command, job: Path) -> None:
    setting, message = SETTINGS[case]
    if "cuda" in setting:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    assert message in omnifm("run", job, "--set", setting, "--out", "r").complaint
    assert not Path("r").exists(), "nothing was begun"


OMNIFM: dict[str, tuple[str, str]] = {
    "a band beyond the image": ("strategies.omnifm.band=64", "the model cannot be built"),
    "a private block without PSP": ("strategies.omnifm={psp=false, private_block=true}", "strategies.omnifm."),
    "a bank below its floor": ("strategies.omnifm={dim=8, band=8, bank={capacity=1}}", "bank: quota needs capacity"),
    "an unknown policy": ("strategies.omnifm.bank.policy=newest", "strategies.omnifm.bank.policy: "),
    "an unknown preset": ("strategies.omnifm.preset=bestest", "strategies.omnifm.preset: "),
    "an unknown switch": ("strategies.omnifm.gskrr=false", "strategies.omnifm.gskrr: unknown key"),
}


@pytest.mark.parametrize("case", OMNIFM)
def test_options_of_omnifm_that_cannot_be(case: str, omnifm: Command, job: Path) -> None:
    setting, message = OMNIFM[case]
    ended = omnifm("run", job, "--set", "strategy=omnifm", "--set", setting, "--out", "r")
    assert message in ended.complaint
    assert not Path("r/checkpoint").exists()


def test_config_files_that_cannot_be(omnifm: Command, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("rounds = = 3")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "c.toml").write_text("")
    for name, message in (("a", "not a TOML file"), ("b", "not a TOML file"), ("c", "cohorts is empty"), ("d", "cannot be read")):
        assert message in omnifm("run", f"{name}.toml").complaint
    assert "cannot be read" in omnifm("run", ".").complaint


Damage = Callable[[Path], object]


def _edit(name: str, old: str, new: str) -> Damage:
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new, 1))


COHORTS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no spec": (lambda folder: (folder / "cohort.toml").unlink(), ("cohort.toml", "missing")),
    "unknown class": (_edit("manifest.csv", ",a\n", ",zebra\n"), ("manifest.csv row 2", "unknown class 'zebra'")),
    "missing image": (lambda folder: (folder / "images/train3.png").unlink(), ("manifest.csv row 5", "train3.png", "missing")),
    "a picture that is none": (
        lambda folder: (folder / "images/val0.png").write_bytes(b"\x89PNG no"),
        ("manifest.csv row 26", "val0.png"),
    ),
    "a path that leaves the folder": (
        _edit("manifest.csv", "images/train0.png", "../secret.png"),
        ("row 2", "leaves the cohort"),
    ),
    "no rows": (_edit("manifest.csv", "", ""), ("manifest.csv", "no rows")),
    "another task": (_edit("cohort.toml", '"classification"', '"super_resolution"'), ("cohort", "super_resolution")),
    "no training rows": (lambda folder: _only_test(folder), ("no training rows", "client mine-0")),
}


def _only_test(folder: Path) -> None:
    text = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text(text.replace(",train,", ",test,").replace(",val,", ",test,"))


@pytest.mark.parametrize("case", COHORTS)
def test_cohorts_that_cannot_be(case: str, omnifm: Command, job: Path, tmp_path: Path) -> None:
    damage, words = COHORTS[case]
    folder = write_images(tmp_path / "mine", "mine", "CT", {"train": 24, "val": 4, "test": 4})
    if case == "no rows":
        text = (folder / "manifest.csv").read_text()
        (folder / "manifest.csv").write_text(text.splitlines()[0] + "\n")
    else:
        damage(folder)
    complaint = omnifm("run", job, "--set", f'federation.cohorts=[{{path="{folder}"}}]', "--out", "r").complaint
    for word in words:
        assert word in complaint
    assert not Path("r").exists()


def test_two_cohorts_of_one_name(omnifm: Command, job: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "scan", tmp_path / "copy")
    value = f'federation.cohorts=[{{path="{data}/scan"}}, {{path="{tmp_path}/copy"}}]'
    assert "cohort scan: two cohorts of the federation have this name" in omnifm("run", job, "--set", value).complaint


def test_two_clients_of_one_id(omnifm: Command, job: Path, tmp_path: Path) -> None:
    """brats by modality has the client brats-CT-0, and so has brats-CT cut into parts."""
    folders = [write_images(tmp_path / name, name, "CT", {"train": 24, "val": 4, "test": 4}) for name in ("brats", "brats-CT")]
    kinds = ("by_modality", "iid")
    entries = [f'{{path="{f}", partition="{kind}", clients=2}}' for f, kind in zip(folders, kinds, strict=True)]
    complaint = omnifm("run", job, "--set", f"federation.cohorts=[{', '.join(entries)}]", "--out", "r").complaint
    assert "client brats-CT-0: cohorts brats and brats-CT have a client of this id; rename one" in complaint
    assert not Path("r").exists()


def test_a_message_with_line_breaks_is_still_one_line(omnifm: Command, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DataError("row 3: label 'ze\nbra'\r\nis unknown")

    monkeypatch.setattr("omnifm.run.execute", fail)
    assert omnifm("run", job).complaint == "row 3: label 'ze bra' is unknown"


@pytest.mark.parametrize("setting", ["strategy=fedavgg", "strategies.fedprox.nu=1", "federation.round=1"])
def test_a_misspelt_key_does_not_wait_for_the_images(setting: str, omnifm: Command, job: Path) -> None:
    value = 'federation.cohorts=[{path="nowhere"}]'
    assert "nowhere" not in omnifm("run", job, "--set", value, "--set", setting).complaint


def test_a_client_without_test_rows_has_no_score_and_costs_none(omnifm: Command, job: Path, tmp_path: Path, data: Path) -> None:
    write_images(tmp_path / "train_only", "train_only", "CT", {"train": 12})
    value = f'federation.cohorts=[{{path="{data}/scan"}}, {{path="train_only"}}]'
    sets = ["--set", value, "--set", "federation.participation=1.0"]
    text = (tmp_path / "train_only" / "manifest.csv").read_text()
    (tmp_path / "train_only" / "manifest.csv").write_text(text)
    ended = omnifm("run", job, *sets, "--out", "r")
    assert ended.code == 0, ended.err
    metrics = json.loads(Path("r/metrics.json").read_text())
    scan, bare = metrics["clients"]
    assert (bare["num_test"], bare["test"]) == (0, {"global": None, "personal": None, "finetuned": None})
    assert metrics["test"]["personal"] == scan["test"]["personal"]
    assert len([e for e in lines(Path("r/events.jsonl")) if e["event"] == "client"]) == 2


def test_a_folder_that_cannot_be_made(omnifm: Command, job: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "file/r: cannot be made" in omnifm("run", job, "--out", "file/r").complaint
    assert "is a file" in omnifm("run", job, "--out", "file").complaint


def test_jobs_helpers_are_what_the_command_reads(job: Path, data: Path) -> None:
    # The tests that call `execute` and those that call the command speak of one config.
    from omnifm.config import load

    assert load(job) == jobs.config(data, "fedavg", federation={"rounds": 1})
