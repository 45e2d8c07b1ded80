"""Which files make up which case, and what a case is called."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omnifm.data.dicom import is_series
from omnifm.data.readers import SUFFIXES
from omnifm.errors import ConfigError, DataError

SUMMARY = "predictions"
"""Name of the file about all cases; no case may have it."""


@dataclass(frozen=True)
class Case:
    """What one answer is given for.

    Attributes:
        name: where its answers go, below the folder of answers; no two cases have the same.
        files: an image, or a pair; a folder is one series of DICOM slices.
        problem: why there will be no answer, where that is known already.
    """

    name: str
    files: tuple[Path, ...]
    problem: str = ""


def find_cases(paths: Sequence[Path], partners: Sequence[Path], out: Path) -> list[Case]:
    """Return the cases that files and folders stand for, in their order.

    A folder stands for all images below it, by name; a folder whose `.dcm` files are slices of one series is one image.

    Args:
        paths: files and folders.
        partners: nothing, or for each of `paths` its second image: a file for a file, and for a folder a folder with equal names.
        out: what lies below it is no input, though it lie below a folder of `paths`.

    Raises:
        ConfigError: paths and partners do not correspond.
        DataError: a folder holds no image.
    """
    if partners and len(partners) != len(paths):
        raise ConfigError(f"--with was given {len(partners)} times for {len(paths)} first images: each needs its own")
    found: list[Case] = []
    for place, path in enumerate(paths):
        cases = [Case(name, (file,)) for name, file in _expanded(path, out)]
        found += _paired(cases, path, partners[place], out) if partners else cases
    return _distinct(found)


def _paired(cases: Sequence[Case], path: Path, partner: Path, out: Path) -> list[Case]:
    others = dict(_expanded(partner, out))
    if _is_many(path) != _is_many(partner):
        raise ConfigError(f"--with {partner}: a file goes with a file, and a folder with a folder ({path} is not of its kind)")
    if not _is_many(path):
        return [replace(cases[0], files=(*cases[0].files, *others.values()))]
    names = {case.name for case in cases}
    matched = [
        replace(case, files=(*case.files, others[case.name]))
        if case.name in others
        else replace(case, problem=f"{partner} holds no image called {case.name}")
        for case in cases
    ]
    left = [Case(name, (file,), f"{path} holds no image called {name}") for name, file in others.items() if name not in names]
    return matched + left


def _is_many(path: Path) -> bool:
    return path.is_dir() and not is_series(path)


def _expanded(path: Path, out: Path) -> list[tuple[str, Path]]:
    """Return name and path of each image that `path` stands for. A file that is not there is returned: its reader complains."""
    if not _is_many(path):
        return [(_bare(path.resolve().name if path.is_dir() else path.name), path)]
    try:
        found = [(_bare(file.relative_to(path).as_posix()), file) for file in _images_below(path, out.resolve())]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if not found:
        raise DataError(f"{path}: holds no image ({', '.join(SUFFIXES)})")
    return found


def _images_below(folder: Path, out: Path) -> Iterator[Path]:
    if folder.resolve() == out:
        return
    series = is_series(folder)
    if series:
        yield folder
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        # Links to folders are not followed: they may lead in circles.
        if entry.is_dir() and not entry.is_symlink():
            yield from _images_below(entry, out)
        elif entry.is_file() and entry.name.lower().endswith(SUFFIXES) and not (series and entry.suffix.lower() == ".dcm"):
            yield entry


def _bare(name: str) -> str:
    """Return a name without the ending that says what kind of file it is."""
    ending = max((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), key=len, default="")
    return name[: len(name) - len(ending)] or name


def _distinct(cases: Sequence[Case]) -> list[Case]:
    """Number the names that occur again; upper and lower case are one on some disks."""
    used = {SUMMARY}
    found = []
    for case in cases:
        name, count = case.name, 1
        while name.casefold() in used:
            count += 1
            name = f"{case.name}-{count}"
        used.add(name.casefold())
        found.append(replace(case, name=name))
    return found
