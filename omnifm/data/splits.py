"""Train, val and test for rows whose manifest leaves `split` empty: by patient, per class, a function of its inputs alone."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

SHARES = {"train": 0.65, "val": 0.10, "test": 0.25}


def assign_splits(given: Sequence[str], units: Sequence[str], labels: Sequence[str], seed: int = 0) -> list[str]:
    """Fill in the empty entries of `given`.

    All rows of a unit (a patient; an image where the patient is unknown) fall into one split: the one another of its
    rows is given, else one drawn. Units are taken class by class, within a class in the order of the SHA-256 of seed and unit,
    and each goes to the split that is furthest below its share (65 / 10 / 25 %). So the shares hold to within one unit over
    the whole cohort, and closely within each class. The order of the rows does not matter.

    Args:
        given: split of each row, "" where it is to be filled in.
        units: unit of each row.
        labels: class of each row, "" where there are none. A unit's class is its most frequent one.
        seed: another seed, another draw.
    """
    known = {unit: split for unit, split in zip(units, given, strict=True) if split}
    tallies: dict[str, Counter[str]] = {}
    for unit, label in zip(units, labels, strict=True):
        tallies.setdefault(unit, Counter())[label] += 1
    drawn = [unit for unit in tallies if unit not in known]
    drawn.sort(key=lambda unit: (main_label(tallies[unit]), hashlib.sha256(f"{seed}|{unit}".encode()).digest()))
    counts = dict.fromkeys(SHARES, 0)
    for position, unit in enumerate(drawn, start=1):
        split = max(SHARES, key=lambda name: SHARES[name] * position - counts[name])
        counts[split] += 1
        known[unit] = split
    return [split or known[unit] for split, unit in zip(given, units, strict=True)]


def crossing(patients: Mapping[str, Mapping[str, Collection[str]]]) -> str:
    """Return a line about the first two cohorts of which one trains on patients that the other validates or tests on; or "".

    Args:
        patients: by cohort, then by split, the patients who are known.
    """
    for (one, own), (other, theirs) in itertools.permutations(patients.items(), 2):
        both = set(own.get("train", ())) & {*theirs.get("val", ()), *theirs.get("test", ())}
        if both:
            return (
                f"cohort {one} trains on {len(both)} patient ids that cohort {other} validates or tests on: if equal ids are the "
                "same people, give each of them one split in both manifests"
            )
    return ""


def main_label(tally: Counter[str]) -> str:
    """Return the most frequent label, of equally frequent ones the first in the alphabet."""
    return min(tally, key=lambda label: (-tally[label], label))
