"""The fusion task: pairs in, windows for training, whole pictures for use, colour for people."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from omnifm import run, seeds
from omnifm.backbones.vgg import BLOCKS
from omnifm.config import parse
from omnifm.data.cohort import Cohort, Row, write_cohort
from omnifm.data.partition import ClientPlan
from omnifm.errors import ConfigError, DataError
from omnifm.metrics.fusion import NAMES
from omnifm.tasks.base import Inputs, Model, Reading, TaskData
from omnifm.tasks.fusion import Fusion, FusionHead, FusionOptions, cut, maximum_fusion
from tests.data.builders import noise, save_png, spec
from tests.tasks.atlas import make_cohorts

SIZE = 64


def blob(stream: int) -> np.ndarray:
    """Return a smooth picture with a dark border, like a head."""
    rough = noise(8, 8, stream=stream)
    plane = np.kron(rough, np.ones((8, 8), dtype=np.uint8))
    plane[:8] = plane[-8:] = plane[:, :8] = plane[:, -8:] = 0
    return plane


def write(folder: Path, modality: str, count: int = 6) -> Cohort:
    other = modality.split("-")[0].lower()
    rows = []
    for i in range(count):
        save_png(folder / f"mri/{i}.png", blob(i))
        colour = np.stack([blob(50 + i), blob(50 + i) // 2, blob(80 + i) // 4], axis=-1)
        save_png(folder / f"{other}/{i}.png", colour if other == "pet" else blob(30 + i))
        split = ("train", "train", "train", "train", "val", "test")[i % 6]
        rows.append(Row(id=f"r{i}", split=split, image=f"mri/{i}.png", image_b=f"{other}/{i}.png"))
    keys = spec(name=f"pairs_{other}", task="fusion", modality=modality, classes=None)
    return Cohort.read(write_cohort(folder, keys, rows))


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cohort]:
    folder = tmp_path_factory.mktemp("pairs")
    found = [write(folder / modality, modality) for modality in ("CT-MRI", "PET-MRI")]
    return {cohort.name: cohort for cohort in found}


MakeTask = Callable[..., Fusion]


@pytest.fixture
def make(cohorts: dict[str, Cohort], tmp_path_factory: pytest.TempPathFactory) -> MakeTask:
    cache = tmp_path_factory.getbasetemp() / "fusion-cache"

    def build_task(options: dict[str, Any] | None = None, size: int = SIZE, **model: Any) -> Fusion:
        federation = {"cohorts": [{"path": "x"}]}
        networks = {"width": 4, **model}
        config = parse({"task": "fusion", "federation": federation, "data": {"image_size": size}, "model": networks})
        plans = [
            ClientPlan("ct-0", "pairs_ct", "CT-MRI", train=(0, 1, 2, 3), val=(4,), test=(5,)),
            ClientPlan("pet-0", "pairs_pet", "PET-MRI", train=(0, 2), val=(4,), test=(5, 1)),
        ]
        return Fusion(TaskData(config, cohorts, plans, cache), FusionOptions(**(options or {})))

    return build_task


def model_of(task: Fusion) -> Model:
    with seeds.scope(0, "model"):
        backbone = task.backbone()
        return Model(backbone, task.head(backbone.token_dim))


def test_a_batch_has_both_luminances_and_the_colour_of_the_other(make: MakeTask) -> None:
    data = make().client_data("pet-0")
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [2, 1, 2]
    batch = data.test.batch(torch.tensor([1, 0]))
    assert batch.row.tolist() == [1, 5] and batch.image.shape == (2, 2, SIZE, SIZE)
    assert torch.equal(batch.image, batch.target)
    torch.testing.assert_close(batch.image[0, 0] * 255, torch.from_numpy(blob(1)).float(), atol=1e-3, rtol=0)
    red, green, blue = (torch.from_numpy(p).float() for p in (blob(51), blob(51) // 2, blob(81) // 4))
    torch.testing.assert_close(batch.image[0, 1] * 255, 0.299 * red + 0.587 * green + 0.114 * blue, atol=1e-3, rtol=0)
    assert batch.side["chroma"].shape == (2, 2, SIZE, SIZE) and float(batch.side["chroma"].std()) > 0.02
    with pytest.raises(DataError, match="client zoo: not in this federation"):
        make().client_data("zoo")


def test_training_sees_windows_of_the_sources_and_keeps_the_whole_picture(make: MakeTask) -> None:
    task = make({"patch": 41})
    batch = task.client_data("ct-0").train.batch(torch.arange(4))
    changed = [task.augment(batch, seeds.generator(0, "augment", k)) for k in range(6)]
    again = task.augment(batch, seeds.generator(0, "augment", 0))
    assert torch.equal(changed[0].target, again.target) and not torch.equal(changed[0].target, changed[1].target)
    mirrored = 0
    for one in changed:
        assert one.image.shape == batch.image.shape and one.target.shape == (4, 2, 41, 41)
        for k in range(4):
            top, left = one.side["window"][k].tolist()
            assert torch.equal(one.target[k], one.image[k, :, top : top + 41, left : left + 41])
            mirrored += not torch.equal(one.image[k], batch.image[k])
            assert torch.equal(one.image[k], batch.image[k]) or torch.equal(one.image[k], batch.image[k].flip(2))
    assert 4 <= mirrored <= 20
    corners = torch.cat([one.side["window"] for one in changed])
    assert int(corners.min()) >= 0 and int(corners.max()) <= SIZE - 41 and len(corners.unique(dim=0)) > 12


def test_windows_are_cut_where_they_say(make: MakeTask) -> None:
    image = torch.arange(2 * 3 * 6 * 5).reshape(2, 3, 6, 5)
    found = cut(image, torch.tensor([[0, 1], [3, 2]]), 3)
    assert torch.equal(found, torch.stack([image[0, :, :3, 1:4], image[1, :, 3:6, 2:5]]))


def test_the_network_sees_the_window_and_its_tokens_have_the_size_of_the_whole_pictures(make: MakeTask) -> None:
    """A whole picture of 64 has 16 x 16 tokens of 4 pixels; a window of 48 has 12 x 12 of 4."""
    task = make({"patch": 48})
    model = model_of(task)
    image = torch.rand(2, 2, SIZE, SIZE)
    window = torch.tensor([[3, 0], [16, 9]])
    features = model.backbone(Inputs(image, {"window": window}))
    assert features.tokens.shape == (2, 144, 24) and features.context[1] == (12, 12)
    assert model.backbone(Inputs(image)).tokens.shape == (2, 256, 24)
    seen = model(Inputs(image, {"window": window})).prediction
    alone = model(Inputs(cut(image, window, 48))).prediction
    torch.testing.assert_close(seen, alone)


def test_what_happens_to_the_tokens_reaches_the_picture_and_nothing_changes_without_it(make: MakeTask) -> None:
    model = model_of(make())
    inputs = Inputs(torch.rand(1, 2, SIZE, SIZE))
    features = model.backbone(inputs)
    plain = model.head.decoder(features.context[0])
    assert torch.equal(model(inputs).prediction, plain)
    tokens = features.tokens
    same = model.head(Reading(tokens, tokens.clone(), features, inputs))
    torch.testing.assert_close(same, plain)
    moved = model.head(Reading(tokens, tokens + 0.1, features, inputs))
    shifted = model.head.decoder(features.context[0] + 0.1)
    torch.testing.assert_close(moved, shifted, atol=1e-5, rtol=1e-5)


def test_the_last_two_convolutions_are_the_clients_own(make: MakeTask) -> None:
    head = make().head(24)
    assert isinstance(head, FusionHead)
    own = [m for m in head.own.modules() if isinstance(m, nn.Conv2d)]
    assert len(own) == 2 and own[-1].out_channels == 1


def test_whole_pictures_are_predicted_a_few_at_a_time_with_the_same_result(make: MakeTask) -> None:
    task = make()
    model = model_of(task).eval()
    batch = task.client_data("ct-0").train.batch(torch.tensor([0, 1, 2, 3, 0, 1]))
    torch.testing.assert_close(task.predict(model, batch), model(batch.inputs).prediction)


def test_a_few_steps_lower_the_loss(make: MakeTask) -> None:
    task = make({"patch": 48})
    model = model_of(task)
    train = task.client_data("pet-0").train
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        batch = task.augment(train.batch(torch.arange(2)), seeds.generator(0, "augment", step))
        loss = task.loss(model(batch.inputs).prediction, batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_references_are_fusions_that_need_no_training(make: MakeTask) -> None:
    task = make()
    batch = task.client_data("ct-0").test.batch(torch.tensor([0]))
    found = {name: answer(batch) for name, answer in task.references("ct-0").items()}
    assert set(found) == {"mean", "maximum", "anatomical", "other"}
    a, b = batch.image[:, :1], batch.image[:, 1:]
    assert torch.equal(found["mean"], (a + b) / 2) and torch.equal(found["maximum"], torch.maximum(a, b))
    assert torch.equal(found["anatomical"], a) and torch.equal(found["other"], b)
    scores = {}
    for name, prediction in found.items():
        metric = task.metric("ct-0")
        metric.update(prediction, batch.target, batch.row, batch.side)
        scores[name] = metric.compute()
    assert scores["maximum"]["vif"] > scores["mean"]["vif"] and scores["anatomical"]["scd"] is None


def test_pictures_show_both_sources_and_the_fused_one_in_the_others_colours(make: MakeTask) -> None:
    task = make()
    batch = task.client_data("pet-0").test.batch(torch.tensor([0, 1]))
    picture = task.picture(maximum_fusion(batch), batch, 1)
    assert [caption for caption, _ in picture.panels] == ["MRI", "PET", "fused"]
    mri, pet, fused = (panel for _, panel in picture.panels)
    assert mri.shape == (SIZE, SIZE) and pet.shape == fused.shape == (SIZE, SIZE, 3)
    assert np.array_equal(mri, blob(1))
    assert np.array_equal(pet, np.stack([blob(51), blob(51) // 2, blob(81) // 4], axis=-1))
    luminance = fused.astype(float) @ [0.299, 0.587, 0.114]
    inside = (fused.min(axis=2) > 0) & (fused.max(axis=2) < 255)
    assert np.abs(luminance - 255 * batch.target[1].amax(0).numpy())[inside].max() < 1.5
    assert picture.prediction.startswith("VIF 0.") and picture.correct is None
    ct = task.client_data("ct-0").test.batch(torch.tensor([0]))
    assert [(c, p.ndim) for c, p in task.picture(maximum_fusion(ct), ct, 0).panels] == [("MRI", 2), ("CT", 2), ("fused", 2)]


def test_how_information_was_measured_is_said(make: MakeTask, tmp_path: Path) -> None:
    assert make().notes == ("information is measured by the gradients of a Gaussian pyramid, not of VGG-16's maps (c = 200)",)
    weights: dict[str, Tensor] = {}
    inputs = 3
    for position, outputs in (layer for block in BLOCKS for layer in block):
        weights[f"features.{position}.weight"] = torch.randn(outputs, inputs, 3, 3) * 0.02
        weights[f"features.{position}.bias"] = torch.zeros(outputs)
        inputs = outputs
    save_file(weights, tmp_path / "vgg16.safetensors")
    task = make({"vgg": str(tmp_path / "vgg16.safetensors")})
    assert task.notes == ("information is measured by the gradients of VGG-16's maps (caffe weights, c = 3200)",)
    sources = torch.rand(1, 2, SIZE, SIZE)
    fused = torch.full((1, 1, SIZE, SIZE), 0.5)
    batch = task.client_data("ct-0").train.batch(torch.tensor([0]))._replace(target=sources)
    assert bool(task.loss(fused, batch).isfinite())
    assert not any("vgg" in name for name in model_of(task).state_dict())


def test_the_published_options_are_the_defaults() -> None:
    options = FusionOptions()
    assert (options.lam, options.intensity, options.gradient, options.patch) == (20.0, "sources", 0.0, 64)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"size": 40}, "data.image_size = 40: VIF over four scales needs at least 41 pixels"),
        ({"width": 5}, "model.width = 5: fusion needs an even number"),
        ({"options": {"vgg": "/gone.safetensors"}}, "tasks.fusion.vgg: /gone.safetensors cannot be read"),
    ],
)
def test_settings_that_do_not_fit(make: MakeTask, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make(**arguments)


@pytest.mark.parametrize("strategy", ["omnifm", "centralised"])
def test_the_atlas_is_fused_in_a_federation(strategy: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    atlas = make_cohorts(tmp_path_factory)
    cohorts = [{"path": str(atlas / f"atlas_fusion_{other}")} for other in ("ct", "pet")]
    tiny = {"dim": 8, "band": 8, "neighbourhood_band": 8, "bank": {"prototypes": 2, "capacity": 12}}
    config = parse(
        {
            "task": "fusion",
            "strategy": strategy,
            "federation": {"cohorts": cohorts, "rounds": 2, "finetune_epochs": 0},
            "data": {"image_size": 64, "augment": "flip_shift", "cache": str(atlas / "cache")},
            "model": {"width": 4},
            "optimiser": {"name": "adamw", "lr": 0.003, "batch_size": 4},
            "strategies": {"omnifm": tiny},
            "tasks": {"fusion": {"patch": 48}},
        }
    )
    metrics = run.execute(config, tmp_path / "run")
    personal = metrics["test"]["personal"]
    assert set(personal) == {*NAMES, "undefined"} and personal["undefined"] == 0
    assert 0 < personal["vif"] < 1 and personal["vif_sum"] == pytest.approx(2 * personal["vif"])
    assert set(metrics["references"]) == {"mean", "maximum", "anatomical", "other"}
    assert len(list((tmp_path / "run/examples").glob("*.png"))) >= 2
