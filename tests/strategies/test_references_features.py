"""Methods that need features, run through the real loop and written again with functional calls only, in float64.

The network has five tanh units and one token. A parameter is called here as in the model, and nothing else is the model's.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from omnifm.federation.client import STATE
from tests.strategies.references import BIAS, LR, WEIGHT, Array, assert_same, features, images, lab_of, order
from tests.support import BATCH, CLASSES, Lab

HIDDEN = 5
PHI = ("backbone.layers.0.weight", "backbone.layers.0.bias")
PSI = (WEIGHT, BIAS)
P = dict[str, Tensor]
Loss = Callable[[P, Tensor, Tensor], Tensor]


class Network:
    """A lab's model before training, its data, and plain SGD on a loss."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.start = {n: t.detach().clone().double() for n, t in lab.site.model.state_dict().items()}
        self.x = {h.id: torch.from_numpy(features(images(lab, h.id))[:, :16]) for h in lab.hospitals}
        self.y = {h.id: lab.task.labels(h.id) for h in lab.hospitals}
        self.size = {h.id: h.train for h in lab.hospitals}
        self.share = {i: torch.bincount(y, minlength=CLASSES).double() / len(y) for i, y in self.y.items()}

    def rounds(self) -> Iterator[tuple[int, list[str]]]:
        for t, sampled in enumerate(self.lab.schedule):
            yield t, [*reversed(sampled)]

    def sgd(self, p: P, loss: Loss, client: str, t: int, names: tuple[str, ...] = (), **which: Any) -> P:
        """Return `p` after an SGD step per batch; only `names` move, by default everything."""
        for index in order(self.lab, client, t, **which):
            q = {n: w.detach().requires_grad_(not names or n in names) for n, w in p.items()}
            moving = [n for n, w in q.items() if w.requires_grad]
            found = torch.autograd.grad(loss(q, self.x[client][index], self.y[client][index]), [q[n] for n in moving])
            p = {n: w.detach() for n, w in q.items()} | {n: q[n].detach() - LR * g for n, g in zip(moving, found, strict=True)}
        return p

    def mean(self, ends: Mapping[str, P], names: tuple[str, ...] = ()) -> P:
        """Return FedAvg's mean of `names`, by default of everything."""
        total = sum(self.size[i] for i in ends)
        return {n: sum(self.size[i] / total * p[n] for i, p in ends.items()) for n in names or self.start}  # type: ignore[misc]


def hidden(p: P, x: Tensor) -> Tensor:
    return torch.tanh(functional.linear(x, p[PHI[0]], p[PHI[1]]))


def plain(p: P, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden(p, x), p[WEIGHT], p[BIAS]), y)


def flat(tensors: Mapping[str, Tensor], names: Any, prefix: str = "") -> Array:
    return torch.cat([tensors[prefix + n].detach().double().reshape(-1) for n in sorted(names)]).numpy()


def fedavg_of(net: Network) -> Array:
    theta = net.start
    for t, sampled in net.rounds():
        theta = theta | net.mean({i: net.sgd(theta, plain, i, t, (*PHI, *PSI)) for i in sampled}, (*PHI, *PSI))
    return flat(theta, PHI)


def test_fedpers_heads_stay_and_its_backbone_is_averaged(tmp_path: Path) -> None:
    """Arivazhagan et al. 2019: joint descent on both, an upload of phi."""
    lab = lab_of(tmp_path, "fedper", {}, HIDDEN)
    net = Network(lab)
    phi = {n: net.start[n] for n in PHI}
    psi = {i: {n: net.start[n] for n in PSI} for i in net.x}
    for t, sampled in net.rounds():
        ends = {i: net.sgd(phi | psi[i], plain, i, t) for i in sampled}
        phi = net.mean(ends, PHI)
        psi |= {i: {n: p[n] for n in PSI} for i, p in ends.items()}
    server = lab.run()
    assert_same(flat(server.shared, PHI), flat(phi, PHI))
    for i, own in psi.items():
        assert_same(flat(lab.private(i), PSI), flat(own, PSI))
    assert abs(flat(phi, PHI) - fedavg_of(net)).max() > 1e-3


def test_fedrep_is_the_papers(tmp_path: Path) -> None:
    """Collins et al. 2021, Algorithm 1: the head on the received backbone, then the backbone under the new head."""
    lab = lab_of(tmp_path, "fedrep", {"head_share": 0.7}, HIDDEN, federation__local_epochs=3)
    net = Network(lab)
    phi = {n: net.start[n] for n in PHI}
    psi = {i: {n: net.start[n] for n in PSI} for i in net.x}
    for t, sampled in net.rounds():
        ends = {}
        for i in sampled:
            p = net.sgd(phi | psi[i], plain, i, t, PSI, epochs=range(2))
            psi[i] = {n: p[n] for n in PSI}
            ends[i] = net.sgd(p, plain, i, t, PHI, epochs=range(1), phase=1)
        phi = net.mean(ends, PHI)
    server = lab.run()
    assert server.shared.keys() == set(PHI)
    assert_same(flat(server.shared, PHI), flat(phi, PHI))
    for i, own in psi.items():
        assert_same(flat(lab.private(i), PSI), flat(own, PSI))


def test_moon_is_the_papers_when_clients_are_away(tmp_path: Path) -> None:
    """Li et al. 2021, Algorithm 1. z_prev is of the client's last model, however old; before there is one, of the received."""
    mu, temperature = 2.0, 0.4
    lab = lab_of(tmp_path, "moon", {"mu": mu, "temperature": temperature, "dim": 3}, HIDDEN)
    net = Network(lab)

    def z(p: P, x: Tensor) -> Tensor:
        first, second = ((p[f"path.layers.{k}.weight"], p[f"path.layers.{k}.bias"]) for k in (0, 2))
        found = functional.linear(functional.linear(hidden(p, x), *first).relu(), *second)
        return found / found.norm(dim=1, keepdim=True)

    theta, last, away = net.start, dict[str, P](), 0
    for t, sampled in net.rounds():
        ends = {}
        for i in sampled:
            received, previous = theta, last.get(i, theta)

            def loss(p: P, x: Tensor, y: Tensor, near: P = received, far: P = previous) -> Tensor:
                positive, negative = (((z(p, x) * z(q, x)).sum(dim=1) / temperature).exp() for q in (near, far))
                return plain(p, x, y) - mu * (positive / (positive + negative)).log().mean()

            ends[i] = net.sgd(theta, loss, i, t)
            away += i in last and i not in lab.schedule[t - 1]
        last |= ends
        theta = net.mean(ends)
    assert away == 2, "a and c were away for a round"
    server = lab.run()
    assert_same(flat(server.shared, theta), flat(theta, theta))
    kept = [n for n in theta if n not in PSI]
    for i, p in last.items():
        assert_same(flat(lab.private(i), kept, STATE), flat(p, kept))
    assert abs(flat(theta, PHI) - fedavg_of(net)).max() > 1e-3


def test_gpfl_is_the_papers(tmp_path: Path) -> None:
    """Zhang et al. 2023, Algorithm 1 with the losses of its section 3, on embeddings just received."""
    lam, mu = 0.3, 0.1
    lab = lab_of(tmp_path, "gpfl", {"lam": lam, "mu": mu}, HIDDEN)
    net = Network(lab)
    gce = "path.embedding.weight"
    path = [n for n in net.start if n.startswith("path.")]

    def cov(p: P, f: Tensor, u: Tensor) -> Tensor:
        branch = {}
        for what in ("gamma", "beta"):
            h = functional.linear(u, p[f"path.cov.{what}.0.weight"], p[f"path.cov.{what}.0.bias"]).relu()
            h = (h - h.mean()) / (h.var(correction=0) + 1e-5).sqrt()
            branch[what] = h * p[f"path.cov.{what}.2.weight"] + p[f"path.cov.{what}.2.bias"]
        return ((branch["gamma"] + 1) * f + branch["beta"]).relu()

    shared, psi = net.start, {i: {n: net.start[n] for n in PSI} for i in net.x}
    for t, sampled in net.rounds():
        ends = {}
        for i in sampled:

            def loss(p: P, x: Tensor, y: Tensor, e: Tensor = shared[gce], share: Tensor = net.share[i]) -> Tensor:
                f = hidden(p, x)
                personal, general = cov(p, f, share @ e), cov(p, f, e.mean(dim=0))
                similar = (general / general.norm(dim=1, keepdim=True)) @ (p[gce] / p[gce].norm(dim=1, keepdim=True)).T
                angle = functional.cross_entropy(similar, y)
                magnitude = (general - e[y]).square().sum().sqrt()
                decay = sum(p[n].square().sum() for n in path) / 2
                own: Tensor = functional.cross_entropy(functional.linear(personal, p[WEIGHT], p[BIAS]), y)
                return own + angle + lam * magnitude + mu * decay

            ends[i] = net.sgd(shared | psi[i], loss, i, t)
            psi[i] = {n: ends[i][n] for n in PSI}
        shared = net.mean(ends)
    server = lab.run()
    assert server.shared.keys() == {*PHI, *path}
    assert_same(flat(server.shared, server.shared), flat(shared, server.shared))
    for i, own in psi.items():
        assert_same(flat(lab.private(i), PSI), flat(own, PSI))


def test_fediir_is_the_papers_with_the_mean_gradient_of_the_round_before(tmp_path: Path) -> None:
    """Guo et al. 2023: || grad_psi - G ||^2, its own gradient through both. G: a moving mean over all batches, at theta^t."""
    penalty, ema = 0.9, 0.4
    lab = lab_of(tmp_path, "fediir", {"penalty": penalty, "ema": ema}, HIDDEN)
    net = Network(lab)
    theta, goal = net.start, dict[str, Tensor]()
    for t, sampled in net.rounds():

        def loss(p: P, x: Tensor, y: Tensor, goal: P = goal) -> Tensor:
            task = plain(p, x, y)
            own = torch.autograd.grad(task, [p[n] for n in PSI], create_graph=True)
            away = [(g - goal[n]).square().sum() for n, g in zip(PSI, own, strict=True) if goal]
            return task + penalty * torch.stack(away).sum() if away else task

        received = {n: w.clone().requires_grad_() for n, w in theta.items()}
        batches = [pair for i in sampled for pair in zip(net.x[i].split(BATCH), net.y[i].split(BATCH), strict=True)]
        seen = [torch.autograd.grad(plain(received, x, y), [received[n] for n in PSI]) for x, y in batches]
        theta = net.mean({i: net.sgd(theta, loss, i, t) for i in sampled})
        means = {n: torch.stack([g[k] for g in seen]).mean(dim=0) for k, n in enumerate(PSI)}
        goal = {n: ema * goal.get(n, torch.zeros_like(m)) + (1 - ema) * m for n, m in means.items()}
    server = lab.run()
    assert_same(flat(server.shared, theta), flat(theta, theta))
    assert_same(flat(server.extra, PSI, "fediir/mean/"), flat(goal, PSI))
    assert abs(flat(theta, PHI) - fedavg_of(net)).max() > 1e-3


def test_fedproto_is_the_papers(tmp_path: Path) -> None:
    """Tan et al. 2022, Algorithm 1: own models, and the distance of features to everybody's class means."""
    lam = 3.0
    lab = lab_of(tmp_path, "fedproto", {"lam": lam}, HIDDEN)
    net = Network(lab)
    own, means = dict.fromkeys(net.x, net.start), torch.empty(0)
    for t, sampled in net.rounds():

        def loss(p: P, x: Tensor, y: Tensor, means: Tensor = means) -> Tensor:
            away = (hidden(p, x) - means[y]).square().sum(dim=1).mean() / HIDDEN if len(means) else 0
            return plain(p, x, y) + lam * away

        sums, counts = torch.zeros(CLASSES, HIDDEN, dtype=torch.float64), torch.zeros(CLASSES, 1)
        for i in sampled:
            own[i] = net.sgd(own[i], loss, i, t)
            for f, y in zip(hidden(own[i], net.x[i]), net.y[i], strict=True):
                sums[y] += f
                counts[y] += 1
        means = sums / counts
    server = lab.run()
    assert_same(server.extra["fedproto/prototypes"].double().numpy(), means.numpy())
    for i, p in own.items():
        assert_same(flat(lab.private(i), p), flat(p, p))
    assert abs(flat(own["a"], own["a"]) - flat(net.sgd(net.start, plain, "a", 0), own["a"])).max() > 1e-2


def test_feddat_is_the_papers(tmp_path: Path) -> None:
    """Chen et al. 2024: each adapter learns the task and the other's answer; a plain mean of the shared one."""
    lab = lab_of(tmp_path, "feddat", {"reduction": 2, "temperature": 2.0}, HIDDEN)
    net = Network(lab)
    shared = tuple(n for n in net.start if ".shared." in n)
    private = (*(n for n in net.start if ".own." in n), *PSI)

    def adapter(p: P, kind: str, x: Tensor) -> Tensor:
        first, second = ((p[f"path.pairs.0.{kind}.{k}.weight"], p[f"path.pairs.0.{kind}.{k}.bias"]) for k in (0, 2))
        return functional.linear(functional.linear(x, *first).relu(), *second)

    theta, own = net.start, {i: {n: net.start[n] for n in private} for i in net.x}
    for t, sampled in net.rounds():

        def loss(p: P, x: Tensor, y: Tensor, kept: P = theta) -> Tensor:
            f = hidden(p, x)
            teacher = functional.linear(f + adapter(p, "own", f) / 2 + adapter(kept, "shared", f) / 2, p[WEIGHT], p[BIAS])
            student = functional.linear(f + adapter(p, "shared", f), p[WEIGHT], p[BIAS])
            total = functional.cross_entropy(teacher, y) + functional.cross_entropy(student, y)
            for learner, taught in ((teacher, student), (student, teacher)):
                wanted, got = (taught.detach() / 2).softmax(dim=1), (learner / 2).softmax(dim=1)
                total = total + 4 * (wanted * (wanted / got).log()).sum(dim=1).mean()
            return total / 2

        ends = {i: net.sgd(theta | own[i], loss, i, t, (*shared, *private)) for i in sampled}
        own |= {i: {n: p[n] for n in private} for i, p in ends.items()}
        theta = net.start | {n: torch.stack([p[n] for p in ends.values()]).mean(dim=0) for n in shared}
    server = lab.run()
    assert server.shared.keys() == set(shared)
    assert_same(flat(server.shared, shared), flat(theta, shared))
    assert abs(flat(theta, shared) - flat(net.start, shared)).max() > 1e-2
    for i, p in own.items():
        assert_same(flat(lab.private(i), private), flat(p, private))


def test_fedbn_is_the_papers(tmp_path: Path) -> None:
    """Li et al. 2021, Algorithm 1, on a convolution: everything but BatchNorm is averaged, which each client keeps."""
    lab = lab_of(tmp_path, "fedbn", {}, None, model__norm="batch")
    net = Network(lab)
    net.x = {i: torch.from_numpy(images(lab, i))[:, None] for i in net.x}
    conv, norm = (tuple(f"backbone.{what}.{n}" for n in ("weight", "bias")) for what in ("conv", "norm"))

    def loss(p: P, x: Tensor, y: Tensor) -> Tensor:
        maps = functional.conv2d(x - 0.5, *(p[n] for n in conv), stride=4)
        mean, variance = maps.mean(dim=(0, 2, 3)), maps.var(dim=(0, 2, 3), correction=0)
        scale = p[norm[0]] / (variance + 1e-5).sqrt()
        maps = maps * scale[:, None, None] + (p[norm[1]] - mean * scale)[:, None, None]
        return functional.cross_entropy(functional.linear(maps.relu().mean(dim=(2, 3)), p[WEIGHT], p[BIAS]), y)

    theta = {n: net.start[n] for n in (*conv, *PSI)}
    own = {i: {n: net.start[n] for n in norm} for i in net.x}
    for t, sampled in net.rounds():
        ends = {i: net.sgd(theta | own[i], loss, i, t) for i in sampled}
        own |= {i: {n: p[n] for n in norm} for i, p in ends.items()}
        theta = net.mean(ends, tuple(theta))
    server = lab.run()
    assert server.shared.keys() == theta.keys()
    assert_same(flat(server.shared, theta), flat(theta, theta))
    for i, p in own.items():
        assert_same(flat(lab.private(i), norm), flat(p, norm))
