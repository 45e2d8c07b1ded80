from pathlib import Path

import numpy as np
import pytest

from omnifm.errors import ConfigError, DataError
from omnifm.predict.cases import Case, find_cases
from tests.predict.files import series

OUT = Path("nowhere")


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def short(cases: list[Case], folder: Path) -> list[tuple[str, ...]]:
    return [(case.name, *(file.relative_to(folder).as_posix() for file in case.files)) for case in cases]


def test_a_folder_stands_for_the_images_below_it_by_name(tmp_path: Path) -> None:
    touch(tmp_path / "in", "b.PNG", "a.nii.gz", "c/d.npy", "c/.hidden.png", "readme.md", ".git/x.png")
    series(tmp_path / "in/scan", np.ones((2, 3, 3)), (1, 0))
    touch(tmp_path / "in/scan", "shot.png")
    assert short(find_cases([tmp_path / "in"], [], OUT), tmp_path / "in") == [
        ("a", "a.nii.gz"),
        ("b", "b.PNG"),
        ("c/d", "c/d.npy"),
        ("scan", "scan"),
        ("scan/shot", "scan/shot.png"),
    ]
    assert short(find_cases([tmp_path / "in/scan"], [], OUT), tmp_path / "in") == [("scan", "scan")]


def test_no_two_cases_have_one_name_and_none_that_of_the_summary(tmp_path: Path) -> None:
    names = ["x.png", "x.jpg", "sub/X.png", "x-2.png", "predictions.png"]
    cases = find_cases([tmp_path / name for name in names], [], OUT)
    assert [case.name for case in cases] == ["x", "x-2", "X-3", "x-2-2", "predictions-2"]
    assert len({case.name.casefold() for case in cases}) == len(names)


def test_answers_of_earlier_are_no_input_and_links_lead_nowhere(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a.png", "answers/a-mask.png")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    assert short(find_cases([tmp_path / "in"], [], tmp_path / "in/answers"), tmp_path / "in") == [("a", "a.png")]


def test_pairs_in_order_and_folders_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "m1.png", "m2.png", "p1.png", "p2.png")
    paths = [tmp_path / name for name in ("m1.png", "m2.png")]
    partners = [tmp_path / name for name in ("p2.png", "p1.png")]
    assert short(find_cases(paths, partners, OUT), tmp_path) == [("m1", "m1.png", "p2.png"), ("m2", "m2.png", "p1.png")]
    touch(tmp_path / "mri", "1.png", "2.png", "4.png")
    touch(tmp_path / "pet", "1.tif", "2.png", "3.png")
    cases = find_cases([tmp_path / "mri"], [tmp_path / "pet"], OUT)
    assert short(cases, tmp_path) == [
        ("1", "mri/1.png", "pet/1.tif"),
        ("2", "mri/2.png", "pet/2.png"),
        ("4", "mri/4.png"),
        ("3", "pet/3.png"),
    ]
    assert [bool(case.problem) for case in cases] == [False, False, True, True]
    assert cases[2].problem == f"{tmp_path / 'pet'} holds no image called 4"


def test_pairs_that_cannot_be(tmp_path: Path) -> None:
    touch(tmp_path / "f", "a.png")
    touch(tmp_path, "a.png")
    with pytest.raises(ConfigError, match="--with was given 1 times for 2 first images"):
        find_cases([tmp_path / "a.png"] * 2, [tmp_path / "a.png"], OUT)
    with pytest.raises(ConfigError, match="a file goes with a file, and a folder with a folder"):
        find_cases([tmp_path / "f"], [tmp_path / "a.png"], OUT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: holds no image"):
        find_cases([tmp_path / "empty"], [], OUT)
