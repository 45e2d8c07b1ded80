"""Masks by the command: of rotated NIfTI volumes, of DICOM series, of pictures; each voxel where its image has it."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from PIL import Image as Pillow

from omnifm import run
from omnifm.config import parse
from omnifm.data.cohort import Row, write_cohort
from omnifm.data.readers import Image, read_image, read_mask
from omnifm.predict.cases import Case
from omnifm.predict.session import Session, open_run
from tests.cli.command import Command
from tests.data.builders import spec
from tests.predict.files import dicom, rotated_affine, series, write_nifti
from tests.predict.test_dicom_seg import voxels

SHAPE = (5, 24, 20)  # slices, rows, columns: no two alike
CLASSES = ("background", "bright", "grey")
CLIENT = "lumps-0"
STORED = rotated_affine()
"""How the training volumes lie, and what `write_nifti` writes."""


LPS = STORED[:3, :3] / np.linalg.norm(STORED[:3, :3], axis=0) * np.array([[-1], [-1], [1]])
"""Directions of their slices, rows and columns as DICOM counts: left and posterior."""


def slice_file(path: Path, plane: np.ndarray, along_row: np.ndarray, along_column: np.ndarray, **tags: Any) -> Path:
    orientation = [float(f"{v:.6f}") for v in (*along_row, *along_column)]
    geometry = {"ImageOrientationPatient": orientation, "ImagePositionPatient": [0, 0, 0], "PixelSpacing": [1, 1]}
    return dicom(path, plane, **(geometry | tags))


def phantom(stream: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a volume 0..1000 with a bright and a grey box on noise, and which is which. No box is in the middle."""
    rng = np.random.default_rng(stream)
    mask = np.zeros(SHAPE, np.uint8)
    for number in (1, 2):
        low = [int(rng.integers(0, n // 2)) for n in SHAPE]
        mask[tuple(slice(a, a + 2 + n // 4) for a, n in zip(low, SHAPE, strict=True))] = number
    volume = np.array([100, 900, 500])[mask] + rng.normal(0, 15, SHAPE)
    return volume.clip(0, 1000).astype(np.int16), mask


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lumps")
    rows = []
    for k in range(14):
        volume, mask = phantom(100 + k)
        split = "train" if k < 12 else "val" if k == 12 else "test"
        for name, array in (("v", volume), ("m", mask)):
            nibabel.save(nibabel.Nifti1Image(array, STORED), folder / f"{name}{k}.nii")
        rows.append(Row(id=f"r{k}", split=split, image=f"v{k}.nii", mask=f"m{k}.nii"))
    keys = {"name": "lumps", "task": "segmentation", "classes": CLASSES, "mask_kind": "semantic", "slice_axis": 0}
    write_cohort(folder, spec(**keys), rows)
    raw: dict[str, Any] = {
        "task": "segmentation",
        "strategy": "fedavg",
        "federation": {"cohorts": [{"path": str(folder)}], "rounds": 1, "local_epochs": 12, "finetune_epochs": 0},
        "data": {"image_size": 32, "cache": str(folder / "cache")},
        "model": {"width": 4},
        "optimiser": {"name": "adamw", "lr": 0.02, "batch_size": 4},
    }
    run.execute(parse(raw), folder / "run")
    return folder / "run"


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean Dice of both structures."""
    return float(np.mean([2 * ((found == n) & (truth == n)).sum() / ((found == n).sum() + (truth == n).sum()) for n in (1, 2)]))


def test_a_rotated_volume_gets_a_mask_in_its_place(trained: Path, omnifm: Command, tmp_path: Path) -> None:
    volume, truth = phantom(1)
    source = write_nifti(tmp_path / "scan.nii.gz", volume)
    assert omnifm("predict", trained, source, "--client", CLIENT, "--out", "out").code == 0
    old, new = nibabel.load(source), nibabel.load(tmp_path / "out/scan-mask.nii.gz")
    assert new.shape == SHAPE
    np.testing.assert_array_equal(new.affine, old.affine)
    assert new.header.get_zooms() == old.header.get_zooms()
    found = np.asarray(new.dataobj)
    assert dice(found, truth) > 0.75, "learned well enough that a turned or shifted mask would show"
    said = json.loads((tmp_path / "out/scan.json").read_text(encoding="utf-8"))
    assert said["samples"] == {name: int((found == n).sum()) for n, name in enumerate(CLASSES)}
    voxel = abs(np.linalg.det(rotated_affine()[:3, :3])) / 1000
    assert said["volume_ml"]["bright"] == pytest.approx(int((found == 1).sum()) * voxel, rel=1e-5)
    assert said["files"] == {"mask": "scan-mask.nii.gz"}


def stored_as(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return a volume that lies as `STORED` says in the nearest order and directions to those of `affine`."""
    turn = ornt_transform(io_orientation(STORED), io_orientation(affine))
    assert not np.array_equal(turn, [[0, 1], [1, 1], [2, 1]])
    return np.asarray(apply_orientation(volume, turn))


def test_a_series_gets_a_mask_in_its_place_though_it_is_stored_otherwise(trained: Path, omnifm: Command, tmp_path: Path) -> None:
    volume, truth = phantom(2)
    affine = read_image(series(tmp_path / "empty", np.zeros((2, 2, 2)), (1, 0))).affine
    assert affine is not None
    volume, truth = stored_as(volume, affine), stored_as(truth, affine)
    order = tuple(np.random.default_rng(5).permutation(len(volume)).tolist())
    folder = series(tmp_path / "ct", volume, order)
    nibabel.save(nibabel.Nifti1Image(volume.astype(np.int16), affine), tmp_path / "same.nii")
    assert omnifm("predict", trained, "ct", "same.nii", "--client", CLIENT, "--out", "out").code == 0
    mask = read_mask(tmp_path / "out/same-mask.nii.gz")
    assert mask.shape == volume.shape
    assert dice(mask, truth) > 0.75
    affine = read_image(folder).affine
    assert affine is not None
    marked = voxels(pydicom.dcmread(tmp_path / "out/ct-mask.dcm"))
    places = {tuple(np.round((affine @ [*i, 1])[:3] * (-1, -1, 1), 2).tolist()): int(mask[tuple(i)]) for i in np.argwhere(mask)}
    assert marked == places


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, -1)])
def test_the_same_volume_stored_otherwise_gets_the_same_mask(
    order: tuple[int, ...], flips: tuple[int, ...], trained: Path, tmp_path: Path
) -> None:
    volume, _ = phantom(6)
    session = open_run(trained, CLIENT)
    expected, _ = session.answer(Case("x", (write_nifti(tmp_path / "x.nii", volume),)))
    table = np.array([[order.index(k), flip] for k, flip in enumerate(flips)])
    turned = nibabel.load(tmp_path / "x.nii").as_reoriented(table)
    nibabel.save(turned, tmp_path / "y.nii")
    found, images = session.answer(Case("y", (tmp_path / "y.nii",)))
    assert found.mask is not None and found.mask.shape == images[0].array.shape[1:]
    np.testing.assert_array_equal(found.mask, apply_orientation(expected.mask, table))
    assert found.facts["samples"] == expected.facts["samples"]
    assert found.facts["volume_ml"] == pytest.approx(expected.facts["volume_ml"])


def test_a_dicom_slice_and_a_png(trained: Path, omnifm: Command, tmp_path: Path) -> None:
    volume, truth = phantom(3)
    place = int(np.argmax([(truth[k] == 1).sum() * (truth[k] == 2).sum() for k in range(SHAPE[0])]))
    slice_file(tmp_path / "slice.dcm", volume[place], *LPS[:, [2, 1]].T, PixelSpacing=[2, 3], SliceThickness=4)
    Pillow.fromarray((volume[place] / 4).astype(np.uint8)).save(tmp_path / "shot.png")
    assert omnifm("predict", trained, "slice.dcm", "shot.png", "--client", CLIENT, "--out", "out").code == 0
    assert read_mask(tmp_path / "out/shot-mask.png").shape == SHAPE[1:]
    said = json.loads((tmp_path / "out/slice.json").read_text(encoding="utf-8"))
    assert said["area_mm2"] == {name: pytest.approx(6.0 * count) for name, count in said["samples"].items()}
    marked = voxels(pydicom.dcmread(tmp_path / "out/slice-mask.dcm"))
    assert len(marked) == said["samples"]["bright"] + said["samples"]["grey"]
    along = np.array(list(marked)) @ LPS[:, [2, 1]] / (3, 2)
    np.testing.assert_allclose(along, np.rint(along), atol=0.01)


def test_a_slice_is_seen_as_the_slices_of_training_however_it_is_stored(trained: Path, omnifm: Command, tmp_path: Path) -> None:
    """A volume's slice as DICOM: with rows and columns as in training, exchanged and backwards, and cut across."""
    volume, _ = phantom(8)
    plane = volume[2]
    slice_file(tmp_path / "a.dcm", plane, LPS[:, 2], LPS[:, 1])
    slice_file(tmp_path / "b.dcm", plane.T[::-1], LPS[:, 1], -LPS[:, 2])
    slice_file(tmp_path / "c.dcm", volume[:, 3], LPS[:, 2], LPS[:, 0])
    session = open_run(trained, CLIENT)
    (a, _), (b, seen) = (session.answer(Case(name, (tmp_path / f"{name}.dcm",))) for name in "ab")
    assert a.mask is not None and b.mask is not None and len(np.unique(a.mask)) > 1
    np.testing.assert_array_equal(b.mask, a.mask.T[::-1])
    assert b.mask.shape == seen[0].array.shape[1:] and a.facts["area_mm2"] == b.facts["area_mm2"]
    ended = omnifm("predict", trained, "c.dcm", "--client", CLIENT, "--out", "out")
    assert "c.dcm: this slice lies across those that the model was trained on: give the folder of its series" in ended.err


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("scale", [1, 2])
def test_predictions_come_back_along_the_axis_that_was_cut(axis: int, scale: int, trained: Path) -> None:
    """With the truth as prediction the mask is the truth: exactly at the network's size, and where blocks are doubled."""
    session = open_run(trained, CLIENT)
    task = _task_with_axis(session, axis)
    shape = [32 * scale] * 3
    shape[axis] = 3
    blocks = np.random.default_rng(axis).integers(0, 3, [n // scale // 8 if k != axis else n for k, n in enumerate(shape)])
    truth = blocks
    for k in range(3):
        truth = truth if k == axis else truth.repeat(8 * scale, axis=k)
    image = Image(truth[None].astype(np.float32), None, None, 16)
    batch = task.examples([image], "", CLIENT)
    assert batch.image.shape == (3, 1, 32, 32)
    small = np.moveaxis(truth, axis, 0)[:, scale // 2 :: scale, scale // 2 :: scale]
    logits = torch.nn.functional.one_hot(torch.from_numpy(small.copy()), 3).movedim(-1, 1).float() * 50
    answer = task.answer(logits, batch, [image], CLIENT)
    assert answer.mask is not None and answer.mask.shape == truth.shape and answer.classes == CLASSES
    if scale == 1:
        np.testing.assert_array_equal(answer.mask, truth)
    else:  # where three classes meet, the mean of neighbours may be neither's
        assert (answer.mask == truth).mean() > 0.99
        inside = np.ones(truth.shape, bool)
        for k in range(3):
            if k != axis:
                inside &= np.moveaxis(np.broadcast_to((np.arange(64) % 16 > 1) & (np.arange(64) % 16 < 14), (1, 1, 64)), 2, k)
        np.testing.assert_array_equal(answer.mask[inside], truth[inside])


def _task_with_axis(session: Session, axis: int) -> Any:
    from dataclasses import replace

    task = session._task
    cohort = task.data.cohorts["lumps"]
    changed = replace(cohort, spec=cohort.spec.model_copy(update={"slice_axis": axis}))
    task.data = replace(task.data, cohorts={"lumps": changed})
    return task


def test_many_slices_are_predicted_a_few_at_a_time_with_the_same_result(trained: Path, tmp_path: Path) -> None:
    volume, _ = phantom(4)
    tall = np.concatenate([volume] * 8)  # 40 slices, 32 go together
    whole, one = (open_run(trained, CLIENT).answer(Case("x", (write_nifti(tmp_path / f"{k}.nii", v),)))[0].mask
                  for k, v in enumerate((tall, volume)))  # fmt: skip
    assert whole is not None and one is not None
    np.testing.assert_array_equal(whole, np.concatenate([one] * 8))
