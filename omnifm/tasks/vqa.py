"""Visual question answering: an image, a question in words, an answer in words.

Two networks read the same r': `compact` chooses among the answers of the training rows, `llava` writes. Scores are those of
`omnifm.metrics.vqa`; closed questions are answered like any other, not restricted to their choices. `blind` shows black images,
to the spectral path too: what is left is what the questions alone give away. `docs/tasks/vqa.md` has the protocol.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from omnifm.backbones.llava import LlavaOptions
from omnifm.data.cache import load_images, to_slices
from omnifm.data.cohort import Cohort
from omnifm.data.partition import ClientPlan
from omnifm.data.readers import Image
from omnifm.data.words import Discretion, Words
from omnifm.errors import ConfigError, DataError
from omnifm.metrics.answers import normalise
from omnifm.metrics.base import Metric
from omnifm.metrics.vqa import VqaMetric, decode_texts, encode_texts
from omnifm.tasks.base import (
    Answer,
    Backbone,
    Batch,
    ClientData,
    Head,
    Inputs,
    Model,
    Picture,
    Task,
    TaskData,
    TaskOptions,
)
from omnifm.tasks.cases import case_rows, cohort_of, only_image
from omnifm.tasks.vqa_models import Compact, CompactOptions, Llava, Network, probe
from omnifm.tasks.vqa_text import answer_table, question_types, types_of
from omnifm.tasks.vqa_words import told_table, told_types, words_of

_UNSEEN = "image_disjoint"
_REACH = 8
_AT_ONCE = 64
Key = tuple[int, ...]


class VqaOptions(TaskOptions):
    """The table `[tasks.vqa]`."""

    model: Literal["compact", "llava"] = "compact"
    blind: bool = Field(False, description="Black images: the question alone (a sanity row).")
    max_question: int = Field(48, ge=8, description="Tokens of a question, or of a prompt, at most.")
    max_answer: int = Field(24, ge=2, description="Tokens of a written answer at most, the end token included.")
    prompt: str = Field("question: {question} answer:", description="What the language model reads; needs {question}.")
    compact: CompactOptions = CompactOptions()
    llava: LlavaOptions = LlavaOptions()


@dataclass(frozen=True)
class _Facts:
    """What is known of each row of a cohort, `(rows,)` or `(rows, types)`."""

    question: Tensor
    answer: Tensor
    closed: Tensor
    disjoint: Tensor
    question_type: Tensor

    def side(self, rows: Tensor) -> dict[str, Tensor]:
        facts = {"closed": self.closed, "disjoint": self.disjoint, "question_type": self.question_type, "number": self.question}
        return {name: fact[rows] for name, fact in facts.items()}


@dataclass(frozen=True)
class _Seen:
    """What a network that sees each image once made of a cohort's images: tensors by name, and the place of each row's image."""

    tensors: Mapping[str, Tensor]
    place: Tensor

    def side(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: tensor[self.place[rows]] for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class QuestionSplit:
    """Questions of some manifest rows with their images, read from the memory map when asked for.

    Attributes:
        pixels: `(rows, c, h, w)` in [0, 1], one image per row.
        seen: what is known of the images beforehand.
        rows: manifest row of each example.
        facts: of the whole cohort.
        network: turns questions and answers into tensors.
        blind: show black images.
    """

    pixels: npt.NDArray[np.float32]
    seen: _Seen
    rows: Tensor
    facts: _Facts
    network: Network
    blind: bool

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Tensor) -> Batch:
        """Return the examples at `index`."""
        rows = self.rows[index]
        image = torch.zeros(len(rows), *self.pixels.shape[1:]) if self.blind else torch.from_numpy(self.pixels[rows.numpy()])
        answer = self.facts.answer[rows]
        side = self.facts.side(rows) | self.seen.side(rows) | self.network.side(self.facts.question[rows], answer)
        return Batch(image, answer, rows, side)


class Vqa(Task):
    """Answers to questions about images."""

    name: ClassVar[str] = "vqa"
    reads: ClassVar[frozenset[str]] = frozenset({"vqa"})
    Options: ClassVar[type[TaskOptions]] = VqaOptions
    options: VqaOptions
    primary = "accuracy"
    one_label_space = True
    apart: ClassVar[bool] = True
    tells: ClassVar[bool] = True

    def __init__(self, data: TaskData, options: VqaOptions) -> None:
        super().__init__(data, options)
        config, cohorts = data.config, dict(sorted(data.local.items()))
        self.table = told_table(data.words, cohorts) if data.words else answer_table(cohorts)
        self.types = told_types(data.words) if data.words else question_types(cohorts)
        self._questions = sorted({row.question for cohort in cohorts.values() for row in cohort.rows})
        seen_here = any(row.value(_UNSEEN) for cohort in cohorts.values() for row in cohort.rows)
        self._disjoint = any(words.disjoint for words in data.words) if data.words else seen_here
        self._images = {n: load_images(c, config.data.image_size, config.data.channels, data.cache) for n, c in cohorts.items()}
        for name, images in self._images.items():
            if len(images.pixels) != len(cohorts[name].rows):
                raise DataError(f"cohort {name}: holds volumes; questions are asked about single images")
        self._facts = {name: self._facts_of(cohort) for name, cohort in cohorts.items()}
        self.network = self._network(cohorts)
        self._seen = {name: self._look(cohort) for name, cohort in cohorts.items()}
        self.notes = (*_notes(options), *_images_seen(cohorts))

    @classmethod
    def introduce(cls, cohort: Cohort, plan: ClientPlan, discretion: Discretion) -> tuple[ClientPlan, Words | None]:
        """Tell frequent answers, types of questions, and how long the longest question is."""
        return words_of(cohort, plan, discretion)

    def _network(self, cohorts: Mapping[str, Cohort]) -> Network:
        o, config = self.options, self.data.config
        if o.model == "compact":
            pieces = max((words.pieces for words in self.data.words), default=0)
            return Compact(config, o.compact, self.table, self._questions, o.max_question, pieces)
        if self.data.words:
            raise ConfigError("tasks.vqa.model = 'llava' cannot run across machines: its tokenizer learns from every question")
        rows = [row for cohort in cohorts.values() for row in cohort.rows if row.split == "train"]
        pairs = [(row.question, row.answer) for row in rows]
        return Llava(config, o.llava, self.table, self._questions, o.prompt, (o.max_question, o.max_answer), pairs)

    def _look(self, cohort: Cohort) -> _Seen:
        """Show the network each image of a cohort once, however many questions are asked about it."""
        pixels = self._images[cohort.name].pixels
        first: dict[str, int] = {}
        for place, row in enumerate(cohort.rows):
            first.setdefault(row.image, place)
        order = {image: number for number, image in enumerate(first)}
        parts: list[dict[str, Tensor]] = []
        for rows in torch.tensor(list(first.values())).split(_AT_ONCE):
            image = torch.from_numpy(pixels[rows.numpy()])
            parts.append(self.network.see(torch.zeros_like(image) if self.options.blind else image))
            if not parts[0]:
                break
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return _Seen(tensors, torch.tensor([order[row.image] for row in cohort.rows], dtype=torch.int64))

    def _facts_of(self, cohort: Cohort) -> _Facts:
        number = {question: place for place, question in enumerate(self._questions)}
        kinds = torch.zeros(len(cohort.rows), len(self.types), dtype=torch.uint8)
        for place, row in enumerate(cohort.rows):
            kinds[place, [self.types.index(name) for name in types_of(row) if name in self.types]] = 1
        return _Facts(
            question=torch.tensor([number[row.question] for row in cohort.rows], dtype=torch.int64),
            answer=torch.tensor([self.table.of(row) for row in cohort.rows], dtype=torch.int64),
            closed=torch.tensor([row.answer_type == "closed" for row in cohort.rows], dtype=torch.uint8),
            disjoint=torch.tensor([row.value(_UNSEEN) == "1" for row in cohort.rows], dtype=torch.uint8),
            question_type=kinds,
        )

    def client_data(self, client: str) -> ClientData:
        """Return a client's splits."""
        plan = self.data.plan(client)
        pixels, facts = self._images[plan.cohort].pixels, self._facts[plan.cohort]
        rows = (torch.tensor(part, dtype=torch.int64) for part in (plan.train, plan.val, plan.test))
        seen, blind = self._seen[plan.cohort], self.options.blind
        return ClientData(*(QuestionSplit(pixels, seen, part, facts, self.network, blind) for part in rows))

    def backbone(self) -> Backbone:
        """Return the image half of the network."""
        return self.network.backbone()

    def head(self, token_dim: int) -> Head:
        """Return the half that reads the question."""
        return self.network.head(token_dim)

    def probes(self) -> Sequence[Inputs]:
        """Return two questions, with and without what teacher forcing tells."""
        size, channels = self.data.config.data.image_size, self.data.config.data.channels
        image = torch.zeros(2, channels, size, size)
        return probe(self.network.side(torch.tensor([0, 0]), torch.tensor([0, 0])) | self.network.see(image), image)

    def begin_training(self, model: Model, round_index: int) -> None:
        """Freeze and thaw what the fine-tuning strategy says for this round."""
        self.network.begin_training(model, round_index)

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Shift images. They are not mirrored: left and right are answers."""
        return batch._replace(image=shifted(batch.image, generator))

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Return the network's loss."""
        return self.network.loss(prediction, batch)

    def predict(self, model: Model, batch: Batch) -> Tensor:
        """Return what is said, code points `(b, k, length)`: freely, and (k = 2) under teacher forcing."""
        return self.network.answers(model, batch)

    def metric(self, client: str | None = None) -> Metric:
        """Return the scores of answers."""
        return VqaMetric(self.table.texts, self.types, forced=self.network.forced, disjoint=self._disjoint)

    def picture(self, prediction: Tensor, batch: Batch, index: int) -> Picture:
        """Show the image with the question below; truth and the free answer in words."""
        pixels = (batch.image[index].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
        image = pixels[..., 0] if pixels.shape[2] == 1 else pixels
        truth, said = self.table.texts[int(batch.target[index])], decode_texts(prediction[index, :1])[0]
        question = self._questions[int(batch.side["number"][index])]
        return Picture(((question, image),), truth, said, None, normalise(said) == normalise(truth))

    def examples(self, images: Sequence[Image], question: str, client: str) -> Batch:
        """Return the image with a question in anybody's words."""
        if not question.strip():
            raise ConfigError(f"task {self.name} needs --question")
        config = self.data.config.data
        axis = cohort_of(self.data, client).spec.slice_axis
        slices = torch.from_numpy(to_slices(only_image(images, "", self.name), config.image_size, config.channels, axis))
        if len(slices) != 1:
            raise DataError("is a volume; questions are asked about single images")
        image = torch.zeros_like(slices) if self.options.blind else slices
        return Batch(image, case_rows(1), case_rows(1), self.network.ask(question) | self.network.see(image))

    def answer(self, prediction: Tensor, batch: Batch, images: Sequence[Image], client: str) -> Answer:
        """Return the free answer in words."""
        return Answer({"answer": decode_texts(prediction[:, 0])[0]})

    def references(self, client: str) -> Mapping[str, Callable[[Batch], Tensor]]:
        """Return `majority`: a client's most frequent training answer to questions of the same types, open or closed alike."""
        plan = self.data.plan(client)
        if plan.cohort not in self._facts:
            return {"majority": partial(_not_here, client)}  # a server asks for the name alone
        facts, rows = self._facts[plan.cohort], torch.tensor(plan.train, dtype=torch.int64)
        keys = _keys(facts.closed[rows], facts.question_type[rows])
        answers = facts.answer[rows].tolist()
        # Types that training does not have fall back on open or closed, then on all questions.
        counts: dict[Key, Counter[int]] = {}
        for key, answer in zip(keys, answers, strict=True):
            for known in (key, key[:1], ()):
                counts.setdefault(known, Counter())[answer] += 1
        best = {key: min(found, key=lambda answer: (-found[answer], answer)) for key, found in counts.items()}
        return {"majority": partial(_majority, best, self.table.texts, 1 + self.network.forced)}


def _not_here(client: str, batch: Batch) -> Tensor:
    raise DataError(f"client {client}: its rows are elsewhere, {len(batch.row)} questions cannot be answered from them")


def _majority(best: Mapping[Key, int], texts: Sequence[str], copies: int, batch: Batch) -> Tensor:
    keys = _keys(batch.side["closed"], batch.side["question_type"])
    said = [texts[next(best[k] for k in (key, key[:1], ()) if k in best)] for key in keys]
    return encode_texts(said).unsqueeze(1).expand(-1, copies, -1)


def _keys(closed: Tensor, types: Tensor) -> list[Key]:
    """Return open or closed, then the types, of each question."""
    return [tuple(line) for line in torch.cat([closed.unsqueeze(1), types], dim=1).tolist()]


def shifted(image: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image `(b, c, h, w)` by up to an eighth of its side; edges are repeated."""
    b, _, h, w = image.shape
    y, x = h // _REACH, w // _REACH
    padded = functional.pad(image, (x, x, y, y), mode="replicate")
    top = torch.randint(0, 2 * y + 1, (b,), generator=generator).tolist()
    left = torch.randint(0, 2 * x + 1, (b,), generator=generator).tolist()
    return torch.stack([one[:, t : t + h, s : s + w] for one, t, s in zip(padded, top, left, strict=True)])


def _notes(options: VqaOptions) -> tuple[str, ...]:
    found = ["Answers are compared after normalisation; closed questions are not restricted to their choices."]
    if options.model == "llava":
        found.append("forced_* scores are under teacher forcing: each word was predicted after the true words before it.")
    if options.blind:
        found.append("Images were replaced by black ones: these are answers to the questions alone.")
    return tuple(found)


def _images_seen(cohorts: Mapping[str, Cohort]) -> list[str]:
    """Say of each cohort how many test questions are about an image that a training question is about: VQA-RAD has most."""
    found = []
    for name, cohort in cohorts.items():
        trained = {row.image for row in cohort.rows if row.split == "train"}
        seen = [row.image in trained for row in cohort.rows if row.split == "test"]
        if any(seen):
            found.append(f"{name}: {sum(seen)} of {len(seen)} test questions are about images that are in training too.")
    return found
