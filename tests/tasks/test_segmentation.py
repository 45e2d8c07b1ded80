from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from omnifm import build, run, seeds
from omnifm.config import parse
from omnifm.data.cohort import Row, write_cohort
from omnifm.errors import ConfigError, DataError
from omnifm.tasks.base import Batch, Features, Inputs, Model, Reading
from omnifm.tasks.segmentation import Segmentation, SliceSplit, all_background, class_union, outlined
from tests.data.builders import in_memory, noise, save_png, spec
from tests.tasks.atlas import make_cohorts

TISSUE = "atlas_seg_tissue_t1"
SIZE = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohorts(tmp_path_factory)


def discs(folder: Path, name: str, structure: str, count: int = 12) -> Path:
    """Bright discs on noise: something that a U-Net learns in a few steps."""
    rows = []
    y, x = np.mgrid[:SIZE, :SIZE]
    for i in range(count):
        at = seeds.numpy_generator(0, "disc", name, i).integers(8, 24, 2)
        disc = (y - at[0]) ** 2 + (x - at[1]) ** 2 < 36
        save_png(folder / f"{i}.png", (noise(SIZE, SIZE, stream=i) // 4 + 150 * disc).astype(np.uint8))
        save_png(folder / f"m{i}.png", disc.astype(np.uint8))
        split = ("train", "train", "train", "train", "val", "test")[i % 6]
        rows.append(Row(id=f"r{i}", split=split, image=f"{i}.png", mask=f"m{i}.png"))
    keys = {"name": name, "task": "segmentation", "classes": ("background", structure), "mask_kind": "semantic"}
    return write_cohort(folder, spec(**keys), rows)


def raw(data: Path, strategy: str, cohorts: list[Path], **options: Any) -> dict[str, Any]:
    tiny = {"dim": 8, "band": 8, "neighbourhood_band": 8, "bank": {"prototypes": 2, "capacity": 12}}
    return {
        "task": "segmentation",
        "strategy": strategy,
        "federation": {"cohorts": [{"path": str(path)} for path in cohorts], "rounds": 2, "evaluate_every": 2},
        "data": {"image_size": SIZE, "cache": str(data / "cache"), "augment": "flip_shift"},
        "model": {"width": 4},
        "optimiser": {"name": "adamw", "lr": 0.01, "batch_size": 4},
        "strategies": {"omnifm": tiny},
        "tasks": {"segmentation": options},
    }


def make_task(data: Path, cohorts: list[Path], label_space: str = "name", **options: Any) -> Segmentation:
    settings = raw(data, "fedavg", cohorts, **options)
    settings["federation"]["label_space"] = label_space
    config = parse(settings)
    task = build.make_task(config, build.load_data(config))
    assert isinstance(task, Segmentation)
    return task


def test_weights_come_from_a_file_of_an_earlier_run(data: Path, tmp_path: Path) -> None:
    def encoder(weights: Path | str = "") -> dict[str, torch.Tensor]:
        settings = raw(data, "fedavg", [data / TISSUE])
        settings["model"] |= {"weights": str(weights)}
        config = parse(settings)
        return build.make_task(config, build.load_data(config)).backbone().state_dict()

    file = tmp_path / "model.safetensors"
    with seeds.scope(1, "other"):
        earlier = encoder()
    save_file({f"backbone.{name}": tensor.contiguous() for name, tensor in earlier.items()}, file)
    found = encoder(file)
    assert found.keys() == earlier.keys() and all(torch.equal(found[name], tensor) for name, tensor in earlier.items())
    save_file({"conv.weight": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match=r"^model\.weights: .*model\.safetensors lacks tensor "):
        encoder(file)


@pytest.mark.parametrize("strategy", ["omnifm", "fedavg", "fedper"])
def test_it_runs_on_the_atlas_from_config_to_report(strategy: str, data: Path, tmp_path: Path) -> None:
    metrics = run.execute(parse(raw(data, strategy, [data / TISSUE])), tmp_path / "out")
    personal, nothing = metrics["test"]["personal"], metrics["references"]["all_background"]["personal"]
    assert {"dice", "hd95", "missed", "empty_cases"} <= set(personal) and nothing["dice"] < 0.3
    assert len([name for name in personal if name.startswith("dice/")]) == 4
    assert metrics["test"]["worst"]["hd95"] >= personal["hd95"]
    report = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "left to right: image, truth, prediction" in report


def test_discs_are_found(tmp_path: Path) -> None:
    settings = raw(tmp_path, "fedavg", [discs(tmp_path / "a", "a", "disc"), discs(tmp_path / "b", "b", "disc")])
    settings["federation"] |= {"rounds": 8, "evaluate_every": 8, "local_epochs": 2}
    metrics = run.execute(parse(settings), tmp_path / "out")
    assert metrics["test"]["global"]["dice"] > 0.8


def test_the_union_of_classes_has_one_background() -> None:
    make = {
        n: in_memory([], Path(n), name=n, task="segmentation", classes=("background", *c), mask_kind="semantic")
        for n, c in (("b", ("left", "right")), ("a", ("right",)))
    }
    assert class_union(make, "name", False) == (("background", "right", "left"), {"a": [0, 1], "b": [0, 2, 1]})
    assert class_union(make, "cohort", False)[0] == ("background", "a/right", "b/left", "b/right")
    twice = in_memory([], name="c", task="segmentation", classes=("air", "x", "background"), mask_kind="semantic")
    with pytest.raises(DataError, match="cohort c: class 2 is called background, which is class 0"):
        class_union({"c": twice}, "name", False)
    assert class_union(make, "name", True) == (("background", "foreground"), {"a": [0, 1], "b": [0, 1, 1]})


def test_a_class_of_another_client_takes_no_part(tmp_path: Path) -> None:
    cohorts = [discs(tmp_path / "a", "a", "lung"), discs(tmp_path / "b", "b", "vessel")]
    task = make_task(tmp_path, cohorts)
    assert not task.one_label_space and task.classes == ("background", "lung", "vessel")
    with seeds.scope(0, "net"):
        backbone = task.backbone()
        model = Model(backbone, task.head(backbone.token_dim))
    batch = task.client_data("b-0").train.batch(torch.arange(3))
    assert set(batch.target.unique().tolist()) == {0, 2}
    logits = model(batch.inputs).prediction
    assert logits.shape == (3, 3, SIZE, SIZE)
    assert not bool((logits.argmax(1) == 1).any()) and not bool(logits.softmax(1)[:, 1].any())
    task.loss(logits, batch).backward()
    weight = model.head.own["classify"].weight.grad  # type: ignore[index, union-attr]
    assert weight is not None and not weight[1].any() and weight[2].any()
    assert set(task.metric("b-0").compute()) == {"dice", "hd95", "missed", "empty_cases", "dice/vessel", "hd95/vessel"}


def test_binary_foreground_is_one_space_for_all(tmp_path: Path) -> None:
    cohorts = [discs(tmp_path / "a", "a", "lung"), discs(tmp_path / "b", "b", "vessel")]
    task = make_task(tmp_path, cohorts, head_space="binary")
    assert task.one_label_space and task.classes == ("background", "foreground")
    assert set(task.client_data("b-0").train.batch(torch.arange(2)).target.unique().tolist()) == {0, 1}


def test_the_loss_is_dice_plus_cross_entropy_over_own_classes(tmp_path: Path) -> None:
    task = make_task(tmp_path, [discs(tmp_path / "a", "a", "lung"), discs(tmp_path / "b", "b", "vessel")])
    batch = task.client_data("b-0").train.batch(torch.arange(2))
    logits = torch.randn(2, 3, SIZE, SIZE, generator=seeds.generator(0, "logits"))
    logits[:, 1] = -1e4
    p, truth = logits.softmax(1)[:, 2], (batch.target == 2).float()
    dice = 1 - (2 * (p * truth).sum((1, 2)) + 1e-5) / (p.sum((1, 2)) + truth.sum((1, 2)) + 1e-5)
    expected = functional.cross_entropy(logits, batch.target) + dice.mean()
    torch.testing.assert_close(task.loss(logits, batch), expected)
    for options, part in (({"ce_weight": 0}, dice.mean()), ({"dice_weight": 0}, functional.cross_entropy(logits, batch.target))):
        other = make_task(tmp_path, [tmp_path / "a", tmp_path / "b"], **options)
        torch.testing.assert_close(other.loss(logits, batch), part)


def test_image_and_mask_move_together(tmp_path: Path) -> None:
    task = make_task(tmp_path, [discs(tmp_path / "a", "a", "disc")])
    batch = task.client_data("a-0").train.batch(torch.arange(4))
    # An image that is its own mask shows it at once.
    twin = batch._replace(image=batch.target[:, None].float())
    moved = task.augment(twin, seeds.generator(0, "augment"))
    assert torch.equal(moved.image[:, 0].round().long(), moved.target) and not torch.equal(moved.target, batch.target)
    still = make_task(tmp_path, [tmp_path / "a"])
    left = torch.zeros(1, 1, SIZE, SIZE)
    left[..., : SIZE // 2] = 1
    one = Batch(left, left[:, 0].long(), torch.zeros(1, dtype=torch.int64), {"allowed": torch.ones(1, 2).bool()})
    for seed in range(8):
        assert still.augment(one, seeds.generator(seed, "augment")).target[0, 0, 0] == 1, "left stays left without `mirror`"


def test_without_a_path_it_is_the_plain_network_and_with_one_it_is_not(tmp_path: Path) -> None:
    task = make_task(tmp_path, [discs(tmp_path / "a", "a", "disc")])
    with seeds.scope(0, "net"):
        backbone, head = task.backbone(), task.head(32)
    inputs = Inputs(torch.rand(2, 1, SIZE, SIZE), {"allowed": torch.ones(2, 2).bool()})
    features: Features = backbone(inputs)
    bottleneck, maps, _ = features.context
    plain = head(Reading(features.tokens, features.tokens, features, inputs))
    assert torch.equal(plain, head.decoder(bottleneck, maps))  # type: ignore[operator, union-attr]
    changed = features.tokens + 1
    assert not torch.equal(head(Reading(changed, changed, features, inputs)), plain)


def test_of_a_volume_some_slices_are_trained_on_and_all_are_scored(tmp_path: Path) -> None:
    depth = 9
    for i in range(3):
        for name in ("v", "m"):
            np.save(
                tmp_path / f"{name}{i}.npy",
                np.full((depth, 16, 16), i, np.int16) + np.arange(depth, dtype=np.int16)[:, None, None] % 2,
            )
    rows = [Row(id=f"r{i}", split=s, image=f"v{i}.npy", mask=f"m{i}.npy") for i, s in enumerate(("train", "val", "test"))]
    keys = {"task": "segmentation", "classes": ("background", "x", "y", "z"), "mask_kind": "semantic", "slice_axis": 0}
    write_cohort(tmp_path, spec(**keys), rows)
    for wanted, kept in ((0, list(range(depth))), (3, [1, 4, 7]), (4, [1, 3, 5, 7]), (20, list(range(depth)))):
        data = make_task(tmp_path, [tmp_path], train_slices=wanted).client_data("tiny-0")
        assert isinstance(data.train, SliceSplit) and data.train.slices.tolist() == kept
        assert len(data.val) == len(data.test) == depth


def test_everything_background_is_what_it_says(tmp_path: Path) -> None:
    task = make_task(tmp_path, [discs(tmp_path / "a", "a", "disc")])
    batch = task.client_data("a-0").test.batch(torch.tensor([0, 1]))
    (answer,) = task.references("a-0").values()
    assert not answer(batch).argmax(1).any() and torch.equal(answer(batch), all_background(batch, 2))


def test_brats_regions_need_brats_classes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"regions = 'brats' needs classes background, NCR, ED, ET .* cohort a does not fit"):
        make_task(tmp_path, [discs(tmp_path / "a", "a", "disc")], regions="brats")


def test_an_image_that_cannot_be_halved_is_refused(tmp_path: Path) -> None:
    settings = raw(tmp_path, "fedavg", [discs(tmp_path / "a", "a", "disc")])
    settings["data"]["image_size"] = 36
    with pytest.raises(ConfigError, match="take a multiple of 8"):
        run.execute(parse(settings), tmp_path / "out")


def test_a_picture_shows_both_outlines(tmp_path: Path) -> None:
    task = make_task(tmp_path, [discs(tmp_path / "a", "a", "disc")])
    batch = task.client_data("a-0").test.batch(torch.tensor([0]))
    logits = torch.zeros(1, 2, SIZE, SIZE)
    logits[0, 1] = batch.target[0].float() * 2 - 1
    picture = task.picture(logits, batch, 0)
    assert [caption for caption, _ in picture.panels] == ["image", "truth", "prediction"]
    image, truth, guess = (pixels for _, pixels in picture.panels)
    assert image.shape == truth.shape == (192, 192, 3) and np.array_equal(truth, guess) and not np.array_equal(truth, image)
    assert picture.prediction == "disc Dice 1.00"
    blank = outlined(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.int64))
    assert not blank.any()
