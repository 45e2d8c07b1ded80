import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnifm import seeds

NAMES = st.lists(st.text(max_size=5) | st.integers(-9, 9), max_size=3)


@given(st.integers(0, 2**63), NAMES, NAMES)
def test_two_names_are_two_streams(root: int, a: list[str | int], b: list[str | int]) -> None:
    assert (seeds.derive(root, *a) == seeds.derive(root, *b)) is (a == b)
    assert 0 <= seeds.derive(root, *a) < 2**63 and seeds.derive(root, *a) != seeds.derive(root + 1, *a)


@pytest.mark.parametrize(
    ("a", "b"), [(("ab", "c"), ("a", "bc")), (("1",), (1,)), (("a|str:1:b",), ("a", "b")), ((), ("",)), ((1, 23), (12, 3))]
)
def test_names_that_look_alike_are_told_apart(a: tuple[str | int, ...], b: tuple[str | int, ...]) -> None:
    assert seeds.derive(0, *a) != seeds.derive(0, *b)


def test_streams_do_not_depend_on_the_order_of_calls() -> None:
    def draw(names: list[str]) -> dict[str, list[float]]:
        return {n: torch.rand(3, generator=seeds.generator(0, n)).tolist() for n in names}

    first = draw(["a", "b", "c"])
    torch.rand(5)
    assert draw(["c", "a", "b"]) == first and len({tuple(v) for v in first.values()}) == 3


def test_streams_look_independent() -> None:
    draws = np.array([seeds.numpy_generator(0, "s", i).standard_normal(500) for i in range(40)])
    correlation = np.corrcoef(draws)[np.triu_indices(40, 1)]
    # Of 780 correlations of 500 independent pairs each, the standard deviation is 1/sqrt(500) = .045.
    assert abs(correlation).max() < 5 * 0.045 and abs(correlation.std() - 0.045) < 0.01
    starts = np.array([seeds.numpy_generator(0, "s", i).random() for i in range(500)])
    assert abs(starts.mean() - 0.5) < 0.05


def test_a_known_seed_never_changes() -> None:
    """Old results stay reproducible, in any process: the first 63 bits of what this prints.

    printf '0|str:4:init|int:1:3' | sha256sum
    """
    assert seeds.derive(0, "init", 3) == 0xD0F009F3AFB5914B >> 1


def test_a_scope_is_its_stream_and_leaves_the_global_one_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with seeds.scope(0, "init"):
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(9)
    with seeds.scope(0, "init"):
        assert torch.equal(torch.rand(4), first)
    with seeds.scope(0, "other"):
        assert not torch.equal(torch.rand(4), first)


def test_a_scope_restores_after_an_error_and_within_another() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="stop"), seeds.scope(0, "x"):
        torch.rand(3)
        raise ValueError("stop")
    assert torch.equal(torch.get_rng_state(), before)
    with seeds.scope(0, "outer"):
        plain = torch.rand(4)
    with seeds.scope(0, "outer"):
        first = torch.rand(2)
        with seeds.scope(0, "inner"):
            torch.rand(7)
        assert torch.equal(torch.cat([first, torch.rand(2)]), plain)


def test_generators_are_fresh_and_on_the_cpu() -> None:
    a, b = seeds.generator(0, "a"), seeds.generator(0, "a")
    torch.rand(3, generator=a)
    assert torch.rand(1, generator=b) == torch.rand(3, generator=seeds.generator(0, "a"))[0]
    assert a.device.type == "cpu"
