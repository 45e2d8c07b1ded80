"""Case after case: predict, write, and say of each whether it went well."""

from collections.abc import Callable, Sequence
from typing import Any

from omnifm.errors import DataError
from omnifm.predict.cases import SUMMARY, Case
from omnifm.predict.session import Session
from omnifm.predict.writers import OutFolder, write_answer

Show = Callable[[Case, str], None]
"""Called after each case, with what went wrong; empty if nothing did."""


def predict_cases(session: Session, cases: Sequence[Case], out: OutFolder, *, question: str = "", show: Show) -> dict[str, Any]:
    """Answer all cases; write NAME.json and what belongs to it for each, and `predictions.json` about all.

    A case that cannot be answered is told of and the next one is taken. What is done is in the summary even if the batch is
    interrupted.

    Returns:
        The summary: what answered, `cases` and `failed`.

    Raises:
        OmnifmError: no case could be answered this way, or there are answers in the folder already.
    """
    out.require_free(f"{SUMMARY}.json")
    if out.force and any(file.resolve().parent == out.folder.resolve() for case in cases for file in case.files):
        raise DataError(
            f"{out.folder}: holds images of this call, and --force could replace what lies beside them: take another --out"
        )
    done: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    summary = {**session.facts, "cases": done, "failed": failed}
    try:
        for case in cases:
            problem = ""
            try:
                done.append(_one(session, case, out, question))
            except DataError as error:
                problem = " ".join(str(error).split())
                failed.append({"file": str(case.files[0]), "problem": problem})
            show(case, problem)
    finally:
        if done or failed:
            out.write_json(f"{SUMMARY}.json", summary)
    return summary


def _one(session: Session, case: Case, out: OutFolder, question: str) -> dict[str, Any]:
    # First: what fails below must not leave the answer that another model gave.
    out.forget(f"{case.name}.json")
    if case.problem:
        raise DataError(f"{case.files[0]}: {case.problem}")
    answer, images = session.answer(case, question)
    source = case.files[0]
    try:
        written = write_answer(out, case.name, source, images[0], answer, session.facts)
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(str(out.folder)) else f"{source}: {error}") from error
    record: dict[str, Any] = {"name": case.name, "file": str(source)}
    if len(case.files) > 1:
        record["with"] = str(case.files[1])
    if question:
        record["question"] = question
    record |= {**answer.facts, "files": written}
    # Last: a case that has its JSON is whole.
    out.write_json(f"{case.name}.json", {**session.facts, **record})
    return record
