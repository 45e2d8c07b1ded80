"""Decoded images on disk: what is in them, when they are built again, two builders at once, damage."""

import dataclasses
import logging
import multiprocessing
import os
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from omnifm.data import cache, orient
from omnifm.data.cache import default_cache_dir, load_images, to_slices, unit_range
from omnifm.data.cohort import Cohort, Row, write_cohort
from omnifm.data.readers import Image
from omnifm.data.vetted import require_vetted
from omnifm.errors import DataError
from tests.data import load_worker
from tests.data.builders import classification, noise, save_png, spec
from tests.predict.files import series


def image(array: np.ndarray, bits: int = 8) -> Image:
    return Image(np.asarray(array, dtype=np.float32), None, None, bits)


def pixel_file(folder: Path) -> Path:
    return next(folder.glob("*.npy"))


def test_same_size_images_are_divided_by_255(tmp_path: Path) -> None:
    cohort = Cohort.read(classification(tmp_path / "c", 5, row=lambda i: {}))
    for i in range(5):
        save_png(cohort.folder / f"images/{i}.png", noise(8, 8, stream=i))
    found = load_images(cohort, 8, 3, tmp_path / "k")
    assert found.pixels.shape == (5, 3, 8, 8)
    assert found.slice_row.tolist() == [0, 1, 2, 3, 4]
    assert found.slice_row.dtype == np.int64
    for i in range(5):
        np.testing.assert_allclose(found.pixels[i], np.stack([noise(8, 8, stream=i) / 255] * 3), atol=1e-7)
    with pytest.raises(ValueError, match="read-only"):
        found.pixels[0] = 0


def test_volumes_are_cut_along_the_slice_axis(tmp_path: Path) -> None:
    cohort = Cohort.read(classification(tmp_path / "c", 3, slice_axis=1, row=lambda i: {"image": f"{i}.nii"} if i < 2 else {}))
    for i, depth in enumerate((4, 6)):
        volume = np.zeros((5, depth, 5), dtype=np.float32)
        volume += np.arange(depth).reshape(1, -1, 1)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), cohort.folder / f"{i}.nii")
    found = load_images(cohort, 5, 1, tmp_path / "k")
    assert found.slice_row.tolist() == [0] * 4 + [1] * 6 + [2]
    np.testing.assert_allclose(found.pixels[:4, 0, 0, 0], [0, 1 / 3, 2 / 3, 1], atol=1e-6)
    np.testing.assert_allclose(found.pixels[4:10].std(axis=(1, 2, 3)), 0, atol=1e-6)


def test_shrinking_is_antialiased_like_torch() -> None:
    sharp = noise(60, 45).astype(np.float32)
    ours = to_slices(image(sharp[None]), 16, 1, None)[0, 0]
    theirs = interpolate(torch.from_numpy(sharp / 255)[None, None], (16, 16), mode="bicubic", antialias=True)[0, 0]
    # Pillow's cubic has a = -0.5, as torch's antialiased one.
    np.testing.assert_allclose(ours, theirs.clamp(0, 1).numpy(), atol=2e-3)


def test_a_fine_chequerboard_becomes_grey() -> None:
    board = 255.0 * (np.indices((64, 64)).sum(axis=0) % 2)
    np.testing.assert_allclose(to_slices(image(board[None]), 8, 1, None), 0.5, atol=0.02)


def test_colour_and_grey_change_into_each_other() -> None:
    colour = np.stack([np.full((4, 4), v) for v in (255.0, 0.0, 0.0)])
    colour[:, 0, 0] = (0, 0, 255)
    grey = to_slices(image(colour), 4, 1, None)
    assert grey[0, 0, 1, 1] == pytest.approx(0.299)
    assert grey[0, 0, 0, 0] == pytest.approx(0.114)
    assert (to_slices(image(colour[:1]), 4, 3, None).std(axis=1) == 0).all()


def test_deep_images_are_scaled_by_their_own_percentiles() -> None:
    values = np.linspace(-1000, 3000, 10_000).reshape(1, 100, 100)
    scaled = unit_range(image(values, bits=16))
    low, high = np.percentile(values, [0.5, 99.5])
    np.testing.assert_allclose(scaled, np.clip((values - low) / (high - low), 0, 1), atol=1e-5)
    np.testing.assert_allclose(unit_range(image(7 * values + 3, bits=16)), scaled, atol=1e-5)


def test_rare_values_on_an_empty_background_survive() -> None:
    lonely = np.zeros((1, 100, 100))
    lonely[0, 3, 3] = 900
    assert unit_range(image(lonely, bits=16)).max() == 1


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_a_constant_image_is_zero_and_nan_is_an_error(bits: int) -> None:
    assert not unit_range(image(np.full((1, 4, 4), 200), bits)).any()
    with pytest.raises(DataError, match="NaN"):
        unit_range(image(np.array([[[1, np.nan]]]), bits))


def test_errors_name_the_row(tmp_path: Path) -> None:
    cohort = Cohort.read(classification(tmp_path / "c", 4))
    (cohort.folder / "images/2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"^cohort tiny: row 'r2': image 2\.png: cannot be read"):
        load_images(cohort, 8, 1, tmp_path / "k")
    assert not list((tmp_path / "k").glob("*.npy"))
    (cohort.folder / "images/2.png").unlink()
    with pytest.raises(DataError, match=r"images/2\.png: No such file"):
        load_images(cohort, 8, 1, tmp_path / "k")
    for size, channels, column in ((8, 2, "image"), (0, 1, "image"), (8, 1, "mask")):
        with pytest.raises(DataError, match="cannot cache"):
            load_images(cohort, size, channels, tmp_path / "k", column)
    with pytest.raises(DataError, match="slice_axis"):
        to_slices(image(np.zeros((1, 2, 3, 4)) + np.arange(4)), 4, 1, None)


def test_the_second_image_of_a_pair(tmp_path: Path) -> None:
    save_png(tmp_path / "c/a.png", noise(6, 6))
    save_png(tmp_path / "c/b.png", noise(6, 6, stream=1))
    pair = [Row("r", "train", image="a.png", image_b="b.png")]
    cohort = Cohort.read(write_cohort(tmp_path / "c", spec(task="fusion", modality="CT-MRI", classes=None), pair))
    found = load_images(cohort, 6, 1, tmp_path / "k", "image_b")
    np.testing.assert_allclose(found.pixels[0, 0], noise(6, 6, stream=1) / 255, atol=1e-7)


def test_a_second_start_decodes_and_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = Cohort.read(classification(tmp_path / "c"))
    first = load_images(cohort, 8, 1, tmp_path / "k")

    def forbidden(path: Path) -> None:
        raise AssertionError(f"{path} read again")

    monkeypatch.setattr(orient, "read_image", forbidden)
    monkeypatch.setattr(cache, "sha256", forbidden)
    np.testing.assert_array_equal(load_images(cohort, 8, 1, tmp_path / "k").pixels, first.pixels)


def test_new_content_of_the_same_size_and_time_is_seen(tmp_path: Path) -> None:
    cohort = Cohort.read(classification(tmp_path / "c", row=lambda i: {} if i else {"image": "x.npy"}))
    path = cohort.folder / "x.npy"
    np.save(path, np.eye(8))
    first = load_images(cohort, 8, 1, tmp_path / "k").pixels[0].copy()
    require_vetted([cohort], tmp_path / "k")
    stat = path.stat()
    np.save(path, np.where(np.eye(8)[::-1] > 0, np.nan, 0))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as cp -p and rsync -t do
    assert path.stat().st_size == stat.st_size
    with pytest.raises(DataError, match="holds NaN"):
        require_vetted([cohort], tmp_path / "k")
    np.save(path, np.eye(8)[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    np.testing.assert_array_equal(load_images(cohort, 8, 1, tmp_path / "k").pixels[0], first[:, ::-1])


def test_a_slice_that_is_written_anew_is_looked_at_again(tmp_path: Path) -> None:
    cohort = Cohort.read(classification(tmp_path / "c", slice_axis=0, row=lambda i: {} if i else {"image": "ct"}))
    folder = series(cohort.folder / "ct", noise(3, 5, 5), (0, 1, 2))
    require_vetted([cohort], tmp_path / "k")
    whole = (folder / "IM1.dcm").read_bytes()
    with (folder / "IM1.dcm").open("r+b") as stream:
        stream.truncate(len(whole) - 20)
    with pytest.raises(DataError, match=r"image 'ct': IM1\.dcm: pixel data cannot be decoded"):
        require_vetted([cohort], tmp_path / "k")


def test_new_content_or_parameters_make_a_new_cache(tmp_path: Path) -> None:
    cohort = Cohort.read(classification(tmp_path / "c"))

    def files() -> int:
        return len(list((tmp_path / "k").glob("*.npy")))

    load_images(cohort, 8, 1, tmp_path / "k")
    for count, (size, channels) in enumerate(((9, 1), (8, 3)), start=2):
        load_images(cohort, size, channels, tmp_path / "k")
        assert files() == count
    load_images(dataclasses.replace(cohort, rows=cohort.rows[::-1]), 8, 1, tmp_path / "k")
    assert files() == 4
    save_png(cohort.folder / "images/3.png", noise(8, 10, stream=99))
    changed = load_images(cohort, 10, 1, tmp_path / "k")
    assert files() == 5
    np.testing.assert_allclose(changed.pixels[3, 0, 0, 0], unit_range(image(noise(8, 10, stream=99)[None]))[0, 0, 0], atol=0.2)


def test_the_key_follows_content_not_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        load_images(Cohort.read(classification(tmp_path / name)), 8, 1, tmp_path / "k")
    assert len(list((tmp_path / "k").glob("*.npy"))) == 1


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "record", "memo"])
def test_damage_is_noticed_told_and_mended(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    cohort = Cohort.read(classification(tmp_path / "c"))
    good = np.array(load_images(cohort, 8, 1, tmp_path / "k").pixels)
    path = pixel_file(tmp_path / "k")
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-40])
    elif damage == "flip":
        path.write_bytes(content[:-40] + b"\x00" * 40)
    elif damage == "gone":
        path.unlink()
    elif damage == "record":
        path.with_suffix(".json").write_text("{", encoding="utf-8")
    else:
        next((tmp_path / "k").glob("seen-*.json")).write_text("{", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        again = load_images(cohort, 8, 1, tmp_path / "k").pixels
    assert len(caplog.records) == 1
    assert "damaged" in caplog.text
    np.testing.assert_array_equal(again, good)


def test_a_copied_cache_is_believed_by_its_content(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cohort = Cohort.read(classification(tmp_path / "c"))
    load_images(cohort, 8, 1, tmp_path / "k")
    os.utime(pixel_file(tmp_path / "k"), ns=(1, 1))
    load_images(cohort, 8, 1, tmp_path / "k")
    assert not caplog.records


def test_two_processes_may_build_one_cache_at_once(tmp_path: Path) -> None:
    folder = classification(tmp_path / "c", 40)
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=load_worker.load, args=(folder, tmp_path / "k", start, results)) for _ in range(2)]
    for process in processes:
        process.start()
    sums = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sums[0] == sums[1] == float(load_images(Cohort.read(folder), 8, 1, tmp_path / "k").pixels.sum())
    assert not [p for p in (tmp_path / "k").iterdir() if p.name.startswith(".")]


def test_a_cache_folder_that_cannot_be(tmp_path: Path) -> None:
    cohort = Cohort.read(classification(tmp_path / "c"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"^cache "):
        load_images(cohort, 8, 1, tmp_path / "file")


def test_progress_counts_rows(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_images(Cohort.read(classification(tmp_path / "c")), 8, 1, tmp_path / "k", progress=lambda a, b: seen.append((a, b)))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_the_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "omnifm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "omnifm"


def resident(path: Path) -> int:
    """Return the bytes of a mapped file that this process holds in memory, as the kernel counts them."""
    lines = iter(Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.endswith(f" {path}"):
            return 1024 * next(int(entry.split()[1]) for entry in lines if entry.startswith("Rss:"))
    raise AssertionError(f"{path} is not mapped")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps, and only Linux is told to give pages back")
@pytest.mark.parametrize("kind", ["rows", "views"])
def test_images_that_were_read_do_not_stay_in_memory(tmp_path: Path, kind: str) -> None:
    rows, size = 320, 128
    cohort = Cohort.read(classification(tmp_path / "c", rows))
    pixels = load_images(cohort, size, 1, tmp_path / "k").pixels
    path = pixel_file(tmp_path / "k")
    truth = np.load(path)
    assert truth.nbytes == 20 * 2**20
    highest = 0
    for index in np.random.default_rng(0).permutation(2 * rows).reshape(-1, 16) % rows:
        batch = pixels[index] if kind == "rows" else np.stack([pixels[i] for i in index])
        np.testing.assert_array_equal(batch, truth[index])
        highest = max(highest, resident(path))
    # A fault maps the pages around it too, up to 64 kB: that can double what was asked for.
    assert 2**20 < highest <= 10 * 2**20


def test_what_is_taken_out_of_the_map_is_a_plain_array(tmp_path: Path) -> None:
    pixels = load_images(Cohort.read(classification(tmp_path / "c", 6)), 8, 1, tmp_path / "k").pixels
    assert len(pixels) == 6
    batch = pixels[np.array([3, 1])]
    assert type(batch) is np.ndarray and batch.flags.writeable
    assert type(pixels[2]) is np.ndarray and not pixels[2].flags.writeable
