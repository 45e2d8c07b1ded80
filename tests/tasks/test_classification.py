from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omnifm import seeds
from omnifm.config import Config, parse
from omnifm.data.cache import CachedImages
from omnifm.data.cohort import Cohort, Row
from omnifm.data.partition import ClientPlan
from omnifm.errors import DataError
from omnifm.metrics.classification import ClassificationMetric
from omnifm.tasks.base import Batch, Features, Inputs, Reading, TaskData, TaskOptions
from omnifm.tasks.classification import Classification, PooledLinear, TrunkBackbone, label_union
from tests.data.builders import in_memory

PIXELS = np.random.default_rng(0).random((8, 1, 16, 16), dtype=np.float32)
SLICE_ROW = np.array([0, 1, 1, 1, 2, 3, 3, 4])


def cohort(name: str, classes: tuple[str, ...], labels: str) -> Cohort:
    rows = [Row(id=f"r{i}", split="train", image=f"{i}.png", label=label) for i, label in enumerate(labels)]
    return in_memory(rows, Path(name), name=name, classes=classes)


LUNG = cohort("lung", ("benign", "cancer"), ["benign", "cancer", "benign", "cancer", "benign"])  # type: ignore[arg-type]
BREAST = cohort("breast", ("benign", "malign"), ["malign"] * 5)  # type: ignore[arg-type]
COHORTS = {"lung": LUNG, "breast": BREAST}


@pytest.fixture(autouse=True)
def _pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cohorts of these tests have no files: their images are `PIXELS`."""
    images = CachedImages(PIXELS, SLICE_ROW)  # type: ignore[arg-type]
    monkeypatch.setattr("omnifm.tasks.classification.load_images", lambda cohort, size, channels, cache: images)


def build_task(config: Config, cohorts: dict[str, Cohort], plans: list[ClientPlan]) -> Classification:
    return Classification(TaskData(config, cohorts, plans, Path("cache")), TaskOptions())


def make_task(label_space: str = "name", channels: int = 1, **model: Any) -> Classification:
    config = parse(
        {
            "federation": {"cohorts": [{"path": "x"}], "label_space": label_space},
            "data": {"channels": channels, "image_size": 16},
            "model": {"width": 4, **model},
        }
    )
    plans = [
        ClientPlan("lung-0", "lung", "CT", train=(1, 3), val=(), test=(0, 2)),
        ClientPlan("breast-0", "breast", "US", train=(4,), val=(0,), test=()),
    ]
    return build_task(config, COHORTS, plans)


def test_a_row_gives_all_its_slices_with_its_label_and_number() -> None:
    data = make_task().client_data("lung-0")
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [5, 0, 2]
    batch = data.train.batch(torch.arange(5))
    assert batch.row.tolist() == [1, 1, 1, 3, 3]
    assert torch.equal(batch.image, torch.from_numpy(PIXELS[[1, 2, 3, 5, 6]]))
    classes = make_task().classes
    assert [classes[label] for label in batch.target.tolist()] == ["cancer"] * 5
    test = data.test.batch(torch.tensor([1, 0]))
    assert test.row.tolist() == [2, 0] and torch.equal(test.image, torch.from_numpy(PIXELS[[4, 0]]))
    assert torch.equal(make_task().labels("lung-0"), batch.target)


def test_changing_a_batch_does_not_change_the_images() -> None:
    split = make_task().client_data("lung-0").train
    first = split.batch(torch.tensor([0, 2])).image
    first += 1
    assert torch.equal(split.batch(torch.tensor([0, 2])).image, torch.from_numpy(PIXELS[[1, 3]]))


def test_a_stranger_is_named() -> None:
    with pytest.raises(DataError, match="client zoo: not in this federation"):
        make_task().client_data("zoo")


def test_equal_names_are_one_class_unless_classes_belong_to_cohorts() -> None:
    names, table = label_union(COHORTS, "name")
    assert sorted(names) == ["benign", "cancer", "malign"] and table["lung"]["benign"] == table["breast"]["benign"]
    names, table = label_union(COHORTS, "cohort")
    assert sorted(names) == ["breast/benign", "breast/malign", "lung/benign", "lung/cancer"]
    assert not set(table["lung"].values()) & set(table["breast"].values())
    for found in (label_union(COHORTS, s) for s in ("name", "cohort")):
        assert {number for numbers in found[1].values() for number in numbers.values()} == set(range(len(found[0])))


@pytest.mark.parametrize("label_space", ["name", "cohort"])
def test_the_order_of_the_cohorts_numbers_no_class(label_space: str) -> None:
    turned = dict(reversed(COHORTS.items()))
    assert label_union(turned, label_space) == label_union(COHORTS, label_space)


def test_one_head_can_serve_all_exactly_if_the_classes_are_the_same() -> None:
    assert not make_task().one_label_space and not make_task("cohort").one_label_space
    config = parse({"federation": {"cohorts": [{"path": "x"}]}})
    twin = cohort("twin", ("cancer", "benign"), ["benign"])  # type: ignore[arg-type]
    assert build_task(config, {"lung": LUNG, "twin": twin}, []).one_label_space
    assert build_task(config, {"lung": LUNG}, []).one_label_space


def test_the_names_of_the_rows_are_those_of_the_union() -> None:
    assert make_task("cohort").row_labels()["breast"] == ["breast/malign"] * 5
    assert make_task().row_labels()["lung"] == ["benign", "cancer", "benign", "cancer", "benign"]


def test_the_network_is_built_from_the_seed_and_the_config() -> None:
    task = make_task(norm="batch", stem_stride=1)
    with seeds.scope(0, "net"):
        backbone = task.backbone()
    assert isinstance(backbone, TrunkBackbone) and backbone.token_dim == 32
    assert backbone(Inputs(torch.rand(2, 1, 32, 32))).tokens.shape == (2, 4, 32)
    head = task.head(32)
    tokens = torch.rand(2, 4, 32)
    reading = Reading(tokens, tokens, Features(tokens), Inputs(torch.zeros(2)))
    assert head(reading).shape == (2, 3) and isinstance(head, PooledLinear) and head.own is head
    torch.testing.assert_close(head(reading), head.linear(tokens).mean(1))


def test_the_trunk_sees_standardised_images_and_its_constants_are_not_shared() -> None:
    backbone = TrunkBackbone(torch.nn.Identity(), 4, [0.5, 0.2], [0.25, 0.1])
    x = torch.rand(2, 2, 3, 3)
    expected = torch.stack([(x[:, 0] - 0.5) / 0.25, (x[:, 1] - 0.2) / 0.1], dim=1)
    torch.testing.assert_close(backbone(Inputs(x)).tokens, expected)
    assert backbone.state_dict() == {}


def test_the_loss_is_cross_entropy_and_the_metric_knows_every_class() -> None:
    task = make_task()
    logits, target = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]]), torch.tensor([0, 2])
    loss = task.loss(logits, Batch(torch.zeros(2), target, target))
    expected = -(logits.log_softmax(1)[[0, 1], target]).mean()
    torch.testing.assert_close(loss, expected)
    metric = task.metric()
    assert isinstance(metric, ClassificationMetric) and metric.state()["probability"].shape == (0, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_shows_image_truth_and_guess(channels: int) -> None:
    task = make_task()
    image = torch.linspace(-0.2, 1.2, channels * 4).view(1, channels, 2, 2)
    truth, guess = task.classes.index("cancer"), task.classes.index("benign")
    logits = torch.zeros(1, 3)
    logits[0, guess] = 2.0
    picture = task.picture(logits, Batch(image, torch.tensor([truth]), torch.tensor([0])), 0)
    ((caption, pixels),) = picture.panels
    assert caption == "image" and pixels.shape == ((2, 2) if channels == 1 else (2, 2, 3)) and pixels.dtype == np.uint8
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert (picture.truth, picture.prediction, picture.correct) == ("cancer", "benign", False)
    assert picture.confidence == pytest.approx(np.exp(2) / (np.exp(2) + 2))


def test_training_images_change_and_their_labels_do_not() -> None:
    task = make_task()
    batch = task.client_data("lung-0").train.batch(torch.arange(5))
    found = task.augment(batch, seeds.generator(0, "augment"))
    assert found.image.shape == batch.image.shape and not torch.equal(found.image, batch.image)
    assert torch.equal(found.target, batch.target) and torch.equal(found.row, batch.row)
