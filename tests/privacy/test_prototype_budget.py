"""Prototypes and mean spectra with a budget of their own: sensitivity, noise, epsilon, and what cannot have it."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from torch import Tensor
from torch.nn import functional

pytest.importorskip("cryptography")
pytest.importorskip("dp_accounting")
pytest.importorskip("opacus")

from omnifm import build
from omnifm.config import PrivacyConfig
from omnifm.errors import ConfigError, FederationError
from omnifm.federation.budgets import by_client, of_a_client
from omnifm.federation.messages import Reply, Request
from omnifm.federation.private import statement
from omnifm.federation.release import Release
from omnifm.federation.strategies.omnifm import OmniFM
from omnifm.privacy.accounting import SLACK, Releases, epsilon, epsilon_of_examples
from omnifm.spectral.compose import SpectralPath
from omnifm.spectral.fft import low_pass_amplitude
from omnifm.spectral.lloyd import bound
from tests.support import Lab, MemorySplit, Spy, differing, make_lab, spy

EXAMPLE = {"privacy__example_clip": 1.0, "privacy__example_noise": 1.0}
CLIENT = {"privacy__clip": 0.5, "privacy__noise_multiplier": 2.0, "federation__weighting": "equal"}
MEAN = {"strategies__omnifm__aggregation": "mean"}
UPLOAD = {"prototypes/vectors", "prototypes/weight"}


def private(folder: Path, strategy: str = "omnifm", noise: float = 1.0, **changes: Any) -> Lab:
    """Return a lab with example-level privacy and a budget; no noise at all if `noise` is 0."""
    own = {"privacy__prototype_clip": 1.0, "privacy__prototype_noise": noise, "privacy__noise": "seeded"}
    weights = EXAMPLE if noise else EXAMPLE | {"privacy__example_noise": 0.0}
    return make_lab(folder, strategy, **{**weights, **own, "engine": Spy, **changes})


def checked(lab: Lab) -> Lab:
    assert build.make_schedule(lab.config, lab.site, list(lab.num_train)) == tuple(lab.schedule)
    return lab


def uploads(lab: Lab, client: str) -> list[Mapping[str, Tensor]]:
    return [reply.extra for reply in spy(lab).trained() if reply.client == client]


# ---------------------------------------------------------------------- the mechanism
def release(z: float = 1.0, seed: int = 0, **changes: Any) -> Release:
    weights = {"example_clip": 1.0, "example_noise": z}
    chosen = {"prototype_clip": 1.0, "prototype_noise": z, "noise": "seeded", **weights, **changes}
    return Release(PrivacyConfig(**chosen), seed)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10), st.integers(1, 4), st.floats(0.01, 5.0), st.integers(0, 10**6))
def test_the_sensitivity_of_sums_is_the_bound_and_that_of_a_mean_twice_it(n: int, k: int, most: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    added, place = 3 * torch.randn(n, 4, generator=g), torch.randint(k, (n,), generator=g)
    quiet = release(0.0)
    whole = quiet.sums(added, place, k, most, "x")
    for gone in range(n):
        kept = torch.arange(n) != gone
        assert float((whole - quiet.sums(added[kept], place[kept], k, most, "x")).norm()) <= most
    other = quiet.sums(3 * torch.randn(n, 4, generator=g), torch.randint(k, (n,), generator=g), k, most, "x")
    assert float((whole - other).norm()) / n <= 2 * most


def test_an_image_as_long_as_the_bound_moves_the_sums_by_it() -> None:
    added = torch.tensor([[3.0, 4.0], [0.0, 0.1]])
    found = release(0.0).sums(added, torch.tensor([0, 1]), 2, 2.5, "x")
    torch.testing.assert_close(found, torch.tensor([[1.5, 2.0], [0.0, 0.1]], dtype=torch.float64))


@pytest.mark.parametrize(("changes", "factor"), [({}, 1), ({"clip": 0.5, "noise_multiplier": 1.0}, 7)])
def test_noise_is_normal_with_the_stated_deviation(changes: dict[str, float], factor: int) -> None:
    noisy, quiet = release(1.5, **changes), release(0.0)
    added, place = torch.randn(7, 500), torch.tensor([0, 1, 2, 3, 3, 3, 0])
    values = (noisy.sums(added, place, 40, 2.0, "x") - quiet.sums(added, place, 40, 2.0, "x")).flatten()
    sigma = 1.5 * 2.0 * factor  # of the sum of 7 images; with client-level privacy of their mean
    assert noisy.deviation(2.0, 7) == sigma and len(values) == 20_000
    assert 1e-3 < stats.chi2.cdf(float((values / sigma).square().sum()), len(values)) < 1 - 1e-3
    assert stats.kstest(values.numpy() / sigma, "norm").pvalue > 1e-3


def test_noise_is_of_its_purpose_and_seed_or_of_nothing() -> None:
    added, place = torch.zeros(1, 9), torch.zeros(1, dtype=torch.int64)
    found = [release(seed=s).sums(added, place, 1, 1.0, *what) for s, what in ((0, "ab"), (0, "ab"), (0, "ac"), (1, "ab"))]
    assert torch.equal(found[0], found[1]) and all(not torch.equal(found[0], other) for other in found[2:])
    secret = [release(noise="secret").sums(added, place, 1, 1.0, "a") for _ in range(2)]
    assert not torch.equal(*secret)


# ---------------------------------------------------------------------- in a run
def test_without_noise_prototypes_are_the_means_of_a_lloyd_step_and_with_it_they_are_not(tmp_path: Path) -> None:
    changes = {**MEAN, "federation__rounds": 1, "privacy__example_noise": 0.0, "privacy__prototype_noise": 0.0}
    quiet = private(tmp_path / "0", **changes)
    quiet.run()
    reply = next(r for r in spy(quiet).trained() if r.client == "a")
    path, split = quiet.site.model.path, quiet.task.client_data("a").train
    assert isinstance(path, SpectralPath)
    own = quiet.private("a")
    state = {**quiet.site.model.state_dict(), **{n: t for n, t in own.items() if not n.startswith("state:")}, **reply.tensors}
    quiet.site.model.load_state_dict(state)
    s = path.eval().embed(split.batch(torch.arange(len(split))).image)
    found = reply.extra["prototypes/vectors"]
    # Whatever the centres, weighted means of all clusters add up to the mean of the images.
    weight = reply.extra["prototypes/weight"]
    assert weight.sum() == len(split)
    torch.testing.assert_close((weight[:, None] * found).sum(0), s.sum(0), atol=1e-4, rtol=1e-4)
    loud = private(tmp_path / "1", noise=0.01, **{n: v for n, v in changes.items() if "noise" not in n})
    loud.run()
    moved = uploads(loud, "a")[0]["prototypes/vectors"]
    assert moved.shape != found.shape or not torch.allclose(moved, found, atol=1e-4)


class Kept(Release):
    """Remembers the sums."""

    def sums(self, added: Tensor, place: Tensor, slots: int, bound: float, *purpose: str | int) -> Tensor:
        self.found = super().sums(added, place, slots, bound, *purpose)
        return self.found


def test_neighbours_of_a_client_are_the_bound_apart_and_in_one_line_alone(tmp_path: Path) -> None:
    """By brute force through the client: every data set with one image less. No other image's share moves by a single bit."""
    lab = private(tmp_path, noise=0.0, **MEAN)
    strategy, kept = lab.site.strategy, Kept(lab.config.privacy, 0)
    assert isinstance(strategy, OmniFM) and isinstance(lab.site.model.path, SpectralPath)
    job = lab.site._job(Request("train", 0, "c", lab.untrained), {})
    split = job.data.train

    def sums(index: Tensor) -> Tensor:
        batch = split.batch(index)
        data = replace(job.data, train=MemorySplit(batch.image, batch.target))
        strategy._released(replace(job, data=data), lab.site.model.path, kept)  # type: ignore[arg-type]
        return kept.found

    everybody = torch.arange(len(split))
    whole = sums(everybody)
    for gone in everybody:
        moved = whole - sums(everybody[everybody != gone])
        assert float(moved.norm()) == pytest.approx(bound(1.0), rel=1e-6)  # s is on the sphere: the bound is met
        assert int((moved.abs().sum(dim=1) > 1e-12).sum()) == 1


def test_prototypes_leave_in_so_many_rounds_and_nothing_else_does(tmp_path: Path) -> None:
    lab = checked(private(tmp_path, federation__rounds=4, privacy__prototype_releases=2))
    server = lab.run()
    for client in lab.num_train:
        assert [set(extra) for extra in uploads(lab, client)] == [UPLOAD, UPLOAD, set(), set()]
    rows = lab.strategy.bank_rows(server)
    assert rows is not None and rows.round.unique().tolist() == [0, 1] and bool((rows.count == 0).all())
    told = [event for event in lab.events if event["event"] == "client"]
    assert all(not {"retrieval", "effective_rank", "spread"} & event.keys() for event in told)


def test_each_release_starts_where_the_last_one_ended(tmp_path: Path) -> None:
    """One cluster without noise is the mean whatever the start; two from random points are not those of two steps."""
    lab = private(tmp_path, federation__rounds=2, privacy__prototype_releases=2)
    lab.run()
    first, later = (lab.private("a", done)["state:release/centres"] for done in (1, 2))
    assert first.shape == later.shape and not torch.equal(first, later)
    sent = {int(lab.private("a", done)["state:release/sent"]) for done in (1, 2)}
    assert sent == {1, 2}
    assert all(any(torch.equal(row, centre) for centre in first) for row in uploads(lab, "a")[0]["prototypes/vectors"])


def test_the_bank_is_read_for_as_long_as_it_is_there(tmp_path: Path) -> None:
    """Rows of the one release serve every later round: another noise there is another model in the end."""
    runs = [private(tmp_path / str(z), federation__rounds=2, privacy__prototype_noise=z) for z in (1.0, 2.0)]
    one, other = (lab.snapshot(lab.run()) for lab in runs)
    assert differing({n: t for n, t in one.items() if n.startswith("shared:")}, other)
    assert all(set(reply.extra) <= UPLOAD for lab in runs for reply in spy(lab).trained())


def test_the_mean_spectrum_is_noisy_and_made_of_shortened_spectra(tmp_path: Path) -> None:
    quiet, loud = (private(tmp_path / str(z), "fedavg", z, strategies__fedavg__aggregation="neighbours",
                           strategies__fedavg__neighbourhood_band=8) for z in (0.0, 3.0))  # fmt: skip
    found = [lab.site.handle(Request("describe", 0, "c")).extra["signature"] for lab in (quiet, checked(loud))]
    split = quiet.task.client_data("c").train
    spectra = low_pass_amplitude(split.batch(torch.arange(12)).image, 8).flatten(1).double()
    expected = (spectra / spectra.norm(dim=1, keepdim=True)).mean(dim=0)  # all are longer than 1
    torch.testing.assert_close(found[0].double(), expected, atol=1e-6, rtol=1e-5)
    noise = (found[1] - found[0]).double() * 12 / 3.0
    assert 1e-3 < stats.chi2.cdf(float(noise.square().sum()), 128) < 1 - 1e-3


def test_retrievals_are_refused_where_there_is_a_budget(tmp_path: Path) -> None:
    lab = private(tmp_path, **MEAN)
    lab.strategy.begin_round(lab.start())
    extra = {"prototypes/vectors": torch.zeros(1, 8), "prototypes/weight": torch.ones(1)}
    counts = {"retrievals/row_id": torch.zeros(1, dtype=torch.int64), "retrievals/count": torch.zeros(1, dtype=torch.int64)}
    lab.strategy.vet(lab.start(), Reply("train", 0, "a", 10, extra=extra))
    lab.strategy.vet(lab.start(), Reply("train", 0, "a", 10))
    with pytest.raises(FederationError, match="retrievals/count is unknown"):
        lab.strategy.vet(lab.start(), Reply("train", 0, "a", 10, extra=extra | counts))
    with pytest.raises(FederationError, match="prototypes/weight is missing"):
        lab.strategy.vet(lab.start(), Reply("train", 0, "a", 10, extra={"prototypes/vectors": torch.zeros(1, 8)}))
    with pytest.raises(FederationError, match="prototypes/vectors is missing"):
        open_lab = make_lab(tmp_path / "open", "omnifm")
        open_lab.strategy.begin_round(open_lab.start())
        open_lab.strategy.vet(open_lab.start(), Reply("train", 0, "a", 10))


# ---------------------------------------------------------------------- gradients by example through the path
@pytest.mark.parametrize("mixing", ["mlp", "global_filter"])
@pytest.mark.parametrize("rounds", [0, 1])
def test_a_step_through_the_path_is_that_of_a_loop_over_examples(rounds: int, mixing: str, tmp_path: Path) -> None:
    """Round 1 has a bank, round 0 none, so that some layers get no gradient. SPAlign's share is in the gradient."""
    clip = 0.05
    lab = private(tmp_path, noise=0.0, privacy__example_clip=clip, optimiser__batch_size=100, optimiser__momentum=0.0,
                  optimiser__weight_decay=0.0, strategies__omnifm__aggregation="mean", strategies__omnifm__lam=2.0,
                  strategies__omnifm__mixing=mixing, federation__rounds=max(rounds, 1))  # fmt: skip
    server = lab.run() if rounds else lab.start()
    extra = lab.strategy.extra_for(server, "a")
    assert bool(extra) == bool(rounds)
    request = Request("train", rounds, "a", server.shared, extra, {"epochs": 1, "steps": 1, "keep": []})
    model = lab.site.model
    lab.site._install(request)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    lab.strategy.begin(lab.site._job(request, lab.private("a", rounds)))
    expected = by_loop(lab, clip)
    lab.site.handle(request)
    moved = {n: p.detach().double() for n, p in model.named_parameters()}
    assert bool(expected["path.tokenizer.embed.weight"].abs().sum()) == bool(rounds)
    assert expected["path.psp.suffix.token"].abs().sum() > 0 and expected["path.psp.parts.vectors"].abs().sum() > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(moved[name], before[name].double() - 0.1 * gradient, atol=5e-7, rtol=1e-6)


def by_loop(lab: Lab, clip: float) -> dict[str, Tensor]:
    """Return the mean of clipped gradients of cross-entropy plus penalty, one example at a time by autograd."""
    model, split = lab.site.model.train(), lab.task.client_data("a").train
    weights = dict(model.named_parameters())
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in weights.items()}
    assert isinstance(model.path, SpectralPath)
    for i in range(len(split)):
        batch = split.batch(torch.tensor([i]))
        output = model(batch.inputs)
        loss = functional.cross_entropy(output.prediction, batch.target) + model.path.penalty(output.trace)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))
        for name, g in zip(total, gradients, strict=True):
            total[name] += 0 if g is None else g.double() * min(1.0, clip / norm) / len(split)
    return total


# ---------------------------------------------------------------------- what it is worth
def exact(mu: float, delta: float) -> float:
    """Return epsilon of a Gaussian mechanism whose means are mu deviations apart: Balle and Wang, ICML 2018, Theorem 8."""

    def excess(e: float) -> float:
        return float(stats.norm.cdf(mu / 2 - e / mu) - math.exp(e) * stats.norm.cdf(-mu / 2 - e / mu)) - delta

    return float(optimize.brentq(excess, 0, 500))


@pytest.mark.parametrize(("z", "count", "delta"), [(1.0, 1, 1e-5), (2.0, 1, 1e-6), (3.0, 5, 1e-5), (10.0, 20, 1e-3)])
def test_epsilon_of_releases_is_a_little_above_the_exact_one(z: float, count: int, delta: float) -> None:
    least = exact(math.sqrt(count) / z, delta)
    assert least < epsilon_of_examples(0.0, delta, 0, 1.0, Releases(z, count)) < 1.35 * least
    least = exact(math.sqrt(count) / (z / 2), delta)
    assert least < epsilon(0.0, delta, 0, releases=Releases(z / 2, count)) < 1.35 * least


def test_both_together_are_a_gaussian_mechanism_where_every_step_takes_everybody() -> None:
    """With rate 1 all are Gaussian, and means that are mu_1, mu_2 apart compose to sqrt(mu_1^2 + mu_2^2)."""
    found = epsilon_of_examples(4.0, 1e-5, 9, 1.0, Releases(2.0, 3))
    least = exact(math.sqrt(9 / 16 + 3 / 4), 1e-5)
    assert least < found < 1.35 * least
    assert found < epsilon_of_examples(4.0, 1e-5, 9, 1.0) + epsilon_of_examples(4.0, 1e-5, 0, 1.0, Releases(2.0, 3))
    both = epsilon(4.0, 1e-5, 9, releases=Releases(2.0, 3))
    least = exact(math.sqrt(9 * (2 * (1 + SLACK)) ** 2 / 16 + 3 / 4), 1e-5)
    assert least < both < 1.35 * least


def test_without_noise_nothing_is_promised_and_nothing_sent_costs_nothing() -> None:
    assert (
        epsilon_of_examples(1.0, 1e-5, 1, 1.0, Releases(0.0, 1)) == epsilon(1.0, 1e-5, 1, releases=Releases(0.0, 1)) == math.inf
    )
    assert epsilon_of_examples(0.0, 1e-5, 1, 1.0) == epsilon(0.0, 1e-5, 1) == math.inf
    assert epsilon_of_examples(0.0, 1e-5, 0, 1.0) == epsilon(0.0, 1e-5, 0) == 0.0


def test_a_client_pays_for_what_it_sent(tmp_path: Path) -> None:
    lab = private(tmp_path, noise=2.0, federation__rounds=3, federation__participation=0.5, privacy__prototype_releases=2)
    lab.schedule = [("a", "b"), ("a", "c"), ("a", "b")]
    found = by_client(lab.config, lab.num_train, lab.schedule, lab.strategy)
    # Aggregation is by neighbourhoods: d never trains, and yet its mean spectrum went out.
    assert {c: round(w.prototypes, 9) for c, w in found.items()} == {
        c: round(epsilon_of_examples(0.0, 1e-5, 0, 1.0, Releases(2.0, count)), 9)
        for c, count in {"a": 3, "b": 3, "c": 2, "d": 1}.items()
    }
    assert found["d"].weights == 0.0 and found["d"].together == found["d"].prototypes
    assert found["b"].together == epsilon_of_examples(1.0, 1e-5, 2 * 2, 4 / 6, Releases(2.0, 3)) > found["b"].weights
    with pytest.raises(ValueError, match="the strategy has to say"):
        by_client(lab.config, lab.num_train, lab.schedule)


def test_both_levels_share_one_noise(tmp_path: Path) -> None:
    lab = checked(private(tmp_path, noise=3.0, **CLIENT, **MEAN))
    whole, one = (
        of_a_client(lab.config, lab.schedule, lab.strategy),
        by_client(lab.config, lab.num_train, lab.schedule, lab.strategy),
    )
    assert whole.prototypes == epsilon(0.0, 1e-5, 0, releases=Releases(1.5, 1))
    assert whole.together == epsilon(2.0, 1e-5, 2, releases=Releases(1.5, 1)) > whole.weights == epsilon(2.0, 1e-5, 2)
    assert one["b"].prototypes == epsilon_of_examples(0.0, 1e-5, 0, 1.0, Releases(3.0 * 6, 1))  # b has 6 images
    found = statement(lab.config, lab.num_train, lab.schedule, lab.strategy)
    assert found is not None
    assert [unit["unit"] for unit in found["combined"]["units"]] == ["one client", "one training image of one client"]
    assert found["combined"]["units"][0]["together"] == whole.together
    assert found["combined"]["units"][1] == {
        "unit": "one training image of one client", "client": "b", **one["b"]._asdict()
    }  # fmt: skip
    lab.run()


# ---------------------------------------------------------------------- what cannot have it
BUDGET = {"privacy__prototype_clip": 1.0, "privacy__prototype_noise": 1.0}
OMNIFM: dict[str, tuple[str, dict[str, Any], str]] = {
    "no budget": ("omnifm", EXAMPLE, "also sends prototypes of its images, which get no noise; set privacy.prototype_clip"),
    "by class": ("omnifm", EXAMPLE | BUDGET | {"strategies__omnifm__bank__per_class": True}, "bank.per_class = true"),
    "by class, clients": (
        "omnifm",
        CLIENT | BUDGET | MEAN | {"strategies__omnifm__bank__per_class": True},
        "bank.per_class = true",
    ),
    "a floor": ("omnifm", EXAMPLE | BUDGET | {"strategies__omnifm__variance_floor": 0.1}, "variance_floor"),
    "one reading": ("omnifm", EXAMPLE | BUDGET | {"strategies__omnifm__gskr": False}, "gskr = false with eca"),
    "nothing told": ("fedavg", EXAMPLE | BUDGET, "strategy fedavg tells nothing of its images' spectra"),
    "neighbourhoods": ("omnifm", CLIENT | BUDGET, "needs more of the clients' tensors than their mean"),
}


@pytest.mark.parametrize("name", OMNIFM)
def test_what_cannot_have_it_is_refused_at_the_start(name: str, tmp_path: Path) -> None:
    strategy, changes, complaint = OMNIFM[name]
    lab = make_lab(tmp_path, strategy, **changes)
    with pytest.raises(ConfigError, match=rf"^privacy\.\w+: .*{complaint}") as caught:
        build.make_schedule(lab.config, lab.site, list(lab.num_train))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"privacy__prototype_noise": 1.0}, r"in units of privacy\.prototype_clip"),
        (BUDGET, "the weights need a budget too"),
        (EXAMPLE | {"privacy__prototype_clip": 1.0}, "the prototypes would have no noise"),
        (BUDGET | {"privacy__example_clip": 1.0}, "the weights, which read the spectra, would have no noise"),
    ],
)
def test_a_budget_for_one_part_alone_is_none(changes: dict[str, float], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_lab(Path("nowhere"), "omnifm", **changes)


def test_without_the_bank_no_budget_is_needed(tmp_path: Path) -> None:
    off = {f"strategies__omnifm__{name}": False for name in ("gskr", "eca", "spalign")}
    lab = checked(make_lab(tmp_path, "omnifm", **EXAMPLE, **off, **MEAN))
    assert all(bool(t.isfinite().all()) for t in lab.snapshot(lab.run()).values())


@pytest.mark.parametrize("policy", ["lfu_aging", "quota", "ema"])
def test_every_policy_of_the_bank_does_without_retrievals(policy: str, tmp_path: Path) -> None:
    changes = {"strategies__omnifm__bank__policy": policy, "privacy__prototype_releases": 9, "federation__rounds": 3}
    lab = private(tmp_path, **changes)
    rows = lab.strategy.bank_rows(lab.run())
    assert rows is not None and 1 <= len(rows) <= 8
