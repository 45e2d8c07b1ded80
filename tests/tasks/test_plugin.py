"""A sixth task, written here and nowhere else: was an image darkened? The contract holds if this file is all it takes.

It has two networks behind two routes, further inputs, a score that is better low, an untrained reference and options: whatever
the contract offers, used by a task that the package does not know.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from omnifm import build, run
from omnifm.compare import Variant, compare, plan_cells
from omnifm.config import parse
from omnifm.data.cache import load_images
from omnifm.errors import ConfigError, DataError
from omnifm.metrics.base import NOTHING, Metric, Scores
from omnifm.tasks.base import (
    Backbone,
    Batch,
    ClientData,
    Features,
    Head,
    Inputs,
    Model,
    Picture,
    Reading,
    Task,
    TaskData,
    TaskOptions,
)
from tests.run.jobs import raw_config, write_federation, write_toml

WIDTH = 8


class Darkened:
    """Every image twice: as it is, and darkened. `side["hint"]` is a brightness that a network may use."""

    def __init__(self, images: Tensor, rows: Tensor, route: str) -> None:
        self._images, self._rows, self._route = images, rows, route

    def __len__(self) -> int:
        return 2 * len(self._images)

    def batch(self, index: Tensor) -> Batch:
        image, darkened = self._images[index // 2], index % 2 == 1
        image = torch.where(darkened[:, None, None, None], image / 2, image)
        return Batch(image, darkened.float(), self._rows[index // 2], {"hint": image.mean(dim=(1, 2, 3))}, self._route)


class Net(Backbone):
    token_dim = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, WIDTH, 4, stride=4)

    def forward(self, inputs: Inputs) -> Features:
        return Features(functional.relu(self.conv(inputs.image - 0.5)).flatten(2).transpose(1, 2))


class TwoHeads(Head):
    """One answer per modality, so that a client holds one of two."""

    def __init__(self, routes: Sequence[str]) -> None:
        super().__init__()
        self.answers = nn.ModuleDict({route: nn.Linear(WIDTH + 1, 1) for route in routes})

    def forward(self, reading: Reading) -> Tensor:
        read = torch.cat([reading.tokens.mean(1), reading.inputs.side["hint"][:, None]], dim=1)
        answer: Tensor = self.answers[reading.inputs.route](read).squeeze(1)
        return answer


class Brier(Metric):
    def __init__(self) -> None:
        self.terms = [torch.zeros(0, dtype=torch.float64)]

    def update(self, prediction: Tensor, target: Tensor, row: Tensor, side: Mapping[str, Tensor] = NOTHING) -> None:
        assert side["hint"].shape == target.shape
        self.terms.append((prediction.double().sigmoid() - target) ** 2)

    def state(self) -> dict[str, Tensor]:
        return {"terms": torch.cat(self.terms)}

    def merge(self, states: Iterable[Mapping[str, Tensor]]) -> "Brier":
        union = Brier()
        union.terms += [state["terms"] for state in states]
        return union

    def compute(self) -> Scores:
        terms = torch.cat(self.terms)
        return {"skill": 1 - float(terms.mean()), "brier": float(terms.mean())} if len(terms) else {"skill": None, "brier": None}


class DarknessOptions(TaskOptions):
    guess: float = Field(0.5, ge=0, le=1)


class Darkness(Task):
    name: ClassVar[str] = "darkness"
    reads: ClassVar[frozenset[str]] = frozenset({"classification", "super_resolution"})
    Options: ClassVar[type[TaskOptions]] = DarknessOptions
    options: DarknessOptions
    primary = "skill"
    lower_is_better = frozenset({"brier"})
    one_label_space = True

    def __init__(self, data: TaskData, options: DarknessOptions) -> None:
        super().__init__(data, options)
        self._plans = {plan.id: plan for plan in data.plans}
        size = data.config.data.image_size
        self._images = {n: load_images(c, size, 1, data.cache).pixels for n, c in data.cohorts.items()}
        self._routes = sorted({plan.modality for plan in data.plans})

    def client_data(self, client: str) -> ClientData:
        plan = self._plans[client]
        images = torch.from_numpy(self._images[plan.cohort].copy())
        return ClientData(*(Darkened(images[list(r)], torch.tensor(r), plan.modality) for r in (plan.train, plan.val, plan.test)))

    def backbone(self) -> Backbone:
        return Net()

    def head(self, token_dim: int) -> Head:
        return TwoHeads(self._routes)

    def holds(self, model: Model, client: str) -> frozenset[str]:
        others = tuple(f"head.answers.{route}." for route in self._routes if route != self._plans[client].modality)
        return frozenset(name for name in model.state_dict() if not name.startswith(others))

    def probes(self) -> Sequence[Inputs]:
        return [Inputs(torch.zeros(2, 1, 32, 32), {"hint": torch.zeros(2)}, route) for route in self._routes]

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        return batch

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        return functional.binary_cross_entropy_with_logits(prediction, batch.target)

    def metric(self, client: str | None = None) -> Metric:
        return Brier()

    def references(self, client: str) -> Mapping[str, Callable[[Batch], Tensor]]:
        logit = torch.tensor(self.options.guess).logit()
        return {"coin": lambda batch: logit.expand(len(batch.target))}

    def picture(self, prediction: Tensor, batch: Batch, index: int) -> Picture:
        pixels = (batch.image[index, 0] * 255).byte().numpy()
        return Picture((("as shown", pixels), ("turned", pixels.T)), truth=str(bool(batch.target[index])))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(build.TASKS, "darkness", f"{Darkness.__module__}:Darkness")
    return write_federation(tmp_path / "data")


def config(data: Path, strategy: str, **options: Any) -> dict[str, Any]:
    raw = raw_config(data, strategy, tasks={"darkness": options} if options else {})
    return {**raw, "task": "darkness", "optimiser": {"name": "adamw", "lr": 0.02, "batch_size": 8}}


# Methods that train a part of the network at a time, begin with much that is random, or blur what is to be learned.
LONGER = {name: {"local_epochs": 3} for name in ("gpfl", "feddat", "fedrep", "harmofl")}
# Servers that move a parameter by about so much a round, however far its clients went.
TO_LEARN_SOON = {"fedadam": {"server_step": 0.1}, "fedyogi": {"server_step": 0.1}}


@pytest.mark.parametrize("strategy", sorted(build.STRATEGIES))
def test_a_task_that_is_written_here_runs_from_config_to_report(strategy: str, data: Path, tmp_path: Path) -> None:
    if strategy == "centralised":
        with pytest.raises(Exception, match="different networks cannot be pooled"):
            run.execute(parse(config(data, strategy)), tmp_path / "out")
        return
    undefined = {"fedbn": "the model has no BatchNorm", "fedproto": "not defined for a task without class labels"}
    if strategy in undefined:
        with pytest.raises(ConfigError, match=undefined[strategy]):
            run.execute(parse(config(data, strategy)), tmp_path / "out")
        return
    raw = config(data, strategy)
    raw["federation"] |= LONGER.get(strategy, {})
    raw["strategies"] |= {strategy: TO_LEARN_SOON[strategy]} if strategy in TO_LEARN_SOON else {}
    metrics = run.execute(parse(raw), tmp_path / "out")
    personal, worst = metrics["test"]["personal"], metrics["test"]["worst"]
    assert metrics["primary"] == "skill" and personal["skill"] == pytest.approx(1 - personal["brier"])
    clients = [c["test"]["personal"] for c in metrics["clients"]]
    assert worst == {"skill": min(c["skill"] for c in clients), "brier": max(c["brier"] for c in clients)}
    assert metrics["references"]["coin"]["personal"] == pytest.approx({"skill": 0.75, "brier": 0.25})
    assert personal["skill"] > 0.76, "half the light is easy to see: it must have learned"
    report = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "left to right: as shown, turned" in report


def test_untrained_rows_stand_in_the_table_of_a_comparison(data: Path, tmp_path: Path) -> None:
    path = write_toml(tmp_path / "job.toml", config(data, "local"))
    cells = plan_cells(path, [Variant("local"), Variant("fedavg")], [0, 1], [], [])
    assert set(compare(cells, tmp_path / "out").values()) == {"ok"}
    with (tmp_path / "out/table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    coins = [row for row in rows if row["strategy"] == "coin"]
    assert [(row["seed"], row["status"], row["personal_skill"], row["worst_brier"]) for row in coins] == [
        (seed, "reference", "0.75", "0.25") for seed in "01"
    ]
    assert len(rows) == 6
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "4 finished" in page and "1 failed" not in page and "Failed: " not in page and "coin" in page


def shared_after(raw: dict[str, Any], out: Path) -> dict[str, Tensor]:
    """Run it; return the server's shared tensors."""
    run.execute(parse(raw), out)
    found = load_file(next((out / "checkpoint").glob("server-*.safetensors")))
    return {name.removeprefix("shared:"): tensor for name, tensor in found.items() if name.startswith("shared:")}


def test_every_tensor_is_averaged_over_the_clients_that_hold_it(data: Path, tmp_path: Path) -> None:
    """With one client per modality, a modality's head is that client's own, though it is shared; the backbone is a mean."""
    raw = config(data, "fedavg")
    raw["federation"] = {**raw["federation"], "rounds": 1, "participation": 1.0}
    for entry in raw["federation"]["cohorts"]:
        entry["clients"] = 1
    final = shared_after(raw, tmp_path / "both")
    # The same heads exist in every run, so a client alone starts from the same weights.
    alone = [shared_after({**raw, "seed": 0, "strategy": "local"}, tmp_path / "local")]
    assert alone == [{}], "local shares nothing"
    private = {
        modality: load_file(next((tmp_path / "local/checkpoint/clients" / f"{name}-0").glob("*.safetensors")))
        for name, modality in (("scan", "MRI"), ("echo", "US"))
    }
    for modality, own in private.items():
        name = f"head.answers.{modality}.weight"
        assert torch.equal(final[name], own[name]), "only this client holds it"
        assert not any(n.startswith("head.answers.") and modality not in n for n in own)
    mean = sum(own["backbone.conv.weight"].double() for own in private.values()) / 2
    torch.testing.assert_close(final["backbone.conv.weight"], mean.float())


def test_its_options_are_checked_and_its_cohorts_too(data: Path, tmp_path: Path) -> None:
    metrics = run.execute(parse(config(data, "local", guess=1.0)), tmp_path / "out")
    assert metrics["references"]["coin"]["personal"]["skill"] == pytest.approx(0.5)
    for options, message in (({"guess": 2}, "tasks.darkness.guess: "), ({"gess": 1}, "tasks.darkness.gess: unknown key")):
        with pytest.raises(ConfigError, match=message):
            run.execute(parse(config(data, "local", **options)), tmp_path / "refused")
    with pytest.raises(ConfigError, match="task = 'darknesses': unknown; known are classification"):
        run.execute(parse({**config(data, "local"), "task": "darknesses"}), tmp_path / "refused")
    monkey = {**config(data, "local"), "task": "mixed"}
    with pytest.raises((ConfigError, DataError)):
        run.execute(parse({**monkey, "tasks": {"mixed": {"set": {"fusion": {}}}}}), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
