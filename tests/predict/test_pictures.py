"""Enlarged and fused images, answers in words, and a federation of several tasks: each by the command, on tiny runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from omnifm import build, run
from omnifm.config import parse
from omnifm.data.readers import read_image
from omnifm.predict.cases import Case
from omnifm.predict.session import open_run
from tests.cli.command import Command
from tests.predict.files import write_nifti
from tests.tasks.atlas import make_cohorts
from tests.tasks.test_vqa import fake_words
from tests.tasks.vqa_cohort import SIDE, write_questions

Make = Callable[..., Path]
SR, CLS, CT, PET = "atlas_sr_t1", "atlas_cls_t1", "atlas_fusion_ct", "atlas_fusion_pet"
LUMINANCE = np.array([0.299, 0.587, 0.114])


@pytest.fixture(scope="session")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohorts(tmp_path_factory)


@pytest.fixture(scope="session")
def make(atlas: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return the folder of a run of one round on some cohorts of the atlas, trained at the first call."""
    base = tmp_path_factory.mktemp("runs")

    def made(task: str, *cohorts: str, slice_axis: int | None = None, **changes: Any) -> Path:
        folder = base / f"{task}-{'-'.join(cohorts)}-{slice_axis}"
        if folder.is_dir():
            return folder
        paths = [_cut_along(atlas / name, base / f"{name}-{slice_axis}", slice_axis) for name in cohorts]
        raw: dict[str, Any] = {
            "task": task,
            "strategy": "fedavg",
            "federation": {"cohorts": [{"path": str(path)} for path in paths], "rounds": 1, "finetune_epochs": 0},
            "data": {"image_size": 48, "augment": "flip_shift", "cache": str(base / "cache")},
            "model": {"width": 4},
            "optimiser": {"name": "adamw", "lr": 0.002, "batch_size": 8},
            **changes,
        }
        run.execute(parse(raw), folder)
        return folder

    return made


def _cut_along(cohort: Path, copy: Path, axis: int | None) -> Path:
    """Return the cohort, or a copy of it that says how volumes would be cut."""
    if axis is None:
        return cohort
    shutil.copytree(cohort, copy)
    (copy / "cohort.toml").write_text(f"slice_axis = {axis}\n" + (cohort / "cohort.toml").read_text(encoding="utf-8"))
    return copy


def waves(*shape: int) -> np.ndarray:
    """Return a smooth picture or volume in 0..1 that no flip leaves as it is."""
    grid = np.meshgrid(*[np.linspace(0, 1, n) for n in shape], indexing="ij")
    return sum((k + 1) * np.sin(3 * g + k) ** 2 for k, g in enumerate(grid)) / sum(range(1, len(shape) + 1))


def alike(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def facts(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def bicubic(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pillow's, antialiased: another implementation than the package's."""
    image = Pillow.fromarray(plane.astype(np.float32))
    return np.asarray(image.resize((width, height), Pillow.Resampling.BICUBIC))


# --------------------------------------------------------------------------- super-resolution
def test_pictures_are_enlarged_at_their_depth_with_their_colours(make: Make, omnifm: Command, tmp_path: Path) -> None:
    run_folder = make("super_resolution", SR, slice_axis=1)
    grey = waves(30, 22)
    colour = np.stack([grey, 1 - grey, grey**2], axis=-1)
    (tmp_path / "in").mkdir()
    Pillow.fromarray((255 * grey).astype(np.uint8)).save(tmp_path / "in/grey.png")
    Pillow.fromarray((255 * colour).astype(np.uint8)).save(tmp_path / "in/colour.png")
    Pillow.fromarray((60000 * grey).astype(np.uint16)).save(tmp_path / "in/deep.png")
    assert omnifm("predict", run_folder, "in", "--client", f"{SR}-0", "--out", "out").code == 0
    found = {name: read_image(tmp_path / f"out/{name}-image.png") for name in ("grey", "colour", "deep")}
    assert {name: (image.array.shape, image.bits) for name, image in found.items()} == {
        "grey": ((1, 60, 44), 8),
        "colour": ((3, 60, 44), 8),
        "deep": ((1, 60, 44), 16),
    }
    assert alike(found["grey"].array[0], bicubic(grey, 60, 44)) > 0.98
    for k in range(3):
        assert alike(found["colour"].array[k], bicubic(colour[..., k], 60, 44)) > 0.97, "RGB"[k]
    assert facts(tmp_path / "out/grey.json")["scale"] == 2


def test_a_volume_is_enlarged_within_its_slices_and_stays_in_its_place(make: Make, omnifm: Command, tmp_path: Path) -> None:
    run_folder = make("super_resolution", SR, slice_axis=1)
    volume = waves(20, 3, 26)
    source = write_nifti(tmp_path / "v.nii.gz", (1000 * volume).astype(np.int16))
    assert omnifm("predict", run_folder, source, "--client", f"{SR}-0", "--out", "out").code == 0
    old, new = nibabel.load(source), nibabel.load(tmp_path / "out/v-image.nii.gz")
    assert new.shape == (40, 3, 52)
    np.testing.assert_allclose(new.header.get_zooms(), np.array(old.header.get_zooms()) / (2, 1, 2), rtol=1e-6)
    for place in range(3):
        assert alike(new.get_fdata()[:, place], bicubic(volume[:, place], 40, 52)) > 0.97
    # The first voxel was cut into four; its middle is between theirs.
    middle = new.affine @ [0.5, 0, 0.5, 1]
    np.testing.assert_allclose(middle, old.affine @ [0, 0, 0, 1], atol=1e-4)


# --------------------------------------------------------------------------- fusion
FUSION: dict[str, Any] = {
    "data": {"image_size": 64, "augment": "flip_shift"},
    "tasks": {"fusion": {"patch": 48}},
    "optimiser": {"name": "adamw", "lr": 0.003, "batch_size": 2},
    "federation": {"rounds": 1, "local_epochs": 6, "finetune_epochs": 0},
}


def fusion(make: Make, atlas: Path, tmp_path: Path) -> Path:
    cohorts = [{"path": str(atlas / CT)}, {"path": str(atlas / PET)}]
    changes = {**FUSION, "federation": {**FUSION["federation"], "cohorts": cohorts}}
    changes["data"] = {**FUSION["data"], "cache": str(atlas / "cache")}
    return make("fusion", CT, PET, **changes)


def test_pairs_are_fused_at_the_first_ones_size_in_the_second_ones_colours(
    make: Make, atlas: Path, omnifm: Command, tmp_path: Path
) -> None:
    run_folder = fusion(make, atlas, tmp_path)
    for name in ("mri", "pet"):
        (tmp_path / name).mkdir()
    mri, hot = waves(70, 50), waves(50, 70).T
    Pillow.fromarray((255 * mri).astype(np.uint8)).save(tmp_path / "mri/1.png")
    Pillow.fromarray((255 * np.stack([hot, hot * 0.3, 0 * hot], -1)).astype(np.uint8)).save(tmp_path / "pet/1.png")
    Pillow.fromarray((255 * mri).astype(np.uint8)).save(tmp_path / "mri/2.png")
    Pillow.fromarray((255 * hot).astype(np.uint8)).save(tmp_path / "pet/2.png")
    ended = omnifm("predict", run_folder, "mri", "--with", "pet", "--client", f"{PET}-0", "--out", "out")
    assert ended.code == 0, ended.err
    coloured, grey = (read_image(tmp_path / f"out/{k}-image.png").array / 255 for k in (1, 2))
    assert coloured.shape == (3, 70, 50) and grey.shape == (1, 70, 50)
    red, green, blue = coloured
    assert red.mean() > green.mean() > blue.mean()
    assert alike(red - blue, hot) > 0.9, "its colours are where the second image has them"
    assert alike(grey[0], mri + hot) > 0.7, "what is seen is where both images have it"
    assert alike(grey[0], mri + hot) > alike(grey[0][::-1], mri + hot) + 0.1
    assert facts(tmp_path / "out/1.json")["with"] == "pet/1.png"


def test_pairs_that_do_not_fit_and_a_second_image_that_is_missing(
    make: Make, atlas: Path, omnifm: Command, tmp_path: Path
) -> None:
    run_folder = fusion(make, atlas, tmp_path)
    Pillow.fromarray((255 * waves(40, 40)).astype(np.uint8)).save(tmp_path / "a.png")
    words = ("predict", run_folder, "a.png", "--client", f"{CT}-0", "--out", "out")
    assert "task fusion reads two images a case" in omnifm(*words).complaint
    ended = omnifm(*words, "--with", "none.png")
    assert (ended.code, ended.err) == (1, "omnifm: none.png: file is missing\n")
    Pillow.fromarray((255 * waves(20, 90)).astype(np.uint8)).save(tmp_path / "b.png")
    ended = omnifm(*words, "--with", "b.png", "--force")
    assert (ended.code, ended.err) == (1, "omnifm: a.png: its second image: size 20 x 90 differs from the image's 40 x 40\n")


# --------------------------------------------------------------------------- questions
def test_a_question_is_answered_about_every_image(omnifm: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.TASKS, "vqa", "omnifm.tasks.vqa:Vqa")
    # MiniLM takes seconds to load; tests/tasks/test_vqa.py has it.
    monkeypatch.setattr("omnifm.tasks.vqa_models.minilm_words", fake_words)
    cohort = write_questions(tmp_path / "scan", "scan", "MRI")
    raw: dict[str, Any] = {
        "task": "vqa",
        "strategy": "local",
        "federation": {"cohorts": [{"path": str(cohort)}], "rounds": 1, "local_epochs": 20, "finetune_epochs": 0},
        "data": {"image_size": SIDE, "channels": 3, "cache": str(tmp_path / "cache")},
        "model": {"width": 16, "stem_stride": 1},
        "optimiser": {"name": "adamw", "lr": 3e-3, "batch_size": 8},
        "tasks": {"vqa": {"compact": {"token_dim": 16, "layers": 1}}},
    }
    run.execute(parse(raw), tmp_path / "run")
    words = ("predict", "run", "scan/images/test0.png", "scan/images/test1.png", "--client", "scan-0", "--out", "out")
    assert "task vqa needs --question" in omnifm(*words).complaint
    assert omnifm(*words, "--question", "Which side is bright?").code == 0
    said = [facts(tmp_path / f"out/test{k}.json") for k in range(2)]
    assert {one["question"] for one in said} == {"Which side is bright?"}
    bright = [read_image(cohort / f"images/test{k}.png").array.mean(axis=(0, 1)) for k in range(2)]
    assert [one["answer"] for one in said] == ["left" if b[:16].mean() > b[16:].mean() else "right" for b in bright]
    assert omnifm(*words[:3], "--client", "scan-0", "--out", "new", "--question", "Where is the light, if any?").code == 0
    assert isinstance(facts(tmp_path / "new/test0.json")["answer"], str)


# --------------------------------------------------------------------------- several tasks
def test_in_a_mixed_federation_each_client_answers_as_its_task(make: Make, atlas: Path, omnifm: Command, tmp_path: Path) -> None:
    tasks = {"mixed": {"token_dim": 16, "set": {"super_resolution": {}}}}
    run_folder = make("mixed", CLS, SR, tasks=tasks)
    path = tmp_path / "a.png"
    Pillow.fromarray((255 * waves(40, 30)).astype(np.uint8)).save(path)
    for client, kind in ((f"{CLS}-0", "class"), (f"{SR}-0", "image")):
        assert omnifm("predict", run_folder, path, "--client", client, "--out", kind).code == 0
    assert sum(facts(tmp_path / "class/a.json")["probabilities"].values()) == pytest.approx(1)
    assert read_image(tmp_path / "image/a-image.png").array.shape == (1, 80, 60)


def test_what_is_not_finite_is_no_answer(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    session = open_run(make("super_resolution", SR, slice_axis=1), f"{SR}-0")
    Pillow.fromarray((255 * waves(20, 20)).astype(np.uint8)).save(tmp_path / "a.png")
    from dataclasses import replace

    broken = replace(session, _predict=lambda batch: torch.full((1, 1, 40, 40), float("nan")))
    with pytest.raises(Exception, match=r"a\.png: the prediction is not finite"):
        broken.answer(Case("a", (tmp_path / "a.png",)))
