from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from omnifm.errors import FederationError
from omnifm.federation.evaluation import Scored, weighted_mean, worst
from omnifm.federation.sharing import write
from omnifm.metrics.base import Scores
from omnifm.metrics.classification import ClassificationMetric
from omnifm.tasks.base import Split
from tests.support import CLASSES, HOSPITALS, Hospital, Lab, MemorySplit, Spy, TinyBackbone, differing, make_lab, spy


def test_the_mean_is_weighted_and_leaves_out_what_is_undefined() -> None:
    rows = [
        Scored({"a": 1.0, "b": None, "c": None}, 1),
        Scored({"a": 0.0, "b": 0.5, "c": None}, 3),
        Scored({"a": 0.9, "b": 0.9, "c": 0.9}, 0),
    ]
    assert weighted_mean(rows) == {"a": 0.25, "b": 0.5, "c": None}
    assert weighted_mean([]) == {} and weighted_mean([Scored({"a": 1.0}, 0)]) == {}


def test_a_score_over_some_of_the_examples_is_weighted_by_those() -> None:
    """9 of 10 right among 10 closed questions of 100, 1 of 3 among 3 of 3: 10 of 13, not nearly 9 of 10."""
    rows = [Scored({"all": 0.5, "closed": 0.9}, 100, {"closed": Fraction(10, 100)}), Scored({"all": 0.0, "closed": 1 / 3}, 3)]
    assert weighted_mean(rows) == {"all": pytest.approx(50 / 103), "closed": pytest.approx(10 / 13)}


def test_counts_are_added_up_and_have_no_worst() -> None:
    rows = [Scored({"a": 0.5, "missed": 9.0}, 90), Scored({"a": 0.4, "missed": 1.0}, 10), Scored({"a": 0.3, "missed": None}, 5)]
    assert weighted_mean(rows, {"missed"})["missed"] == 10.0
    assert worst(rows, counts={"missed"}) == {"a": 0.3}
    assert weighted_mean(rows[2:], {"missed"})["missed"] is None, "undefined is not 0"


class ByClass(ClassificationMetric):
    """Beside the others: mean probability of class 0 among the images of class 0, and how many images there are."""

    counts = frozenset({"images"})

    def _first(self) -> torch.Tensor:
        state = self.state()
        return state["probability"][state["label"] == 0, 0]

    def compute(self) -> Scores:
        first = float(self._first().mean()) if len(self._first()) else None
        return {**super().compute(), "first": first, "images": float(len(self.state()["label"]))}

    def shares(self) -> dict[str, Fraction]:
        return {"first": Fraction(len(self._first()), len(self.state()["label"]))}

    def merge(self, states: Iterable[Mapping[str, torch.Tensor]]) -> "ByClass":
        union = ByClass(CLASSES)
        union._parts = super().merge(states)._parts
        return union


def test_where_all_clients_have_one_model_means_over_examples_do_not_depend_on_who_holds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client b has one image of class 0 among 17: its score of them weighs little."""
    hospitals = (Hospital("a", "CT", 10, test=3), Hospital("b", "MRI", 6, test=17), Hospital("c", "US", 8, test=7))
    lab = make_lab(tmp_path, hospitals=hospitals)
    test = lab.task.client_data("b").test
    assert isinstance(test, MemorySplit)
    test.labels[test.labels == 0] = 1
    test.labels[0] = 0
    monkeypatch.setattr(lab.task, "metric", lambda client=None: ByClass(CLASSES))
    found = lab.evaluate(lab.start())
    personal, shared, lowest = (found.views[view] for view in ("personal", "global", "worst"))
    assert personal is not None and shared is not None and lowest is not None
    own = {c: views["personal"]["first"] for c, views in found.clients.items()}  # type: ignore[index]
    assert len(set(own.values())) == 3, "or any weights would do"
    for name in ("accuracy", "first", "images"):
        assert personal[name] == pytest.approx(shared[name])
    assert lowest["first"] == min(v for v in own.values() if v is not None) and "images" not in lowest


class BySlice(ByClass):
    """One whose rows are volumes of `depth` slices, each scored on its own."""

    by_row = False

    def __init__(self, classes: int, depth: int = 1) -> None:
        super().__init__(classes)
        self._depth = depth

    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.repeat_interleave(self._depth, dim=0) for name, tensor in super().state().items()}

    def merge(self, states: Iterable[Mapping[str, torch.Tensor]]) -> "BySlice":
        union = BySlice(CLASSES)
        union._parts = super().merge(states)._parts
        return union


def test_so_it_is_where_slices_are_scored_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client weighs as many slices as it has, not as many volumes."""
    lab = make_lab(tmp_path, hospitals=(Hospital("a", "CT", 10, test=3), Hospital("b", "MRI", 6, test=7)))
    monkeypatch.setattr(lab.task, "metric", lambda client=None: BySlice(CLASSES, {"a": 30, "b": 1}.get(client or "", 1)))
    found = lab.evaluate(lab.start())
    own = [views["personal"]["accuracy"] for views in found.clients.values()]  # type: ignore[index]
    assert own[0] != own[1], "or any weights would do"
    personal, shared = found.views["personal"], found.views["global"]
    assert personal is not None and shared is not None
    assert personal["accuracy"] == pytest.approx(shared["accuracy"])


def test_dropped_statistics_are_those_of_a_clients_own_training_images_when_it_is_scored(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, model__norm="batch", model__buffers="drop", hospitals=HOSPITALS[:1])
    server = lab.run()
    found = lab.evaluate(server)
    backbone = lab.site.model.backbone
    assert isinstance(backbone, TinyBackbone) and isinstance(backbone.norm, torch.nn.BatchNorm2d)
    split = lab.task.client_data("a").train
    values = backbone.conv(split.batch(torch.arange(len(split))).image - 0.5)
    torch.testing.assert_close(backbone.norm.running_mean, values.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(backbone.norm.running_var, values.var(dim=(0, 2, 3)))
    mean, variance = backbone.norm.running_mean, backbone.norm.running_var
    assert mean is not None and variance is not None
    test = lab.task.client_data("a").test
    statistics = {"backbone.norm.running_mean": mean.clone(), "backbone.norm.running_var": variance.clone()}
    guess, truth = predict(lab, {**server.shared, **statistics}, test)
    assert found.views["global"] is not None and found.views["personal"] is not None
    assert found.views["global"]["accuracy"] == found.views["personal"]["accuracy"] == pytest.approx((guess == truth).mean())


def test_dropped_statistics_need_images(tmp_path: Path) -> None:
    few = (HOSPITALS[0], Hospital("z", "US", 1))
    lab = make_lab(tmp_path, model__norm="batch", model__buffers="drop", hospitals=few)
    with pytest.raises(FederationError, match=r"^client z: model\.buffers = 'drop' .* two training images"):
        lab.evaluate(lab.start())


def test_the_worst_is_per_score() -> None:
    rows: list[Scores] = [{"a": 0.5, "b": None}, {"a": 0.2, "b": None}, {"a": None, "b": None, "c": 1.0}]
    assert worst(Scored(row, 1) for row in rows) == {"a": 0.2, "b": None, "c": 1.0}
    assert worst([]) == {} and worst([Scored({"a": 0.0}, 1), Scored({"a": 0.1}, 1)]) == {"a": 0.0}


def predict(lab: Lab, tensors: dict[str, torch.Tensor], split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return predicted and true classes of a plain model with these weights."""
    write(lab.site.model, tensors)
    lab.site.model.eval()
    batch = split.batch(torch.arange(len(split)))
    with torch.no_grad():
        return lab.site.model(batch.inputs).prediction.argmax(1).numpy(), batch.target.numpy()


@pytest.mark.parametrize("strategy", ["fedavg", "fedper"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_the_numbers_of_the_contract_worked_out_by_hand(strategy: str, split: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy, federation__rounds=3, federation__local_epochs=3)
    server = lab.run()
    found = lab.evaluate(server, split)
    hits: dict[str, np.ndarray] = {}
    scores: dict[str, float] = {}
    pooled: list[tuple[np.ndarray, np.ndarray]] = []
    for h in HOSPITALS:
        own = server.shared | lab.private(h.id)
        pooled.append(predict(lab, own, lab.task.client_data(h.id).split(split)))
        guess, truth = pooled[-1]
        hits[h.id] = guess == truth
        scores[h.id] = f1_score(truth, guess, labels=range(CLASSES), average="macro", zero_division=0)
        assert found.clients[h.id]["personal"]["accuracy"] == pytest.approx(hits[h.id].mean())  # type: ignore[index]
    personal, worst = found.views["personal"], found.views["worst"]
    assert personal is not None and worst is not None
    assert personal["accuracy"] == pytest.approx(np.concatenate(list(hits.values())).mean())
    sizes = [len(hits[h.id]) for h in HOSPITALS]
    assert personal["f1_union"] == pytest.approx(np.average([scores[h.id] for h in HOSPITALS], weights=sizes))
    assert worst["accuracy"] == pytest.approx(min(h.mean() for h in hits.values()))
    assert worst["f1_union"] == pytest.approx(min(scores.values()))
    if strategy == "fedper":
        assert found.views["global"] is None
        return
    guess, truth = (np.concatenate(part) for part in zip(*pooled, strict=True))
    whole = f1_score(truth, guess, labels=range(CLASSES), average="macro", zero_division=0)
    assert found.views["global"] is not None
    # One set of all clients' examples, which is no mean of the clients' scores.
    assert found.views["global"]["f1_union"] == pytest.approx(whole) and whole != pytest.approx(personal["f1_union"])


def test_clients_without_examples_have_no_score_and_no_weight(tmp_path: Path) -> None:
    hospitals = (Hospital("a", "CT", 8, test=6), Hospital("b", "US", 8, test=0))
    lab = make_lab(tmp_path, hospitals=hospitals, engine=Spy)
    found = lab.evaluate(lab.run(), finetune=True)
    assert found.clients["b"] == {"personal": None, "global": None, "finetuned": None}
    assert found.views["personal"] == found.clients["a"]["personal"]
    assert found.views["worst"] == {n: v for n, v in (found.views["personal"] or {}).items() if n != "auc_classes_skipped"}
    assert all(q.client == "a" for q in spy(lab).requests if q.kind == "evaluate")


def test_fine_tuning_is_asked_for_and_can_be_left_out(tmp_path: Path) -> None:
    lab = make_lab(tmp_path / "1", engine=Spy, optimiser__finetune_lr=0.02, federation__finetune_epochs=3)
    server = lab.run()
    assert lab.evaluate(server).views["finetuned"] is None
    found = lab.evaluate(server, finetune=True)
    assert found.views["finetuned"] is not None
    settings = [q.settings for q in spy(lab).requests if "finetune_epochs" in q.settings]
    assert len(settings) == 4 and all((s["finetune_epochs"], s["finetune_lr"]) == (3, 0.02) for s in settings)
    off = make_lab(tmp_path / "2", federation__finetune_epochs=0)
    assert off.evaluate(off.run(), finetune=True).views["finetuned"] is None


def test_fine_tuning_is_local_training_on_the_task_alone(tmp_path: Path) -> None:
    """It is what two more local epochs give, by hand; FedProx's pull takes no part in it."""
    changes: dict[str, Any] = {"optimiser__momentum": 0.0, "optimiser__finetune_lr": 0.05, "federation__finetune_epochs": 2}
    lab = make_lab(tmp_path, "fedprox", {"mu": 5.0}, hospitals=HOSPITALS[:1], engine=Spy, optimiser__batch_size=10, **changes)
    server = lab.run()
    lab.evaluate(server, finetune=True)
    found = spy(lab).replies[-1].extra["probability"]
    data, model = lab.task.client_data("a"), lab.site.model
    write(model, server.shared)
    batch, test = data.train.batch(torch.arange(10)), data.test.batch(torch.arange(6))
    parameters = list(model.parameters())
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(model(batch.inputs).prediction, batch.target)
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data -= 0.05 * (g + 1e-4 * p.data)
    with torch.no_grad():
        expected = model(test.inputs).prediction.double().softmax(1)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_scores_come_from_the_state_of_the_round_that_is_asked_for(tmp_path: Path) -> None:
    """After three rounds, the personal view after one reads what the clients held then."""
    lab = make_lab(tmp_path, "local", federation__rounds=3, federation__local_epochs=3)
    lab.after_round = lambda lab, server, done: server.meta.update(keep=[1])
    server = lab.run()
    early = make_lab(tmp_path / "1", "local", federation__rounds=1, federation__local_epochs=3)
    first = early.evaluate(early.run())
    lab.schedule = lab.schedule[:1]
    assert lab.evaluate(server) == first


def test_a_client_is_scored_with_the_shared_tensors_that_are_its_own(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedavg", {"aggregation": "neighbours", "neighbourhood_shrinkage": 0.0}, engine=Spy)
    server = lab.run()
    lab.evaluate(server)
    asked = [q for q in spy(lab).requests if q.kind == "evaluate"]
    own = {h.id: dict(lab.strategy.shared_for(server, h.id)) for h in HOSPITALS}
    assert differing(own["a"], server.shared)
    for request in asked:
        expected = server.shared if request.settings["view"] == "global" else own[request.client]
        assert differing(dict(request.tensors), expected) == []
    assert sorted(q.settings["view"] for q in asked) == ["global"] * 4 + ["personal"] * 4


def test_a_weighted_mean_does_not_depend_on_the_order_of_the_clients() -> None:
    rows = [Scored({"x": 0.1 * i}, 7 * i + 1, {"x": Fraction(i, 10)} if i % 3 else {}) for i in range(1, 9)]
    orders = [rows, rows[::-1], rows[4:] + rows[:4], rows[1::2] + rows[::2]]
    assert len({weighted_mean(order)["x"] for order in orders}) == 1
