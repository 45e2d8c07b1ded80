"""GPFL: features are read twice, through an affine map whose context says for whom: for everybody, or for this client.

    CoV(f, u) = relu((gamma(u) + 1) f + beta(u))                   gamma, beta: Linear, ReLU, LayerNorm
    g = mean_c e_c          p_i = sum_c (n_ic / n_i) e_c           e_c: shared class embeddings (GCE)
    loss = L(head_i(CoV(r, p_i))) + CE(cos(CoV(f, g), e), y) + lam || CoV(f, g) - e_y^t ||_F

Zhang et al., "GPFL: Simultaneously learning global and personalized feature information for personalized federated learning",
ICCV 2023, and the authors' code. f: mean of the tokens r. g, p_i and e^t are those of the embeddings just received and stay for
the round; the published code makes g and p_i of the embeddings before, and starts from zeros. The norm is over the batch, not
squared. lam = 1e-4, mu = 0 as published for ResNet-18 (.01 and .1 for a small CNN); mu is a weight decay of CoV and GCE alone.
It is a gradient, as in the published code, so under AdamW it is rescaled like any other and is no decoupled decay.

private  the head
traffic  C d + 2 (d^2 + 3 d) numbers each way, beside the backbone

Adaptations. CoV maps every token with p_i, so that any head can read the result; with a pooled linear head the mean then comes
after CoV. A task that does not number its classes (all but classification) has one embedding per modality: g is their mean, p_i
the client's own, there is no cross-entropy, and the norm, which is all that is left, trains e as well.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from omnifm.federation.card import Card
from omnifm.federation.sharing import names_under
from omnifm.federation.state import LocalJob
from omnifm.federation.strategy import Step, Strategy, StrategyOptions
from omnifm.tasks.base import Model


class GPFLOptions(StrategyOptions):
    """GPFL's two numbers."""

    lam: float = Field(1e-4, ge=0, description="Weight of the distance to the class's embedding.")
    mu: float = Field(0.0, ge=0, description="Weight decay of the conditional map and the embeddings.")


class ConditionalMap(nn.Module):
    """CoV."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.LayerNorm(dim)) for _ in range(2))

    def forward(self, features: Tensor, context: Tensor) -> Tensor:
        """Map `(..., d)` under a context `(d,)`."""
        return torch.relu((self.gamma(context) + 1) * features + self.beta(context))


class ConditionalPath(nn.Module):
    """What stands between backbone and head: CoV with the client's context. The trace is f `(b, d)`."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.cov = ConditionalMap(dim)
        self.embedding = nn.Embedding(rows, dim)
        self.set_shares(torch.full((rows,), 1 / rows))

    def set_shares(self, shares: Tensor) -> None:
        """Make the contexts of the embeddings as they are now. `shares` `(rows,)`: n_ic / n_i."""
        self.rows = self.embedding.weight.detach().clone()
        self.generic = self.rows.mean(dim=0)
        self.personal = shares.to(self.rows) @ self.rows

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Any]:
        """Return CoV(r, p_i) and f."""
        del image
        return self.cov(tokens, self.personal.to(tokens.device)), tokens.mean(dim=1)

    def content(self, tokens: Tensor, length: int) -> Tensor:
        """All tokens."""
        del length
        return tokens


class GPFL(Strategy):
    """FedPer with a conditional map and class embeddings."""

    card: ClassVar[Card] = Card(paper="Zhang et al., ICCV 2023", private="head", search={"lam": (1e-4, 1e-2), "mu": (0.0, 0.1)})
    Options: ClassVar[type[StrategyOptions]] = GPFLOptions
    options: GPFLOptions
    mean_suffices: ClassVar[bool] = True

    def setup(self, model: Model) -> None:
        """Add CoV and one embedding per class, or per modality where classes have no numbers."""
        model.path = ConditionalPath(self.context.label_count or len(self.context.modalities), model.backbone.token_dim)

    def private(self, model: Model) -> frozenset[str]:
        """The head."""
        return names_under(model, model.head.own)

    def begin(self, job: LocalJob) -> None:
        """Make the contexts, of the embeddings just received."""
        path = job.model.path
        assert isinstance(path, ConditionalPath)
        path.set_shares(self._shares(job))

    def _shares(self, job: LocalJob) -> Tensor:
        if self.context.label_count:
            assert job.labels is not None  # a task that counts its classes has labels
            counts = torch.bincount(job.labels.cpu(), minlength=self.context.label_count)
            return counts / counts.sum().clamp_min(1)
        return torch.eye(len(self.context.modalities))[self.context.modality_index(job.client)]

    def penalty(self, step: Step) -> Tensor:
        """What the generic features are held to."""
        path, feature = step.job.model.path, step.output.trace
        assert isinstance(path, ConditionalPath)
        generic: Tensor = path.cov(feature, path.generic).float()
        if not self.context.label_count:
            own = path.embedding.weight[self.context.modality_index(step.job.client)]
            distance: Tensor = torch.linalg.vector_norm(generic - own)
            return self.options.lam * distance
        cosine = functional.normalize(generic, dim=1) @ functional.normalize(path.embedding.weight, dim=1).t()
        distance = torch.linalg.vector_norm(generic - path.rows[step.batch.target])
        return functional.cross_entropy(cosine.float(), step.batch.target) + self.options.lam * distance

    def correct(self, step: Step) -> None:
        """Weight decay of the path alone."""
        path = step.job.model.path
        assert isinstance(path, ConditionalPath)
        for parameter in path.parameters() if self.options.mu else ():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach(), alpha=self.options.mu)
