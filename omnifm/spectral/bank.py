"""The server's knowledge bank K^(r): a bounded set of prototypes, refreshed with what clients upload.

    K^(r+1) = policy( K^(r) + uploads of round r ),   |K| <= capacity,   n_i <- gamma n_i where the policy ages

K^(r): the bank in round r; n_i: retrievals of row i; gamma: ageing factor. Rules: `policies.py`; retrieval: `gskr.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from omnifm.errors import CheckpointError, ConfigError, FederationError
from omnifm.spectral.policies import AGEING_POLICIES, POLICIES, Limits, PolicyName, merge
from omnifm.spectral.rows import BankRows

__all__ = ["BankRows", "KnowledgeBank"]

# What float32 rounding (and a half-precision wire) may add to a norm of rho.
_BALL_TOLERANCE = 1e-3


class KnowledgeBank:
    """Rows of all clients, pruned at the end of every round.

    Args:
        modalities: number of modalities; a row's modality is in [0, modalities).
        capacity: rows the bank may hold after a round.
        policy: which rows stay, see `policies.py`.
        dim: length d_s of a row.
        rho: radius of the ball every row must lie in.
        young_rounds: under `quota`, rows of fewer rounds are safe while they fit.
        delta: under `lfu` and `lfu_aging`, the fraction of the mean retrieval count below which a row is dropped.
        ageing: factor on the counts per round under `lfu_aging` and `quota`, in (0, 1].
        per_client: rows a client may hold per modality under `ema`.
        ema: weight of a new row when it is merged under `ema`, in (0, 1].

    Raises:
        ConfigError: a value is out of range, or `quota` has less than one row for every modality's floor.
    """

    def __init__(
        self,
        *,
        modalities: int,
        capacity: int = 256,
        policy: PolicyName = "quota",
        dim: int = 128,
        rho: float = 1.0,
        young_rounds: int = 3,
        delta: float = 0.1,
        ageing: float = 0.5,
        per_client: int = 16,
        ema: float = 0.5,
    ) -> None:
        if policy not in get_args(PolicyName):
            raise ConfigError(f"bank: unknown policy {policy!r}, one of {', '.join(get_args(PolicyName))}")
        if min(modalities, capacity, dim, per_client) < 1 or young_rounds < 0 or rho <= 0:
            raise ConfigError("bank: modalities, capacity, dim and per_client must be at least 1, young_rounds >= 0, rho > 0")
        if not (0 <= delta <= 1 and 0 < ageing <= 1 and 0 < ema <= 1):
            raise ConfigError(f"bank: delta in [0, 1], ageing and ema in (0, 1]; got {delta}, {ageing}, {ema}")
        if policy == "quota" and capacity < 2 * modalities:
            raise ConfigError(f"bank: quota needs capacity >= 2 * modalities = {2 * modalities}, got {capacity}")
        self._limits = Limits(capacity, modalities, young_rounds, delta)
        self._policy: PolicyName = policy
        self._rho, self._ageing, self._per_client, self._ema = rho, ageing, per_client, ema
        self._rows = BankRows.empty(dim)
        self._next_row_id = 0

    @property
    def rows(self) -> BankRows:
        """All rows, in the order of their ids."""
        return self._rows

    def add(self, vectors: Tensor, client: int, modality: int, round_index: int, weight: Tensor) -> None:
        """Add one client's prototypes of one modality.

        Call in client order: ids follow the order of the calls, and ties follow ids.

        Args:
            vectors: (n, d_s), finite, inside the ball.
            client: who uploads.
            modality: in [0, modalities).
            round_index: the round of the upload.
            weight: (n,) samples each row stands for, positive.

        Raises:
            FederationError: naming the client, if an upload is malformed; the bank is then unchanged.
        """
        try:
            self.check(vectors, modality, weight)
        except FederationError as error:
            raise FederationError(f"client {client}: {error}") from None
        n = len(vectors)
        new = BankRows(
            vectors=vectors.detach().float().cpu(),
            client=torch.full((n,), client),
            modality=torch.full((n,), modality),
            round=torch.full((n,), round_index),
            weight=weight.detach().float().cpu(),
            count=torch.zeros(n),
            row_id=torch.arange(self._next_row_id, self._next_row_id + n),
        )
        if self._policy == "ema":
            self._rows = merge(self._rows, new, self._per_client, self._ema)
        else:
            self._rows = self._rows.append(new)
        self._next_row_id += n

    def count(self, row_ids: Tensor, counts: Tensor) -> None:
        """Add retrievals that clients report.

        An id whose row was pruned since the client received its snapshot is legitimate and has no effect.

        Args:
            row_ids: (n,) int64.
            counts: (n,) non-negative numbers.

        Raises:
            FederationError: shapes differ, an id was never given out, or a count is negative or not finite.
        """
        self.check_counts(row_ids, counts)
        # One slot per id ever given out would grow with the run; matching against the rows held is bounded.
        hit = (self._rows.row_id[:, None] == row_ids[None, :]).float()
        self._rows = replace(self._rows, count=self._rows.count + hit @ counts.float())

    def check_counts(self, row_ids: Tensor, counts: Tensor) -> None:
        """Raise FederationError where `count` would; changes nothing."""
        if row_ids.ndim != 1 or row_ids.shape != counts.shape:
            raise FederationError(f"retrieval counts: {tuple(row_ids.shape)} row ids for {tuple(counts.shape)} counts")
        if row_ids.is_floating_point():
            raise FederationError("retrieval counts: a row's id is a whole number")
        known = (row_ids >= 0) & (row_ids < self._next_row_id)
        if not bool(known.all()):
            raise FederationError(f"retrieval counts: row {int(row_ids[~known][0])} was never in the bank")
        values = counts.float()
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise FederationError("retrieval counts: a count is negative or not finite")

    def check(self, vectors: Tensor, modality: int, weight: Tensor) -> None:
        """Raise FederationError where `add` would, without a name; changes nothing."""
        dim = self._rows.vectors.shape[1]
        if vectors.ndim != 2 or vectors.shape[1] != dim or weight.shape != vectors.shape[:1]:
            shapes = f"{tuple(vectors.shape)} with weights {tuple(weight.shape)}"
            raise FederationError(f"prototypes must be (n, {dim}) with weights (n,), got {shapes}")
        if not 0 <= modality < self._limits.modalities:
            raise FederationError(f"modality {modality} is not in [0, {self._limits.modalities})")
        if not bool(torch.isfinite(vectors).all()):
            raise FederationError("a prototype is not finite")
        if not bool((torch.isfinite(weight) & (weight > 0)).all()):
            raise FederationError("a prototype's weight is not a positive number")
        longest = float(torch.linalg.vector_norm(vectors.float(), dim=1).max()) if len(vectors) else 0.0
        if longest > self._rho * (1 + _BALL_TOLERANCE):
            raise FederationError(f"a prototype of norm {longest:.4g} is outside the ball of {self._rho:g}")

    def end_round(self, round_index: int) -> int:
        """Prune to capacity, then age the counts; return how many rows went."""
        before = len(self._rows)
        self._rows = self._rows.select(POLICIES[self._policy](self._rows, self._limits, round_index))
        if self._policy in AGEING_POLICIES:
            self._rows = replace(self._rows, count=self._rows.count * self._ageing)
        return before - len(self._rows)

    def state(self) -> dict[str, Tensor]:
        """Return everything a resumed run needs, as named tensors."""
        return {**self._rows.to_tensors("rows"), "next_row_id": torch.tensor(self._next_row_id)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave.

        Raises:
            CheckpointError: a tensor is missing or malformed, or the rows have another length than this bank's.
        """
        try:
            rows = BankRows.from_tensors(state, "rows")
            next_row_id = int(state["next_row_id"])
        except (FederationError, KeyError) as error:
            raise CheckpointError(f"bank state: {error}") from error
        if rows.vectors.shape[1] != self._rows.vectors.shape[1]:
            raise CheckpointError(f"bank state: rows of length {rows.vectors.shape[1]}, expected {self._rows.vectors.shape[1]}")
        self._rows, self._next_row_id = rows, next_row_id
