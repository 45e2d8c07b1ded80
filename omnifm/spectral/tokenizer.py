"""The spectral tokenizer: from a low-pass spectrum to one embedding in a ball.

    s = Pi_B(rho)( LN( W_o mean_t( FreqMix( W_p patches(P) ) ) ) ),   Pi_B(rho)(v) = v * min(1, rho / ||v||_2)

P: low-pass log amplitude, `fft.py`; patches: its squares of patch x patch frequencies, the tokens t; W_p, W_o: linear maps;
FreqMix: mixes along frequency (between tokens), then along channels, both residual; rho: radius of the ball.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from omnifm.spectral.fft import circular_filter, low_pass_amplitude

Mixing = Literal["mlp", "global_filter", "identity"]


def project_to_ball(vectors: Tensor, rho: float) -> Tensor:
    """Return v * min(1, rho / ||v||) for each row of (..., d); the gradient is finite at 0."""
    # Divided by exactly 1 inside the ball; the clamp comes last, so that no 0 / 0 enters the gradient.
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / (norm / rho).clamp_min(1.0)


class TokenMlp(nn.Module):
    """Mix along frequency: an MLP over the token axis, between two transposes.

    Source: I. Tolstikhin et al., "MLP-Mixer", NeurIPS 2021.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.mlp = _mlp(num_tokens, 2 * num_tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (b, t, width) to (b, t, width)."""
        mixed: Tensor = self.mlp(tokens.transpose(1, 2))
        return mixed.transpose(1, 2)


class GlobalFilter(nn.Module):
    """Mix along frequency: a learnable complex filter on the token grid (see `fft.circular_filter`)."""

    def __init__(self, rows: int, columns: int, width: int) -> None:
        super().__init__()
        self.grid = (rows, columns)
        self.weight = nn.Parameter(torch.randn(rows, columns // 2 + 1, width, 2) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (b, t, width) to (b, t, width), t = rows * columns."""
        return circular_filter(torch.unflatten(tokens, 1, self.grid), self.weight).flatten(1, 2)


class FreqMix(nn.Module):
    """One frequency-mixing and one channel-mixing step, pre-norm and residual."""

    def __init__(self, along_frequency: nn.Module, width: int) -> None:
        super().__init__()
        self.norm_frequency, self.along_frequency = nn.LayerNorm(width), along_frequency
        self.norm_channel, self.along_channel = nn.LayerNorm(width), _mlp(width, 2 * width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (b, t, width) to (b, t, width)."""
        tokens = tokens + self.along_frequency(self.norm_frequency(tokens))
        mixed: Tensor = tokens + self.along_channel(self.norm_channel(tokens))
        return mixed


class SpectralTokenizer(nn.Module):
    """Embed an image's low-pass spectrum.

    Args:
        band: frequencies kept on each side; a multiple of `patch`.
        dim: length d_s of the embedding.
        patch: side of a patch, in frequencies.
        width: channels of a token.
        mixing: `mlp`, `global_filter` or `identity` (no mixing: mean of linear patch embeddings).
        rho: radius of the ball.
        normalise: layer norm before the ball. With it ||s|| = rho in practice; without it s can lie inside.

    Raises:
        ValueError: `band` is not a multiple of `patch`.
    """

    def __init__(
        self,
        band: int,
        dim: int = 128,
        patch: int = 4,
        width: int = 64,
        mixing: Mixing = "mlp",
        rho: float = 1.0,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        if band % patch:
            raise ValueError(f"spectral band {band} is not a multiple of the patch {patch}")
        rows, columns = 2 * band // patch, band // patch
        self.band, self.patch, self.rho = band, patch, rho
        self.embed = nn.Linear(patch * patch, width)
        self.mix = _mixer(mixing, rows, columns, width)
        self.project = nn.Linear(width, dim)
        self.norm = nn.LayerNorm(dim) if normalise else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        """Return the spectral embeddings.

        Args:
            image: (b, c, h, w); c may differ between calls.

        Returns:
            s: (b, d_s) float32 even under autocast, ||s||_2 <= rho.

        Raises:
            DataError: the image is too small for the band.
        """
        with torch.autocast(device_type=image.device.type, enabled=False):
            spectrum = low_pass_amplitude(image, self.band)
            # (b, 2 * band, band) to (b, patch * patch, tokens): unfold takes the squares, row by row.
            tokens = unfold(spectrum[:, None], self.patch, stride=self.patch).transpose(1, 2)
            pooled = self.mix(self.embed(tokens)).mean(dim=1)
            return project_to_ball(self.norm(self.project(pooled)), self.rho)


def _mixer(mixing: Mixing, rows: int, columns: int, width: int) -> nn.Module:
    match mixing:
        case "mlp":
            return FreqMix(TokenMlp(rows * columns), width)
        case "global_filter":
            return FreqMix(GlobalFilter(rows, columns, width), width)
        case "identity":
            return nn.Identity()


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
