"""A path that changes nothing and lets a strategy see the tokens."""

from torch import Tensor, nn


class Tap(nn.Module):
    """Between backbone and head: r' = r, the same tensor, and r as the trace. It holds no tensors."""

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens twice."""
        del image
        return tokens, tokens

    def content(self, tokens: Tensor, length: int) -> Tensor:
        """All tokens."""
        del length
        return tokens
