"""Super-resolution as a task: what a client sees, who trains what, scores, pictures, and a run on the simulated atlas."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from omnifm import build, run, seeds
from omnifm.config import Config, parse
from omnifm.data.cohort import Cohort, Row, write_cohort
from omnifm.data.partition import ClientPlan
from omnifm.data.resample import enlarged, low_resolution
from omnifm.errors import ConfigError, DataError, OmnifmError
from omnifm.tasks.base import Batch, Inputs, Model, TaskData
from omnifm.tasks.super_resolution import SuperResolution, SuperResolutionHead, SuperResolutionOptions, scales_of
from tests.data.builders import noise, save_png, spec
from tests.tasks.atlas import make_cohorts

SPLITS = ("train", "train", "val", "test")


def cohort(folder: Path, name: str, *sizes: tuple[int, ...], task: str = "super_resolution") -> Cohort:
    rows = []
    for i, size in enumerate(sizes):
        save_png(folder / name / f"images/{i}.png", noise(*size, stream=i))
        rows.append(Row(id=f"r{i}", split=SPLITS[i % 4], image=f"images/{i}.png", label="a" if task == "classification" else ""))
    classes = ("a", "b") if task == "classification" else None
    return Cohort.read(write_cohort(folder / name, spec(name=name, task=task, classes=classes), rows))


def make(tmp_path: Path, *cohorts: Cohort, options: dict[str, Any] | None = None, **changes: Any) -> SuperResolution:
    """Build the task with one client per cohort."""
    raw = {
        "task": "super_resolution",
        "federation": {"cohorts": [{"path": "x"}]},
        "data": {"image_size": 16, **changes},
        "model": {"width": 4},
    }
    plans = [ClientPlan(f"{c.name}-0", c.name, "CT", *(tuple(c.indices(s)) for s in ("train", "val", "test"))) for c in cohorts]
    chosen = SuperResolutionOptions.model_validate({"patch": 16, "blocks": 1, "cell": 4, **(options or {})})
    return SuperResolution(TaskData(config(raw), {c.name: c for c in cohorts}, plans, tmp_path / "cache"), chosen)


def config(raw: dict[str, Any]) -> Config:
    return parse(raw)


def network(task: SuperResolution) -> Model:
    with seeds.scope(0, "net"):
        backbone = task.backbone()
        return Model(backbone, task.head(backbone.token_dim)).eval()


@pytest.fixture
def task(tmp_path: Path) -> SuperResolution:
    return make(tmp_path, cohort(tmp_path, "one", *[(41, 50)] * 4))


# What a client sees


def test_pictures_are_scored_whole_at_their_own_size(task: SuperResolution) -> None:
    """To the last multiple of the scale; low resolution by the one definition; the overview is made of nothing else."""
    batch = task.client_data("one-0").test.batch(torch.tensor([0]))
    true = torch.from_numpy(noise(41, 50, stream=3)[None, None, :40].astype(np.float32) / 255)
    assert torch.equal(batch.target, true)
    assert torch.equal(batch.side["low"], low_resolution(true, 2)) and batch.route == "x2"
    assert batch.image.shape == (1, 1, 16, 16) and batch.row.tolist() == [3] and batch.side["scale"].tolist() == [2]
    hidden = batch.inputs
    assert "target" not in hidden._fields and set(hidden.side) == {"low", "scale"}


def test_training_pictures_of_all_cohorts_stack(tmp_path: Path) -> None:
    """Squares of the smallest side of all cohorts: of a much larger picture several, of a little larger one the middle."""
    small, medium, large = (cohort(tmp_path, n, *[s] * 4) for n, s in (("s", (40, 44)), ("m", (50, 58)), ("l", (80, 120))))
    task = make(tmp_path, small, medium, large)
    parts = {name: task.client_data(f"{name}-0") for name in "sml"}
    assert {name: len(data.train) for name, data in parts.items()} == {"s": 2, "m": 2, "l": 12}
    assert {tuple(data.train.batch(torch.tensor([0])).target.shape) for data in parts.values()} == {(1, 1, 40, 40)}
    middle = parts["m"].train.batch(torch.tensor([1])).target[0, 0] * 255
    np.testing.assert_allclose(middle.numpy(), noise(50, 58, stream=1)[5:45, 9:49], atol=1e-4)
    seen = parts["l"].train.batch(torch.arange(12))
    assert seen.row.tolist() == [0] * 6 + [1] * 6
    tiles = [noise(80, 120)[y : y + 40, x : x + 40] for y in (0, 40) for x in (0, 40, 80)]
    np.testing.assert_allclose(seen.target[:6, 0].numpy() * 255, tiles, atol=1e-4)
    assert {name: tuple(data.test.batch(torch.tensor([0])).target.shape[2:]) for name, data in parts.items()} == {
        **{"s": (40, 44), "m": (50, 58), "l": (80, 120)}
    }


def test_patches_are_of_the_picture_and_fit_each_other(task: SuperResolution) -> None:
    """Whatever way a patch is turned, its reduction is its low-resolution side (away from the border, where more is known)."""
    batch = task.client_data("one-0").train.batch(torch.tensor([0, 1] * 8))
    found = task.augment(batch, seeds.generator(0, "augment"))
    assert found.target.shape == (16, 1, 16, 16) and found.side["low"].shape == (16, 1, 8, 8)
    inner = low_resolution(found.target, 2)[..., 2:-2, 2:-2]
    torch.testing.assert_close(found.side["low"][..., 2:-2, 2:-2], inner, atol=1.01 / 255, rtol=0)
    assert torch.equal(found.image, batch.image) and torch.equal(found.row, batch.row) and found.route == "x2"
    assert len({tuple(patch.flatten().tolist()) for patch in found.target}) == 16
    whole = batch.target[0, 0].unfold(0, 16, 1).unfold(1, 16, 1).flatten(0, 1)
    ways = [w for t in (whole, whole.mT) for f in (t, t.flip(-1)) for w in (f, f.flip(-2))]
    places = [any(bool((way == found.target[k, 0]).all(-1).all(-1).any()) for way in ways) for k in (0, 2, 4)]
    assert places == [True, True, True]


def test_patches_come_from_the_generator_alone(task: SuperResolution) -> None:
    batch = task.client_data("one-0").train.batch(torch.tensor([0, 1]))
    first, again, other = (task.augment(batch, seeds.generator(k, "a")) for k in (0, 0, 1))
    assert torch.equal(first.target, again.target) and torch.equal(first.side["low"], again.side["low"])
    assert not torch.equal(first.target, other.target)


def test_all_eight_ways_and_all_places_occur(task: SuperResolution) -> None:
    ramp = torch.arange(40.0 * 40).view(1, 1, 40, 40).expand(400, 1, 40, 40)
    low = ramp[..., ::2, ::2]
    batch = Batch(torch.zeros(400, 1, 16, 16), ramp, torch.zeros(400), {"low": low, "scale": torch.full((400,), 2)}, "x2")
    found = task.augment(batch, seeds.generator(0, "ways")).side["low"][:, 0]
    steps = torch.stack([found[:, 0, 1] - found[:, 0, 0], found[:, 1, 0] - found[:, 0, 0]], dim=1)
    assert len({tuple(step) for step in steps.tolist()}) == 8
    corners = found.flatten(1).min(dim=1).values
    assert {int(c) // 80 for c in corners} == {int(c) % 40 // 2 for c in corners} == set(range(13))


def test_classification_cohorts_serve_too_and_colour_stays(tmp_path: Path) -> None:
    task = make(tmp_path, cohort(tmp_path, "c", *[(40, 40, 3)] * 4, task="classification"), channels=3)
    batch = task.client_data("c-0").val.batch(torch.tensor([0]))
    np.testing.assert_allclose(batch.target[0].numpy() * 255, np.moveaxis(noise(40, 40, 3, stream=2), -1, 0), atol=1e-4)
    assert network(task)(batch.inputs).prediction.shape == (1, 3, 40, 40)


def test_unlike_sizes_in_a_cohort_are_said(tmp_path: Path) -> None:
    task = make(tmp_path, cohort(tmp_path, "one", (40, 50), (40, 50), (48, 44), (60, 60)))
    assert task.client_data("one-0").test.batch(torch.tensor([0])).target.shape == (1, 1, 40, 44)
    assert any("cropped centrally to 40 x 44" in note for note in task.notes)


# The network


def test_an_untrained_network_scores_what_bicubic_scores(task: SuperResolution) -> None:
    batch = task.client_data("one-0").test.batch(torch.tensor([0]))
    with torch.no_grad():
        answer = task.predict(network(task), batch)
    (reference,) = task.references("one-0").items()
    assert reference[0] == "bicubic" and torch.equal(reference[1](batch), enlarged(batch.side["low"], 2))
    torch.testing.assert_close(answer, reference[1](batch))
    scores = []
    for prediction in (answer, reference[1](batch)):
        metric = task.metric("one-0")
        metric.update(prediction, batch.target, batch.row, batch.side)
        scores.append(metric.compute())
    assert scores[0] == pytest.approx(scores[1]) and scores[0]["psnr"] is not None


def test_the_border_left_out_is_the_scale(tmp_path: Path) -> None:
    for scale in (2, 4):
        task = make(tmp_path, cohort(tmp_path / str(scale), "one", *[(48, 48)] * 4), options={"scale": scale})
        batch = task.client_data("one-0").test.batch(torch.tensor([0]))
        wrong = batch.target.clone()
        wrong[..., :scale, :] = 0
        metric = task.metric()
        metric.update(wrong, batch.target, batch.row, batch.side)
        assert metric.compute()["capped"] == 1
        wrong[..., scale, 20] = 1 - wrong[..., scale, 20]
        metric = task.metric()
        metric.update(wrong, batch.target, batch.row, batch.side)
        assert metric.compute()["capped"] == 0


@pytest.mark.parametrize(("side", "cell", "grid"), [(16, 4, (4, 4)), (18, 4, (5, 5)), (128, 4, (16, 16)), (8, 8, (1, 1))])
def test_a_token_stands_for_a_cell_until_there_are_256(tmp_path: Path, side: int, cell: int, grid: tuple[int, int]) -> None:
    task = make(tmp_path, cohort(tmp_path, "one", *[(40, 40)] * 4), options={"cell": cell})
    features = network(task).backbone(Inputs(torch.zeros(1, 1, 16, 16), {"low": torch.rand(1, 1, side, side)}, "x2"))
    assert features.context[1] == grid and features.tokens.shape == (1, grid[0] * grid[1], 4)


def test_a_path_that_changes_nothing_leaves_the_published_network(task: SuperResolution) -> None:
    """And one that adds something is felt, through the tokens' content alone."""
    model = network(task)
    inputs = task.client_data("one-0").test.batch(torch.tensor([0])).inputs
    torch.nn.init.normal_(model.head.enlarger.tails["x2"][-1].weight)  # type: ignore[union-attr, index]
    with torch.no_grad():
        features = model.backbone(inputs)
        plain = model(inputs).prediction
        reading = model.head(_reading(features, features.tokens.clone(), inputs))
        assert torch.equal(reading, plain)
        assert not torch.allclose(model.head(_reading(features, features.tokens + 1, inputs)), plain)


def _reading(features: Any, content: torch.Tensor, inputs: Inputs) -> Any:
    from omnifm.tasks.base import Reading

    return Reading(torch.cat([content, content]), content, features, inputs)


def test_the_loss_is_the_mean_absolute_difference(task: SuperResolution) -> None:
    batch = task.augment(task.client_data("one-0").train.batch(torch.tensor([0])), seeds.generator(0, "x"))
    prediction = torch.zeros_like(batch.target)
    assert task.loss(prediction, batch) == functional.l1_loss(prediction, batch.target) == batch.target.mean()


def test_a_few_steps_beat_bicubic_on_what_they_learned(task: SuperResolution) -> None:
    batch = task.client_data("one-0").train.batch(torch.tensor([0, 1]))
    model = network(task).train()
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(30):
        loss = task.loss(model(batch.inputs).prediction, batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]


def test_large_pictures_are_enlarged_in_tiles(task: SuperResolution) -> None:
    model = network(task)
    torch.nn.init.normal_(model.head.enlarger.tails["x2"][-1].weight, std=0.1)  # type: ignore[union-attr, index]
    batch = task.client_data("one-0").test.batch(torch.tensor([0]))
    shapes: list[tuple[int, ...]] = []
    model.backbone.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].side["low"].shape[2:])))
    with torch.no_grad():
        whole = task.predict(model, batch)
        task.options = task.options.model_copy(update={"tile": 16, "overlap": 8})
        tiled = task.predict(model, batch)
    assert shapes[0] == (20, 25) and set(shapes[1:]) == {(16, 16)}
    assert (whole - tiled).abs().max() < 0.05
    assert (whole - enlarged(batch.side["low"], 2)).abs().max() > 0.1


# Scales


def plan(client: str, name: str) -> ClientPlan:
    return ClientPlan(client, name, "CT", (0,), (), ())


def test_scales_by_client_by_cohort_or_in_turn() -> None:
    plans = [plan("a-0", "a"), plan("a-1", "a"), plan("b-0", "b")]
    assert scales_of(plans, SuperResolutionOptions(scale=4)) == {"a-0": 4, "a-1": 4, "b-0": 4}
    assert scales_of(plans, SuperResolutionOptions(scales=(2, 8))) == {"a-0": 2, "a-1": 8, "b-0": 2}
    assert scales_of(plans, SuperResolutionOptions(scale=2, scales={"a": 4, "a-1": 8})) == {"a-0": 4, "a-1": 8, "b-0": 2}
    with pytest.raises(ConfigError, match=r"tasks\.super_resolution\.scales\.c: is neither a client nor a cohort"):
        scales_of(plans, SuperResolutionOptions(scales={"c": 2}))


def test_each_client_has_the_upsampler_of_its_scale(tmp_path: Path) -> None:
    task = make(tmp_path, *(cohort(tmp_path, n, *[(64, 64)] * 4) for n in "abc"), options={"scales": [2, 4, 8]})
    model = network(task)
    state = model.state_dict()
    held = {client: task.holds(model, f"{client}-0") for client in "abc"}
    for client, scale in zip("abc", (2, 4, 8), strict=True):
        names = held[client]
        assert names is not None
        tails = {name for name in names if ".tails." in name}
        assert tails == {name for name in state if f".tails.x{scale}." in name}
        assert names - tails == {name for name in state if ".tails." not in name}
        # What a step trains is what the client holds.
        batch = task.client_data(f"{client}-0").train.batch(torch.tensor([0]))
        model.zero_grad()
        task.loss(model(batch.inputs).prediction, batch).backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == names
    assert isinstance(model.head, SuperResolutionHead) and model.head.own is model.head.enlarger.tails
    assert [probe.route for probe in task.probes()] == ["x2", "x4", "x8"]
    assert all(model(probe).prediction.shape == (2, 1, 16, 16) for probe in task.probes())


def test_one_scale_is_held_whole(task: SuperResolution) -> None:
    assert task.holds(network(task), "one-0") is None


# Pictures


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_shows_low_bicubic_enlarged_and_truth(tmp_path: Path, channels: int) -> None:
    task = make(tmp_path, cohort(tmp_path, "one", *[(40, 300)] * 4), channels=channels)
    batch = task.client_data("one-0").test.batch(torch.tensor([0]))
    picture = task.picture(batch.target, batch, 0)
    assert [caption for caption, _ in picture.panels] == ["low resolution, x2", "bicubic", "enlarged", "truth"]
    shape = (40, 256) if channels == 1 else (40, 256, 3)
    assert {pixels.shape for _, pixels in picture.panels} == {shape} and {p.dtype for _, p in picture.panels} == {
        np.dtype(np.uint8)
    }
    low, bicubic, found, truth = (pixels.reshape(40, 256, -1)[..., 0] for _, pixels in picture.panels)
    np.testing.assert_array_equal(truth, noise(40, 300, stream=3)[:, 22:278])
    np.testing.assert_array_equal(found, truth)
    assert (low[::2] == low[1::2]).all() and not np.array_equal(bicubic, truth)
    assert picture.prediction.startswith("PSNR 100.00 dB, SSIM 1.0000 (bicubic ") and picture.correct is None


# What does not fit


@pytest.mark.parametrize(
    ("options", "changes", "text"),
    [
        ({"scale": 8}, {}, "cohort one: images of 32 x 32 are too small, 35 are needed"),
        ({}, {"width": 6}, "model.width = 6: super-resolution needs a multiple of 4"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(
    tmp_path: Path, options: dict[str, Any], changes: dict[str, Any], text: str
) -> None:
    sound = make(tmp_path, one := cohort(tmp_path, "one", *[(32, 32)] * 4))
    model = sound.data.config.model.model_copy(update=changes)
    data = replace(sound.data, config=sound.data.config.model_copy(update={"model": model}))
    assert one.name in data.cohorts
    with pytest.raises(OmnifmError, match=text):
        SuperResolution(data, SuperResolutionOptions.model_validate(options))


def test_wrong_options(task: SuperResolution) -> None:
    for wrong, text in (({"scale": 3}, "scale"), ({"scales": [2, 5]}, "scales"), ({"tile": 16, "overlap": 9}, "more than half")):
        with pytest.raises(ValueError, match=text):
            SuperResolutionOptions.model_validate(wrong)
    with pytest.raises(DataError, match="client nobody"):
        task.client_data("nobody")


# A run


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohorts(tmp_path_factory)


def raw(atlas: Path, strategy: str, **options: Any) -> dict[str, Any]:
    tiny = {"dim": 8, "band": 8, "bank": {"prototypes": 2, "capacity": 12}, "aggregation": "mean"}
    return {
        "task": "super_resolution",
        "strategy": strategy,
        "federation": {
            "cohorts": [{"path": str(atlas / "atlas_sr_t1"), "clients": 2}, {"path": str(atlas / "atlas_cls_t1")}],
            "rounds": 1,
            "min_examples": 4,
            "finetune_epochs": 0,
        },
        "data": {"image_size": 32, "augment": "flip_shift", "cache": str(atlas / "cache")},
        "model": {"width": 4},
        "optimiser": {"name": "adamw", "lr": 0.002, "batch_size": 8},
        "strategies": {"omnifm": tiny},
        "tasks": {"super_resolution": {"patch": 32, "blocks": 1, **options}},
    }


@pytest.mark.parametrize("strategy", ["omnifm", "fedper", "centralised"])
def test_a_federation_enlarges_and_bicubic_stands_beside_it(strategy: str, atlas: Path, tmp_path: Path) -> None:
    metrics = run.execute(parse(raw(atlas, strategy)), tmp_path / "out")
    personal, bicubic = metrics["test"]["personal"], metrics["references"]["bicubic"]["personal"]
    assert personal["psnr"] > 15 and bicubic["psnr"] > 15 and 0 < personal["ssim"] < 1
    assert len(list((tmp_path / "out" / "examples").glob("*.png"))) == 9


def test_a_federation_of_scales_averages_the_trunk_and_no_upsampler(atlas: Path, tmp_path: Path) -> None:
    config = parse(raw(atlas, "omnifm", scales=[2, 4, 2]))
    site = build.make_site(config, tmp_path / "clients", build.load_data(config))
    held = [set(names) for names in site.holds.values()]
    assert held[0] == held[2] != held[1]
    assert all(".tails." in name for name in held[0] ^ held[1])
    metrics = run.execute(config, tmp_path / "out")
    scores = {client["id"]: client["test"]["personal"]["psnr"] for client in metrics["clients"]}
    assert len(scores) == 3 and all(np.isfinite(score) for score in scores.values())
    with pytest.raises(OmnifmError, match="different networks"):
        run.execute(parse(raw(atlas, "centralised", scales=[2, 4, 2])), tmp_path / "pooled")
