"""What a hospital says of the words in its rows, so that others can build the same model; and what it may say."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from omnifm.errors import DataError

LEAST = 5
"""Training rows that an answer must have to be told, where nobody says another number."""
_MOST_WORDS = 100_000
_LONGEST = 1_000


def is_plain(text: str) -> bool:
    """Whether a text is one line of printable words with single spaces, and not too long to be told."""
    return 0 < len(text) <= _LONGEST and text == " ".join(text.split()) and text.isprintable()


def _plain(text: str) -> str:
    if not is_plain(text):
        raise ValueError("is no line of printable words")
    return text


Line = Annotated[str, AfterValidator(_plain)]


class Words(BaseModel):
    """Of one client's rows: what is told of their words.

    Attributes:
        answers: training rows by answer, as it is spelt; rare ones are left out.
        types: of questions, by the alphabet; rare ones are left out.
        pieces: word pieces of the longest question.
        disjoint: whether rows say which images are unseen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    answers: Annotated[dict[Line, Annotated[int, Field(ge=1, le=10_000_000)]], Field(min_length=1, max_length=_MOST_WORDS)]
    types: Annotated[tuple[Line, ...], Field(max_length=_MOST_WORDS)]
    pieces: Annotated[int, Field(ge=1, le=_MOST_WORDS)]
    disjoint: bool


@dataclass(frozen=True)
class Discretion:
    """What a hospital lets out of its answers. It is the hospital's own word: no config from elsewhere changes it.

    Attributes:
        least: training rows in which an answer must be spelt so.
        free: answers that may be told however rare they are, because everybody knows them (`yes`, `no`).
    """

    least: int = LEAST
    free: tuple[str, ...] = ()


def read_discretion(least: int | None, file: Path | None) -> Discretion:
    """Return what `--answers-least` (None: as ever) and the file of `--answers`, one answer a line, let out.

    Raises:
        DataError: the file is no such list.
    """
    least = LEAST if least is None else least
    if file is None:
        return Discretion(least)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: no list of answers ({error})") from None
    return Discretion(least, tuple(line.strip() for line in lines if line.strip()))
