"""The tutorial of docs/deployment.md: its commands, in its order, with this machine's names in the place of the page's."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.engines.federation import ROOT

PAGE = ROOT / "docs" / "deployment.md"
CLINICS = ("clinic_a", "clinic_b", "clinic_c")
_SECTION = re.compile(r"^## From two empty machines.*?(?=^## )", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(r"^```(sh|toml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Tutorial:
    """What the page says to do, by who does it and when. A command is its words without `omnifm`.

    Attributes:
        job: the config, TOML.
        authority, serve, status: the server's commands.
        key, doctor, join: the first hospital's.
        open_serve, open_join: how to try it without certificates.
    """

    job: str
    authority: list[str]
    key: list[str]
    serve: list[str]
    doctor: list[str]
    join: list[str]
    status: list[str]
    open_serve: list[str]
    open_join: list[str]

    @classmethod
    def read(cls) -> "Tutorial":
        """Read the page. Raises ValueError where it has other commands than these."""
        section = _SECTION.search(PAGE.read_text(encoding="utf-8"))
        blocks = _BLOCK.findall(section[0] if section else "")
        (job,) = [text for kind, text in blocks if kind == "toml"]
        commands = [shlex.split(line) for kind, text in blocks if kind == "sh" for line in text.splitlines()]
        if any(words[0] != "omnifm" for words in commands):
            raise ValueError(f"{PAGE.name}: a command of the tutorial is not omnifm's")
        return cls(job, *(words[1:] for words in commands))


def with_names(words: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Return a command in which each name of the page has given way to one of this machine."""
    return [renamed(word, names) for word in words]


def renamed(text: str, names: Mapping[str, str]) -> str:
    """Return a text with its names replaced."""
    for name, other in names.items():
        text = text.replace(name, other)
    return text


def real_cohorts() -> list[Path]:
    """Return three public cohorts of three modalities, or nothing where ../shared/data does not have them."""
    found = [ROOT.parent / "shared" / "data" / name for name in ("cls_brain_mri", "cls_breast_us", "cls_chest_ct")]
    return found if all(path.is_dir() for path in found) else []
