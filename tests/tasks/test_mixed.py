"""A federation of several tasks on the simulated atlas: who holds what, what is averaged, and that each task stays itself."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from omnifm import build, run, seeds
from omnifm.config import parse
from omnifm.errors import ConfigError
from omnifm.federation.messages import Request
from omnifm.federation.store import ClientStore
from omnifm.metrics.fusion import FusionMetric
from omnifm.tasks.base import Task
from omnifm.tasks.mixed import Mixed, MixedHead, MixedMetric
from tests.tasks.atlas import COHORTS, make_cohorts

CLASSIFY, FUSE = "atlas_cls_t1", "atlas_fusion_ct"


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohorts(tmp_path_factory)


def raw(atlas: Path, strategy: str, *cohorts: str, **changes: Any) -> dict[str, Any]:
    tiny = {"dim": 8, "band": 8, "neighbourhood_band": 8, "bank": {"prototypes": 2, "capacity": 12}}
    return {
        "task": "mixed",
        "strategy": strategy,
        "federation": {"cohorts": [{"path": str(atlas / name)} for name in cohorts], "rounds": 1, "finetune_epochs": 0},
        "data": {"image_size": 48, "cache": str(atlas / "cache")},
        "model": {"width": 4},
        "optimiser": {"name": "adamw", "lr": 0.002, "batch_size": 8},
        "strategies": {"omnifm": tiny},
        "tasks": {"mixed": {"token_dim": 16, **changes}},
    }


def shared_of(out: Path) -> dict[str, torch.Tensor]:
    found = load_file(next((out / "checkpoint").glob("server-*.safetensors")))
    return {name.removeprefix("shared:"): tensor for name, tensor in found.items() if name.startswith("shared:")}


@pytest.mark.parametrize("strategy", ["omnifm", "fedavg", "fedper", "local"])
def test_every_client_gets_the_scores_of_its_task(strategy: str, atlas: Path, tmp_path: Path) -> None:
    metrics = run.execute(parse(raw(atlas, strategy, CLASSIFY, FUSE)), tmp_path / "out")
    by_client = {client["id"]: client["test"]["personal"] for client in metrics["clients"]}
    assert set(by_client) == {f"{CLASSIFY}-0", f"{FUSE}-0"}
    for client, scores in by_client.items():
        task = "classification" if client.startswith(CLASSIFY) else "fusion"
        main = {"classification": "accuracy", "fusion": "vif"}[task]
        assert all(name == "score" or name.startswith(f"{task}/") for name in scores)
        assert scores["score"] == scores[f"{task}/{main}"] is not None
    personal = metrics["test"]["personal"]
    assert {"score", "classification/accuracy", "fusion/vif"} <= set(personal)
    references = metrics["references"]
    assert set(references) >= {"mean", "maximum"}
    # One client of two can be scored with it: no mean over the clients, so none to set beside a strategy's.
    assert all("score" not in scores and scores["fusion/vif"] > 0 for scores in references["mean"].values())


def initial(raw: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    config = parse(raw)
    return dict(build.make_site(config, folder, build.load_data(config)).model.state_dict())


def test_networks_start_alike_whichever_others_there_are(atlas: Path, tmp_path: Path) -> None:
    both, own = (initial(raw(atlas, "fedper", *names), tmp_path) for names in ((CLASSIFY, FUSE), (FUSE,)))
    assert {name for name in both if ".fusion." in name} == own.keys()
    assert all(torch.equal(both[name], tensor) for name, tensor in own.items())
    alone = raw(atlas, "fedper", FUSE) | {"task": "fusion", "tasks": {}}
    pairs = {"backbone.": "backbone.nets.fusion.", "head.": "head.heads.fusion."}
    for name, tensor in initial(alone, tmp_path).items():
        part = next(prefix for prefix in pairs if name.startswith(prefix))
        assert torch.equal(both[pairs[part] + name.removeprefix(part)], tensor), name


def test_a_client_trains_and_sends_its_own_networks_and_the_path(atlas: Path, tmp_path: Path) -> None:
    config = parse(raw(atlas, "omnifm", CLASSIFY, FUSE))
    site = build.make_site(config, tmp_path / "clients", build.load_data(config))
    every = set(site.model.state_dict())
    held = {client: set(names) for client, names in site.holds.items()}
    one, two = held[f"{CLASSIFY}-0"], held[f"{FUSE}-0"]
    assert one | two == every
    both = one & two
    assert both and all(name.startswith("path.") for name in both)
    assert all(name in both for name in every if name.startswith("path."))
    for own, task in ((one, "classification"), (two, "fusion")):
        assert {name for name in own if not name.startswith("path.")} == {
            name for name in every if f".{task}." in name and not name.startswith("path.")
        }


def test_a_task_alone_in_the_mixture_learns_as_in_its_own_federation(atlas: Path, tmp_path: Path) -> None:
    """Fusion's tensors must not feel that others classify: with nothing shared in between, they are equal bit for bit."""
    run.execute(parse(raw(atlas, "fedavg", CLASSIFY, FUSE)), tmp_path / "mixed")
    run.execute(parse(raw(atlas, "fedavg", FUSE)), tmp_path / "alone")
    mixed, alone = shared_of(tmp_path / "mixed"), shared_of(tmp_path / "alone")
    names = [name for name in alone if ".fusion." in name]
    assert names
    # Nothing is shared across the two tasks, so what the other one's client does changes no bit.
    assert all(torch.equal(mixed[name], alone[name]) for name in names)
    assert not any(".classification." in name for name in alone)


def test_every_task_is_told_the_round_and_sees_its_own_parts(atlas: Path, tmp_path: Path) -> None:
    config = parse(raw(atlas, "fedavg", CLASSIFY, FUSE))
    data = build.load_data(config)
    site = build.make_site(config, tmp_path / "clients", data)
    task, seen = site.task, {}
    assert isinstance(task, Mixed) and isinstance(site.model.head, MixedHead)
    for kind, inner in task.tasks.items():
        inner.begin_training = lambda model, round_index, kind=kind: seen.update({kind: (model.head, round_index)})  # type: ignore[misc]
    site.handle(Request("train", 3, f"{FUSE}-0", site.initial_shared(), {}, {"epochs": 1}))
    assert seen == {kind: (site.model.head.heads[kind], 3) for kind in ("classification", "fusion")}


def test_tasks_with_the_same_network_share_it(atlas: Path) -> None:
    from omnifm.tasks.mixed import MixedBackbone
    from tests.support import TinyBackbone

    nets = MixedBackbone({"b": TinyBackbone("group"), "a": TinyBackbone("group"), "c": TinyBackbone("batch")}, 8, 0)
    assert nets.group == {"a": "a", "b": "a", "c": "c"} and set(nets.nets) == {"a", "c"}


def test_states_of_several_tasks_merge_each_with_its_own(atlas: Path, tmp_path: Path) -> None:
    config = parse(raw(atlas, "fedavg", CLASSIFY, FUSE))
    site = build.make_site(config, ClientStore(tmp_path)._folder, build.load_data(config))
    task: Task = site.task
    assert isinstance(task, Mixed)
    states, expected = [], {}
    for client in (f"{CLASSIFY}-0", f"{FUSE}-0"):
        metric = task.metric(client)
        split = task.client_data(client).test
        batch = split.batch(torch.arange(len(split)))
        with torch.no_grad():
            metric.update(task.predict(site.model.eval(), batch), batch.target, batch.row, batch.side)
        states.append(metric.state())
        expected |= metric.compute()
    union = task.metric().merge(states)
    assert isinstance(union, MixedMetric)
    found = union.compute()
    assert {n: v for n, v in found.items() if n != "score"} == pytest.approx({n: v for n, v in expected.items() if n != "score"})
    assert found["score"] == pytest.approx((found["classification/accuracy"] + found["fusion/vif"]) / 2)  # type: ignore[operator]
    assert union.counts == {"classification/auc_classes_skipped", "fusion/undefined"} <= found.keys()


def test_shares_carry_the_tasks_name() -> None:
    picture = torch.rand(1, 2, 48, 48, generator=seeds.generator(0, "pictures"))
    metric = MixedMetric({"fusion": FusionMetric()}, {"fusion": ("vif", 1.0)})
    for fused in (picture[:, :1], picture.mean(1, keepdim=True)):
        metric.update(fused, picture, torch.zeros(1, dtype=torch.int64))
    assert metric.shares() == {"fusion/scd": Fraction(1, 2)}, "a copy of a source has no SCD"


def test_a_full_score_scales_what_counts(atlas: Path, tmp_path: Path) -> None:
    changed = raw(atlas, "local", FUSE, full_score={"fusion": 0.5})
    metrics = run.execute(parse(changed), tmp_path / "out")
    personal = metrics["test"]["personal"]
    assert personal["score"] == pytest.approx(2 * personal["fusion/vif"])
    assert metrics["references"]["mean"]["personal"]["score"] > 0, "all clients fuse"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"set": {"vqa": {"data.image_size": 64}}}, "tasks.mixed.set.vqa: the federation has no cohort of this task"),
        ({"set": {"fusion": {"data.image_sizes": 64}}}, "tasks.mixed.set.fusion: data.image_sizes: unknown key"),
        ({"token_dim": 6}, "tasks.mixed.token_dim: "),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], message: str, atlas: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run.execute(parse(raw(atlas, "fedavg", CLASSIFY, FUSE, **changes)), tmp_path / "out")


def test_a_task_may_have_settings_of_its_own(atlas: Path, tmp_path: Path) -> None:
    config = parse(raw(atlas, "local", CLASSIFY, FUSE, set={"classification": {"data.image_size": 32}}))
    task = build.make_task(config, build.load_data(config))
    sizes = {client: task.client_data(client).test.batch(torch.tensor([0])).image.shape[-1] for client in _clients(task)}
    assert sizes == {f"{CLASSIFY}-0": 32, f"{FUSE}-0": 48}


def _clients(task: Task) -> list[str]:
    return [plan.id for plan in task.data.plans]


def test_the_cohorts_of_the_tests_are_there(atlas: Path) -> None:
    assert {path.name for path in atlas.iterdir()} >= set(COHORTS)
