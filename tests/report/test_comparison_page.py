"""What the page of a comparison says of differences, on rows written by hand."""

from pathlib import Path

from omnifm.report.comparison_page import comparison_page
from omnifm.report.load import Comparison, Row
from omnifm.report.page import Cell, Note, Table


def comparison(scores: dict[str, list[float]], **changes: dict[str, str]) -> Comparison:
    """One cell per method and seed; `changes`: further fields of a method's rows."""
    rows: list[Row] = [
        {
            "strategy": name,
            "variant": "",
            "participation": "1.0",
            "seed": str(seed),
            "status": "ok",
            "personal_accuracy": str(score),
            **changes.get(name, {}),
        }
        for name, values in scores.items()
        for seed, score in enumerate(values)
    ]
    return Comparison(Path("nowhere"), tuple(rows), (None,) * len(rows), {})


def differences(found: Comparison) -> dict[str, tuple[Cell, ...]]:
    """The line of each method in the table of differences."""
    (section,) = [s for s in comparison_page(found).sections if s.id == "differences"]
    (table,) = [block for block in section.blocks if isinstance(block, Table)]
    return {row[0].text: row for row in table.rows}  # type: ignore[union-attr,misc]


def tones(found: Comparison) -> dict[str, str]:
    """The colour of each method's difference."""
    return {name: row[2].tone for name, row in differences(found).items()}


def test_a_difference_is_coloured_by_the_test_that_knows_how_many_there_are() -> None:
    """The interval of c alone leaves out 0 (p = .043), of three methods it is not enough; b and d are far enough away."""
    found = {"a": [0.9, 0.82, 0.87], "c": [0.8, 0.77, 0.76]}
    assert tones(comparison(found)) == {"c": "good"}
    found |= {"b": [0.7, 0.65, 0.66], "d": [0.89, 0.84, 0.85], "e": [0.92, 0.8, 0.88]}
    assert tones(comparison(found)) == {"c": "", "b": "good", "d": "", "e": ""}
    assert tones(comparison({"a": [0.1, 0.11], "b": [0.9, 0.92]})) == {"b": "bad"}


def greens(found: Comparison) -> list[str]:
    """The methods whose own-model score is green."""
    (section,) = [s for s in comparison_page(found).sections if s.id == "scores-table"]
    table = next(block for block in section.blocks if isinstance(block, Table))
    return [row[0].text for row in table.rows if row[2].tone == "good"]  # type: ignore[union-attr]


def test_who_failed_on_a_seed_is_neither_best_nor_first() -> None:
    """a has no score on the hard seed, so its mean is over the easy one alone."""
    nan = float("nan")
    found = comparison({"a": [0.9, nan], "b": [0.8, 0.4], "c": [0.85, 0.2]})
    assert greens(found) == ["b"]
    assert comparison_page(found).summary == (
        "At 100% participation, own models, best first: b 0.600, c 0.525, a 0.900 (1 of 2 seeds).",
    )
    assert greens(comparison({"a": [0.9, nan], "b": [nan, 0.4]})) == []
    assert greens(comparison({"a": [0.6, nan], "b": [0.8, 0.4], "c": [0.85, 0.2]})) == ["b"], "of equal means too"
    assert greens(comparison({"a": [0.9], "b": [0.8, 0.4], "c": [0.85, 0.2]})) == ["b"], "nor who was not run on it"
    assert greens(comparison({"a": [0.9, 0.8], "b": [0.8, 0.4]})) == ["a"]


def test_the_same_difference_on_every_seed_is_not_coloured() -> None:
    line = differences(comparison({"a": [0.75, 0.5], "b": [0.5, 0.25], "c": [0.7, 0.5]}))
    assert [cell.text for cell in line["b"]][2:7] == ["+0.250", "no spread", "no spread", "2", "no spread"]
    assert line["b"][2].tone == ""
    assert "no spread" not in [cell.text for cell in line["c"]]


def test_pairs_of_different_commits_are_named() -> None:
    def notes(found: Comparison) -> list[str]:
        (section,) = [s for s in comparison_page(found).sections if s.id == "differences"]
        return [block.text for block in section.blocks if isinstance(block, Note)]

    scores = {"omnifm": [0.9, 0.82], "local": [0.8, 0.77], "fedavg": [0.8, 0.7], "majority": [0.1, 0.1]}
    same, other = {"commit": "aaa"}, {"commit": "bbb"}
    assert notes(comparison(scores, omnifm=same, local=same, fedavg=same)) == [], "a reference has no commit"
    (said,) = notes(comparison(scores, omnifm=same, local=other, fedavg=same))
    assert said.startswith("Not run at the commit of omnifm's cells: local.")
