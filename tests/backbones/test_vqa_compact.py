import pytest
import torch
from torch import Tensor

from omnifm import seeds
from omnifm.backbones.vqa_compact import QuestionReader, answer_classifier

WORD, DIM = 6, 8


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeds.generator(0, "compact", *shape))


@pytest.fixture
def reader() -> QuestionReader:
    with seeds.scope(0, "reader"):
        return QuestionReader(WORD, DIM, layers=2, heads=2, dropout=0.5).eval()


@torch.no_grad()
def test_what_follows_a_question_is_not_read(reader: QuestionReader) -> None:
    words, tokens = draw(1, 4, WORD), draw(1, 5, DIM)
    padded = torch.cat([words, 9 * draw(1, 3, WORD)], dim=1)
    mask = torch.tensor([[True] * 4 + [False] * 3])
    found = reader(padded, mask, tokens)
    assert found.shape == (1, 3 * DIM)
    torch.testing.assert_close(found, reader(words, torch.ones(1, 4, dtype=torch.bool), tokens))


@torch.no_grad()
def test_image_tokens_are_a_set_and_matter(reader: QuestionReader) -> None:
    words, tokens, mask = draw(2, 4, WORD), draw(2, 5, DIM), torch.ones(2, 4, dtype=torch.bool)
    found = reader(words, mask, tokens)
    torch.testing.assert_close(reader(words, mask, tokens.flip(1)), found)
    other = reader(words, mask, draw(2, 7, DIM))
    assert not torch.allclose(other[:, :DIM], found[:, :DIM]), "the words look at them"
    torch.testing.assert_close(other[:, DIM : 2 * DIM], found[:, DIM : 2 * DIM], msg="the second part goes round the image")


@torch.no_grad()
def test_one_word_and_one_token_by_hand(reader: QuestionReader) -> None:
    """With one key, attention gives its value: each layer adds W_o (W_v LN r' + b_v) + b_o, then its MLP."""
    words, tokens = draw(1, 1, WORD), draw(1, 1, DIM)
    read = reader.enter(words)
    seen = reader.seen(tokens)
    for layer in reader.layers:
        attention = layer.attention
        value = seen @ attention.in_proj_weight[2 * DIM :].T + attention.in_proj_bias[2 * DIM :]
        read = read + attention.out_proj(value)
        read = read + layer.mlp(layer.norm_mid(read))
    found = reader(words, torch.ones(1, 1, dtype=torch.bool), tokens)
    torch.testing.assert_close(found, torch.cat([read, reader.enter(words), seen], dim=2)[0])


def test_the_classifier_has_one_logit_per_answer() -> None:
    assert answer_classifier(DIM, 11, 0.0)(draw(3, 3 * DIM)).shape == (3, 11)
