"""Example-level privacy: gradients by example against a loop, clipping, noise, draws, and what it is worth."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn
from torch.nn import functional

pytest.importorskip("cryptography")
pytest.importorskip("dp_accounting")
pytest.importorskip("opacus")

from omnifm import build
from omnifm.config import PrivacyConfig
from omnifm.errors import ConfigError
from omnifm.federation.example_level import ExampleLevel
from omnifm.federation.messages import Request
from omnifm.federation.private import statement
from omnifm.federation.state import LocalJob
from omnifm.privacy.accounting import epsilon_of_examples
from omnifm.tasks.base import Batch
from tests.support import Lab, differing, make_lab

# A batch of everybody: each example is drawn with probability one, so that a plain loop can follow.
WHOLE = {"optimiser__batch_size": 100, "optimiser__momentum": 0.0, "optimiser__weight_decay": 0.0}


def private(folder: Path, strategy: str = "fedavg", clip: float = 0.1, noise: float = 0.0, **changes: Any) -> Lab:
    settings = {"privacy__example_clip": clip, "privacy__example_noise": noise, "privacy__noise": "seeded"}
    return make_lab(folder, strategy, **{**settings, **changes})


def trained(lab: Lab, client: str = "a", **settings: Any) -> dict[str, torch.Tensor]:
    request = Request("train", 0, client, lab.untrained, {}, {"epochs": 1, "steps": 1, "keep": [], **settings})
    return dict(lab.site.handle(request).tensors)


def by_loop(lab: Lab, clip: float, client: str = "a") -> dict[str, torch.Tensor]:
    """Return one step's sum of clipped gradients, one example at a time by autograd, divided by their number."""
    model, split = make_lab(Path("nowhere")).site.model, lab.task.client_data(client).train
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
    for i in range(len(split)):
        batch = split.batch(torch.tensor([i]))
        loss = functional.cross_entropy(model(batch.inputs).prediction, batch.target)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        for name, g in zip(total, gradients, strict=True):
            total[name] += g.double() * min(1.0, clip / norm) / len(split)
    return total


@pytest.mark.parametrize("clip", [0.01, 0.5, 1e6])
def test_a_step_is_that_of_a_loop_over_examples(clip: float, tmp_path: Path) -> None:
    lab = private(tmp_path, clip=clip, **WHOLE)
    moved = trained(lab)
    for name, gradient in by_loop(lab, clip).items():
        expected = lab.untrained[name].double() - 0.1 * gradient
        torch.testing.assert_close(moved[name].double(), expected, atol=2e-7, rtol=1e-5)


def net_that_overflows() -> nn.Module:
    """Return a network whose gradient overflows for an image brighter than .5, while its loss does not."""
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net[0].weight[0, 0], net[0].bias[0] = 2e-42, -1e-42
        net[2].weight[0, 0], net[4].weight[0, 0] = 1e21, 1e20
    return net


def gradients(images: torch.Tensor, privacy: PrivacyConfig, net: nn.Module) -> torch.Tensor:
    level = ExampleLevel(net, privacy, 0, len(images))
    data: Any = SimpleNamespace(train=images)
    job = LocalJob("c", 0, net, data, {}, {}, {}, 0, torch.device("cpu"))  # type: ignore[arg-type]
    with level.recording():
        loss = functional.cross_entropy(net(images), torch.zeros(len(images), dtype=torch.int64))
        assert math.isfinite(loss.item())
        loss.backward()
        level.privatise(job)
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def test_an_image_whose_gradient_overflows_counts_as_none() -> None:
    """Weights from a hostile server would otherwise tell in one bit whether such an image is there, whatever the noise."""
    privacy = PrivacyConfig(example_clip=1.0, example_noise=0.0)
    dark = torch.full((8, 4), 0.2)
    one = dark.clone()
    one[3, 0] = 1.0
    quiet = gradients(dark[1:], privacy, net_that_overflows()) * 7 / 8
    assert torch.equal(gradients(one, privacy, net_that_overflows()), quiet), "not those of the seven others"
    noisy = PrivacyConfig(example_clip=1.0, example_noise=1.0)
    assert bool(gradients(one, noisy, net_that_overflows()).isfinite().all())


def test_no_gradient_is_longer_than_the_clip_however_long_it_was() -> None:
    """Where float32 has no number for the share of a gradient that may stay, nothing of it stays."""
    net = nn.Sequential(nn.Linear(1, 2, bias=False))
    for size, clip in ((1e30, 1e-12), (1e37, 1e-6), (3e38, 1e-15), (1e20, 1.0)):
        with torch.no_grad():
            net[0].weight.zero_()
        found = gradients(torch.tensor([[size]]), PrivacyConfig(example_clip=clip), net).double().norm()
        assert float(found) <= clip and (float(found) > 0.99 * clip) == (clip / size > 1.2e-38)


@pytest.mark.parametrize("clip", [1e-42, 1e-21])
def test_a_clip_beyond_float32_is_refused(clip: float) -> None:
    with pytest.raises(ConfigError, match=rf"^privacy\.example_clip = {clip:g}: at least 1e-20"):
        ExampleLevel(nn.Linear(2, 2), PrivacyConfig(example_clip=clip, example_noise=1.0), 0, 4)


def test_without_a_bound_and_noise_it_is_sgd(tmp_path: Path) -> None:
    plain, lab = make_lab(tmp_path / "1", **WHOLE), private(tmp_path / "2", clip=1e6, **WHOLE)
    expected, found = plain.run(), lab.run()
    for name, tensor in expected.shared.items():
        torch.testing.assert_close(found.shared[name], tensor, atol=1e-5, rtol=1e-4)


def test_noise_has_the_stated_deviation_and_is_drawn_anew_every_step(tmp_path: Path) -> None:
    quiet, loud = private(tmp_path / "0", noise=0.0, **WHOLE), private(tmp_path / "1", noise=3.0, **WHOLE)
    before, after, later = trained(quiet), trained(loud), trained(loud, steps=2)
    moved = torch.cat([(after[n] - before[n]).flatten() for n in before]).double()
    sigma = 0.1 * 3.0 * 0.1 / 10  # lr z C / n
    assert 1e-3 < stats.chi2.cdf(float((moved / sigma).square().sum()), len(moved)) < 1 - 1e-3
    second = torch.cat([(later[n] - after[n]).flatten() for n in before]).double()
    assert abs(np.corrcoef(moved, second)[0, 1]) < 0.2 and float(second.std()) == pytest.approx(sigma, rel=0.2)


def test_draws_are_by_coin_and_may_be_empty(tmp_path: Path) -> None:
    lab = private(tmp_path, noise=1.0, optimiser__batch_size=1, federation__local_epochs=20)
    example, sizes = lab.site._example, []
    assert example is not None
    draw = example.draw
    example.draw = lambda job, step: (sizes.append(len(found := draw(job, step))), found)[1]  # type: ignore[method-assign, func-returns-value]
    lab.run()
    assert len(sizes) == 2 * 20 * 36 and 0 in sizes and max(sizes) > 1
    # A draw of n examples with 1 / n each: mean 1, variance 1 - 1 / n.
    assert np.mean(sizes) == pytest.approx(1.0, abs=0.1) and np.var(sizes) == pytest.approx(0.88, abs=0.12)


def test_changes_of_images_are_unknown_where_the_noise_is_and_repeat_where_it_is_seeded(tmp_path: Path) -> None:
    """Known ones would be others for all images after one that is left out, and a step would tell of more than one example."""

    def drawn(name: str, noise: str) -> list[torch.Tensor]:
        lab = private(tmp_path / name, noise=1.0, privacy__noise=noise, data__augment="flip_shift", federation__local_steps=3)
        seen: list[torch.Tensor] = []
        augment = lab.task.augment

        def note(batch: Batch, generator: torch.Generator) -> Batch:
            seen.append(torch.rand(4, generator=generator))
            return augment(batch, generator)

        lab.task.augment = note  # type: ignore[method-assign]
        lab.run()
        return seen

    one, two = drawn("a", "seeded"), drawn("b", "seeded")
    assert one and len({tuple(draws.tolist()) for draws in one}) == len(one), "each step has its own"
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    secret = [drawn(name, "secret") for name in ("c", "d")]
    assert not any(torch.equal(a, b) for a, b in zip(*secret, strict=False))


def test_seeded_runs_repeat_and_secret_ones_do_not(tmp_path: Path) -> None:
    def run(name: str, noise: str) -> dict[str, torch.Tensor]:
        lab = private(tmp_path / name, noise=1.0, privacy__noise=noise)
        return lab.snapshot(lab.run())

    assert differing(run("1", "seeded"), run("2", "seeded")) == []
    assert differing(run("3", "secret"), run("4", "secret")) != []


def test_scores_and_fine_tuning_leave_no_gradients_behind(tmp_path: Path) -> None:
    lab = private(tmp_path, noise=1.0)
    lab.evaluate(lab.run(), finetune=True)
    assert all(p.grad_sample is None for p in lab.site.model.parameters())
    assert all(not getattr(m, "activations", None) for m in lab.site.model.modules())


def gaussian_sample(sigma: float, rate: float, alpha: int) -> float:
    """Return the Renyi divergence of (1 - q) N(0, s^2) + q N(1, s^2) from N(0, s^2) by numerical integration."""

    def integrand(x: float) -> float:
        ratio = 1 - rate + rate * math.exp((2 * x - 1) / (2 * sigma**2))
        return float(stats.norm.pdf(x, scale=sigma) * ratio**alpha)

    value, _ = integrate.quad(integrand, -12 * sigma, alpha + 12 * sigma, limit=500)
    return math.log(value) / (alpha - 1)


@pytest.mark.parametrize(("z", "steps", "rate"), [(1.0, 100, 0.05), (2.0, 400, 0.2), (1.5, 1, 1.0)])
def test_epsilon_is_that_of_the_integral(z: float, steps: int, rate: float) -> None:
    delta, orders = 1e-5, [2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20]
    losses = {a: steps * gaussian_sample(z, rate, a) for a in orders}
    expected = min(loss + math.log1p(-1 / a) - math.log(delta * a) / (a - 1) for a, loss in losses.items())
    found = epsilon_of_examples(z, delta, steps, rate)
    assert found <= expected * (1 + 1e-6) and found == pytest.approx(expected, rel=0.05)
    assert epsilon_of_examples(0.0, delta, steps, rate) == math.inf


def test_the_client_with_the_largest_epsilon_speaks_for_all(tmp_path: Path) -> None:
    lab = private(tmp_path, noise=1.5)
    found = statement(lab.config, lab.num_train, lab.schedule)
    assert found is not None and found["example_level"]["client"] == "b"  # 6 examples in batches of 4: drawn most often
    assert found["example_level"]["epsilon"] == epsilon_of_examples(1.5, 1e-5, 2 * 2, 4 / 6)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    name: (name, {}, f"strategy {name} trains or sends otherwise")
    for name in ("scaffold", "fedprox", "centralised", "moon", "feddg", "harmofl")
} | {
    "prototypes": ("omnifm", {}, "a client also sends prototypes of its images, which get no noise; set privacy.prototype_clip"),
    "a mean spectrum": ("fedavg", {"strategies__fedavg__aggregation": "neighbours"}, "a client also sends its mean spectrum"),
    "another task": ("fedavg", {"task": "segmentation"}, "the loss of task segmentation"),
    "bf16": ("fedavg", {"engine__precision": "bf16"}, "fp32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_have_it_is_refused_at_the_start(name: str, tmp_path: Path) -> None:
    strategy, changes, complaint = REFUSED[name]
    lab = private(tmp_path, strategy, **changes)
    with pytest.raises(ConfigError, match=f"^privacy.example_clip: .*{complaint}") as caught:
        build.make_schedule(lab.config, lab.site, list(lab.num_train))
    assert "\n" not in str(caught.value)


def test_batch_norm_is_refused_where_the_model_is_built(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^privacy\.example_clip: the model has no gradients by example .*BatchNorm.*"
    ) as caught:
        private(tmp_path, model__norm="batch")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strategy", ["fedavg", "fedper", "fedadam", "median", "local"])
def test_what_can_have_it_runs(strategy: str, tmp_path: Path) -> None:
    lab = private(tmp_path, strategy, noise=1.0)
    assert build.make_schedule(lab.config, lab.site, list(lab.num_train)) == tuple(lab.schedule)
    assert all(bool(t.isfinite().all()) for t in lab.snapshot(lab.run()).values())


@pytest.mark.parametrize("strategy", sorted(build.STRATEGIES))
def test_whatever_is_not_refused_trains(strategy: str, tmp_path: Path) -> None:
    try:
        lab = private(tmp_path, strategy, noise=1.0)
        build.make_schedule(lab.config, lab.site, list(lab.num_train))
        assert strategy != "lora"
        lab.run()
    except ConfigError as refusal:
        assert strategy not in ("fedavg", "fedper", "fedavgm") and "\n" not in str(refusal)
