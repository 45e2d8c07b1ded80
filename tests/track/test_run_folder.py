"""What a run leaves behind: every file the README promises, and numbers that fit each other."""

import getpass
import hashlib
import json
import math
import socket
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from omnifm.config import load
from omnifm.data.cohort import Cohort
from omnifm.data.partition import partition
from omnifm.federation.schedule import draw_schedule
from omnifm.track import folder
from omnifm.track.folder import environment, read_json, write_json
from omnifm.track.recorder import read_events
from tests.run.jobs import MODALITIES, config, contents, lines

Finished = Callable[[str], Path]
STRATEGIES = ["omnifm", "fedavg", "local"]


def load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(params=STRATEGIES)
def run(request: pytest.FixtureRequest, finished: Finished) -> Path:
    return finished(request.param)


def test_every_file_is_there_and_nothing_else(run: Path) -> None:
    expected = {
        "config.toml",
        "run.lock",
        "environment.json",
        "split.json",
        "events.jsonl",
        "checkpoint",
        "metrics.json",
        "report.html",
        "examples",
    }
    assert {p.name for p in run.iterdir()} - {"bank"} == expected
    assert (run / "bank").is_dir() == ("omnifm" in run.name)
    assert {p.name for p in run.rglob("*.part")} == set()


def test_the_metrics_have_every_key(run: Path) -> None:
    found = load_json(run / "metrics.json")
    strategy = run.name.rpartition("-")[2]
    assert (found["task"], found["strategy"], found["seed"], found["rounds"]) == ("classification", strategy, 0, 3)
    assert (found["participation"], found["primary"], found["simulated"]) == (0.75, "accuracy", False)
    assert set(found["test"]) == {"global", "personal", "worst", "finetuned"}
    assert (found["test"]["global"] is None) == (strategy != "fedavg")
    assert set(found["bytes"]) == {"up", "down", "bank_up", "bank_down"}
    assert set(found["seconds"]) == {"total", "train", "aggregate", "evaluate"}
    assert 50 < found["peak_rss_mib"] < 20_000
    assert len(found["clients"]) == 4
    for row in found["clients"]:
        assert set(row) == {"id", "cohort", "modality", "num_train", "num_test", "test"}
        assert row["modality"] == MODALITIES[row["cohort"]]
        assert set(row["test"]) == {"global", "personal", "finetuned"}
    assert sum(row["num_test"] for row in found["clients"]) == 16


def test_the_views_follow_from_the_clients(run: Path) -> None:
    found = load_json(run / "metrics.json")
    for part in (found, found["best"]):
        rows = part["clients"]
        scores = [row["test"]["personal"]["accuracy"] for row in rows]
        weights = [row["num_test"] for row in rows]
        mean = sum(s * w for s, w in zip(scores, weights, strict=True)) / sum(weights)
        assert math.isclose(part["test"]["personal"]["accuracy"], mean, abs_tol=1e-12)
        assert part["test"]["worst"]["accuracy"] == min(scores)


def test_the_stripes_are_learned(finished: Finished) -> None:
    # Otherwise the tests of equal scores would compare noise.
    losses = [e["loss"] for e in lines(finished("fedavg") / "events.jsonl") if e["event"] == "round"]
    assert losses[-1] < losses[0]


def test_the_events_follow_the_schedule(run: Path, data: Path) -> None:
    events = lines(run / "events.jsonl")
    plans = load_json(run / "split.json")["clients"]
    ids = [plan["id"] for plan in plans]
    schedule = draw_schedule(ids, 3, 0.75, 0)
    for index, sampled in enumerate(schedule):
        clients = [e for e in events if e["event"] == "client" and e["round"] == index]
        (whole,) = [e for e in events if e["event"] == "round" and e["round"] == index]
        assert tuple(whole["clients"]) == tuple(e["client"] for e in clients) == sampled
        assert whole["seconds"].keys() == {"train", "aggregate"}
        count = sum(e["num_examples"] for e in clients)
        assert math.isclose(whole["loss"], sum(e["loss"] * e["num_examples"] for e in clients) / count, rel_tol=1e-12)
        for event in clients:
            assert event["num_examples"] == len(plans[ids.index(event["client"])]["train"])
            assert event["seconds"] > 0
    assert [e["round"] for e in events if e["event"] == "evaluation"] == [0, 1, 2]
    kinds = Counter(e["event"] for e in events)
    assert set(kinds) - {"description"} == {"client", "round", "evaluation"}


def test_the_bytes_add_up(run: Path) -> None:
    found = load_json(run / "metrics.json")["bytes"]
    events = lines(run / "events.jsonl")
    up, down = Counter[str](), Counter[str]()
    for event in events:
        up.update(event.get("bytes_up", {}))
        down.update(event.get("bytes_down", {}))
    assert (found["up"], found["down"]) == (up.total(), down.total())
    assert found["bank_up"] == up["prototypes"] + up["retrievals"]
    assert found["bank_down"] == down["bank"]


def test_bytes_of_the_model_are_those_of_the_checkpoint(finished: Finished) -> None:
    run = finished("fedavg")
    record = load_json(run / "checkpoint" / "last.json")
    tensors = contents(run / "checkpoint" / record["file"])
    size = sum(len(value[2]) for name, value in tensors.items() if name.startswith("shared:"))
    assert load_json(run / "metrics.json")["bytes"] == {"up": 9 * size, "down": 9 * size, "bank_up": 0, "bank_down": 0}


def test_local_sends_nothing_and_omnifm_has_a_bank(finished: Finished) -> None:
    assert load_json(finished("local") / "metrics.json")["bytes"] == {"up": 0, "down": 0, "bank_up": 0, "bank_down": 0}
    found = load_json(finished("omnifm") / "metrics.json")["bytes"]
    assert 0 < found["bank_up"] < found["up"]
    assert 0 < found["bank_down"] < found["down"]


def test_the_bank_is_drawn_from_the_rounds(finished: Finished) -> None:
    run = finished("omnifm")
    rows = {e["round"]: e["bank"]["rows"] for e in lines(run / "events.jsonl") if e["event"] == "round"}
    for index in range(3):
        found = contents(run / "bank" / f"round-{index:04d}.safetensors")
        assert json.loads(found["metadata"]["modalities"]) == sorted(MODALITIES.values())
        assert found["vectors"][1] == (rows[index], 8)
        assert found["client"][1] == found["modality"][1] == found["round"][1] == (rows[index],)
    assert max(rows.values()) <= 12
    shares = [e["retrieval"] for e in lines(run / "events.jsonl") if e["event"] == "client" and e["round"] > 0]
    assert shares
    for share in shares:
        assert math.isclose(sum(share.values()), 1.0)
        assert share["own"] == 0.0
    ranks = [e["effective_rank"] for e in lines(run / "events.jsonl") if e["event"] == "client"]
    assert all(1 <= rank <= 8 for rank in ranks)
    spreads = [e["spread"] for e in lines(run / "events.jsonl") if e["event"] == "client"]
    assert all(0 < spread <= 1 for spread in spreads)


def test_the_examples_are_pictures(run: Path) -> None:
    rows = load_json(run / "examples" / "examples.json")
    assert len(rows) == 12
    for row in rows:
        with Image.open(run / "examples" / row["file"]) as image:
            assert image.size == (32, 32)
        assert {row["truth"], row["prediction"]} <= {"a", "b"}
        assert row["correct"] == (row["truth"] == row["prediction"])
        assert 0.5 <= row["confidence"] <= 1
    assert {p.name for p in (run / "examples").glob("*.png")} == {row["file"] for row in rows}


def test_the_split_is_the_partition_with_its_digest(run: Path, data: Path) -> None:
    found = load_json(run / "split.json")
    text = json.dumps(found["clients"], separators=(",", ":"), sort_keys=True)
    assert found["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    plans = [
        plan
        for name in MODALITIES
        for plan in partition(Cohort.read(data / name), clients=2, kind="iid", gamma=0.5, min_examples=10, seed=0)
    ]
    for row, plan in zip(found["clients"], plans, strict=True):
        assert (row["id"], row["modality"]) == (plan.id, plan.modality)
        assert [row[s] for s in ("train", "val", "test")] == [list(plan.train), list(plan.val), list(plan.test)]
    rows = [("scan" in r["id"], i) for r in found["clients"] for s in ("train", "val", "test") for i in r[s]]
    assert len(rows) == len(set(rows)) == 80


def test_the_config_is_resolved_and_runs_again(run: Path, data: Path) -> None:
    again = load(run / "config.toml")
    assert again == config(data, run.name.rpartition("-")[2])


def test_the_report_is_there_and_asks_nothing_of_the_network(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    assert len(text) > 10_000
    assert 'src="http' not in text


def test_the_environment_names_no_person_and_no_host(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = load_json(run / "environment.json")
    assert {"omnifm", "commit", "python", "platform", "machine", "cores", "argv", "packages"} == set(found)
    assert {"torch", "monai", "numpy"} <= set(found["packages"])
    home = tmp_path / "home" / "ada.lovelace"
    monkeypatch.setenv("HOME", str(home))
    value = f'federation.cohorts=[{{path="{home}/scans"}}]'
    monkeypatch.setattr("sys.argv", [str(home / ".venv/bin/omnifm"), "run", str(home / "a.toml"), "--set", value])
    shown = json.dumps(environment())
    assert json.loads(shown)["argv"] == ["omnifm", "run", "~/a.toml", "--set", 'federation.cohorts=[{path="~/scans"}]']
    assert "ada.lovelace" not in shown
    assert socket.gethostname() not in shown.replace("localhost", "")
    assert f'"{getpass.getuser()}"' not in shown


def test_a_run_that_goes_on_at_another_commit_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "environment.json"
    write_json(path, {"commit": "aaa+", "cores": 2})
    for commit in ("aaa+", "bbb", "bbb", "aaa+"):
        monkeypatch.setattr(folder, "commit", lambda name=commit: name)
        folder.note_commit(path)
    assert read_json(path) == {"commit": "aaa+..bbb", "cores": 2}


def test_outside_a_checkout_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert folder.commit() == "unknown"


def test_json_is_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": math.nan})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_damaged_line_of_events_is_named(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "round"}\n{"event": "ro')
    with pytest.raises(Exception, match=r"events\.jsonl, line 2: damaged"):
        read_events(tmp_path / "events.jsonl")


def test_another_cohort_title_makes_the_run_simulated(data: Path) -> None:
    from omnifm import build
    from omnifm.run import split_record

    found = build.load_data(config(data))
    task = build.make_task(config(data), found)
    assert not split_record(config(data), found, task)["simulated"]
    scan = found.cohorts["scan"]
    titled = replace(scan, spec=scan.spec.model_copy(update={"title": "Simulated brains"}))
    assert split_record(config(data), replace(found, cohorts={**found.cohorts, "scan": titled}), task)["simulated"]
