"""The picture of a table has a line for everything that has a score, and mixes nothing."""

from collections.abc import Callable
from types import ModuleType

import pytest

Script = Callable[[str], ModuleType]


def row(strategy: str, variant: str, level: str, score: str, status: str = "ok") -> dict[str, str]:
    return {"strategy": strategy, "variant": variant, "participation": level, "status": status, "personal_dice": score}


def test_variants_of_a_strategy_are_lines_of_their_own(script: Script) -> None:
    rows = [
        row("fedavg", "tuned", "0.2", "0.25"),
        row("fedavg", "tuned", "0.2", "0.75"),
        row("fedavg", "equal", "0.2", "0.875"),
        row("local", "tuned", "0.2", "0.625"),
        row("local", "tuned", "1.0", "0.75"),
        row("local", "tuned", "1.0", "", "failed: no"),
    ]
    picture = script("picture")
    found = picture.dots(rows, "dice")
    assert list(found) == ["fedavg equal", "local", "fedavg tuned"]
    assert found["fedavg tuned"] == {0.2: picture.Dot(0.25, 0.5, 0.75)}
    assert found["local"] == {0.2: picture.Dot(0.625, 0.625, 0.625), 1.0: picture.Dot(0.75, 0.75, 0.75)}
    text = picture.svg(found, "a < b")
    assert text.count("<circle") == 2 + 4 and "a &lt; b" in text


def test_a_score_that_is_no_share_has_no_picture(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = script("picture")
    monkeypatch.setattr(picture, "read_results", lambda path: [row("local", "", "0.2", "36.2") | {"personal_psnr": "36.2"}])
    monkeypatch.setattr("sys.argv", ["picture.py", "super_resolution"])
    with pytest.raises(SystemExit, match="psnr is no share of 1"):
        picture.main()
