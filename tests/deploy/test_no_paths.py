"""Nothing that a server names is looked for on a hospital's disk."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from omnifm import build
from omnifm.config import dump
from omnifm.deploy.data import FILES, public
from omnifm.deploy.hospital import Hospital
from omnifm.engines.calls import Call
from omnifm.federation.messages import Request, encode
from tests.deploy.test_server import said
from tests.run import jobs

INSIDE: tuple[dict[str, Any], ...] = (
    {"model.weights": "{}"},
    {"data.cache": "{}"},
    {"tasks.fusion.vgg": "{}"},
    {"tasks.fusion": {"vgg": "{}"}},
)


@pytest.mark.parametrize(
    ("task", "tasks"),
    [
        ("classification", {"fusion": {"vgg": "{}"}}),
        ("fusion", {"fusion": {"vgg": "{}"}}),
        *(("vqa", {"vqa": {"llava": {part: "{}"}}}) for part in ("vision", "language", "connector")),
        *(("mixed", {"mixed": {"set": {kind: changes}}}) for kind in ("classification", "fusion") for changes in INSIDE),
    ],
)
def test_no_key_of_the_server_tells_what_files_there_are(
    task: str, tasks: dict[str, Any], hospital: Hospital, data: Path, tmp_path: Path
) -> None:
    """Were one read, the answer would say whether there is such a file: a patient's folder, say."""
    (tmp_path / "there").write_text("no weights")
    raw = dump(public(jobs.config(data, "fedavg")))
    answers = set()
    for path in (tmp_path / "there", tmp_path / "missing", tmp_path):
        named = json.loads(json.dumps(tasks).replace("{}", str(path)))
        asked = {**raw, "task": task, "tasks": named}
        answers.add(said(hospital, Call("introduce", {"config": asked})))
        header = {"config": asked, "introductions": []}
        answers.add(said(hospital, Call("answer", header, encode(Request("train", 0, "scan-0")))))
    (answer,) = answers
    assert answer.startswith("mistake: ") and "does not travel" in answer and str(tmp_path) not in answer


def test_every_option_that_is_a_text_is_known_to_be_no_file() -> None:
    """A new option that names a file belongs into FILES, or a server can ask hospitals for it."""
    harmless = {"tasks.vqa.prompt"}
    found = set()
    for name, place in build.TASKS.items():
        module, _, kind = place.partition(":")
        stack = [(f"tasks.{name}", getattr(import_module(module), kind).Options)]
        while stack:
            prefix, options = stack.pop()
            for key, field in options.model_fields.items():
                if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                    stack.append((f"{prefix}.{key}", field.annotation))
                elif field.annotation is str:
                    found.add(f"{prefix}.{key}")
    assert found - harmless == set(FILES)
