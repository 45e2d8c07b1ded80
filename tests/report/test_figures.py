"""The figures say what the folder says, and Plotly's own schema accepts them."""

from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.decomposition import PCA

from omnifm.report import bank, figures
from omnifm.report.comparison_page import comparison_page
from omnifm.report.load import Run, read_comparison, read_run
from omnifm.report.page import Figure, Page
from omnifm.report.run_page import run_page
from omnifm.report.style import gaps, safe
from tests.report.folders import client_ids, write_compare, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(write_run(tmp_path_factory.mktemp("run"), rounds=6))


def figures_of(page: Page) -> dict[str, Figure]:
    return {b.id: b for section in page.sections for b in section.blocks if isinstance(b, Figure)}


def check_schema(figure: Figure) -> None:
    go.Figure(figure.spec["data"], figure.spec["layout"], figure.spec.get("frames"))


def test_a_run_has_all_its_figures_and_plotly_accepts_them(run: Run) -> None:
    found = figures_of(run_page(run))
    drawn = ["bank-map", "bank-rows", "clients", "effective-rank", "loss", "retrieval", "scores", "sizes", "spread", "traffic"]
    assert sorted(found) == drawn
    for figure in found.values():
        check_schema(figure)
        assert figure.caption
    # The loss that a client reports is the task's: the penalty is beside it.
    names = [trace["name"] for trace in found["loss"].spec["data"]]
    assert names == ["training loss", "penalty, added to the loss"] and "no part of it" in found["loss"].caption


def test_a_comparison_has_all_its_figures_and_plotly_accepts_them(tmp_path: Path) -> None:
    page = comparison_page(read_comparison(write_compare(tmp_path, seeds=(0, 1), rounds=3)))
    found = figures_of(page)
    drawn = ["bytes-score", "clients-100", "clients-20", "curves-100", "curves-20", "differences-figure"]
    assert sorted(found) == drawn
    for figure in found.values():
        check_schema(figure)


def test_many_clients_are_drawn_as_boxes(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, rounds=1, clients=client_ids(9)))
    for figure in (figures.client_scores(run), figures.client_sizes(run)):
        assert figure is not None
        assert {trace["type"] for trace in figure.spec["data"]} == {"box"}
        check_schema(figure)


def test_traffic_is_the_sum_over_the_events(run: Run) -> None:
    count = len(run.client_events)
    expected = {"backbone": 1_128_000 * count, "head": 5_200 * count}
    once = {"description": 256 * 10}
    assert figures.traffic(run) == {
        "up": once | expected | {"prototypes": 4_096 * count},
        "down": expected | {"bank": 65_536 * count},
    }


def test_the_mean_over_clients_is_weighted_by_examples(run: Run) -> None:
    rounds, means = figures.by_round(run.client_events, lambda event: event.loss)
    first = [event for event in run.client_events if event.round == 0]
    expected = np.average([e.loss or 0.0 for e in first], weights=[e.num_examples for e in first])
    assert rounds == list(range(6))
    assert means[0] == pytest.approx(expected)


def test_a_round_without_retrieval_is_left_out(run: Run) -> None:
    figure = bank.retrieval_share(run)
    assert figure is not None
    own, same, other = (trace["y"] for trace in figure.spec["data"])
    assert figure.spec["data"][1]["x"] == [1, 2, 3, 4, 5]
    assert np.add(np.add(own, same), other) == pytest.approx(1.0)


@given(hnp.arrays(np.float64, st.tuples(st.integers(3, 9), st.integers(2, 6)), elements=st.floats(-10, 10, width=32)))
def test_the_plane_is_the_principal_one(vectors: np.ndarray) -> None:
    mean, axes, share = bank.principal_plane(vectors)
    reference = PCA(2, svd_solver="full").fit(vectors) if np.ptp(vectors, axis=0).any() else None
    if reference is None:
        assert share.tolist() == [0.0, 0.0]
        return
    assert share == pytest.approx(reference.explained_variance_ratio_, abs=1e-9)
    # The spread in the plane is unique where the axes are not (equal singular values).
    spread = ((vectors - mean) @ axes).var(axis=0, ddof=1)
    assert spread == pytest.approx(reference.explained_variance_, abs=1e-7)
    assert (axes[np.abs(axes).argmax(axis=0), [0, 1]] > 0).all()


@pytest.mark.parametrize("shape", [(1, 4), (2, 1), (1, 1)])
def test_a_bank_too_small_for_a_plane_is_still_projected(shape: tuple[int, int]) -> None:
    mean, axes, share = bank.principal_plane(np.arange(np.prod(shape), dtype=float).reshape(shape))
    assert mean.shape == (shape[1],) and axes.shape == (shape[1], 2)
    assert share[1] == 0.0 and np.isfinite(axes).all()


def test_the_bank_map_has_a_frame_per_round_in_one_plane(run: Run) -> None:
    figure = bank.bank_map(run)
    assert figure is not None
    assert [frame["name"] for frame in figure.spec["frames"]] == ["0", "1", "2", "3", "4", "5"]
    dots = [sum(len(trace["x"]) for trace in frame["data"]) for frame in figure.spec["frames"]]
    assert dots == [len(snapshot.vectors) for snapshot in run.bank]
    assert figure.spec["data"] == figure.spec["frames"][-1]["data"]


def test_names_cannot_carry_markup_into_a_figure() -> None:
    assert safe("<b>a & b</b>") == "&lt;b&gt;a &amp; b&lt;/b&gt;"


def test_what_is_left_out_is_said() -> None:
    assert gaps([0.5, None, float("nan")]) == " 2 values are undefined and left as a gap."
    assert gaps([0.5]) == ""
