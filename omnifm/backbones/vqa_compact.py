"""A small network that answers questions on a CPU: a question's words look at the image, a classifier chooses the answer.

    u_0 = W_q e + b_q                                    e: (b, t, d_e), the question's words as a frozen language model sees them
    v_k = u_(k-1) + CrossAttention(LN u_(k-1), LN r')    r': (b, L, d), the image
    u_k = v_k + MLP(LN v_k),   k = 1..n
    z   = [ mean_t u_n || mean_t u_0 || mean_L r' ]      means over words leave padding out
    p   = classifier(z)                                  (b, answers)

The second part of z is a way round the image, so that what the question alone says need not pass through attention.
"""

import torch
from torch import Tensor, nn


class QuestionReader(nn.Module):
    """From words and image tokens to z, `(b, 3 d)`.

    Args:
        word_dim: d_e.
        token_dim: d, a multiple of `heads`.
        layers: n.
        heads: attention heads.
        dropout: share of values dropped after attention and in the MLPs.
    """

    def __init__(self, word_dim: int, token_dim: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Linear(word_dim, token_dim), nn.LayerNorm(token_dim))
        self.seen = nn.LayerNorm(token_dim)
        self.layers = nn.ModuleList(_Layer(token_dim, heads, dropout) for _ in range(layers))

    def forward(self, words: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """Return z.

        Args:
            words: e, `(b, t, d_e)`.
            mask: `(b, t)` bool, False where a question has ended; at least one True each.
            tokens: r', `(b, L, d)`.
        """
        asked = read = self.enter(words)
        seen = self.seen(tokens)
        for layer in self.layers:
            read = layer(read, seen)
        weight = (mask / mask.sum(dim=1, keepdim=True)).unsqueeze(2).to(read.dtype)
        return torch.cat([(weight * read).sum(dim=1), (weight * asked).sum(dim=1), seen.mean(dim=1)], dim=1)


class _Layer(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_in, self.norm_mid = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim))
        self.drop = nn.Dropout(dropout)

    def forward(self, words: Tensor, seen: Tensor) -> Tensor:
        # Keys are image tokens, none of which is padding; words do not look at each other here, the language model saw to that.
        attended, _ = self.attention(self.norm_in(words), seen, seen, need_weights=False)
        words = words + self.drop(attended)
        changed: Tensor = words + self.drop(self.mlp(self.norm_mid(words)))
        return changed


def answer_classifier(token_dim: int, answers: int, dropout: float) -> nn.Sequential:
    """Return the last layers, from z `(b, 3 d)` to logits over the answer vocabulary."""
    return nn.Sequential(
        nn.LayerNorm(3 * token_dim),
        nn.Linear(3 * token_dim, 2 * token_dim),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(2 * token_dim, answers),
    )
