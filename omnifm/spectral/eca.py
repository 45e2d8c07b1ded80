"""Enhanced cross-attention: spatial tokens read the retrieved spectral prototypes.

    Z = softmax( Q K^T / sqrt(d_h) ) V,   Q = r W_q,  K = S_g W_k,  V = S_g W_v

r: (b, l, d) spatial tokens; S_g: (b, k, d_s) prototypes, no gradient; d_h: head dimension; Z: (b, l, d), the prefix.
"""

import math

from torch import Tensor, nn


class EnhancedCrossAttention(nn.Module):
    """One attention head from tokens to prototypes.

    Args:
        token_dim: d.
        spectral_dim: d_s.
        head_dim: d_h.
    """

    def __init__(self, token_dim: int, spectral_dim: int, head_dim: int = 64) -> None:
        super().__init__()
        self.query = nn.Linear(token_dim, head_dim, bias=False)
        self.key = nn.Linear(spectral_dim, head_dim, bias=False)
        self.value = nn.Linear(spectral_dim, token_dim, bias=False)

    def forward(self, tokens: Tensor, prototypes: Tensor) -> Tensor:
        """Return Z.

        Args:
            tokens: r, (b, l, d).
            prototypes: S_g, (b, k, d_s), or (1, k, d_s) when all images read the same rows.

        Returns:
            Z: (b, l, d).
        """
        query, key, value = self.query(tokens), self.key(prototypes), self.value(prototypes)
        weights = (query @ key.transpose(1, 2) / math.sqrt(key.shape[-1])).softmax(dim=-1)
        prefix: Tensor = weights @ value
        return prefix
