"""Registered pairs of the Whole Brain Atlas (K. A. Johnson and J. A. Becker, Harvard) in the folders they are shared in.

    SRC/CT-MRI/CT/16005.png, SRC/CT-MRI/MRI/16005.png, PET-MRI/..., SPECT-MRI/...; `train`, `val`, `test` anywhere between;
    SRC may also be the folder of one kind of pair

Files of one name in the two folders are a pair. Each kind of pair becomes a cohort.

Neighbouring slices of a head are almost the same picture, so a subject must not be cut by a split. In the usual names the last
three digits are the slice and what is before them the case (16005 is slice 5 of case 16); `case16_005` says the same. Where
names are plain numbers, consecutive ones that a block holds together stand for a subject. Splits that cut a subject, as the
shared train and test folders do, are not taken over: the cohort's reader then splits by subject.
"""

import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from omnifm.data.importers import Progress, Provenance, finish, make_spec, new_folder
from omnifm.data.importers.folder import SPLIT_NAMES, SUFFIXES
from omnifm.data.manifest import Row
from omnifm.errors import DataError

log = logging.getLogger(__name__)

PAIRS = ("CT-MRI", "PET-MRI", "SPECT-MRI")
BLOCK = 20
"""Slices of a head in the atlas, about."""

_NAMED = re.compile(r"(?P<case>.*[A-Za-z].*?|\d+)[_-]+(?P<slice>\d+)")
_DIGITS = re.compile(r"(?P<case>\d{1,2})(?P<slice>\d{3})")
_PROVENANCE = {
    "source": "The Whole Brain Atlas (AANLIB), www.med.harvard.edu/AANLIB, from a shared folder of registered pairs",
    "citation": "K. A. Johnson and J. A. Becker, The Whole Brain Atlas, Harvard Medical School, www.med.harvard.edu/AANLIB",
    "notes": "Copyright of the atlas authors; no open licence is known. Neighbouring slices of one subject are alike. ",
}


@dataclass(frozen=True)
class _Pair:
    """Two files below SRC, and the split their folders name."""

    name: str
    split: str
    anatomical: PurePosixPath
    other: PurePosixPath


def import_harvard(source: Path, folder: Path, *, block: int = BLOCK, progress: Progress | None = None) -> list[Path]:
    """Copy the pairs into new cohorts `folder/fusion_ct_mri`, `fusion_pet_mri`, `fusion_spect_mri`, as far as there are some.

    Args:
        source: the shared folder.
        folder: where the cohorts' folders are made; it must be new or empty.
        block: consecutive file numbers taken for one subject where names do not tell it.
        progress: called with pairs copied and pairs in all.

    Returns:
        The folders of the cohorts.

    Raises:
        DataError: no pairs are there, two files stand for one pair, `block` is below 1, or `folder` is not empty.
    """
    if block < 1:
        raise DataError(f"block = {block}: at least one slice belongs to a subject")
    found = {pair: _pairs(source, pair) for pair in PAIRS}
    found = {pair: pairs for pair, pairs in found.items() if pairs}
    if not found:
        raise DataError(f"{source}: holds no pairs in the layout CT-MRI/{{CT,MRI}}/*.png (or PET-MRI, SPECT-MRI)")
    new_folder(folder)
    total, done, cohorts = sum(map(len, found.values())), 0, []
    for pair, pairs in found.items():
        target = folder / f"fusion_{pair.lower().replace('-', '_')}"
        rows, note = _rows(pair, pairs, block)
        for row, files in zip(rows, pairs, strict=True):
            for origin, place in ((files.anatomical, row.image), (files.other, row.image_b)):
                (target / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / origin, target / place)
            done += 1
            if progress is not None:
                progress(done, total)
        provenance = Provenance(f"Registered brain MRI and {pair.removesuffix('-MRI')}", **_PROVENANCE)
        provenance = replace(provenance, notes=provenance.notes + note)
        spec = make_spec({"name": target.name, "task": "fusion", "modality": pair}, provenance)
        cohorts.append(finish(target, spec, rows))
    return cohorts


def _pairs(source: Path, pair: str) -> list[_Pair]:
    """Return the pairs of one kind, by split and name."""
    sides: dict[str, dict[tuple[str, str], PurePosixPath]] = {part: {} for part in pair.split("-")}
    for path in _pictures(source):
        place = _place(source, path, pair)
        if place is None:
            continue
        split, part = place
        known = sides[part].setdefault((split, path.stem), path)
        if known != path:
            raise DataError(f"{source}: {known} and {path} both stand for {part} of pair {path.stem}")
    other, anatomical = sides.values()
    if lonely := sorted(set(other) ^ set(anatomical)):
        log.warning("%s: %d files of %s have no partner and are left out, the first: %s", source, len(lonely), pair, lonely[0][1])
    both = sorted(set(other) & set(anatomical), key=_order)
    loose = {name for split, name in both if not split}
    if clash := sorted(name for split, name in both if split and name in loose):
        raise DataError(f"{source}: pair {clash[0]} is there with and without a split: name the folder of one of the two layouts")
    return [_Pair(name, split, anatomical[split, name], other[split, name]) for split, name in both]


def _pictures(source: Path) -> Iterator[PurePosixPath]:
    if not source.is_dir():
        raise DataError(f"{source}: is not a folder")
    for file in sorted(source.rglob("*")):
        path = PurePosixPath(file.relative_to(source).as_posix())
        if file.is_file() and path.name.lower().endswith(SUFFIXES) and not any(part.startswith(".") for part in path.parts):
            yield path


def _place(source: Path, path: PurePosixPath, pair: str) -> tuple[str, str] | None:
    """Return split and modality that a file's folders name; None where it is of another kind of pair."""
    folders = (source.resolve().name, *path.parts[:-1])
    splits = [SPLIT_NAMES[part.lower()] for part in folders if part.lower() in SPLIT_NAMES]
    others = [part.upper() for part in folders if part.lower() not in SPLIT_NAMES]
    if pair not in others or others[-1] not in pair.split("-"):
        return None
    return (splits[-1] if splits else ""), others[-1]


def _order(key: tuple[str, str]) -> tuple[str, list[tuple[int, str]]]:
    """Return what sorts keys (split, name) so that 9 comes before 10."""
    return key[0], [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key[1])]


def _rows(pair: str, pairs: Sequence[_Pair], block: int) -> tuple[list[Row], str]:
    """Return one row per pair, and what to note about subjects and splits."""
    subjects, note = _subjects(pairs, block)
    splits: dict[str, set[str]] = {}
    for found, subject in zip(pairs, subjects, strict=True):
        splits.setdefault(subject, set()).add(found.split)
    cut = sorted(subject for subject, names in splits.items() if len(names) > 1)
    if cut:
        log.warning("%s: the folders' splits cut subject %s (and %d more): split by subject instead", pair, cut[0], len(cut) - 1)
        note += " The shared split cuts subjects and was not taken over."
    twice = _twice(pairs)
    other, anatomical = (part.lower() for part in pair.split("-"))
    rows = []
    for found, subject in zip(pairs, subjects, strict=True):
        name = f"{found.split}_{found.name}" if found.name in twice else found.name
        rows.append(
            Row(
                id=name,
                split="" if cut else found.split,
                patient=subject,
                image=f"{anatomical}/{name}{found.anatomical.suffix.lower()}",
                image_b=f"{other}/{name}{found.other.suffix.lower()}",
            )
        )
    return rows, note


def _twice(pairs: Sequence[_Pair]) -> set[str]:
    """Return the names that more than one split has."""
    return {name for name, count in Counter(found.name for found in pairs).items() if count > 1}


def _subjects(pairs: Sequence[_Pair], block: int) -> tuple[list[str], str]:
    """Return the subject of each pair: told by all of the names, or blocks of neighbours."""
    for pattern in (_NAMED, _DIGITS):
        matches = [pattern.fullmatch(found.name) for found in pairs]
        cases = [match["case"] for match in matches if match is not None]
        # One case for all is a name such as `slice`, not a subject.
        if len(cases) == len(pairs) and len(set(cases)) > 1:
            return [_case(case) for case in cases], "Subjects are told by the file names."
    note = f"File names tell no subject: every {block} consecutive numbers stand for one."
    numbers = [_number(found.name, place) // block for place, found in enumerate(pairs)]
    # Splits that use a number twice count each on its own: then nothing tells whether one subject is in both.
    if _twice(pairs):
        return [f"{found.split}_block{number:03d}" for found, number in zip(pairs, numbers, strict=True)], note
    return [f"block{number:03d}" for number in numbers], note


def _case(text: str) -> str:
    return f"case{int(text):02d}" if text.isdigit() else text


def _number(name: str, place: int) -> int:
    digits = re.search(r"\d+$", name)
    return int(digits[0]) if digits else place
