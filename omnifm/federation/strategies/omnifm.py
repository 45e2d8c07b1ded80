"""OmniFM: a server-side bank of spectral prototypes anchors clients that see different modalities.

Liu, Wang, Shan, "OmniFM: Toward Modality-Robust and Task-Agnostic Federated Learning for Heterogeneous Medical Imaging",
CVPR 2026, arXiv 2603.21660. The client's step is in `omnifm.spectral.compose`; this file says what travels.

down   shared tensors, and a snapshot of the bank
up     shared tensors, at most K prototypes of the client's s, and how often each row was retrieved
never  the suffix c; with `private_*` also head, block over r', normalisation layers

preset `paper`: everything but c (and the head, where label spaces differ) is shared, one mean, the bank pruned by retrieval
frequency. preset `best` adds what our own study found to matter: private head and block, one mean per spectral neighbourhood,
a floor of bank rows per modality.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from omnifm import seeds
from omnifm.errors import FederationError
from omnifm.federation.card import Card
from omnifm.federation.messages import Reply
from omnifm.federation.release import Release
from omnifm.federation.sharing import NORMS, names_of_type, names_under
from omnifm.federation.state import Context, LocalJob, ServerState
from omnifm.federation.strategy import Step, Strategy, StrategyOptions, Upload
from omnifm.spectral.bank import BankRows, KnowledgeBank
from omnifm.spectral.compose import SpectralOptions, SpectralPath, SpectralTrace
from omnifm.spectral.gskr import retrieval_counts
from omnifm.spectral.lloyd import bound, contributions, first_centres, step
from omnifm.spectral.policies import PolicyName
from omnifm.spectral.prototypes import prototypes
from omnifm.spectral.spalign import effective_rank, spread
from omnifm.tasks.base import Model

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"aggregation": "mean", "head": "auto", "private_block": False, "bank": {"policy": "lfu"}},
    "best": {"aggregation": "neighbours", "head": "private", "private_block": True, "bank": {"policy": "quota"}},
}
_BATCH = 256
_UPLOAD = {"prototypes/vectors", "prototypes/weight"}
_CENTRES, _SENT = "release/centres", "release/sent"
_RETRIEVALS = {"retrievals/row_id", "retrievals/count"}


class BankOptions(BaseModel):
    """The knowledge bank and what is uploaded to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    capacity: int = Field(256, ge=1, description="Rows at most.")
    policy: PolicyName = "quota"
    prototypes: int = Field(16, ge=1, description="K, rows a client uploads per round.")
    per_class: bool = Field(False, description="Prototypes within each class instead of over all.")
    young_rounds: int = Field(3, ge=0, description="Rows younger than this are not pruned by `quota`.")
    delta: float = Field(0.1, ge=0, le=1, description="`lfu`: rows retrieved less than delta times the mean are pruned.")
    ageing: float = Field(0.5, gt=0, le=1, description="Counts are multiplied by this each round, where the policy ages.")
    ema: float = Field(0.5, gt=0, le=1, description="`ema`: weight of a new prototype against the row it updates.")


class OmniFMOptions(SpectralOptions, StrategyOptions):
    """Switches of the path, aggregation, sharing and bank in one table."""

    preset: Literal["paper", "best"] = "best"
    head: Literal["auto", "shared", "private"] = Field("auto", description="`auto`: private where label spaces differ.")
    private_block: bool = Field(False, description="The transformer block over r' and its part embeddings stay at the client.")
    private_norms: bool = Field(False, description="Normalisation layers stay at the client.")
    bank: BankOptions = BankOptions()

    @model_validator(mode="before")
    @classmethod
    def _preset_below(cls, given: Any) -> Any:
        """A preset gives defaults; what is set by hand wins."""
        if not isinstance(given, dict):
            return given
        preset = PRESETS.get(given.get("preset", "best"), {})
        bank = given.get("bank", {})
        merged = {**preset, **given}
        if isinstance(bank, dict):
            merged["bank"] = {**preset.get("bank", {}), **bank}
        if given.get("psp") is False and "private_block" not in given:
            merged["private_block"] = False  # there is no block to keep
        return merged

    @model_validator(mode="after")
    def _parts_exist(self) -> "OmniFMOptions":
        if self.private_block and not self.psp:
            raise ValueError("private_block keeps the block over r' private, which exists only with psp = true")
        return self


class OmniFM(Strategy):
    """FedAvg, plus the spectral path and the bank."""

    card: ClassVar[Card] = Card(
        paper="Liu et al., CVPR 2026",
        private="suffix; head and block with preset best",
        up="prototypes, retrieval counts, and once a mean spectrum with preset best",
        down="the bank",
        server="the bank",
        search={"lam": (0.01, 0.1), "neighbourhood_alone": ("global", "own")},
    )
    Options: ClassVar[type[StrategyOptions]] = OmniFMOptions
    options: OmniFMOptions
    mean_suffices: ClassVar[bool] = True
    by_example: ClassVar[frozenset[str]] = frozenset({"penalty", "finish"})

    def __init__(self, options: OmniFMOptions, context: Context) -> None:
        super().__init__(options, context)
        self._uses_bank = options.reads_bank

    # ------------------------------------------------------------------ the model
    def setup(self, model: Model) -> None:
        """Put the spectral path between backbone and head, unless every switch is off."""
        if self.options.any:
            model.path = SpectralPath(self.options, model.backbone.token_dim)
            # What reads spectra is what unlike modalities have in common.
            self.common = names_under(model, model.path)

    def private(self, model: Model) -> frozenset[str]:
        """The suffix always; head, block and norms by option."""
        names: frozenset[str] = frozenset()
        path = model.path
        if isinstance(path, SpectralPath) and path.psp is not None:
            names |= names_under(model, path.psp.suffix)
            if self.options.private_block:
                names |= names_under(model, path.psp.block) | names_under(model, path.psp.parts)
        if self._private_head:
            names |= names_under(model, model.head.own)
        if self.options.private_norms:
            names |= names_of_type(model, NORMS, "normalisation layers")
        return names

    @property
    def _private_head(self) -> bool:
        return self.options.head == "private" or (self.options.head == "auto" and not self.context.one_label_space)

    def globalise(self, model: Model) -> bool:
        """The global model has no client's suffix: c = 0. With other private parts there is none."""
        if self._private_head or self.options.private_block or self.options.private_norms:
            return False
        if isinstance(model.path, SpectralPath) and model.path.psp is not None:
            nn.init.zeros_(model.path.psp.suffix.token)
        return True

    # ------------------------------------------------------------------ the client
    def begin(self, job: LocalJob) -> None:
        """Install the foreign rows of the bank that came with the request, or of the snapshot kept from the last one."""
        path = job.model.path
        if not isinstance(path, SpectralPath):
            return
        received = _bank_in(job.received) or _bank_in(job.state)
        self._rows = _rows_of(received).foreign(self.context.client_index(job.client)) if received else None
        path.set_bank(self._rows)
        self._retrieved: list[Tensor] = []

    def penalty(self, step: Step) -> Tensor | None:
        """SPAlign (Eq. 5), and a note of which rows were retrieved."""
        path, trace = step.job.model.path, step.output.trace
        if not isinstance(path, SpectralPath) or not isinstance(trace, SpectralTrace):
            return None
        if trace.index is not None:
            self._retrieved.append(trace.index.detach())
        return path.penalty(trace) if self.options.spalign and trace.s_g is not None else None

    def finish(self, job: LocalJob) -> Upload:
        """Summarise the client's embeddings, report retrievals, keep the snapshot for server-free prediction."""
        path = job.model.path
        if not isinstance(path, SpectralPath) or not self._uses_bank:
            return Upload()
        upload, kept = self._told(job, path) if job.release is None else self._released(job, path, job.release)
        job.state.clear()
        job.state.update({**_bank_in(job.received), **kept})
        return upload

    def _told(self, job: LocalJob, path: SpectralPath) -> tuple[Upload, dict[str, Tensor]]:
        """Return prototypes and retrievals as they are."""
        s = self._embeddings(job, path, _BATCH)
        if not bool(s.isfinite().all()):
            raise FederationError(f"client {job.client}, round {job.round}: a spectral embedding is not finite")
        bank = self.options.bank
        generator = seeds.generator(job.seed, "prototypes", job.round, job.client)
        labels = job.labels if bank.per_class else None
        vectors, weight = prototypes(s, bank.prototypes, generator, labels, self.options.rho)
        extra = {"prototypes/vectors": vectors, "prototypes/weight": weight}
        facts: dict[str, Any] = {"effective_rank": effective_rank(s), "spread": spread(s, self.options.rho)}
        if self._retrieved and self._rows is not None:
            row_id, count = retrieval_counts(torch.cat(self._retrieved).cpu(), self._rows)
            extra |= {"retrievals/row_id": row_id, "retrievals/count": count}
            facts["retrieval"] = self._shares(job.client, row_id, count, self._rows)
        return Upload(extra, facts), {}

    def _released(self, job: LocalJob, path: SpectralPath, release: Release) -> tuple[Upload, dict[str, Tensor]]:
        """Return noisy prototypes while the budget lasts, and what the next release needs. Retrievals stay at the client.

        Each release is one Lloyd step from the rows of the last one, which are public, or from random points.
        """
        # What left in a round that did not count is paid for too; a round that is done again after a crash is one release.
        sent = max(int(job.state.get(_SENT, torch.zeros(()))), len(job.released - {job.round}))
        o = self.options
        kept = {name: job.state[name] for name in (_CENTRES, _SENT) if name in job.state}
        if sent >= release.rounds:
            return Upload(), kept
        generator = seeds.generator(job.seed, "centres", job.client)
        centres = kept.get(_CENTRES, first_centres(o.bank.prototypes, o.dim, o.rho, generator))
        # One by one: an image that is not there must not move a rounding of another's embedding.
        s = self._embeddings(job, path, 1)
        # Weights can be made so that one image's overflows. An error, or NaN in the sums, would tell of it through any noise.
        s = s.masked_fill(~s.isfinite().all(dim=1, keepdim=True), 0.0)
        added, place = contributions(s, centres, release.clip)
        longest = bound(release.clip)
        sums = release.sums(added, place, len(centres), longest, "prototypes", job.round, job.client)
        found = step(sums, centres, release.clip, release.deviation(longest, len(added)), o.rho)
        extra = release.told({"prototypes/vectors": found.vectors, "prototypes/weight": found.weight})
        return Upload(extra), {_CENTRES: found.centres, _SENT: torch.tensor(sent + 1)}

    @staticmethod
    def _embeddings(job: LocalJob, path: SpectralPath, size: int) -> Tensor:
        path.eval()
        parts = torch.arange(len(job.data.train)).split(size)
        return torch.cat([path.embed(job.data.train.batch(part).image.to(job.device)).cpu() for part in parts])

    def _shares(self, client: str, row_id: Tensor, count: Tensor, rows: BankRows) -> dict[str, float]:
        """Return which share of the retrieved rows was the client's own, of its modality, of another one."""
        place = {int(row): i for i, row in enumerate(rows.row_id)}
        index = torch.tensor([place[int(row)] for row in row_id], dtype=torch.int64)
        weight = count.double() / count.sum().clamp_min(1)
        own = rows.client[index] == self.context.client_index(client)
        same = (rows.modality[index] == self.context.modality_index(client)) & ~own
        shares = {"own": weight[own].sum(), "same": weight[same].sum(), "other": weight[~own & ~same].sum()}
        return {name: float(value) for name, value in shares.items()}

    # ------------------------------------------------------------------ the server
    def _bank(self, server: ServerState) -> KnowledgeBank:
        o, b = self.options, self.options.bank
        bank = KnowledgeBank(
            modalities=len(self.context.modalities),
            capacity=b.capacity,
            policy=b.policy,
            dim=o.dim,
            rho=o.rho,
            young_rounds=b.young_rounds,
            delta=b.delta,
            ageing=b.ageing,
            per_client=b.prototypes,
            ema=b.ema,
        )
        saved = {name.removeprefix("bank/"): tensor for name, tensor in server.extra.items() if name.startswith("bank/")}
        if saved:
            bank.load(saved)
        return bank

    def extra_for(self, server: ServerState, client: str) -> Mapping[str, Tensor]:
        """Return the snapshot of the bank, rows of the client itself included (it leaves them out by its own check)."""
        if not self._uses_bank:
            return {}
        rows = self._bank(server).rows
        return {f"bank/{n.removeprefix('rows.')}": t for n, t in rows.to_tensors("rows").items()} if len(rows) else {}

    def begin_round(self, server: ServerState) -> None:
        """Open the bank."""
        super().begin_round(server)
        self._open = self._bank(server)

    @property
    def uploads(self) -> str:
        """Prototypes and retrieval counts, where the bank is used."""
        return "prototypes of its images" if self._uses_bank else super().uploads

    @property
    def sends_prototypes(self) -> bool:
        """Where the bank is used."""
        return self._uses_bank

    def unfit(self, *, by_example: bool) -> str:
        """Prototypes by class tell labels; a floor of variance, or one reading of the bank for all, is no sum over examples."""
        o = self.options
        if o.bank.per_class and self._uses_bank:
            return "bank.per_class = true"
        if by_example and o.variance_floor:
            return "variance_floor"
        return "gskr = false with eca" if by_example and o.attends and not o.gskr else ""

    def vet(self, server: ServerState, reply: Reply) -> None:
        """Judge prototypes and retrieval counts. Whose rows they are is the sender's, not for the upload to say."""
        extra = reply.extra
        wanted = self._wanted(extra)
        if odd := wanted ^ extra.keys():
            raise FederationError(f"tensor {min(odd)} is {'missing' if min(odd) in wanted else 'unknown'}")
        if not wanted:
            return
        rows, most = extra["prototypes/weight"].numel(), self.options.bank.prototypes
        if rows > most:
            raise FederationError(f"{rows} prototypes, at most {most} are taken")
        modality = self.context.modality_index(reply.client)
        self._open.check(extra["prototypes/vectors"], modality, extra["prototypes/weight"])
        if wanted >= _RETRIEVALS:
            self._open.check_counts(extra["retrievals/row_id"], extra["retrievals/count"])

    def _wanted(self, extra: Mapping[str, Tensor]) -> set[str]:
        """Return the names that an upload must have. With a budget it may be empty, and retrievals never leave a client."""
        if not self._uses_bank or (self.context.budgeted and not extra):
            return set()
        return _UPLOAD | (_RETRIEVALS if _RETRIEVALS & extra.keys() and not self.context.budgeted else set())

    def receive(self, server: ServerState, reply: Reply) -> None:
        """Add prototypes and retrieval counts to the bank, tensors to the mean."""
        super().receive(server, reply)
        if not self._wanted(reply.extra):
            return
        if reply.extra.keys() >= _RETRIEVALS:
            self._open.count(reply.extra["retrievals/row_id"], reply.extra["retrievals/count"])
        client, modality = self.context.client_index(reply.client), self.context.modality_index(reply.client)
        vectors, weight = reply.extra["prototypes/vectors"], reply.extra["prototypes/weight"]
        self._open.add(vectors, client, modality, reply.round, weight)

    def end_round(self, server: ServerState, round_index: int) -> dict[str, Any]:
        """Average, prune the bank, keep it."""
        facts = super().end_round(server, round_index)
        if not self._uses_bank:
            return facts
        self._open.end_round(round_index)
        server.extra.update({f"bank/{name}": tensor for name, tensor in self._open.state().items()})
        counts = torch.bincount(self._open.rows.modality, minlength=len(self.context.modalities)).tolist()
        by_modality = dict(zip(self.context.modalities, counts, strict=True))
        return {**facts, "bank": {"rows": len(self._open.rows), "by_modality": by_modality}}

    def bank_rows(self, server: ServerState) -> BankRows | None:
        """Return the bank's rows, for the run's record; None without a bank."""
        return self._bank(server).rows if self._uses_bank else None


def _bank_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("bank/")}


def _rows_of(tensors: Mapping[str, Tensor]) -> BankRows:
    return BankRows.from_tensors({f"rows.{n.removeprefix('bank/')}": t for n, t in tensors.items()}, "rows")
