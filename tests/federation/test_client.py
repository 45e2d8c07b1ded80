import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omnifm import seeds
from omnifm.config import OptimiserConfig
from omnifm.errors import FederationError, NotFiniteError
from omnifm.federation.messages import Request
from omnifm.federation.optimisers import build_optimiser, learning_rate
from omnifm.federation.strategy import Step
from omnifm.metrics.base import Metric, Scores
from omnifm.tasks.base import Batch, Features, Inputs, Picture, Reading
from omnifm.track.examples import save_examples
from tests.support import HOSPITALS, Lab, MemorySplit, Spy, differing, make_lab, spy

ONE = HOSPITALS[:1]


def test_the_rate_is_constant_or_half_a_cosine() -> None:
    constant, cosine = OptimiserConfig(lr=0.4), OptimiserConfig(lr=0.4, schedule="cosine")
    assert [learning_rate(constant, r, 10) for r in (0, 5, 9)] == [0.4] * 3
    assert [learning_rate(cosine, r, 10) for r in (0, 5, 10)] == pytest.approx([0.4, 0.2, 0.0])
    assert learning_rate(cosine, 9, 10) == pytest.approx(0.2 * (1 + math.cos(0.9 * math.pi)))


def test_the_optimiser_is_the_one_that_is_named() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))
    sgd = build_optimiser(net, OptimiserConfig(momentum=0.5, weight_decay=0.1), 0.3)
    adam = build_optimiser(net, OptimiserConfig(name="adamw", weight_decay=0.1), 0.3)
    assert isinstance(sgd, torch.optim.SGD) and isinstance(adam, torch.optim.AdamW)
    group = sgd.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], len(group["params"])) == (0.3, 0.5, 0.1, 2)
    assert (adam.param_groups[0]["lr"], adam.param_groups[0]["weight_decay"]) == (0.3, 0.1)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_local_loop_is_a_bare_loop_over_the_same_batches(name: str, tmp_path: Path) -> None:
    """Same seed, same order of batches: the same bits, over two rounds with a fresh optimiser each."""
    changes: dict[str, Any] = {
        "optimiser__name": name,
        "federation__local_epochs": 2,
        "optimiser__schedule": "cosine",
        "optimiser__clip_norm": 0.5,
    }
    lab = make_lab(tmp_path, hospitals=ONE, **changes)
    model, train = make_lab(tmp_path, hospitals=ONE, **changes).site.model, lab.task.client_data("a").train
    for round_index in range(2):
        lr = learning_rate(lab.config.optimiser, round_index, 2)
        optimiser = build_optimiser(model, lab.config.optimiser, lr)
        for epoch in range(2):
            order = torch.randperm(10, generator=seeds.generator(0, "batches", round_index, "a", epoch))
            for index in order.split(4):
                batch = train.batch(index)
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(model(batch.inputs).prediction, batch.target).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimiser.step()
    assert differing(lab.run().shared, dict(model.state_dict())) == []


def watched(lab: Lab) -> list[Batch]:
    """Collect the batches that a site trains on."""
    found: list[Batch] = []
    loss = lab.task.loss

    def keep(prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        found.append(batch)
        return loss(prediction, batch)

    lab.task.loss = keep  # type: ignore[method-assign]
    return found


def test_an_epoch_is_every_example_once_in_a_new_order(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, hospitals=ONE, federation__rounds=1, federation__local_epochs=2)
    batches = watched(lab)
    lab.run()
    rows = [batch.row.tolist() for batch in batches]
    assert [len(r) for r in rows] == [4, 4, 2] * 2
    first, second = ([k for r in half for k in r] for half in (rows[:3], rows[3:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_steps_go_on_into_further_epochs_and_stop_in_the_middle_of_one(tmp_path: Path) -> None:
    lab = make_lab(tmp_path / "1", hospitals=ONE, federation__rounds=1, federation__local_steps=5)
    whole = make_lab(tmp_path / "2", hospitals=ONE, federation__rounds=1, federation__local_epochs=2)
    batches, longer = watched(lab), watched(whole)
    lab.run()
    whole.run()
    rows = [batch.row.tolist() for batch in batches]
    assert [len(r) for r in rows] == [4, 4, 2, 4, 4]
    assert rows == [batch.row.tolist() for batch in longer][:5]


def test_every_client_takes_the_same_number_of_steps(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, federation__rounds=1, federation__local_steps=2)
    batches = watched(lab)
    lab.run()
    assert len(batches) == 2 * len(HOSPITALS)
    pooled = make_lab(tmp_path / "2", "centralised", federation__rounds=1, federation__local_steps=2)
    batches = watched(pooled)
    pooled.run()
    assert len(batches) == 2 * len(HOSPITALS)


def test_a_client_that_has_no_batch_is_named_with_steps_too(tmp_path: Path) -> None:
    alone = (replace(ONE[0], train=1),)
    lab = make_lab(tmp_path, hospitals=alone, model__norm="batch", federation__rounds=1, federation__local_steps=3)
    with pytest.raises(FederationError, match=r"client a.*BatchNorm"):
        lab.run()


@pytest.mark.parametrize(("norm", "sizes"), [("group", [4, 4, 1]), ("batch", [4, 4])])
def test_a_batch_of_one_is_left_out_for_batch_norm_alone(norm: str, sizes: list[int], tmp_path: Path) -> None:
    lab = make_lab(tmp_path, hospitals=(replace(ONE[0], train=9),), model__norm=norm, federation__rounds=1)
    batches = watched(lab)
    lab.run()
    assert [len(batch.row) for batch in batches] == sizes


def test_a_client_of_one_image_trains_unless_there_is_batch_norm(tmp_path: Path) -> None:
    alone = (replace(ONE[0], train=1),)
    lab = make_lab(tmp_path / "1", hospitals=alone, federation__rounds=1)
    lab.run()
    assert lab.task.seen == 1
    lab = make_lab(tmp_path / "2", hospitals=alone, model__norm="batch", federation__rounds=1)
    with pytest.raises(FederationError, match=r"client a.*BatchNorm") as caught:
        lab.run()
    assert "\n" not in str(caught.value)


def test_training_images_are_augmented_and_test_images_are_not(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, hospitals=ONE, data__augment="flip_shift", federation__rounds=1)
    batches, train = watched(lab), lab.task.client_data("a").train
    server = lab.run()
    assert any(not torch.equal(b.image, train.batch(b.row).image) for b in batches)
    plain = make_lab(tmp_path / "2", hospitals=ONE, federation__rounds=1)
    assert lab.evaluate(server) == plain.evaluate(server)


def test_the_loss_that_is_reported_is_the_mean_over_the_steps(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, hospitals=ONE, federation__rounds=1, optimiser__lr=1e-9, optimiser__batch_size=5)
    lab.run()
    model, train = make_lab(tmp_path).site.model, lab.task.client_data("a").train
    batch = train.batch(torch.arange(10))
    expected = torch.nn.functional.cross_entropy(model(batch.inputs).prediction, batch.target)
    found = [e["loss"] for e in lab.events if "loss" in e]
    assert found == pytest.approx([float(expected.detach())] * 2, rel=1e-5)


def test_a_rate_too_high_is_one_line_that_says_so(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, federation__rounds=4, optimiser__lr=1e30)
    with pytest.raises(FederationError, match=r"client \w, round \d: .*not finite") as caught:
        lab.run()
    assert "\n" not in str(caught.value)


class Hiding(Metric):
    """A metric of class numbers, which are finite whatever the network says."""

    def __init__(self) -> None:
        self._right: list[torch.Tensor] = []

    def update(self, prediction: torch.Tensor, target: torch.Tensor, row: torch.Tensor, side: object = None) -> None:
        self._right.append(prediction == target)

    def state(self) -> dict[str, torch.Tensor]:
        return {"right": torch.cat([torch.zeros(0, dtype=torch.bool), *self._right]).to(torch.uint8)}

    def merge(self, states: Iterable[Mapping[str, torch.Tensor]]) -> "Hiding":
        union = Hiding()
        union._right = [state["right"] for state in states]
        return union

    def compute(self) -> Scores:
        right = self.state()["right"]
        return {"accuracy": float(right.double().mean()) if len(right) else None}


def hiding(folder: Path, strategy: str) -> Lab:
    """A lab whose task says the most probable class alone, which is what a task of generated text does."""
    lab = make_lab(folder, strategy, federation__rounds=1)
    lab.task.metric = lambda client=None: Hiding()  # type: ignore[method-assign]
    lab.task.predict = lambda model, batch: model(batch.inputs).prediction.argmax(dim=1)  # type: ignore[method-assign]
    return lab


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("view", ["personal", "global"])
def test_what_a_network_says_is_finite_before_the_task_makes_classes_of_it(view: str, value: float, tmp_path: Path) -> None:
    lab = hiding(tmp_path, "fedavg")
    server = lab.run()
    assert lab.evaluate(server).views[view] is not None
    name = list(server.shared)[-1]
    server.shared[name][-1] = value
    request = Request("evaluate", 1, "b", server.shared, settings={"split": "test", "view": view})
    with pytest.raises(NotFiniteError, match=r"^client b, round 1: a prediction is not finite$"):
        lab.site.handle(request)
    with pytest.raises(NotFiniteError, match=r"^client b, round 1: a prediction is not finite$"):
        lab.site.predict(request, torch.arange(2))


def test_a_picture_that_is_not_finite_is_no_score_of_an_untrained_rule(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, federation__rounds=1)
    answer = partial(torch.full, (6, 3), math.nan)
    lab.task.references = lambda client: {"none": lambda batch: answer()}  # type: ignore[method-assign]
    request = Request("evaluate", 1, "a", settings={"split": "test", "view": "reference", "reference": "none"})
    with pytest.raises(NotFiniteError, match=r"^client a, round 1: a prediction is not finite$"):
        lab.site.handle(request)


def test_a_strategy_that_tolerates_it_gives_that_client_no_score(tmp_path: Path) -> None:
    lab = hiding(tmp_path, "median")
    server = lab.run()
    name = list(server.shared)[-1]
    server.shared[name][-1] = math.nan
    for settings in ({"view": "personal"}, {"view": "personal", "finetune_epochs": 1, "finetune_lr": 0.0}, {"view": "global"}):
        reply = lab.site.handle(Request("evaluate", 1, "b", server.shared, settings={"split": "test", **settings}))
        assert not reply.extra


def test_a_client_whose_predictions_are_not_finite_has_no_pictures(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "median", federation__rounds=1)
    server = lab.run()
    test = lab.task.client_data("d").test
    assert isinstance(test, MemorySplit)
    test.images.fill_(math.nan)
    square = np.zeros((2, 2), np.uint8)
    lab.task.picture = lambda prediction, batch, index: Picture((("image", square),))  # type: ignore[method-assign]
    save_examples(tmp_path / "examples", lab.site, lab.strategy, server, 1)
    shown = json.loads((tmp_path / "examples/examples.json").read_text(encoding="utf-8"))
    assert {picture["client"] for picture in shown} == {"a", "b", "c"}


def test_the_global_random_state_is_left_alone(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "omnifm", federation__rounds=1)
    before = torch.get_rng_state()
    lab.evaluate(lab.run(), finetune=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_drawn_from_the_stream_of_round_and_client(tmp_path: Path) -> None:
    """Code that cannot be handed a generator draws the same whatever was drawn before it, and whoever trained before."""

    def drop(reading: Reading) -> Reading:
        return reading._replace(tokens=torch.nn.functional.dropout(reading.tokens))

    def trained(seed: int, schedule: list[list[str]]) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        lab = make_lab(tmp_path / str(seed), engine=Spy, schedule=schedule, federation__rounds=1)
        lab.site.model.head.register_forward_pre_hook(lambda _, args: (drop(args[0]),))
        lab.run()
        return dict(spy(lab).trained()[-1].tensors)

    assert differing(trained(1, [["b"]]), trained(2, [["a", "b"]])) == []


def test_evaluation_between_rounds_changes_nothing(tmp_path: Path) -> None:
    labs = [make_lab(tmp_path / str(i), "omnifm", model__norm="batch", federation__rounds=3) for i in range(2)]
    labs[1].after_round = lambda lab, server, done: void(lab.evaluate(server, finetune=True))
    first, second = (lab.snapshot(lab.run()) for lab in labs)
    assert differing(first, second) == []


def void(_: object) -> None:
    """Throw an answer away."""


def test_predictions_for_pictures_are_those_that_are_scored(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedper")
    server = lab.run()
    settings = {"split": "test", "view": "personal"}
    request = Request("evaluate", 2, "b", server.shared, settings=settings)
    prediction, batch = lab.site.predict(request, torch.arange(6))
    state = lab.site.handle(request).extra
    torch.testing.assert_close(prediction.double().softmax(1), state["probability"])
    assert torch.equal(batch.target, state["label"])


def test_every_event_of_a_client_says_what_it_did(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedper", engine=Spy)
    lab.run()
    events = [e for e in lab.events if e["event"] == "client"]
    assert [(e["round"], e["client"], e["num_examples"]) for e in events] == [
        (r, h.id, h.train) for r in (0, 1) for h in HOSPITALS
    ]
    bytes_of_phi = sum(4 * t.numel() for t in lab.untrained.values())
    for e in events:
        assert e["bytes_up"] == e["bytes_down"] == {"backbone": bytes_of_phi}
    rounds = [e for e in lab.events if e["event"] == "round"]
    for number, e in enumerate(rounds):
        mine = [c for c in events if c["round"] == number]
        assert e["loss"] == pytest.approx(sum(c["loss"] * c["num_examples"] for c in mine) / 36)
        assert e["clients"] == ["a", "b", "c", "d"]
    assert all(r.seconds > 0 for r in spy(lab).replies)


def test_a_strategy_prepares_every_batch_in_training_and_in_prediction(tmp_path: Path) -> None:
    """The network sees what `prepare` returns; the truth that is scored is untouched."""
    lab = make_lab(tmp_path, hospitals=ONE, federation__rounds=1)
    seen: list[tuple[bool, torch.Tensor]] = []
    forward = lab.site.model.backbone.forward

    def look(inputs: Inputs) -> Features:
        seen.append((lab.site.model.training, inputs.image))
        return forward(inputs)

    lab.site.model.backbone.forward = look  # type: ignore[method-assign]
    lab.site.strategy.prepare = lambda job, batch: batch._replace(image=torch.ones_like(batch.image))  # type: ignore[method-assign]
    lab.evaluate(lab.run(), finetune=True)
    assert {training for training, _ in seen} == {True, False}
    assert all(bool((image == 1).all()) for _, image in seen)


def test_a_further_pass_gives_answer_and_loss_of_the_model_as_it_is(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, hospitals=ONE, federation__rounds=1)
    checked: list[int] = []

    def look(step: Step) -> None:
        for p in lab.site.model.parameters():
            p.data *= 1.5
        output, loss = step.again(step.batch)
        assert torch.equal(output.prediction, lab.site.model(step.batch.inputs).prediction)
        assert torch.equal(loss, torch.nn.functional.cross_entropy(output.prediction, step.batch.target))
        assert not torch.equal(output.prediction, step.output.prediction)
        checked.append(1)

    lab.site.strategy.correct = look  # type: ignore[method-assign]
    lab.run()
    assert checked == [1] * 3
