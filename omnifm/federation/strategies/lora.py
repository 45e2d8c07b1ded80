"""LoRA: the backbone stays as it came; low-rank changes of its layers are trained and averaged, and the head with them.

    W' = W + (alpha / r) B A          W: (out, in), frozen;  A: (r, in), B: (out, r) = 0 at first
    plain   A <- sum_i p_i A_i,   B <- sum_i p_i B_i                                which is not the mean change:
    exact   B A <- the best rank-r approximation of sum_i p_i B_i A_i               B = U_r S_r^(1/2),  A = S_r^(1/2) V_r^T
    share_a   A <- sum_i p_i A_i,   B_i stays at its client
    freeze_a  B <- sum_i p_i B_i,   A = A^0 for ever                                which is the mean change: sum_i p_i B_i A^0

Hu et al., "LoRA: Low-rank adaptation of large language models", ICLR 2022; Zhang et al., "FedPETuning: When federated learning
meets the parameter-efficient tuning methods of pre-trained language models", Findings of ACL 2023: r = 8, alpha = 8, `plain`.
In `exact` the mean of the products is factorised anew, so what is lost is what r dimensions cannot hold, not the cross terms.
`share_a`: Guo et al., "Selective aggregation for low-rank adaptation in federated learning" (FedSA-LoRA), ICLR 2025, Algorithm 1:
A learns what all have in common, B what a client has of its own. `freeze_a`: Sun et al., "Improving LoRA in privacy-preserving
federated learning" (FFA-LoRA), ICLR 2024.

traffic  A, B and the head each way, and running statistics, without B in `share_a` and without A in `freeze_a`; W, and the A of
         `freeze_a`, come from the seed or W from `model.weights`, and never travel
state    none; in `exact` the server keeps the A_i, B_i of a round until it ends; in `share_a` B is private

Adaptations. Every linear layer and convolution of the backbone gets a change, a convolution's kernel read as (out, the rest), and
r is at most what the layer has. Normalisation keeps its weights; BatchNorm's statistics move and are averaged like others. Where
the mean product has less than r dimensions, the rows of A that are left over are those of the mean of A, and B is 0 there: with
both 0 they would never train again.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omnifm.federation.card import Card
from omnifm.federation.low_rank import DOWN, UP, add_changes, changed_layers
from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState
from omnifm.federation.strategy import Strategy, StrategyOptions
from omnifm.tasks.base import Model

_NEGLIGIBLE = 1e-12
Factors = tuple[float, Tensor, Tensor]


class LoRAOptions(StrategyOptions):
    """The size of the changes, and how they are averaged."""

    rank: int = Field(8, ge=1, description="r.")
    alpha: float = Field(8.0, gt=0, description="The product is scaled by alpha / r.")
    average: Literal["plain", "exact", "share_a", "freeze_a"] = Field(
        "plain", description="Mean of both factors, of their products, of A alone with B private, or of B alone with A as drawn."
    )

    @model_validator(mode="after")
    def _one_mean(self) -> Self:
        if self.average == "exact" and self.aggregation != "mean":
            raise ValueError('average = "exact" is of one mean for all: set aggregation = "mean"')
        return self


class LoRA(Strategy):
    """FedAvg of low-rank changes and the head."""

    card: ClassVar[Card] = Card(
        paper="Hu et al., ICLR 2022; Zhang et al., ACL 2023", search={"average": ("plain", "exact", "share_a", "freeze_a")}
    )
    Options: ClassVar[type[StrategyOptions]] = LoRAOptions
    options: LoRAOptions

    def unfit(self, *, by_example: bool) -> str:
        """An adapted weight is computed anew from its factors, and Opacus finds no gradients of single examples through that."""
        return "its low-rank factors" if by_example else ""

    def outdates(self) -> str:
        """In `exact` A and B of the next round are other axes than those along which a client held something back."""
        return "factorises the mean anew (average = 'exact')" if self.options.average == "exact" else ""

    def setup(self, model: Model) -> None:
        """Freeze the backbone and give every layer a change."""
        for change in add_changes(model, self.options.rank, self.options.alpha):
            change.down.requires_grad_(self.options.average != "freeze_a")

    def private(self, model: Model) -> frozenset[str]:
        """B, where it is each client's own."""
        return frozenset(n for n in model.state_dict() if n.endswith(UP)) if self.options.average == "share_a" else frozenset()

    def begin_round(self, server: ServerState) -> None:
        """Wait for factors."""
        super().begin_round(server)
        self._factors: dict[str, list[Factors]] = {}

    def receive(self, server: ServerState, reply: Reply) -> None:
        """Add the tensors to the mean; keep the factors where their products are averaged."""
        super().receive(server, reply)
        if self.options.average == "exact":
            weight = float(self.context.weight(reply.num_examples))
            for name, down, up in _changes(reply.tensors):
                self._factors.setdefault(name, []).append((weight, down, up))

    def end_round(self, server: ServerState, round_index: int) -> dict[str, Any]:
        """Average; in `exact` put new factors in the place of the averaged ones."""
        if self.options.average != "exact":
            return super().end_round(server, round_index)
        old = {name: (down, up) for name, down, up in _changes(server.shared)}
        facts = super().end_round(server, round_index)
        lost = kept = 0.0
        for name, factors in self._factors.items():
            total, step = sum(weight for weight, _, _ in factors), self.options.server_step
            parts = [(step * weight / total, down, up) for weight, down, up in factors]
            parts += [(1 - step, *old[name])] if step != 1 else []
            down, up, values = refactorised(parts, spare=server.shared[name + DOWN])
            server.shared |= {name + DOWN: down, name + UP: up}
            kept += float(values[: len(down)].square().sum())
            lost += float(values[len(down) :].square().sum())
        return {**facts, "lora": {"lost": lost / (lost + kept) if lost else 0.0}}


def _changes(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """Return name, A and B of every layer that has a change."""
    return [(name, tensors[name + DOWN], tensors[name + UP]) for name in changed_layers(tensors)]


def refactorised(parts: Sequence[Factors], spare: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, B and all singular values of M = sum_j w_j B_j A_j, where B A is the best approximation of M of a rank.

    M itself is never formed: M = Q_b (R_b R_a^T) Q_a^T with the two QR factorisations of all B_j and all A_j side by side.

    Args:
        parts: (w_j, A_j (r, in), B_j (out, r)).
        spare: (r, in), the rows of A for dimensions that M does not have; r is the rank of the answer.
    """
    q_b, r_b = torch.linalg.qr(torch.cat([weight * up.double() for weight, _, up in parts], dim=1))
    q_a, r_a = torch.linalg.qr(torch.cat([down.double() for _, down, _ in parts]).t())
    u, values, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    rank = len(spare)
    root = values[:rank].sqrt()
    down, up = root[:, None] * (q_a @ v.t()[:, :rank]).t(), q_b @ u[:, :rank] * root
    there = values[:rank] > _NEGLIGIBLE * values[0]
    return torch.where(there[:, None], down, spare.double()).float(), torch.where(there, up, 0.0).float(), values
