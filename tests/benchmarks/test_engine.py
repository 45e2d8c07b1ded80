from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

Script = Callable[[str], ModuleType]


def tiny(job: ModuleType, **changes: object) -> object:
    return job.Job(**{"model": "cnn", "clients": 3, "rounds": 2, "examples": 6, "batch": 4, "side": 8, **changes})


# ResNet-18 has 11,689,512 parameters for 1,000 classes; the head of 10 takes the place of 513,000 of them.
@pytest.mark.parametrize(("model", "side", "parameters"), [("cnn", 32, 281_960), ("resnet18", 64, 11_181_642)])
def test_models_have_the_size_they_are_named_for(script: Script, model: str, side: int, parameters: int) -> None:
    job = script("job")
    net = job.build(tiny(job, model=model, side=side))
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize("bf16", [False, True])
def test_the_engine_ends_with_the_weights_of_the_bare_loop(script: Script, tmp_path: Path, bf16: bool) -> None:
    job, ours, engine = script("job"), script("run_ours"), script("engine")
    assignment = job.Assignment(tiny(job, bf16=bf16), tmp_path, True, {"record": True})
    ours.run(assignment, tmp_path / "run")
    assert engine.max_difference(tmp_path) == 0.0
    initial = next(iter(job.build(assignment.job).state_dict().values())).numpy()
    with np.load(tmp_path / "weights.npz") as weights:
        assert np.abs(weights["0000"] - initial).max() > 1e-4, "nothing was trained"
    assert (tmp_path / "run" / "checkpoint" / "last.json").is_file()


def test_the_bare_loop_is_federated_averaging(script: Script) -> None:
    job, bare = script("job"), script("run_bare")
    one_step = tiny(job, rounds=1, examples=4, batch=4)
    loop = bare.BareLoop(one_step)
    loop.round(0)
    # One full-batch step each from the same weights: the mean of the clients is one step along the mean gradient.
    net = job.build(one_step)
    data = [job.client_data(one_step, client) for client in range(3)]
    torch.nn.functional.cross_entropy(net(torch.cat([x for x, _ in data])), torch.cat([y for _, y in data])).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        expected = parameter.detach() * (1 - one_step.lr * job.WEIGHT_DECAY) - one_step.lr * parameter.grad
        torch.testing.assert_close(loop.weights[name], expected, rtol=0, atol=1e-7)


def test_a_batch_of_one_is_refused(script: Script) -> None:
    with pytest.raises(ValueError, match="batch of one"):
        tiny(script("job"), examples=5, batch=2)


def test_a_missing_round_is_an_error(script: Script, tmp_path: Path) -> None:
    job = script("job")
    result = job.Result(job.Assignment(tiny(job), tmp_path, False), None)
    with result.watch.round():
        pass
    with pytest.raises(RuntimeError, match="1 rounds were timed, 2 were asked for"):
        result.save({})


def run_of(engine: ModuleType, factor: float, whole: float = 10.0) -> object:
    bare = [9.0, 2.0, 2.0, 4.0]
    return engine.Run(
        start=1.0,
        whole=whole,
        rounds=[b * factor for b in bare],
        cpu=bare,
        bare=bare,
        bare_cpu=bare,
        peak_pss=5.0,
        difference=0.0,
    )


def test_overhead_is_the_paired_difference_of_steady_rounds(script: Script) -> None:
    engine = script("engine")
    run = run_of(engine, 1.5)
    assert engine.overhead_ms(run.rounds, run.bare, 4) == pytest.approx(250.0)
    assert engine.ratio_to_bare(run) == pytest.approx(1.5)
    assert engine.steady(run.rounds) == pytest.approx(3.0)


def test_ratios_and_goals_come_from_like_repeats(script: Script) -> None:
    engine = script("engine")
    runs = {
        ("cnn282k", "omnifm", True): [run_of(engine, 1.1)],
        ("cnn282k", "omnifm", False): [run_of(engine, 1.1, whole=3.0)],
        ("cnn282k", "flower, 1 actor", True): [run_of(engine, 2.2)],
        ("cnn282k", "flower, 1 actor", False): [run_of(engine, 2.2, whole=10.0)],
    }
    found, rows = engine.report(runs, {"cnn282k": engine.JOBS["cnn282k"]}, ["omnifm", "flower, 1 actor"])
    assert found["ratios"]["cnn282k"]["omnifm / flower, 1 actor, steady rounds"]["median"] == pytest.approx(0.5)
    assert found["ratios"]["cnn282k"]["omnifm / flower, 1 actor, whole job"]["median"] == pytest.approx(0.3)
    met = {item["goal"]: item["met"] for item in found["goals"]}
    assert met == {
        "cnn282k: omnifm: max difference of weights to the bare loop": True,
        "cnn282k: overhead, ms per client-round": False,
        "cnn282k: omnifm / flower, 1 actor, steady rounds": True,
        "cnn282k: omnifm / flower, 1 actor, whole job": True,
    }
    assert {row["system"] for row in rows} == {"omnifm", "flower, 1 actor", ""}


def test_every_system_runs_in_every_repeat_and_the_order_rotates(script: Script) -> None:
    found = list(script("engine").cells(["j"], ["bare", "a", "b"], 3))
    assert len(found) == len(set(found)) == 3 * 5  # the bare loop has nothing to be paired with
    first = [next(system for repeat, _, system, _ in found if repeat == r) for r in range(3)]
    assert first == ["bare", "a", "b"]
