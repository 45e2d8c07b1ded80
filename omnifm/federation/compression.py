"""What a client uploads, made smaller: its change of the shared tensors, rounded or with most of it left for later rounds.

    target  t = w_i + e_i      w: what the client received;  w_i: its tensor after training;  e_i: its residual, 0 at first
    bf16    d = bf16(t - w)                                                   server: w + d
    int8    s = max |t - w| / 127,   d = round((t - w) / s)                   server: w + s d,   off by at most s / 2
    topk    the k = ceil(share n) numbers with the largest |t - w|            server: t there, w elsewhere
    e_i <- t - what the server makes of it                                    with error feedback; else there is no e_i

Error feedback: Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; Stich, Cordonnier, Jaggi, "Sparsified SGD
with memory", NeurIPS 2018; Karimireddy et al., "Error feedback fixes SignSGD and other gradient compression schemes", ICML 2019.
In a federation where not all take part, a residual waits for its client's next round: Li and Li, ICML 2023. Over any number of
rounds, what was sent and what is held back add up to what was trained.

Rounding is to the nearest, ties to even, so nothing is drawn. One scale per tensor: the message is a quarter whatever a kernel's
shape, and what a coarse scale rounds away comes back as residual. k is per tensor, ties go to the lower index. Top-k sends new
values in place of differences, which costs the same: with share 1 the server has the client's very numbers.

On the wire a tensor NAME becomes `NAME` (bfloat16); `NAME` (int8) and `NAME:scale` (float32, one number); or `NAME:index` (int32,
increasing) and `NAME:value` (float32). Left as they are: buffers (a variance must not become negative), whole numbers, other
types than float32, tensors of fewer than 64 numbers.
"""

import math
from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor

from omnifm.config import CompressionConfig, Config
from omnifm.errors import ConfigError, FederationError
from omnifm.federation.strategy import Strategy

LEAST = 64
"""Numbers of the smallest tensor that is compressed."""
_LEVELS = 127
Parts = Mapping[str, Tensor]
"""What a tensor is on the wire, by the end of its name."""


class Codec(Protocol):
    """One way to write a tensor, given the one that both sides have."""

    def encode(self, target: Tensor, start: Tensor) -> Parts:
        """Write `target` (float64); numbers that are none stay none."""

    def decode(self, parts: Parts, start: Tensor) -> Tensor:
        """Read what `encode` wrote, float64. Raises FederationError if the values are none that it writes."""

    def outline(self, start: Tensor) -> Parts:
        """Return shapes and types of what `encode` writes, without numbers."""


class BFloat16:
    """Differences in bfloat16: 8 bits of exponent, 8 of precision."""

    def encode(self, target: Tensor, start: Tensor) -> Parts:
        """Round to bfloat16."""
        return {"": (target - start.double()).bfloat16()}

    def decode(self, parts: Parts, start: Tensor) -> Tensor:
        """Add the differences."""
        return start.double() + parts[""].double()

    def outline(self, start: Tensor) -> Parts:
        """Return the tensor's own shape."""
        return {"": torch.empty(start.shape, dtype=torch.bfloat16, device="meta")}


class Int8:
    """Differences as multiples of one scale, from -127 to 127."""

    def encode(self, target: Tensor, start: Tensor) -> Parts:
        """Round to multiples."""
        change = target - start.double()
        longest = change.abs().max()
        scale = (longest / _LEVELS).float()
        # Rounded up, so that the largest number still is one of the 127.
        scale = torch.where(scale.double() * _LEVELS < longest, scale.nextafter(scale.new_tensor(math.inf)), scale)
        # A number that is none makes the scale none, and so all that is read with it; as int8 it would be anything.
        sound = bool(scale.isfinite()) and bool(scale > 0)
        codes = (change / scale.double()).round() if sound else torch.zeros_like(change)
        return {"": codes.to(torch.int8), ":scale": scale}

    def decode(self, parts: Parts, start: Tensor) -> Tensor:
        """Add the multiples."""
        codes, scale = parts[""], parts[":scale"]
        if bool(scale < 0):
            raise FederationError("has a negative scale")
        if bool((codes < -_LEVELS).any()):
            raise FederationError(f"has a number below -{_LEVELS}")
        return start.double() + scale.double() * codes.double()

    def outline(self, start: Tensor) -> Parts:
        """Return the tensor's own shape, and one number."""
        codes = torch.empty(start.shape, dtype=torch.int8, device="meta")
        return {"": codes, ":scale": torch.empty((), dtype=torch.float32, device="meta")}


class TopK:
    """The numbers that changed most, as they are now. Args: `share`: of a tensor, more than 0, at most 1."""

    def __init__(self, share: float) -> None:
        self._share = share

    def encode(self, target: Tensor, start: Tensor) -> Parts:
        """Choose and copy."""
        index = largest((target - start.double()).abs().flatten(), self._count(start))
        return {":index": index.to(torch.int32), ":value": target.flatten()[index].float()}

    def decode(self, parts: Parts, start: Tensor) -> Tensor:
        """Put the numbers in their places."""
        index = parts[":index"].long()
        if bool(index[0] < 0) or bool(index[-1] >= start.numel()) or bool((index.diff() <= 0).any()):
            raise FederationError(f"has indices that do not increase within 0 to {start.numel() - 1}")
        return start.double().flatten().index_copy_(0, index, parts[":value"].double()).view(start.shape)

    def outline(self, start: Tensor) -> Parts:
        """Return k indices and values."""
        count = self._count(start)
        types = {":index": torch.int32, ":value": torch.float32}
        return {end: torch.empty(count, dtype=dtype, device="meta") for end, dtype in types.items()}

    def _count(self, start: Tensor) -> int:
        # .07 of 100 are 7, whatever floating point makes of the product.
        return max(1, math.ceil(round(self._share * start.numel(), 6)))


def largest(magnitudes: Tensor, count: int) -> Tensor:
    """Return the places, increasing, of the `count` largest magnitudes; of equal ones the first. What is no number is largest.

    Args:
        magnitudes: (n,), not negative.
        count: 1 to n.
    """
    known = magnitudes.nan_to_num(nan=math.inf, posinf=math.inf)
    least = known.topk(count).values[-1]
    chosen = known > least
    chosen[(known == least).nonzero().flatten()[: count - int(chosen.sum())]] = True
    return chosen.nonzero().flatten()


class Compression:
    """Both halves: the client's `compress`, the server's `restore`. It has no state; the residual is handed in and out.

    Args:
        config: the method.
        buffers: names of the tensors that are no parameters.
    """

    def __init__(self, config: CompressionConfig, buffers: Collection[str] = ()) -> None:
        codecs: dict[str, Codec] = {"bf16": BFloat16(), "int8": Int8(), "topk": TopK(config.topk_share)}
        self._codec = codecs.get(config.upload)
        self._feedback, self._buffers = config.error_feedback, frozenset(buffers)

    @property
    def on(self) -> bool:
        """Whether anything is compressed."""
        return self._codec is not None

    def codec(self, name: str, start: Tensor) -> Codec | None:
        """Return how a shared tensor is written; None: as it is. Both sides know it without a word on the wire."""
        fits = name not in self._buffers and start.dtype is torch.float32 and start.numel() >= LEAST
        return self._codec if fits else None

    def compress(self, tensors: Parts, start: Parts, residual: Parts) -> tuple[Parts, Parts]:
        """Return what a client sends, and its new residual.

        Args:
            tensors: shared tensors after training, by name.
            start: those received.
            residual: what earlier rounds held back; of some of the names, or none.

        Returns:
            Tensors by name on the wire; float32 differences by name, none without error feedback. If a tensor is not finite it is
            sent as such, for the server to refuse, and the residual stays what it was.
        """
        sent: dict[str, Tensor] = {}
        held: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if (codec := self.codec(name, start[name])) is None:
                sent[name] = tensor
                continue
            target = tensor.double()
            if self._feedback and name in residual:
                target = target + residual[name]
            parts = codec.encode(target, start[name])
            sent |= {name + end: part for end, part in parts.items()}
            if self._feedback:
                held[name] = (target - codec.decode(parts, start[name]).float()).float()
        sound = all(bool(tensor.isfinite().all()) for tensor in held.values())
        return sent, held if sound else residual

    def outline(self, start: Parts) -> dict[str, Tensor]:
        """Return what a reply must look like: names, shapes and types, without numbers where something is compressed."""
        found: dict[str, Tensor] = {}
        for name, tensor in start.items():
            codec = self.codec(name, tensor)
            found |= {name + end: part for end, part in (codec.outline(tensor) if codec else {"": tensor}).items()}
        return found

    def restore(self, sent: Parts, start: Parts) -> dict[str, Tensor]:
        """Return the shared tensors that a client meant, in full.

        Args:
            sent: fits `outline(start)`.
            start: the shared tensors that the client received.

        Raises:
            FederationError: naming the tensor, if its values are none that `compress` makes.
        """
        found: dict[str, Tensor] = {}
        for name, tensor in start.items():
            if (codec := self.codec(name, tensor)) is None:
                found[name] = sent[name]
                continue
            try:
                found[name] = codec.decode({end: sent[name + end] for end in codec.outline(tensor)}, tensor).float()
            except FederationError as error:
                raise FederationError(f"tensor {name} {error}") from None
        return found


def check_compression(config: Config, strategy: Strategy, shared: Mapping[str, Tensor]) -> None:
    """Raise ConfigError, in one line, unless the run can have the compression it asks for.

    Args:
        config: the run.
        strategy: as the site left it: it knows the buffers.
        shared: the shared tensors.
    """
    chosen, key = config.compression, "compression.upload"
    compression = Compression(chosen, strategy.buffers)
    if not compression.on:
        return
    if config.privacy.secure_aggregation:
        raise ConfigError(f"{key}: privacy.secure_aggregation adds up masked numbers, which only fit uncompressed; unset one")
    if config.privacy.clip and (chosen.upload != "topk" or chosen.error_feedback):
        raise ConfigError(
            f"{key}: an update would be longer than privacy.clip again; only 'topk' with error_feedback = false keeps to it"
        )
    if strategy.pooled or not any(compression.codec(name, tensor) for name, tensor in shared.items()):
        raise ConfigError(f"{key}: with strategy {config.strategy} no client uploads a tensor that could be compressed")
    if chosen.upload == "topk" and strategy.compares_numbers:
        raise ConfigError(
            f"{key}: strategy {config.strategy} judges clients number by number, and 'topk' leaves most numbers unchanged"
        )
    if chosen.upload == "topk" and not chosen.error_feedback and strategy.remembers_change:
        raise ConfigError(
            f"{key}: a client of strategy {config.strategy} remembers its whole change, and the server would add up what 'topk' "
            "leaves of it; set compression.error_feedback = true"
        )
    if chosen.error_feedback and (act := strategy.outdates()):
        raise ConfigError(f"{key}: strategy {config.strategy} {act}; set compression.error_feedback = false")
