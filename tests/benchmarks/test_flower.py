"""The benchmarks of federations over Flower: what they read from runs, and that a missing reply is an error."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Script = Callable[[str], ModuleType]
CONFIG = {"federation": {"cohorts": [{"path": "a"}, {"path": "b"}], "rounds": 2, "local_steps": 5}}


def events(path: Path, clients: int) -> Path:
    found: list[dict[str, Any]] = []
    for number in range(2):
        found += [{"event": "client", "round": number}] * clients
        found.append({"event": "round", "round": number, "seconds": {"train": 2.0 + number, "aggregate": 0.5}})
    path.write_text("".join(json.dumps(event) + "\n" for event in found))
    return path


def test_rounds_after_the_first_and_all_steps_are_read_from_our_events(script: Script, tmp_path: Path) -> None:
    found = script("flower").read_ours(events(tmp_path / "e", 2), CONFIG, 7.0)
    assert (found.start, found.rounds, found.steps) == (7.0, [3.5], 2 * 2 * 5)


def test_a_missing_reply_is_an_error(script: Script, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="2 of 4 replies"):
        script("flower").read_ours(events(tmp_path / "e", 1), CONFIG, 7.0)


def test_a_missing_round_of_flower_s_own_is_an_error(script: Script, tmp_path: Path) -> None:
    flower, deployments = script("flower"), script("deployments")
    rounds = [{"begin": 3.0, "end": 5.0, "steps": 10}, {"begin": 6.0, "end": 6.5, "steps": 10}]
    where = deployments.Place(tmp_path, begin=1.0)
    (tmp_path / "result.json").write_text(json.dumps({"rounds": rounds}))
    found = flower.read_flowers(where, CONFIG)
    assert (found.start, found.rounds, found.steps) == (4.0, [0.5], 20)
    (tmp_path / "result.json").write_text(json.dumps({"rounds": rounds[:1]}))
    with pytest.raises(RuntimeError, match="1 of 2 rounds"):
        flower.read_flowers(where, CONFIG)


def test_a_program_that_fails_is_told_with_its_last_words_and_nothing_is_left(script: Script, tmp_path: Path) -> None:
    deployments = script("deployments")
    with pytest.raises(RuntimeError, match=r"ended with 3\n(.|\n)*the reason"), deployments.place(tmp_path / "x") as where:
        stays = where.start(["sleep", "600"], "stays")
        where.wait(where.start(["sh", "-c", "echo the reason; exit 3"], "fails"), tmp_path / "nowhere")
    assert stays.returncode is not None


def test_systems_must_do_the_same_steps(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flower = script("flower")
    steps = iter([10, 11])
    monkeypatch.setattr(flower, "run_system", lambda system, where, config: flower.Run(1.0, [1.0], next(steps)))
    with pytest.raises(RuntimeError, match=r"different numbers of steps: \[10, 11\]"):
        flower.measure(["in process", "2 workers"], 1, CONFIG, tmp_path)


def test_the_plain_client_takes_the_steps_of_the_local_loop(script: Script, tmp_path: Path) -> None:
    """The same weights after one round of one client, whichever loop trains it."""
    pytest.importorskip("flwr")
    from omnifm.config import parse
    from omnifm.federation.messages import Request
    from tests.run import jobs

    app = script("flower_app")
    federation = {"cohorts": [{"path": str(jobs.data_folder(tmp_path) / "scan")}], "local_steps": 9}
    config = parse(jobs.raw_config(tmp_path, "fedavg", federation=federation))
    site, data = app.make_site(config, tmp_path)
    name, start = data.plans[0].id, site.initial_shared()
    start = {tensor: value.clone() for tensor, value in start.items()}
    taken = app.fit(site, config, 2, name)
    plain = {tensor: value.clone() for tensor, value in site.model.state_dict().items()}
    reply = site.handle(Request("train", 2, name, start, settings={"epochs": 1, "steps": 9}))
    assert taken == 9 and all(bool((plain[tensor] == value).all()) for tensor, value in reply.tensors.items())
    assert any(bool((start[tensor] != value).any()) for tensor, value in reply.tensors.items())


def test_the_slope_is_that_of_the_second_half(script: Script) -> None:
    soak = script("soak")
    samples = [(n, {"server": 500.0 - 10 * n if n < 10 else 400 + 0.25 * n}) for n in range(1, 21)]
    assert soak.slope(samples, "server") == pytest.approx(25.0)
    rows = soak.table(samples)
    assert [(r["round"], r["samples"]) for r in rows] == [(10, 10), (20, 10)]
    assert rows[1]["server"] == pytest.approx(400 + 0.25 * 15.5, abs=0.1)
