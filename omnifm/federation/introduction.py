"""What a hospital says of itself before training across machines: all that the others need to build the same model.

Counts, modalities and the names of classes; no row, no patient, no file name, and none of the free text in `cohort.toml`. Where
questions are asked, what the hospital lets out of their words too.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omnifm.config import one_line
from omnifm.data.cohort import Cohort, CohortSpec
from omnifm.data.partition import ClientPlan
from omnifm.data.words import Words
from omnifm.errors import FederationError

MOST_EXAMPLES = 1_000_000
"""Rows of a split; each of them is a number in split.json, whoever said how many there are."""
MOST_CLASSES = 10_000
MOST_BYTES = 2 * 2**20
Count = Annotated[int, Field(ge=0, le=MOST_EXAMPLES)]


class Introduction(BaseModel):
    """One client, as the server and the other clients know it.

    Attributes:
        client: its id.
        place: its number among the clients that its cohort is cut into.
        spec: `cohort.toml` without its free text.
        modality: of the client's rows, joined with `+`.
        train, val, test: numbers of its rows.
        words: what it tells of the words in them; None for tasks that need nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    client: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}$")]
    place: Count
    spec: CohortSpec
    modality: Annotated[str, Field(pattern=r"^[A-Z][A-Z+-]{0,199}$")]
    train: Annotated[int, Field(ge=1, le=MOST_EXAMPLES)]
    val: Count
    test: Count
    words: Words | None = None

    @property
    def plan(self) -> ClientPlan:
        """The client's plan with numbers in place of rows: as many of them, but they name none."""
        return ClientPlan(self.client, self.spec.name, self.modality, *map(range, (self.train, self.val, self.test)))


def introduce(cohort: Cohort, plan: ClientPlan, place: int, words: Words | None = None) -> Introduction:
    """Return what others may know of a client."""
    counts = {"train": len(plan.train), "val": len(plan.val), "test": len(plan.test)}
    return Introduction(client=plan.id, place=place, spec=bare(cohort.spec), modality=plan.modality, words=words, **counts)


def bare(spec: CohortSpec) -> CohortSpec:
    """Return a spec without its free text, but for whether it calls its images simulated."""
    title = "simulated" if "simulated" in spec.title.lower() else "elsewhere"
    free = {"title": title, "licence": "elsewhere", "redistribution": "testing-only", "source": "", "citation": "", "notes": ""}
    return spec.model_copy(update=free)


def read_introduction(text: str | bytes) -> Introduction:
    """Return the introduction in a JSON text that came from elsewhere; free text in it is dropped.

    Raises:
        FederationError: it is none.
    """
    try:
        found = Introduction.model_validate_json(text)
    except ValidationError as error:
        raise FederationError(f"an introduction cannot be read: {one_line(error)}") from None
    if len(found.spec.classes) > MOST_CLASSES:
        raise FederationError(f"client {found.client}: introduces itself with {len(found.spec.classes)} classes")
    # It goes to every hospital with every request, as ASCII.
    if (size := len(json.dumps(found.model_dump(mode="json")))) > MOST_BYTES:
        raise FederationError(f"client {found.client}: introduces itself with {size} bytes, at most {MOST_BYTES} are taken")
    return found.model_copy(update={"spec": bare(found.spec)})


def in_order(introductions: Sequence[Introduction], cohorts: Sequence[str]) -> list[Introduction]:
    """Return the introductions in the order a run in one process has: by cohort as in the config, then by place.

    Args:
        introductions: one per client.
        cohorts: names of the cohorts, in the config's order.

    Raises:
        FederationError: two say the same id or place, two describe one cohort differently, or one's cohort is not in the config.
    """
    specs: dict[str, Introduction] = {}
    for one in introductions:
        if one.spec.name not in cohorts:
            raise FederationError(f"client {one.client}: cohort {one.spec.name} is not one of this federation's")
        first = specs.setdefault(one.spec.name, one)
        if first.spec != one.spec:
            raise FederationError(f"clients {first.client} and {one.client}: describe cohort {one.spec.name} differently")
    ordered = sorted(introductions, key=lambda one: (cohorts.index(one.spec.name), one.place))
    for before, after in itertools.pairwise(ordered):
        if (before.spec.name, before.place) == (after.spec.name, after.place):
            raise FederationError(
                f"clients {before.client} and {after.client}: both are number {after.place} of {after.spec.name}"
            )
    if len({one.client for one in ordered}) < len(ordered):
        raise FederationError("two clients introduce themselves with the same id")
    return ordered
