"""The spectral path round any backbone: wires tokenizer, retrieval, cross-attention, prompting and alignment.

    s = tokenizer(x);  S_g = retrieve(s);  Z = ECA(r, S_g);  r' = PSP(Z, r, c);  penalty = lambda * L_align(s, S_g)

x: image; r: the backbone's tokens; the other symbols are in the modules. What each switch removes:

    gskr off      no selection: S_g is every foreign row, for SPAlign their centroid
    eca off       no prefix: r' = Block([r || c])
    psp off       no concatenation, block or suffix: tokens' = r + Z
    spalign off   no penalty; nothing trains the tokenizer then, so it is frozen, and skipped where no retrieval reads s
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize

from omnifm import seeds
from omnifm.spectral.eca import EnhancedCrossAttention
from omnifm.spectral.gskr import retrieve
from omnifm.spectral.psp import PrefixSuffix
from omnifm.spectral.rows import BankRows
from omnifm.spectral.spalign import spectral_alignment, variance_floor
from omnifm.spectral.tokenizer import Mixing, SpectralTokenizer


class SpectralOptions(BaseModel):
    """The switches and sizes of the spectral path; impossible combinations do not validate.

    Attributes:
        gskr: retrieve the most similar rows.
        eca: read rows by cross-attention.
        psp: prefix, suffix and the block over r'.
        spalign: the alignment penalty.
        top_k: rows retrieved per image; half of the 16 prototypes that one client uploads.
        band: frequencies kept on each side, in cycles per image; 16 for 64-px images, 32 from 224 px.
        patch: side of a spectral patch, in frequencies; divides `band`.
        width: channels of a spectral token.
        dim: length d_s of the spectral embedding.
        mixing: how FreqMix mixes along frequency.
        rho: radius of the ball that holds s.
        normalise: layer norm before the ball.
        lam: weight lambda of the penalty.
        variance_floor: standard deviation per dimension asked of s; 0 switches it off, above rho / sqrt(dim) it cannot be met.
        head_dim: d_h of the cross-attention.
        heads: attention heads of the block over r'.
        mlp_ratio: hidden width of the block's MLP over the token dimension.
        identity: the block over r' starts as the identity: what it adds starts at zero, as in a residual network's last layer.
        prefix: `attention`, or `zero` to keep the prefix's slots and put nothing in them.
        bank_source: `bank`, or `random` to replace every row by a random vector that never changes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gskr: bool = True
    eca: bool = True
    psp: bool = True
    spalign: bool = True
    top_k: int = Field(8, ge=1)
    band: int = Field(16, ge=1)
    patch: int = Field(4, ge=1)
    width: int = Field(64, ge=1)
    dim: int = Field(128, ge=2)
    mixing: Mixing = "mlp"
    rho: float = Field(1.0, gt=0)
    normalise: bool = True
    lam: float = Field(0.1, gt=0)
    variance_floor: float = Field(0.0, ge=0)
    head_dim: int = Field(64, ge=1)
    heads: int = Field(4, ge=1)
    mlp_ratio: float = Field(2.0, gt=0)
    identity: bool = False
    prefix: Literal["attention", "zero"] = "attention"
    bank_source: Literal["bank", "random"] = "bank"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.band % self.patch:
            raise ValueError(f"band = {self.band} is not a multiple of patch = {self.patch}")
        if self.prefix == "zero" and not (self.eca and self.psp):
            raise ValueError('prefix = "zero" keeps the prefix slots, which exist only with eca = true and psp = true')
        if self.gskr and not self.reads_bank:
            raise ValueError("gskr = true selects rows that nothing reads: switch on eca (with attention) or spalign")
        if self.bank_source == "random" and not self.reads_bank:
            raise ValueError('bank_source = "random" has no effect: neither eca (with attention) nor spalign reads the bank')
        if self.variance_floor > 0 and not self.spalign:
            raise ValueError("variance_floor is part of the alignment penalty: switch on spalign")
        return self

    @property
    def any(self) -> bool:
        """Whether there is a path to build at all; if not, the run is the strategy without it, bit for bit."""
        return self.gskr or self.eca or self.psp or self.spalign

    @property
    def attends(self) -> bool:
        """Whether cross-attention is computed."""
        return self.eca and self.prefix == "attention"

    @property
    def reads_bank(self) -> bool:
        """Whether anything reads the bank's rows."""
        return self.attends or self.spalign

    @property
    def reads_embedding(self) -> bool:
        """Whether a training step reads s; if not, the FFT is skipped."""
        return self.spalign or self.gskr


@dataclass(frozen=True)
class SpectralTrace:
    """What a forward pass leaves for the penalty and the log.

    Attributes:
        s: (b, d_s) float32 embeddings, or None where nothing reads them.
        index: (b, k) int64 positions in `SpectralPath.bank` that were retrieved, or None without retrieval.
        s_g: (b, k, d_s) float32 prototypes without gradient, or None without foreign rows.
    """

    s: Tensor | None
    index: Tensor | None
    s_g: Tensor | None


class SpectralPath(nn.Module):
    """From an image and the backbone's tokens to the tokens the head reads.

    Parameters are drawn from torch's global generator: build inside `omnifm.seeds.scope`.

    Args:
        options: at least one switch is on.
        token_dim: d of the backbone's tokens.

    Raises:
        ValueError: every switch is off (the caller then builds no path), or `heads` does not divide `token_dim`.
    """

    def __init__(self, options: SpectralOptions, token_dim: int) -> None:
        super().__init__()
        if not options.any:
            raise ValueError("every switch of the spectral path is off: there is nothing to build")
        o = self.options = options
        self.tokenizer = SpectralTokenizer(o.band, o.dim, o.patch, o.width, o.mixing, o.rho, o.normalise)
        self.tokenizer.requires_grad_(o.spalign)
        self.eca: EnhancedCrossAttention | None = None
        self.psp: PrefixSuffix | None = None
        if o.attends:
            self.eca = EnhancedCrossAttention(token_dim, o.dim, o.head_dim)
        if o.psp:
            self.psp = PrefixSuffix(token_dim, o.heads, o.mlp_ratio, prefix=o.eca, identity=o.identity)
        self._bank: BankRows | None = None

    @property
    def bank(self) -> BankRows | None:
        """The foreign rows in use; neither parameter nor buffer, so they are never averaged and never in a state dict."""
        return self._bank

    def set_bank(self, rows: BankRows | None) -> None:
        """Install the rows that the client may read: all but its own (`rows.foreign(client)`).

        Raises:
            ValueError: the rows have another length than `options.dim`.
        """
        if rows is None or len(rows) == 0:
            self._bank = None
            return
        if rows.vectors.shape[1] != self.options.dim:
            raise ValueError(f"bank rows have length {rows.vectors.shape[1]}, the spectral path has dim = {self.options.dim}")
        self._bank = _randomised(rows, self.options.rho) if self.options.bank_source == "random" else rows

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, SpectralTrace]:
        """Return tokens' and the trace.

        Args:
            image: (b, c, h, w).
            tokens: r, (b, l, d).

        Returns:
            tokens': (b, L, d), L = 2l + 1 with eca and psp, l + 1 without eca, l without psp; and the trace.

        Raises:
            DataError: the image is too small for the band.
        """
        s = self.tokenizer(image) if self.options.reads_embedding else None
        index, s_g = self._select(s, tokens)
        prefix = self._prefix(tokens, s_g)
        trace = SpectralTrace(s, index, s_g)
        if self.psp is not None:
            return self.psp(tokens, prefix), trace
        return (tokens if prefix is None else tokens + prefix), trace

    def embed(self, image: Tensor) -> Tensor:
        """Return s without gradient, (b, d_s) float32: what the prototypes are made of."""
        with torch.no_grad():
            s: Tensor = self.tokenizer(image)
            return s

    def penalty(self, trace: SpectralTrace) -> Tensor:
        """Return lambda * (L_align + L_floor), a float32 scalar; 0 without spalign or without foreign rows."""
        if not self.options.spalign or trace.s is None or trace.s_g is None:
            return torch.zeros(())
        loss = spectral_alignment(trace.s, trace.s_g)
        if self.options.variance_floor > 0:
            loss = loss + variance_floor(trace.s, self.options.variance_floor)
        return self.options.lam * loss

    def content(self, tokens: Tensor, length: int) -> Tensor:
        """Return the positions of r in tokens': (b, L, d) to (b, length, d), for heads that need the map back."""
        start = length if self.options.eca and self.options.psp else 0
        return tokens[:, start : start + length]

    def _select(self, s: Tensor | None, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self._bank is None or not self.options.reads_bank:
            return None, None
        rows = self._bank = self._bank.to(tokens.device)
        if self.options.gskr and s is not None:
            found = retrieve(s, rows, self.options.top_k)
            return found.index, found.vectors
        return None, rows.vectors.expand(len(tokens), -1, -1)

    def _prefix(self, tokens: Tensor, s_g: Tensor | None) -> Tensor | None:
        if not self.options.eca:
            return None
        if self.eca is None or s_g is None:
            return torch.zeros_like(tokens)  # the slots stay, so the head sees one shape in every round
        # All images read the same rows: project them once.
        prefix: Tensor = self.eca(tokens, s_g if self.options.gskr else s_g[:1])
        return prefix


def _randomised(rows: BankRows, rho: float) -> BankRows:
    """Replace row i's vector by the i-th of one endless random list, the same at every client and in every round."""
    # numpy draws one by one, so a longer list starts with the shorter one; its root is no run's seed on purpose.
    draws = seeds.numpy_generator(0, "random bank").standard_normal(tuple(rows.vectors.shape))
    vectors = rho * normalize(torch.from_numpy(draws), dim=1)
    return replace(rows, vectors=vectors.float().to(rows.vectors.device))
