"""Scanners: noise of the stated kind and size, resolution of the stated width, and contrast that survives both."""

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from omnifm.data.atlas.anatomy import FIELD_OF_VIEW, TISSUES, Array
from omnifm.data.atlas.patient import draw_patient, slice_fractions
from omnifm.data.atlas.scanner import CONTRASTS, SCANNERS, Scanner, acquire, scanners
from omnifm.seeds import numpy_generator

SIZE = 96


@pytest.fixture(scope="module")
def head() -> Array:
    patient = draw_patient("scanned", "normal", 0)
    return slice_fractions(patient, 12.0, SIZE)


def uniform(tissue: str, size: int = SIZE) -> Array:
    fractions = np.zeros((len(TISSUES), size, size), dtype=np.float32)
    fractions[TISSUES.index(tissue)] = 1.0
    return fractions


def scan(fractions: Array, scanner: Scanner, name: str = "s") -> Array:
    return acquire(fractions, scanner, 0.5, numpy_generator(0, "test scan", name))


@pytest.mark.parametrize("scanner", SCANNERS, ids=lambda s: s.site)
def test_tissue_contrast_is_the_modalitys(head: Array, scanner: Scanner) -> None:
    image = scan(head, scanner)
    assert image.shape == (SIZE, SIZE)
    assert image.dtype == np.float32
    assert image.min() >= 0.0
    assert image.max() <= 1.0
    # Away from the skull, whose density bleeds into the fluid beside it.
    inside = binary_erosion(head[:3].sum(axis=0) > 0.99, iterations=6)
    csf, grey, white = (float(image[inside & (head[i] > 0.85)].mean()) for i in range(3))
    order = {"t1": white > grey > csf, "t2": csf > grey > white, "flair": grey > white > csf, "ct": grey > white > csf}
    assert {**order, "pet": grey > white > csf}[scanner.contrast], (csf, grey, white)


def test_two_sites_per_contrast_and_modalities_of_the_format() -> None:
    for contrast in CONTRASTS:
        assert [s.site for s in scanners(contrast)] == [f"north_{contrast}", f"south_{contrast}"]
    assert {(s.modality, s.sequence) for s in SCANNERS} == {
        ("MRI", "T1"),
        ("MRI", "T2"),
        ("MRI", "FLAIR"),
        ("CT", ""),
        ("PET", ""),
    }


def test_background_noise_of_mr_is_rayleigh() -> None:
    """The modulus of a complex Gaussian without signal: mean over standard deviation is sqrt(pi / (4 - pi)) = 1.913."""
    air = np.zeros((len(TISSUES), 128, 128), dtype=np.float32)
    image = scan(air, scanners("t1")[1])
    assert image.mean() > 0.0
    assert image.mean() / image.std() == pytest.approx(np.sqrt(np.pi / (4 - np.pi)), rel=0.03)


@pytest.mark.parametrize("scanner", scanners("ct"), ids=lambda s: s.site)
def test_noise_of_ct_is_the_stated_hounsfield_units(scanner: Scanner) -> None:
    image = scan(uniform("white"), scanner)
    assert image.std() * 80.0 == pytest.approx(scanner.noise, rel=0.02)
    assert image.mean() * 80.0 == pytest.approx(28.0, abs=4.0)


def test_noise_of_pet_grows_with_the_root_of_the_counts() -> None:
    scanner = scanners("pet")[1]
    bright, dim = (np.concatenate([scan(uniform(t), scanner, f"{t}{k}").ravel() for k in range(3)]) for t in ("white", "infarct"))
    # Uptake doubles from infarct to white matter, so does the variance; tissue values vary by 6 % between scans.
    within = [np.mean([part.var() for part in np.split(values, 3)]) for values in (bright, dim)]
    assert within[0] / within[1] == pytest.approx(2.0, rel=0.3)


@pytest.mark.parametrize("scanner", scanners("pet"), ids=lambda s: s.site)
def test_noise_of_pet_is_that_of_the_stated_counts(scanner: Scanner) -> None:
    """Poisson noise through a Gaussian filter of s pixels: variance over squared mean is (1 / counts) / (4 pi s^2)."""
    size = 256
    image = scan(uniform("white", size), scanner)[16:-16, 16:-16]
    s = 4.0 / 2.3548 * size / FIELD_OF_VIEW
    assert image.std() / image.mean() == pytest.approx(np.sqrt(scanner.noise / (4 * np.pi * s**2)), rel=0.1)


def test_an_edge_is_as_wide_as_the_stated_resolution() -> None:
    """The derivative of a blurred step is the line spread function: its second moment gives the width."""
    size = 224  # one pixel is one millimetre
    scanner = Scanner("edge_ct", "ct", psf=6.0, noise=0.001)
    step = uniform("white", size)
    step[:, :, size // 2 :] = uniform("csf", size)[:, :, size // 2 :]
    profile = scan(step, scanner).mean(axis=0)
    spread = -np.diff(profile)[size // 2 - 20 : size // 2 + 20]
    position = np.arange(len(spread)) * FIELD_OF_VIEW / size
    mean = (spread * position).sum() / spread.sum()
    width = np.sqrt((spread * (position - mean) ** 2).sum() / spread.sum()) * 2.3548
    assert width == pytest.approx(6.0, rel=0.05)


def test_the_sharp_protocol_is_sharper_and_quieter(head: Array) -> None:
    for scanner in SCANNERS:
        plain, sharp = (acquire(head, scanner, 0.0, numpy_generator(1, "x"), sharp=flag) for flag in (False, True))
        assert not np.array_equal(plain, sharp)
        air = head.sum(axis=0) == 0
        assert sharp[air].std() <= plain[air].std() + 1e-6
        if scanner.contrast == "pet":
            brain = head[:3].sum(axis=0) > 0.99
            assert sharp[brain].std() > plain[brain].std()


def test_scans_are_reproducible_and_differ_between_streams(head: Array) -> None:
    for scanner in SCANNERS[::3]:
        np.testing.assert_array_equal(scan(head, scanner), scan(head, scanner))
        assert not np.array_equal(scan(head, scanner), scan(head, scanner, "other"))
