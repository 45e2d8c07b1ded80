"""With next to no noise epsilon is infinite: beyond what floating-point numbers hold the accountant would make 0 of it."""

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("dp_accounting")
pytest.importorskip("opacus")

from omnifm.federation.private import statement
from omnifm.privacy import accounting
from omnifm.privacy.accounting import LEAST_NOISE, Releases, Steps, epsilon, epsilon_of_all, epsilon_of_examples, spent
from tests.support import make_lab

TINY = [5e-324, 1e-200, 1e-153, 1e-100, LEAST_NOISE * 0.999, -1.0, math.nan]
"""Noises: with the second dp-accounting divides by 0, with the third its series ends in NaN, and NaN in an epsilon of 0."""


@pytest.mark.parametrize("noise", TINY)
@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_next_to_no_noise_is_worth_everything_and_so_is_all_that_comes_with_it(noise: float, rate: float) -> None:
    good = Steps(2.0, 0.25, 5)
    assert epsilon_of_all(1e-5, [Steps(noise, rate, 1)], []) == math.inf
    assert epsilon_of_all(1e-5, [good, Steps(noise, rate, 1), good], [Releases(2.0, 1)]) == math.inf
    assert epsilon_of_all(1e-5, [good], [Releases(noise, 1)]) == math.inf
    assert epsilon(noise, 1e-5, 1) == epsilon(noise, 1e-5, 1, (3, 4)) == math.inf
    assert epsilon(2.0, 1e-5, 1, releases=Releases(noise, 1)) == math.inf
    assert math.isfinite(epsilon_of_all(1e-5, [good, Steps(noise, rate, 0)], [Releases(noise, 0)])), "of what was never done"
    assert spent(noise, 1e-5, 4, [("a", "b", "c")]).epsilon == math.inf


def test_the_least_noise_that_counts_is_worth_a_great_deal() -> None:
    assert 5e5 < epsilon_of_examples(LEAST_NOISE, 1e-5, 1, 1e-3) < epsilon(LEAST_NOISE, 1e-5, 1) < math.inf


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_divergence_that_is_no_number_is_no_epsilon_of_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever noise that was with."""
    monkeypatch.setattr(accounting, "LEAST_NOISE", 0.0)
    assert epsilon_of_examples(1e-153, 1e-5, 1, 0.5) == math.inf
    assert epsilon(1e-153, 1e-5, 1, (3, 4)) == math.inf


@pytest.mark.parametrize("noise", [1e-200, 1e-153])
def test_a_statement_of_next_to_no_noise_names_no_epsilon(noise: float, tmp_path: Path) -> None:
    both = {"clip": 1.0, "noise_multiplier": noise, "example_clip": 1.0, "example_noise": noise}
    lab = make_lab(tmp_path, federation__weighting="equal", **{f"privacy__{name}": value for name, value in both.items()})
    found = statement(lab.config, lab.num_train, lab.schedule, lab.strategy)
    assert found is not None
    json.dumps(found, allow_nan=False)  # as metrics.json is written
    assert found["client_level"]["epsilon"] is found["client_level"]["epsilon_participation_known"] is None
    assert found["example_level"]["epsilon"] is None
    assert all(unit["together"] is None for unit in found["combined"]["units"])
