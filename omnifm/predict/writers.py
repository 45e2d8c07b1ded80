"""Answers as files: JSON, masks and pictures, each in the geometry of the image it is about."""

import colorsys
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omnifm.data.readers import NIFTI_SUFFIXES, Image
from omnifm.errors import CheckpointError, ConfigError, DataError
from omnifm.predict import nifti
from omnifm.tasks.base import Answer
from omnifm.track.folder import read_json

_GOLDEN = 0.618033988749895
Mask = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class OutFolder:
    """The folder of answers: nothing is written outside it, and nothing replaced unless `force`."""

    folder: Path
    force: bool = False

    def require_free(self, name: str) -> None:
        """Raise DataError if the file `name` may not be written."""
        target = self._target(name)
        if self.folder.exists() and not self.folder.is_dir():
            raise DataError(f"{self.folder}: is a file, not a folder")
        if target.exists() and not self.force:
            raise DataError(f"{target}: is there already; --force replaces it")

    def _target(self, name: str) -> Path:
        target = self.folder / name
        if not target.resolve().is_relative_to(self.folder.resolve()):
            raise DataError(f"{target}: leaves the folder of answers")
        return target

    def forget(self, name: str) -> None:
        """Remove the answer `name` of an earlier batch. Raises DataError: there is one, and no `force`; or it is no answer."""
        self.require_free(name)
        target = self._target(name)
        if target.exists():
            try:
                answer = "config_hash" in read_json(target)
            except CheckpointError:
                answer = False
            if not answer:
                raise DataError(f"{target}: is no answer of an earlier call, and stays as it is: take another --out")
            target.unlink()

    def put(self, name: str, write: Callable[[Path], object]) -> str:
        """Let `write` write the file `name`, which appears once it is whole; return the name. Raises DataError if it cannot."""
        self.require_free(name)
        target = self._target(name)
        # The ending stays: libraries go by it.
        partial = target.with_name(f".{os.getpid()}.{target.name}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write(partial)
            partial.replace(target)
        except OSError as error:
            raise DataError(f"{target}: cannot be written ({error.strerror or error})") from None
        except (DataError, ConfigError):
            raise
        # What libraries raise for an image that their format cannot hold is theirs to choose.
        except Exception as error:
            raise DataError(f"{target}: cannot be written ({type(error).__name__})") from error
        finally:
            with suppress(OSError):
                partial.unlink()
        return name

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write JSON. Undefined is null; numbers that are not finite are an error."""
        text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        self.put(name, lambda path: path.write_text(text, encoding="utf-8"))


def write_answer(
    out: OutFolder, name: str, source: Path, image: Image, answer: Answer, made_by: Mapping[str, Any]
) -> dict[str, str]:
    """Write mask and picture of an answer; return their names by kind.

    Args:
        out: where to.
        name: of the case.
        source: the file or folder that `image` was read from.
        image: the first one of the case.
        answer: on the image's grid.
        made_by: what answered; DICOM objects say it.
    """
    written: dict[str, str] = {}
    if answer.mask is not None:
        written["mask"] = _write_mask(out, f"{name}-mask", source, image, answer.mask, answer.classes, made_by)
    if answer.image is not None:
        written["image"] = _write_image(out, f"{name}-image", source, image, answer.image)
    return written


def _write_mask(
    out: OutFolder, stem: str, source: Path, image: Image, mask: Mask, classes: Sequence[str], made_by: Mapping[str, Any]
) -> str:
    assert mask.shape == image.array.shape[1:], "an answer's mask is on its image's grid"
    if source.is_dir() or source.name.lower().endswith(".dcm"):
        from omnifm.predict.dicom_seg import write_seg

        return out.put(f"{stem}.dcm", lambda path: write_seg(path, source, mask, classes, made_by))
    if _is_nifti(source) or mask.ndim == 3:
        header = source if _is_nifti(source) else None
        return out.put(f"{stem}.nii.gz", lambda path: nifti.write_mask(path, mask, classes, image, header))
    return out.put(f"{stem}.png", lambda path: write_palette_png(path, mask, classes))


def _write_image(out: OutFolder, stem: str, source: Path, image: Image, found: npt.NDArray[np.float32]) -> str:
    if _is_nifti(source) or found.ndim == 4:
        header = source if _is_nifti(source) else None
        return out.put(f"{stem}.nii.gz", lambda path: nifti.write_image(path, found, image, header))
    if image.bits > 8 and len(found) == 3:
        # Pillow has no PNG of 16 bits per colour.
        return out.put(f"{stem}.tiff", lambda path: _write_tiff(path, found))
    return out.put(f"{stem}.png", lambda path: _write_png(path, found, image.bits))


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(NIFTI_SUFFIXES)


def write_palette_png(path: Path, mask: Mask, classes: Sequence[str]) -> None:
    """Write class numbers as a PNG whose palette shows them apart; the text chunk `classes` has their names, a JSON list."""
    from PIL import Image as Pillow
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("classes", json.dumps(list(classes), ensure_ascii=False))
    picture = Pillow.fromarray(mask)
    picture.putpalette(_palette())
    picture.save(path, pnginfo=text)


def _palette() -> bytes:
    """Black, then hues that are far from those before them."""
    hues = ((number * _GOLDEN) % 1 for number in range(1, 256))
    colours = [(0.0, 0.0, 0.0), *(colorsys.hsv_to_rgb(hue, 0.8, 0.95) for hue in hues)]
    return bytes(round(255 * part) for colour in colours for part in colour)


def _write_png(path: Path, found: npt.NDArray[np.float32], bits: int) -> None:
    from PIL import Image as Pillow

    pixels = found[0] if len(found) == 1 else np.moveaxis(found, 0, -1)
    Pillow.fromarray(_whole(pixels, np.uint16 if bits > 8 else np.uint8)).save(path)


def _write_tiff(path: Path, found: npt.NDArray[np.float32]) -> None:
    import tifffile

    tifffile.imwrite(path, _whole(np.moveaxis(found, 0, -1), np.uint16), photometric="rgb")


def _whole(found: npt.NDArray[np.float32], kind: type[np.unsignedinteger[Any]]) -> npt.NDArray[Any]:
    white = np.iinfo(kind).max
    return np.rint(np.clip(found, 0, 1).astype(np.float64) * white).astype(kind)
