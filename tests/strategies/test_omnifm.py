from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from omnifm.build import strategy_options
from omnifm.config import parse
from omnifm.errors import ConfigError, FederationError
from omnifm.federation.client import STATE
from omnifm.federation.strategies.omnifm import OmniFM, OmniFMOptions
from omnifm.spectral.compose import SpectralPath
from omnifm.spectral.psp import Block, Suffix
from omnifm.tasks.base import Model
from tests.support import HOSPITALS, Hospital, Spy, differing, make_lab, make_split, spy


def options(**values: Any) -> OmniFMOptions:
    raw = {"strategy": "omnifm", "strategies": {"omnifm": values}, "federation": {"cohorts": [{"path": "x"}]}}
    found = strategy_options(parse(raw))[1]
    assert isinstance(found, OmniFMOptions)
    return found


def test_presets_give_defaults_and_what_is_set_by_hand_wins() -> None:
    best, paper = options(), options(preset="paper")
    assert (best.aggregation, best.head, best.private_block, best.bank.policy) == ("neighbours", "private", True, "quota")
    assert (paper.aggregation, paper.head, paper.private_block, paper.bank.policy) == ("mean", "auto", False, "lfu")
    mixed = options(preset="paper", head="shared", bank={"capacity": 9})
    assert (mixed.head, mixed.bank.policy, mixed.bank.capacity, mixed.aggregation) == ("shared", "lfu", 9, "mean")
    assert options(bank={"policy": "fifo"}).bank.policy == "fifo"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "worst"}, "strategies.omnifm.preset"),
        ({"bank": {"size": 3}}, "strategies.omnifm.bank.size: unknown key"),
        ({"bank": 3}, "strategies.omnifm.bank"),
        ({"psp": False, "private_block": True}, "exists only with psp = true"),
        ({"top_k": 0}, "strategies.omnifm.top_k"),
        ({"mu": 1.0}, "strategies.omnifm.mu: unknown key"),
    ],
)
def test_impossible_options_are_one_line_with_their_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        options(**values)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("strategies.omnifm")


def test_without_psp_there_is_no_block_to_keep() -> None:
    assert not options(psp=False).private_block


def names_under(model: Model, kind: type[torch.nn.Module]) -> set[str]:
    return {f"{p}.{n}" for p, m in model.named_modules() if isinstance(m, kind) for n in m.state_dict()}


def sharing(tmp_path: Path, **values: Any) -> tuple[set[str], Model]:
    site = make_lab(tmp_path, "omnifm", values).site
    return set(site.sharing.private), site.model


def test_what_is_private_is_what_the_options_say(tmp_path: Path) -> None:
    bare = {"preset": "paper", "head": "shared"}
    private, model = sharing(tmp_path, **bare)
    suffix, block = names_under(model, Suffix), names_under(model, Block)
    head = {n for n in model.state_dict() if n.startswith("head.")}
    assert private == suffix and len(suffix) == 1 and len(head) == 2
    assert sharing(tmp_path, **{**bare, "head": "private"})[0] == suffix | head
    assert sharing(tmp_path, **bare, private_block=True)[0] == suffix | block | {"path.psp.parts.vectors"}
    norms = {n for p, m in model.named_modules() if isinstance(m, torch.nn.GroupNorm | torch.nn.LayerNorm) for n in state(p, m)}
    assert len(norms) >= 4 and sharing(tmp_path, **bare, private_norms=True)[0] == suffix | norms


def state(prefix: str, module: torch.nn.Module) -> set[str]:
    return {f"{prefix}.{n}" for n in module.state_dict()}


@pytest.mark.parametrize(("one_label_space", "private"), [(True, False), (False, True)])
def test_an_automatic_head_is_private_where_label_spaces_differ(one_label_space: bool, private: bool, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "omnifm", {"preset": "paper"})
    context = lab.strategy.context.__class__(**{**vars(lab.strategy.context), "one_label_space": one_label_space})
    strategy = OmniFM(options(preset="paper"), context)
    assert ("head.linear.weight" in strategy.private(lab.site.model)) is private
    assert strategy.globalise(lab.site.model) is not private


def test_the_global_model_has_no_suffix(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "omnifm", {"preset": "paper"})
    model = lab.site.model
    assert isinstance(model.path, SpectralPath) and model.path.psp is not None
    assert bool(model.path.psp.suffix.token.abs().sum() > 0)
    assert lab.strategy.globalise(model)
    assert bool((model.path.psp.suffix.token == 0).all())


def outcome(folder: Path, **values: Any) -> dict[str, Tensor]:
    lab = make_lab(folder, "omnifm", values)
    return dict(lab.run().shared)


@pytest.mark.parametrize("switch", ["gskr", "eca", "psp", "spalign"])
def test_each_mechanism_is_used(switch: str, tmp_path: Path) -> None:
    """The backbone that comes out is another one without it, not only the path."""
    on, off = outcome(tmp_path / "1"), outcome(tmp_path / "2", **{switch: False})
    backbone = [n for n in on if n.startswith("backbone.")]
    # Alignment trains the tokenizer alone, and the tokenizer decides what is retrieved.
    assert any(not torch.equal(on[n], off[n]) for n in backbone)


def test_no_client_reads_its_own_rows(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "omnifm", federation__rounds=3)
    installed: list[tuple[int, set[int]]] = []
    path, begin = lab.site.model.path, lab.site.strategy.begin
    assert isinstance(path, SpectralPath)

    def watch(job: Any) -> None:
        begin(job)
        assert isinstance(job.model.path, SpectralPath)
        rows = job.model.path.bank
        installed.append((lab.strategy.context.client_index(job.client), set() if rows is None else set(rows.client.tolist())))

    lab.site.strategy.begin = watch  # type: ignore[method-assign]
    lab.evaluate(lab.run())
    assert any(rows for _, rows in installed) and all(client not in rows for client, rows in installed)
    shares = [e["retrieval"] for e in lab.events if "retrieval" in e]
    assert shares and all(s["own"] == 0 and sum(s.values()) == pytest.approx(1) for s in shares)


def test_shares_of_retrieval_count_the_own_modality(tmp_path: Path) -> None:
    """Of two hospitals, all foreign rows are of the other; its modality decides what they count as."""
    for modality, share in (("CT", "same"), ("US", "other")):
        hospitals = (Hospital("a", "CT", 8), Hospital("b", modality, 8))
        lab = make_lab(tmp_path / modality, "omnifm", hospitals=hospitals)
        lab.run()
        last = [e["retrieval"] for e in lab.events if "retrieval" in e]
        assert len(last) == 2 and all(shares[share] == pytest.approx(1) for shares in last)


def test_the_bank_grows_from_uploads_and_stays_within_capacity(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "omnifm", {"bank": {"capacity": 8, "prototypes": 3}}, engine=Spy, federation__rounds=3)
    server = lab.run()
    sizes = [e["bank"]["rows"] for e in lab.events if e["event"] == "round"]
    assert sizes == [8, 8, 8]
    counts = [e["bank"]["by_modality"] for e in lab.events if e["event"] == "round"][-1]
    assert counts.keys() == {"CT", "MRI", "US"} and sum(counts.values()) == 8 and min(counts.values()) >= 1
    rows = lab.strategy.bank_rows(server)
    assert rows is not None and len(rows) == 8
    first = [q for q in spy(lab).requests if q.kind == "train"]
    assert [bool(q.extra) for q in first] == [False] * 4 + [True] * 8
    for reply in spy(lab).trained():
        vectors = reply.extra["prototypes/vectors"]
        assert 1 <= len(vectors) <= 3 and bool((vectors.norm(dim=1) <= 1 + 1e-5).all())
        assert float(reply.extra["prototypes/weight"].sum()) == reply.num_examples


def test_the_uploaded_prototypes_are_of_this_client_s_embeddings(tmp_path: Path) -> None:
    """With at least as many prototypes as images, they are the embeddings themselves."""
    values = {"bank": {"capacity": 90, "prototypes": 20}}
    lab = make_lab(tmp_path, "omnifm", values, hospitals=HOSPITALS[:1], engine=Spy, federation__rounds=1)
    lab.run()
    path, train = lab.site.model.path, lab.task.client_data("a").train
    assert isinstance(path, SpectralPath)
    s = path.embed(train.batch(torch.arange(len(train))).image)
    found = spy(lab).trained()[0].extra["prototypes/vectors"]
    assert float(torch.cdist(s, found).min(dim=1).values.max()) < 1e-3


def test_without_a_reader_there_is_no_bank_and_no_traffic_for_it(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "omnifm", {"gskr": False, "eca": False, "spalign": False}, engine=Spy)
    server = lab.run()
    assert lab.strategy.bank_rows(server) is None
    assert all(not any(n.startswith(("bank/", "prototypes/")) for n in m.extra) for m in spy(lab).messages())


def test_a_client_predicts_from_the_snapshot_it_kept(tmp_path: Path) -> None:
    """Server-free inference: without rows in the request, the last ones that came are read."""
    lab = make_lab(tmp_path, "omnifm", {"aggregation": "mean"}, engine=Spy)
    lab.run()
    held = {n.removeprefix(STATE): t for n, t in lab.private("b").items() if n.startswith(STATE)}
    last = next(q for q in reversed(spy(lab).requests) if q.client == "b")
    assert held and differing(held, dict(last.extra)) == []
    settings = {"split": "test", "view": "personal"}
    ask = partial(type(last), "evaluate", 2, "b", last.tensors, settings=settings)
    plain, cut = lab.site.handle(ask(extra=last.extra)), lab.site.handle(ask(extra={}))
    assert differing(dict(plain.extra), dict(cut.extra)) == []


def test_prototypes_are_of_the_classes_where_asked(tmp_path: Path) -> None:
    values = {"bank": {"per_class": True, "prototypes": 3, "capacity": 30}}
    lab = make_lab(tmp_path, "omnifm", values, engine=Spy, federation__rounds=1)
    lab.run()
    sizes = sorted(spy(lab).trained()[0].extra["prototypes/weight"].tolist())
    assert sizes == sorted(torch.bincount(make_split(10, "CT", "x").labels).tolist())


def test_the_penalty_is_in_the_loss_that_is_minimised(tmp_path: Path) -> None:
    """A heavy penalty draws the embeddings to the bank's rows."""

    def distance(lam: float) -> float:
        lab = make_lab(tmp_path / str(lam), "omnifm", {"lam": lam}, federation__rounds=4, federation__local_epochs=3)
        lab.run()
        penalties = [e["penalty"] for e in lab.events if e["event"] == "client" and e["round"] == 3]
        return sum(penalties) / len(penalties) / lam

    assert distance(10.0) < 0.7 * distance(1e-3)


def test_an_embedding_that_is_not_finite_never_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = SpectralPath.embed
    monkeypatch.setattr(SpectralPath, "embed", lambda self, image: embed(self, image) * float("nan"))
    with pytest.raises(FederationError, match="client a, round 0: a spectral embedding is not finite"):
        make_lab(tmp_path, "omnifm").run()


def test_options_are_a_table() -> None:
    with pytest.raises(ValidationError):
        OmniFM.Options.model_validate("best")
