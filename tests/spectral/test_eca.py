import math

import torch

from omnifm import seeds
from omnifm.spectral.eca import EnhancedCrossAttention
from tests.spectral.examples import ball


def build() -> EnhancedCrossAttention:
    with seeds.scope(0, "eca"):
        return EnhancedCrossAttention(token_dim=6, spectral_dim=8, head_dim=5)


def test_equals_the_equation_written_as_loops() -> None:
    eca = build()
    tokens, rows = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0)), ball(8, 8).view(2, 4, 8)
    got = eca(tokens, rows)
    w_q, w_k, w_v = (m.weight.detach().T for m in (eca.query, eca.key, eca.value))
    for b in range(2):
        for i in range(3):
            scores = [math.exp(float((tokens[b, i] @ w_q) @ (rows[b, j] @ w_k)) / math.sqrt(5)) for j in range(4)]
            expected = sum(score / sum(scores) * (rows[b, j] @ w_v) for j, score in enumerate(scores))
            torch.testing.assert_close(got[b, i], expected)


def test_one_row_gives_its_value_to_every_token() -> None:
    eca, row = build(), ball(1, 8)
    z = eca(torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0)), row[None])
    torch.testing.assert_close(z, eca.value(row).expand(2, 3, 6))


def test_shared_rows_equal_repeated_rows_and_order_does_not_matter() -> None:
    eca, rows = build(), ball(4, 8)
    tokens = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(eca(tokens, rows[None]), eca(tokens, rows.expand(2, -1, -1)))
    torch.testing.assert_close(eca(tokens, rows[None]), eca(tokens, rows.flip(0)[None]))


def test_gradient_reaches_tokens_and_all_maps() -> None:
    eca = build()
    tokens = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    eca(tokens, ball(4, 8)[None]).square().sum().backward()
    for tensor in [tokens, *eca.parameters()]:
        assert tensor.grad is not None and bool(tensor.grad.abs().sum() > 0)
