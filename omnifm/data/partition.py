"""Cutting a cohort into clients. Official splits are never mixed: a client's val and test rows follow its train proportions."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from omnifm.data.cohort import Cohort
from omnifm.data.manifest import SPLITS, units
from omnifm.data.splits import main_label
from omnifm.errors import DataError
from omnifm.seeds import numpy_generator

Kind = Literal["natural", "by_modality", "dirichlet", "iid", "by_column"]
MAX_DRAWS = 2000
BOUNDARY = {"natural": "site", "by_modality": "modality"}
"""The column by whose values a kind of partition cuts; `by_column` names its own."""


@dataclass(frozen=True)
class ClientPlan:
    """Which rows of which cohort one client holds. `train`, `val` and `test` index `Cohort.rows`, ascending.

    `modality` joins all modalities of the client's rows with `+`. Of a client elsewhere the numbers of rows are known
    alone, for which ranges stand.
    """

    id: str
    cohort: str
    modality: str
    train: Sequence[int]
    val: Sequence[int]
    test: Sequence[int]

    def record(self) -> dict[str, Any]:
        """Return the plan as JSON has it, its rows as lists."""
        return {f.name: value if isinstance(value := getattr(self, f.name), str) else list(value) for f in fields(self)}


def partition(
    cohort: Cohort, *, clients: int, kind: Kind, gamma: float, min_examples: int = 10, column: str = "", seed: int
) -> list[ClientPlan]:
    """Cut a cohort into clients; every row goes to exactly one.

    - `natural`: one client per `site`; a cohort without sites is one client.
    - `by_column`: one client per value of `column`.
    - `by_modality`: one client per modality; with `clients` > 1 that many per modality, drawn as `dirichlet` within it, or as
      `iid` if `gamma` is 0.
    - `dirichlet`: `clients` clients. For each class the proportions over clients are drawn from Dir(gamma, ..., gamma) (Yurochkin
      et al. 2019; Hsu et al. 2019), anew until every client has `min_examples` train rows (as FL-bench does), and a row to
      validate and to test on where the cohort has enough of them that are not bound to a client. Classes are the values of
      `column`, by default of `label`; without any, gamma governs the clients' sizes.
    - `iid`: `clients` equal random parts of each split.

    In the two drawn kinds a patient's rows stay together, and those of an image where no patient is known (counted under the most
    frequent class): where they are in several splits, those to validate and to test on go to the client that trains on the
    others. In the other kinds the boundary decides.

    Raises:
        DataError: a client would have no training rows, a boundary value is missing, or no draw met `min_examples`.
    """
    if clients < 1:
        raise DataError(f"cohort {cohort.name}: clients must be at least 1, not {clients}")
    if not 0 <= gamma < math.inf or (kind == "dirichlet" and gamma == 0):
        raise DataError(f"cohort {cohort.name}: gamma must be a positive number, not {gamma}")
    if kind in ("dirichlet", "iid"):
        groups, parts_per_group = {"": list(range(len(cohort.rows)))}, clients
    else:
        groups = _by_value(cohort, BOUNDARY.get(kind, column))
        parts_per_group = clients if kind == "by_modality" else 1
    drawn_gamma = 0.0 if kind == "iid" else gamma
    plans = []
    for (value, rows), name in zip(groups.items(), _file_names(groups), strict=True):
        if parts_per_group == 1:
            parts = {f"{cohort.name}-{name or 0}": rows}
        else:
            stem = "-".join(filter(None, (cohort.name, name)))
            rng = numpy_generator(seed, "partition", cohort.name, kind, value)
            drawn = _draw(cohort, rows, parts_per_group, drawn_gamma, min_examples, column, rng)
            parts = {f"{stem}-{k}": part for k, part in enumerate(drawn)}
        plans += [_plan(cohort, client, part) for client, part in parts.items()]
    return plans


def _by_value(cohort: Cohort, column: str) -> dict[str, list[int]]:
    if not column:
        raise DataError(f"cohort {cohort.name}: a partition by_column needs the name of a column")
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(cohort.rows):
        groups.setdefault(row.value(column), []).append(index)
    if "" in groups and not (column == "site" and len(groups) == 1):
        row_id = cohort.rows[groups[""][0]].id
        raise DataError(f"cohort {cohort.name}: row '{row_id}' has no value in column '{column}', which parts the clients")
    return dict(sorted(groups.items()))


def _file_names(values: Iterable[str]) -> list[str]:
    """Make values safe in file names and different from each other, also where case does not count."""
    values = list(values)
    names = [re.sub(r"[^A-Za-z0-9_.]+", "_", value) for value in values]
    taken = Counter(name.lower() for name in names)
    digests = [hashlib.sha256(value.encode()).hexdigest()[:6] for value in values]
    return [name if taken[name.lower()] == 1 else f"{name}-{d}" for name, d in zip(names, digests, strict=True)]


def _plan(cohort: Cohort, client: str, rows: Sequence[int]) -> ClientPlan:
    parts = {split: tuple(i for i in sorted(rows) if cohort.rows[i].split == split) for split in SPLITS}
    if not parts["train"]:
        raise DataError(f"client {client}: no training rows (val {len(parts['val'])}, test {len(parts['test'])})")
    modality = "+".join(sorted({cohort.rows[i].modality for i in rows}))
    return ClientPlan(client, cohort.name, modality, parts["train"], parts["val"], parts["test"])


@dataclass(frozen=True)
class _Units:
    """What a draw moves as one: a patient's rows of a split, or an image's where no patient is known. Arrays of shape (units,).

    `leader` is the unit whose client a unit goes to: that of the same patient or image in the first split which has any, most
    often itself. Only leaders are drawn.
    """

    rows: tuple[tuple[int, ...], ...]
    size: npt.NDArray[np.float64]
    split: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    leader: npt.NDArray[np.int64]

    @property
    def leads(self) -> npt.NDArray[np.bool_]:
        alone: npt.NDArray[np.bool_] = self.leader == np.arange(len(self.rows))
        return alone


def _units(cohort: Cohort, rows: Sequence[int], column: str) -> _Units:
    members: dict[tuple[str, str], list[int]] = {}
    for index, unit in zip(rows, units([cohort.rows[index] for index in rows]), strict=True):
        members.setdefault((cohort.rows[index].split, unit), []).append(index)
    labels = [main_label(Counter(cohort.rows[i].value(column or "label") for i in part)) for part in members.values()]
    names = sorted(set(labels))
    place = {member: number for number, member in enumerate(members)}
    leaders = [next(place[split, unit] for split in SPLITS if (split, unit) in place) for _, unit in members]
    return _Units(
        rows=tuple(tuple(part) for part in members.values()),
        size=np.array([len(part) for part in members.values()], dtype=np.float64),
        split=np.array([SPLITS.index(split) for split, _ in members], dtype=np.int64),
        label=np.array([names.index(label) for label in labels], dtype=np.int64),
        leader=np.array(leaders, dtype=np.int64),
    )


def _draw(
    cohort: Cohort, rows: Sequence[int], clients: int, gamma: float, min_examples: int, column: str, rng: np.random.Generator
) -> list[list[int]]:
    drawn = _units(cohort, rows, column if gamma > 0 else "")
    floor = _least_rows(drawn, clients, min_examples, drawn.leads)
    wanted = _least_rows(drawn, clients, min_examples, np.ones_like(drawn.leads))
    second_best: npt.NDArray[np.int64] | None = None
    fewest = 0
    for _ in range(MAX_DRAWS):
        owner = _owners(drawn, clients, gamma, rng)
        counts = [np.bincount(owner, drawn.size * (drawn.split == s), clients) for s in range(len(SPLITS))]
        if _reaches(counts, wanted):
            return _rows_of(drawn, owner, clients)
        if second_best is None and _reaches(counts, floor):
            second_best = owner
        fewest = max(fewest, int(counts[0].min()))
    if second_best is not None:
        return _rows_of(drawn, second_best, clients)
    raise DataError(
        f"cohort {cohort.name}: no draw of {MAX_DRAWS} gave each of {clients} clients {floor[0]} train, {floor[1]} val and "
        f"{floor[2]} test rows (most train rows of a smallest client: {fewest}); take fewer clients, a larger gamma or a smaller "
        "min_examples"
    )


def _rows_of(units: _Units, owner: npt.NDArray[np.int64], clients: int) -> list[list[int]]:
    return [[i for u in np.flatnonzero(owner == k) for i in units.rows[u]] for k in range(clients)]


def _reaches(counts: Sequence[npt.NDArray[Any]], floor: Sequence[int]) -> bool:
    return all((count >= least).all() for count, least in zip(counts, floor, strict=True))


def _least_rows(units: _Units, clients: int, min_examples: int, counted: npt.NDArray[np.bool_]) -> list[int]:
    """Return the train, val and test rows of every client: one of val and test where there are that many `counted` units.

    Units that follow another may all follow the same client's: a draw that gives every client one is wanted, not insisted on.
    """
    held_out = [int(np.count_nonzero(counted & (units.split == s)) >= clients) for s in range(1, len(SPLITS))]
    return [max(min_examples, 1), *held_out]


def _owners(units: _Units, clients: int, gamma: float, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return the client of each unit: shares drawn per class, the same in each split, cut along a shuffled order.

    Units that follow another go to its client; the shares are those of the rest.
    """
    owner = np.zeros(len(units.rows), dtype=np.int64)
    labels = units.label if gamma > 0 else np.zeros_like(units.label)
    for label in np.unique(labels):
        shares = rng.dirichlet(np.full(clients, gamma)) if gamma > 0 else np.full(clients, 1 / clients)
        ends = np.minimum(np.cumsum(shares), 1.0)
        for split in range(len(SPLITS)):
            chosen = rng.permutation(np.flatnonzero((labels == label) & (units.split == split) & units.leads))
            size = units.size[chosen]
            centre = (np.cumsum(size) - size / 2) / max(size.sum(), 1)
            owner[chosen] = np.minimum(np.searchsorted(ends, centre), clients - 1)
    return owner[units.leader]


def require_own_ids(plans: Iterable[ClientPlan]) -> None:
    """Raise DataError if two clients have one id: the parts of a client's name may be a cohort's name and another's modality."""
    known: dict[str, str] = {}
    for plan in plans:
        if plan.id in known:
            raise DataError(f"client {plan.id}: cohorts {known[plan.id]} and {plan.cohort} have a client of this id; rename one")
        known[plan.id] = plan.cohort


def plans_to_json(plans: Iterable[ClientPlan]) -> str:
    """Return plans as JSON text, the same text for the same plans."""
    return json.dumps([plan.record() for plan in plans], separators=(",", ":"), sort_keys=True)


def plans_from_json(text: str) -> list[ClientPlan]:
    """Return the plans that `plans_to_json` wrote.

    Raises:
        DataError: the text is something else.
    """
    try:
        return [
            ClientPlan(p["id"], p["cohort"], p["modality"], tuple(p["train"]), tuple(p["val"]), tuple(p["test"]))
            for p in json.loads(text)
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"client plans cannot be read: {error}") from error


def plans_digest(plans: Iterable[ClientPlan]) -> str:
    """Return the SHA-256 of the plans, in hex."""
    return hashlib.sha256(plans_to_json(plans).encode()).hexdigest()
