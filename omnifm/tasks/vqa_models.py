"""The two networks of visual question answering, as parts that a federation trains: which answers, and in which words.

Both read r', whatever made it. What a network sees of a question travels in `Inputs.side`; the LLaVA shape also finds the true
answer there while it is trained or scored under teacher forcing, and answers freely where it does not.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from omnifm import seeds
from omnifm.backbones.build import build_trunk
from omnifm.backbones.efficientnet import IMAGENET_MEAN, IMAGENET_STD
from omnifm.backbones.llava import PAD, Answerer, LlavaOptions, VisionTower, build_answerer, build_tower
from omnifm.backbones.vqa_compact import QuestionReader, answer_classifier
from omnifm.config import Config
from omnifm.errors import ConfigError, FederationError
from omnifm.metrics.vqa import encode_texts
from omnifm.tasks.base import Backbone, Batch, Features, Head, Inputs, Model, Reading
from omnifm.tasks.classification import TrunkBackbone
from omnifm.tasks.vqa_text import (
    WORD_DIM,
    AnswerTable,
    decode,
    encode,
    load_tokenizer,
    minilm_words,
    special_ids,
    train_tokenizer,
    widened,
)

_HEADS = 4
_PLACE = "{question}"
_SEEN = "seen"


class CompactOptions(BaseModel):
    """Sizes of the compact model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_dim: int = Field(128, ge=8, multiple_of=_HEADS, description="Width of the image tokens that the question looks at.")
    layers: int = Field(2, ge=1, description="Layers of cross-attention from the question to the image.")
    dropout: float = Field(0.1, ge=0, lt=1)
    freeze_trunk: bool = Field(False, description="The image trunk keeps the weights it came with, and sees each image once.")


class Network(ABC):
    """One of the two networks, without data: how it is built, what it reads, what it says."""

    forced = False
    """Whether it can answer under teacher forcing."""

    @abstractmethod
    def side(self, question: Tensor, answer: Tensor) -> dict[str, Tensor]:
        """Return what the network reads of questions and answers, by their numbers `(b,)`."""

    @abstractmethod
    def ask(self, question: str) -> dict[str, Tensor]:
        """Return what the network reads of one question that may be new to it, without an answer."""

    def see(self, image: Tensor) -> dict[str, Tensor]:
        """Return what is known beforehand of images `(b, c, h, w)`, and stays the same; by default, nothing."""
        del image
        return {}

    @abstractmethod
    def backbone(self) -> Backbone:
        """Return a new backbone."""

    @abstractmethod
    def head(self, token_dim: int) -> Head:
        """Return a new head."""

    @abstractmethod
    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss."""

    @abstractmethod
    def answers(self, model: Model, batch: Batch) -> Tensor:
        """Return what is said, code points `(b, 1 or 2, length)`."""

    def begin_training(self, model: Model, round_index: int) -> None:
        """Prepare for a round of local training; by default, nothing."""
        del model, round_index


# ---------------------------------------------------------------------------------------------------- compact
class ImageTokens(Backbone):
    """A trunk, and a linear map to the width that the question looks at. Without a trunk: the map, over what a frozen one saw."""

    def __init__(self, trunk: TrunkBackbone | None, width: int, token_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.token_dim = token_dim
        self.project = nn.Linear(width, token_dim) if trunk is None or width != token_dim else nn.Identity()

    def forward(self, inputs: Inputs) -> Features:
        """Return tokens `(b, l, token_dim)`."""
        return Features(self.project(inputs.side[_SEEN] if self.trunk is None else self.trunk(inputs).tokens))


class CompactHead(Head):
    """The question reads r', a classifier over the answer vocabulary answers. The classifier is the client's own."""

    def __init__(self, token_dim: int, answers: int, options: CompactOptions) -> None:
        super().__init__()
        self.reader = QuestionReader(WORD_DIM, token_dim, options.layers, _HEADS, options.dropout)
        self.classifier = answer_classifier(token_dim, answers, options.dropout)

    def forward(self, reading: Reading) -> Tensor:
        """Return logits `(b, answers)`."""
        side = reading.inputs.side
        logits: Tensor = self.classifier(self.reader(side["question"], side["question_mask"], reading.tokens))
        return logits

    @property
    def own(self) -> nn.Module:
        """The classifier."""
        return self.classifier


class Compact(Network):
    """Image trunk, MiniLM, cross-attention, classifier."""

    def __init__(
        self,
        config: Config,
        options: CompactOptions,
        table: AnswerTable,
        questions: Sequence[str],
        max_question: int,
        pieces: int = 0,
    ) -> None:
        """Read the questions. `pieces`: word pieces of the longest one of the federation, where that is elsewhere."""
        self._config, self._options, self._table, self._longest = config, options, table, max_question
        # A server has no questions, and yet the model is tried with one.
        questions = questions or [""]
        words = widened(minilm_words(questions, max_question), min(pieces, max_question))
        self._states, self._mask = words.states, words.mask
        self._place = torch.tensor([words.place[text] for text in questions], dtype=torch.int64)
        self._spoken = encode_texts(table.texts[: table.classes])
        # What is never trained is no part of the model: it sees each image once, before the first round.
        self._frozen = self._frozen_trunk() if options.freeze_trunk else None

    def _frozen_trunk(self) -> TrunkBackbone:
        if not self._config.model.weights:
            raise ConfigError("tasks.vqa.compact.freeze_trunk keeps the weights of model.weights, which names none")
        if self._config.data.augment != "none":
            raise ConfigError("tasks.vqa.compact.freeze_trunk sees each image once: set data.augment = 'none'")
        with seeds.scope(self._config.seed, "init", "frozen trunk"):
            return self._trunk().eval()

    def side(self, question: Tensor, answer: Tensor) -> dict[str, Tensor]:
        """Return MiniLM's states `(b, t, 384)` and their mask `(b, t)`."""
        place = self._place[question]
        return {"question": self._states[place].float(), "question_mask": self._mask[place]}

    def ask(self, question: str) -> dict[str, Tensor]:
        """Return MiniLM's states of the question."""
        words = minilm_words([question], self._longest)
        return {"question": words.states.float(), "question_mask": words.mask}

    def see(self, image: Tensor) -> dict[str, Tensor]:
        """Return the tokens of a frozen trunk."""
        if self._frozen is None:
            return {}
        with torch.no_grad():
            return {_SEEN: self._frozen(Inputs(image)).tokens}

    def _trunk(self) -> TrunkBackbone:
        """Return the trunk that `[model]` names."""
        model, channels = self._config.model, self._config.data.channels
        trunk, width = build_trunk(model, channels)
        published = model.backbone == "efficientnet_lite0" and channels == 3
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if published else ([0.5] * channels, [0.25] * channels)
        return TrunkBackbone(trunk, width, mean, std)

    def backbone(self) -> Backbone:
        """Return the trunk and the map behind it, or the map alone."""
        if self._frozen is not None:
            return ImageTokens(None, self._frozen.token_dim, self._options.token_dim)
        trunk = self._trunk()
        return ImageTokens(trunk, trunk.token_dim, self._options.token_dim)

    def head(self, token_dim: int) -> Head:
        """Return the reader and the classifier."""
        return CompactHead(token_dim, self._table.classes, self._options)

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy over the answer vocabulary."""
        return functional.cross_entropy(prediction, batch.target)

    def answers(self, model: Model, batch: Batch) -> Tensor:
        """Return the most probable answer of the vocabulary, closed questions not restricted to their choices."""
        chosen = model(batch.inputs).prediction.argmax(dim=1).cpu()
        return self._spoken[chosen].unsqueeze(1)


# ---------------------------------------------------------------------------------------------------- LLaVA's shape
class TowerBackbone(Backbone):
    """CLIP's vision tower."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower = tower
        self.token_dim = tower.token_dim

    def forward(self, inputs: Inputs) -> Features:
        """Return patch tokens."""
        return Features(self.tower(inputs.image))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The tower's layers up to the one that is read."""
        return tuple(self.tower.tower.encoder.layers)


class LlavaHead(Head):
    """Connector and language model. With `side["answer"]`: logits under teacher forcing; without: generated token ids."""

    def __init__(self, answerer: Answerer, options: LlavaOptions) -> None:
        super().__init__()
        self.answerer = answerer
        self._options = options

    def forward(self, reading: Reading) -> Tensor:
        """Return logits `(b, m, vocabulary)`, or token ids `(b, n)`."""
        side = reading.inputs.side
        if "answer" in side:
            return self.answerer.logits(reading.tokens, side["question"], side["answer"])
        return self.answerer.generate(reading.tokens, side["question"])

    @property
    def own(self) -> nn.Module:
        """The last part that trains: LoRA's language model, the connector alone, or the output layer of a full training."""
        if self._options.tune == "full":
            output: nn.Module = self.answerer.language.get_output_embeddings()
            return output
        return self.answerer.language if self._options.adapts else self.answerer.connector


class Llava(Network):
    """CLIP vision tower, connector, causal language model."""

    forced = True

    def __init__(
        self,
        config: Config,
        options: LlavaOptions,
        table: AnswerTable,
        questions: Sequence[str],
        prompt: str,
        lengths: tuple[int, int],
        trained: Sequence[tuple[str, str]],
    ) -> None:
        """Tokenise everything.

        Args:
            config: the run.
            options: what is trained and where weights come from.
            table: answers.
            questions: by number.
            prompt: what the language model reads, with `{question}` in it.
            lengths: most tokens of a prompt and of an answer.
            trained: questions and answers of training rows; a small model's tokenizer learns from them.

        Raises:
            ConfigError: the prompt has no place for a question, images are grey, `model.weights` names a file, or the language
                model's folder does not fit.
        """
        if config.data.channels != 3:
            raise ConfigError("tasks.vqa.model = 'llava': CLIP reads colour images, set data.channels = 3")
        if config.model.weights:
            raise ConfigError(
                "model.weights: tasks.vqa.model = 'llava' reads its weights from tasks.vqa.llava.vision and .language"
            )
        if _PLACE not in prompt:
            raise ConfigError(f"tasks.vqa.prompt: holds no {_PLACE}")
        self._config, self._options, self._prompt, self._most = config, options, prompt, lengths[0]
        folder = Path(options.language) if options.language else None
        texts = [text for question, answer in trained for text in (self._prompted(question), f" {answer}")]
        self._tokenizer = train_tokenizer(texts, options.vocabulary) if folder is None else load_tokenizer(folder)
        self._special = special_ids(self._tokenizer, folder)
        self._prompts = encode(self._tokenizer, [self._prompted(question) for question in questions], lengths[0])
        self._answers = encode(self._tokenizer, [f" {text}" for text in table.texts], lengths[1], end=self._special[1])
        self._switch = options.switch_round or max(1, config.federation.rounds // 2)
        self._staged = options.tune != "F-2stage"

    def _prompted(self, question: str) -> str:
        return self._prompt.replace(_PLACE, question)

    def side(self, question: Tensor, answer: Tensor) -> dict[str, Tensor]:
        """Return token ids of prompts `(b, q)` and answers `(b, m)`."""
        return {"question": self._prompts[question], "answer": self._answers[answer]}

    def ask(self, question: str) -> dict[str, Tensor]:
        """Return token ids of the prompt."""
        return {"question": encode(self._tokenizer, [self._prompted(question)], self._most)}

    def backbone(self) -> Backbone:
        """Return the tower."""
        return TowerBackbone(build_tower(self._options, self._config.model.width, self._config.data.image_size))

    def head(self, token_dim: int) -> Head:
        """Return connector and language model."""
        size = self._tokenizer.get_vocab_size()
        longest = self._answers.shape[1]
        answerer = build_answerer(self._options, self._config.model.width, token_dim, size, self._special, longest)
        return LlavaHead(answerer, self._options)

    def begin_training(self, model: Model, round_index: int) -> None:
        """F-2stage: the connector before the switch, LoRA from it on. Nothing else changes from round to round."""
        if self._options.tune != "F-2stage":
            return
        assert isinstance(model.head, LlavaHead)
        first, answerer = round_index < self._switch, model.head.answerer
        answerer.connector.requires_grad_(first)
        for matrix in answerer.adapters():
            matrix.requires_grad_(not first)
        self._staged = True

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy over the answers' tokens, end tokens included; every token counts the same.

        Raises:
            FederationError: F-2stage, and nobody said which round it is.
        """
        if not self._staged:
            raise FederationError("tasks.vqa.llava.tune = 'F-2stage': the training loop did not say which round it is")
        labels = batch.side["answer"].masked_fill(batch.side["answer"] == PAD, -100)
        return functional.cross_entropy(prediction.flatten(0, 1), labels.flatten(), ignore_index=-100)

    def answers(self, model: Model, batch: Batch) -> Tensor:
        """Return freely generated answers, which no true answer was near, and those under teacher forcing where it is known."""
        asked = {name: tensor for name, tensor in batch.side.items() if name != "answer"}
        free = model(batch.inputs._replace(side=asked)).prediction.cpu()
        if "answer" not in batch.side:
            return encode_texts(self.spoken(free)).unsqueeze(1)
        guessed = model(batch.inputs).prediction.argmax(dim=2).cpu()
        # Where the true answer has ended there is nothing left to be told.
        forced = guessed.masked_fill(batch.side["answer"].cpu() == PAD, PAD)
        return pair_texts(self.spoken(free), self.spoken(forced))

    def spoken(self, ids: Tensor) -> list[str]:
        """Return token ids `(b, n)` as texts."""
        return decode(self._tokenizer, ids)


def pair_texts(free: Sequence[str], forced: Sequence[str]) -> Tensor:
    """Return code points `(b, 2, length)` of two answers to each question."""
    codes = encode_texts([*free, *forced])
    return torch.stack([codes[: len(free)], codes[len(free) :]], dim=1)


def probe(side: Mapping[str, Tensor], image: Tensor) -> list[Inputs]:
    """Return inputs that pass through all of a network: with what is in `side`, and without the true answer."""
    asked = {name: tensor for name, tensor in side.items() if name != "answer"}
    found = [Inputs(image, side)]
    return found if len(asked) == len(side) else [*found, Inputs(image, asked)]
