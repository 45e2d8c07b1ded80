"""The rows of the knowledge bank, as plain tensors.

    K = {(v_i, client_i, modality_i, round_i, w_i, n_i)}, i = 1 .. m,   ||v_i||_2 <= rho

v_i: a prototype of some client's spectral embeddings; w_i: the samples it stands for; n_i: how often it was retrieved.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from omnifm.errors import FederationError

_DTYPES = {
    "vectors": torch.float32,
    "client": torch.int64,
    "modality": torch.int64,
    "round": torch.int64,
    "weight": torch.float32,
    "count": torch.float32,
    "row_id": torch.int64,
}


@dataclass(frozen=True)
class BankRows:
    """m rows of the bank, in the order of their `row_id`.

    Attributes:
        vectors: (m, d) float32, the prototypes.
        client: (m,) int64, who uploaded the row.
        modality: (m,) int64.
        round: (m,) int64, the round of the upload.
        weight: (m,) float32, samples the row stands for.
        count: (m,) float32, retrievals (aged where the policy ages them).
        row_id: (m,) int64, unique, growing with arrival.
    """

    vectors: Tensor
    client: Tensor
    modality: Tensor
    round: Tensor
    weight: Tensor
    count: Tensor
    row_id: Tensor

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2:
            raise FederationError(f"bank rows: vectors must be (m, d), got {tuple(self.vectors.shape)}")
        for name, dtype in _DTYPES.items():
            column: Tensor = getattr(self, name)
            if column.dtype != dtype:
                raise FederationError(f"bank rows: {name} must be {dtype}, got {column.dtype}")
            if name != "vectors" and column.shape != (len(self),):
                raise FederationError(f"bank rows: {name} must have shape ({len(self)},), got {tuple(column.shape)}")

    def __len__(self) -> int:
        return self.vectors.shape[0]

    @classmethod
    def empty(cls, dim: int) -> "BankRows":
        """Return a bank without rows, for vectors of length `dim`."""
        columns = {name: torch.empty(0, dtype=dtype) for name, dtype in _DTYPES.items() if name != "vectors"}
        return cls(vectors=torch.empty(0, dim), **columns)

    def select(self, index: Tensor) -> "BankRows":
        """Return the rows at `index`: (k,) int64 positions, or (m,) bool."""
        return BankRows(**{name: column[index] for name, column in self._columns().items()})

    def append(self, other: "BankRows") -> "BankRows":
        """Return these rows followed by `other`'s."""
        theirs = other._columns()
        return BankRows(**{name: torch.cat((column, theirs[name])) for name, column in self._columns().items()})

    def foreign(self, client: int) -> "BankRows":
        """Return the rows that `client` did not upload: it must not retrieve its own."""
        return self.select(self.client != client)

    def to(self, device: torch.device) -> "BankRows":
        """Return the rows on `device`."""
        return BankRows(**{name: column.to(device) for name, column in self._columns().items()})

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the columns as named tensors `prefix.vectors`, `prefix.client`, ..., as a message or checkpoint carries them."""
        return {f"{prefix}.{name}": column for name, column in self._columns().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> "BankRows":
        """Read back what `to_tensors` gave; other names in `tensors` are left alone.

        Raises:
            FederationError: a column is missing, or has the wrong type or shape.
        """
        missing = [f"{prefix}.{name}" for name in _DTYPES if f"{prefix}.{name}" not in tensors]
        if missing:
            raise FederationError(f"bank rows: {missing[0]} is missing")
        return cls(**{name: tensors[f"{prefix}.{name}"] for name in _DTYPES})

    def _columns(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}
