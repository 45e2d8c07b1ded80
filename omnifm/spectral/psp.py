"""Personalised spectral prompting: prefix, content and the client's own suffix, read by one transformer block.

    r' = Block( [ Z + e_prefix || r + e_content || c + e_suffix ] )          2l + 1 tokens; without ECA: [ r || c ]
    Block(x): x <- x + MHA(LN x);  x <- x + MLP(LN x)

Z: prefix, (b, l, d); r: spatial tokens, (b, l, d); c: suffix, (1, 1, d), which never leaves the client; e: part embeddings.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

_INIT_STD = 0.02


class Suffix(nn.Module):
    """The client's own learnable token c; a module of its own, so that it can be declared private as an object."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, dim) * _INIT_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return c for every image of r (b, l, d): (b, 1, d)."""
        return self.token.expand(len(tokens), -1, -1)


class PartEmbedding(nn.Module):
    """One learned vector per part of r', in the order of the parts."""

    def __init__(self, num_parts: int, dim: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(num_parts, dim) * _INIT_STD)

    def forward(self, joined: Tensor) -> Tensor:
        """Add each part's vector: (b, n, d) to the same. The last part is one token, the others share the rest equally."""
        before = len(self.vectors) - 1
        parts = joined.split([*[(joined.shape[1] - 1) // before] * before, 1], dim=1)
        return torch.cat([part + vector for part, vector in zip(parts, self.vectors, strict=True)], dim=1)


class Block(nn.Module):
    """One pre-norm transformer block without dropout.

    Args:
        dim: d, a multiple of `heads`.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP over d.
        identity: whether what it adds starts at zero, so that the untrained block changes nothing.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, identity: bool = False) -> None:
        super().__init__()
        self.heads = heads
        hidden = int(dim * mlp_ratio)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        # The order of these lines is that of the draws: another one gives every run other initial weights.
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        for parameter in (*self.out.parameters(), *self.mlp[-1].parameters()) if identity else ():
            nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (b, n, d) to (b, n, d)."""
        tokens = tokens + self._attend(self.norm_attention(tokens))
        mixed: Tensor = tokens + self.mlp(self.norm_mlp(tokens))
        return mixed

    def _attend(self, tokens: Tensor) -> Tensor:
        heads = self.query_key_value(tokens).unflatten(-1, (3, self.heads, -1))  # (b, n, 3, heads, d / heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended: Tensor = self.out(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return attended


class PrefixSuffix(nn.Module):
    """Build r' and run the block over it.

    Args:
        dim: d, a multiple of `heads`.
        heads: attention heads of the block.
        mlp_ratio: hidden width of the block's MLP over d.
        prefix: whether r' has a prefix (ECA is on).
        identity: whether the untrained block changes nothing.

    Raises:
        ValueError: `dim` is not a multiple of `heads`.
    """

    def __init__(self, dim: int, heads: int = 4, mlp_ratio: float = 2.0, prefix: bool = True, identity: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim}-dimensional tokens do not divide into {heads} attention heads")
        self.suffix = Suffix(dim)
        self._num_parts = 3 if prefix else 2
        self.parts = PartEmbedding(self._num_parts, dim)
        self.block = Block(dim, heads, mlp_ratio, identity)

    def forward(self, tokens: Tensor, prefix: Tensor | None) -> Tensor:
        """Return r'.

        Args:
            tokens: r, (b, l, d).
            prefix: Z, (b, l, d); None exactly if built without prefix.

        Returns:
            (b, 2l + 1, d), or (b, l + 1, d) without prefix.
        """
        # Gradients by example are found layer by layer, with hooks that a tensor has to go into; no gradient leaves by this one.
        own = self.suffix(tokens.detach())
        parts = [tokens, own] if prefix is None else [prefix, tokens, own]
        if len(parts) != self._num_parts:
            raise ValueError("the prefix is an argument exactly where the module was built with one")
        mixed: Tensor = self.block(self.parts(torch.cat(parts, dim=1)))
        return mixed
