"""Words in, words compared: the one normalisation of answers, and the scores of one answer against the truth.

No score looks inside words: `no` is not part of `normal`, and the first letter of an answer proves nothing.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

ARTICLES = frozenset({"a", "an", "the"})
_UNITS = "zero one two three four five six seven eight nine ten"
_TEENS = "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
_TENS = "thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = {word: str(value) for value, word in enumerate(f"{_UNITS} {_TEENS}".split())} | {
    word: str(10 * value) for value, word in enumerate(_TENS.split(), start=3)
}
# With the apostrophe lost, as people type. `its`, `were`, `well` and the like mean something else and stay.
_NEGATED = "is are was were do does did has have had could should would must need"
CONTRACTIONS = {f"{verb}nt": (verb, "not") for verb in _NEGATED.split()} | {
    "cant": ("can", "not"),
    "cannot": ("can", "not"),
    "wont": ("will", "not"),
}
_EXPANSIONS = (
    (re.compile(r"\bcan't\b"), "can not"),
    (re.compile(r"\bwon't\b"), "will not"),
    (re.compile(r"n't\b"), " not"),
    (re.compile(r"\b(it|that|there|here|what|who|he|she)'s\b"), r"\1 is"),
    (re.compile(r"'(re)\b"), " are"),
    (re.compile(r"'(ve)\b"), " have"),
    (re.compile(r"'(ll)\b"), " will"),
    (re.compile(r"\bi'm\b"), "i am"),
)
_APOSTROPHES = re.compile("[\u2019\u2018\u02bc`\u00b4]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_BARE_POINT = re.compile(r"(?<![\w.])\.(?=\d)")
_NO_DECIMAL_POINT = re.compile(r"(?<!\d)\.|\.(?!\d)")
_NO_WORD = re.compile(r"[^\w.]|_")
MAX_ORDER = 4


def tokens(text: str) -> list[str]:
    """Return the words of `text` that count.

    In this order: Unicode NFKC and lower case; contractions with an apostrophe are written out (`isn't`: is not; `there's`: there
    is) and other apostrophes dropped (`patient's`: patients); commas between thousands go; `.5` becomes 0.5; every other sign
    but the decimal point of a number becomes a space (`x-ray`: x ray); contractions without apostrophe are written out (`dont`:
    do not); the words zero to twenty and the tens to ninety become numbers; `a`, `an` and `the` go, unless nothing else is left.
    """
    text = _APOSTROPHES.sub("'", unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower()))
    for pattern, words in _EXPANSIONS:
        text = pattern.sub(words, text)
    text = _THOUSANDS.sub("", text.replace("'", ""))
    text = _BARE_POINT.sub("0.", text)
    text = _NO_WORD.sub(" ", _NO_DECIMAL_POINT.sub(" ", text))
    written = [word for token in text.split() for word in CONTRACTIONS.get(token, (token,))]
    found = [NUMBER_WORDS.get(word, word) for word in written]
    return [word for word in found if word not in ARTICLES] or found


def normalise(text: str) -> str:
    """Return the words of `tokens`, joined by single spaces. Two answers are equal if these are."""
    return " ".join(tokens(text))


def overlap(predicted: Sequence[str], truth: Sequence[str]) -> tuple[float, float, float]:
    """Return F1, recall and precision of the bags of words (Rajpurkar et al., SQuAD, EMNLP 2016).

    m = sum_w min(count_predicted(w), count_truth(w));  recall = m / |truth|;  precision = m / |predicted|
    F1 is their harmonic mean. Where both are empty all three are 1, where one is, 0.
    """
    if not predicted or not truth:
        same = float(len(predicted) == len(truth))
        return same, same, same
    matches = sum((Counter(predicted) & Counter(truth)).values())
    recall, precision = matches / len(truth), matches / len(predicted)
    return (2 * recall * precision / (recall + precision) if matches else 0.0), recall, precision


def bleu(predicted: Sequence[str], truth: Sequence[str]) -> list[float]:
    """Return BLEU-1 to BLEU-4 of one answer (Papineni et al., ACL 2002), smoothed.

    BLEU-N = BP * (prod_{n <= N} p_n)^(1/N),  BP = exp(min(0, 1 - |truth| / |predicted|))
    p_1 = m_1 / c_1,  p_n = (m_n + 1) / (c_n + 1) for n > 1;  m_n clipped matches among the c_n n-grams of the prediction.

    Adding one above order 1 is Lin and Och's smoothing (ACL 2004; method 2 of Chen and Cherry, WMT 2014). Without it every
    answer of fewer than four words has BLEU-4 = 0; with it an exact answer of any length has 1, one without a right word 0.
    """
    if not predicted or not truth:
        return [float(len(predicted) == len(truth))] * MAX_ORDER
    penalty = math.exp(min(0.0, 1 - len(truth) / len(predicted)))
    scores, logarithm = [], 0.0
    for order in range(1, MAX_ORDER + 1):
        grams, right = _grams(predicted, order), _grams(truth, order)
        matches, extra = sum((grams & right).values()), int(order > 1)
        if order == 1 and not matches:
            return [0.0] * MAX_ORDER
        logarithm += math.log((matches + extra) / (sum(grams.values()) + extra))
        scores.append(penalty * math.exp(logarithm / order))
    return scores


def _grams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))
