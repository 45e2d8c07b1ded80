from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from omnifm.federation.state import LocalJob, ServerState
from omnifm.federation.strategies.gpfl import GPFL, ConditionalPath
from omnifm.federation.strategy import Step
from omnifm.tasks.base import Batch, Output
from tests.support import CLASSES, HOSPITALS, Lab, MemoryTask, Spy, make_lab, spy

ROWS = "path.embedding.weight"


def path_of(lab: Lab) -> ConditionalPath:
    path = lab.site.model.path
    assert isinstance(path, ConditionalPath)
    return path


def shares_of(lab: Lab, client: str) -> Tensor:
    labels = lab.task.labels(client).tolist()
    return torch.tensor([labels.count(c) / len(labels) for c in range(CLASSES)])


def test_the_map_is_relu_of_gamma_plus_one_times_f_plus_beta(tmp_path: Path) -> None:
    cov = path_of(make_lab(tmp_path, "gpfl")).cov
    f, u = torch.randn(2, 5, 8), torch.randn(8)
    gamma, beta = ((h := branch[0](u).clamp_min(0)) - h.mean() for branch in (cov.gamma, cov.beta))
    gamma, beta = (x / (x.square().mean() + 1e-5).sqrt() for x in (gamma, beta))
    torch.testing.assert_close(cov(f, u), ((gamma + 1) * f + beta).clamp_min(0))


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_contexts_are_of_the_new_embeddings(kind: str, tmp_path: Path) -> None:
    """The published code makes them of the embeddings that the client had before."""
    lab = make_lab(tmp_path, "gpfl", engine=Spy)
    found: list[tuple[str, Tensor, Tensor, Tensor]] = []
    begin = lab.site.strategy.begin

    def listen(job: LocalJob) -> None:
        begin(job)
        if job.training == (kind == "train"):
            path = path_of(lab)
            found.append((job.client, job.anchor[ROWS].clone(), path.generic.clone(), path.personal.clone()))

    lab.site.strategy.begin = listen  # type: ignore[method-assign]
    lab.evaluate(lab.run())
    assert len(found) == (8 if kind == "train" else 4)
    for client, rows, generic, personal in found:
        assert bool(rows.any())
        torch.testing.assert_close(generic, rows.mean(dim=0))
        torch.testing.assert_close(personal, sum(s * row for s, row in zip(shares_of(lab, client), rows, strict=True)))
    assert not torch.equal(found[0][1], found[-1][1]) or kind == "evaluate"
    assert not torch.equal(found[0][3], found[1][3]), "clients with other shares have other contexts"


def test_a_round_agrees_with_one_written_by_hand(tmp_path: Path) -> None:
    """Plain torch: two rounds of a lone client in full batches, every term and the weight decay included."""
    lam, mu, lr, decay = 0.3, 0.2, 0.1, 1e-4
    options = {"lam": lam, "mu": mu}
    lab = make_lab(
        tmp_path / "1",
        "gpfl",
        options,
        hospitals=HOSPITALS[:1],
        optimiser__batch_size=10,
        optimiser__momentum=0.0,
        federation__local_epochs=2,
    )
    model = make_lab(tmp_path / "2", "gpfl", options, hospitals=HOSPITALS[:1]).site.model
    backbone, cov, embedding, linear = model.backbone, model.path.cov, model.path.embedding.weight, model.head.linear  # type: ignore[union-attr]
    train = lab.task.client_data("a").train
    batch = train.batch(torch.arange(len(train)))
    shares, parameters, own = shares_of(lab, "a"), list(model.parameters()), {id(p) for p in model.path.parameters()}  # type: ignore[union-attr]
    for _ in range(2):
        rows = embedding.detach().clone()
        for _ in range(2):
            r = backbone(batch.inputs).tokens
            generic = cov(r.mean(1), rows.mean(0))
            logits = linear(cov(r, (shares[:, None] * rows).sum(0)).mean(1))
            cosine = torch.stack([functional.cosine_similarity(generic, e[None]) for e in embedding], dim=1)
            distance = (generic - rows[batch.target]).square().sum().sqrt()
            loss = sum(functional.cross_entropy(x, batch.target) for x in (logits, cosine)) + lam * distance
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.data -= lr * (g + (decay + (mu if id(p) in own else 0)) * p.data)
    found = {**lab.run().shared, **lab.private("a")}
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=3e-6, rtol=1e-5)


def test_what_travels_beside_the_backbone_and_what_stays(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "gpfl", engine=Spy)
    lab.run()
    d = lab.site.model.backbone.token_dim
    for message in [*spy(lab).requests, *spy(lab).trained()]:
        beside = {n: t for n, t in message.tensors.items() if not n.startswith("backbone.")}
        assert sum(t.numel() for t in beside.values()) == CLASSES * d + 2 * (d * d + 3 * d)
        assert not message.extra and not any(n.startswith("head.") for n in message.tensors)
    assert set(lab.private("a")) == {"head.linear.weight", "head.linear.bias"}


def test_an_evaluation_reads_the_features_as_the_client_does(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "gpfl")
    server = lab.run()
    scores = lab.evaluate(server)
    assert scores.views["global"] is None and scores.views["personal"] is not None
    with torch.no_grad():
        path_of(lab).set_shares(torch.tensor([1.0, 0, 0]))
        tokens = torch.rand(2, 16, 8)
        one = path_of(lab)(torch.zeros(0), tokens)[0]
        path_of(lab).set_shares(torch.tensor([0, 1.0, 0]))
        assert not torch.equal(one, path_of(lab)(torch.zeros(0), tokens)[0])


def test_a_task_without_numbered_classes_has_an_embedding_per_modality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryTask, "label_count", 0)
    monkeypatch.setattr(MemoryTask, "labels", lambda self, client: None)
    lab = make_lab(tmp_path, "gpfl", {"lam": 0.5})
    start = lab.start().shared[ROWS]
    assert len(start) == 3  # CT, MRI, US
    strategy = lab.site.strategy
    assert isinstance(strategy, GPFL)
    job = LocalJob("b", 0, lab.site.model, lab.task.client_data("b"), {}, {}, {}, 0, torch.device("cpu"))
    strategy.begin(job)
    path = path_of(lab)
    torch.testing.assert_close(path.generic, start.mean(dim=0))
    torch.testing.assert_close(path.personal, start[1])
    f = torch.randn(4, 8)
    batch = Batch(torch.zeros(4), torch.zeros(4), torch.zeros(4))
    penalty = strategy.penalty(Step(job, batch, Output(torch.zeros(4), f)))
    torch.testing.assert_close(penalty, 0.5 * (path.cov(f, path.generic) - start[1]).norm())
    server: ServerState = lab.run()
    assert all(not torch.equal(a, b) for a, b in zip(server.shared[ROWS], start, strict=True)), "they are learned"
    assert isinstance(path.embedding, nn.Embedding)
