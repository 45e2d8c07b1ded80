"""A cohort of questions whose answers are in the picture: which half is bright, and is it the left one."""

from pathlib import Path
from typing import Any

import numpy as np

from omnifm.data.cohort import Row, write_cohort
from omnifm.seeds import numpy_generator
from tests.data.builders import save_png, spec

SIDE = 32
SIDES = ("left", "right")
COUNTS = {"train": 24, "val": 8, "test": 8}


def write_questions(folder: Path, name: str, modality: str, counts: dict[str, int] = COUNTS, **extra: str) -> Path:
    """Write a cohort: each image has an open question (`left` or `right`) and a closed one (`yes` or `no`)."""
    rng = numpy_generator(0, "questions", name)
    rows = []
    for split, count in counts.items():
        for i in range(count):
            bright = (i + i // 2) % 2  # alternates with neither of the two kinds of question
            pixels = rng.normal(60, 10, (SIDE, SIDE, 3))
            pixels[:, bright * SIDE // 2 : (bright + 1) * SIDE // 2] += 120
            path = f"images/{split}{i}.png"
            save_png(folder / path, np.clip(pixels, 0, 255).astype(np.uint8))
            asked: dict[str, Any] = {"answer": SIDES[bright], "answer_type": "open", "question_type": "POS", "organ": "CHEST"}
            asked["question"] = "Which side is bright?"
            if i % 2:
                asked |= {"answer": ("Yes", "No")[bright], "answer_type": "closed", "question_type": "POS, PRES"}
                asked |= {"question": "Is the left side bright?", "organ": "HEAD"}
            rows.append(Row(id=f"{split}{i}", split=split, image=path, extra=dict(extra), **asked))
    return write_cohort(folder, spec(name=name, modality=modality, task="vqa", classes=()), rows)
