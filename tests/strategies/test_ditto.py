from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from omnifm.federation.client import STATE
from omnifm.federation.messages import Request
from omnifm.federation.strategies.ditto import OWN
from tests.support import HOSPITALS, NEIGHBOURS, Lab, Spy, differing, make_lab, spy

FULL: dict[str, Any] = {"optimiser__batch_size": 99, "federation__rounds": 3}
NORM: dict[str, Any] = {"model__norm": "batch"}


def own(lab: Lab, client: str) -> dict[str, Tensor]:
    """v_i."""
    return {n.removeprefix(STATE + OWN): t for n, t in lab.private(client).items() if n.startswith(STATE + OWN)}


def close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 5e-6) -> None:
    assert a and a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, NEIGHBOURS])
@pytest.mark.parametrize("buffers", ["average", "local", "drop"])
def test_the_global_stream_is_fedavg_bit_for_bit(buffers: str, options: dict[str, Any], tmp_path: Path) -> None:
    changes = {**NORM, "model__buffers": buffers, "federation__participation": 0.5, "federation__rounds": 3}
    ours = make_lab(tmp_path / "1", "ditto", options, engine=Spy, data__augment="flip_shift", **changes)
    plain = make_lab(tmp_path / "2", "fedavg", options, engine=Spy, data__augment="flip_shift", **changes)
    first, second = ours.run(), plain.run()
    assert differing(first.shared, second.shared) == [] and differing(first.extra, second.extra) == []
    for a, b in zip(spy(ours).trained(), spy(plain).trained(), strict=True):
        assert differing(dict(a.tensors), dict(b.tensors)) == [] and not a.extra
    for h in HOSPITALS:
        kept = {n: t for n, t in ours.private(h.id).items() if not n.startswith(STATE)}
        assert differing(kept, plain.private(h.id)) == []
    assert ours.evaluate(first).views["global"] == plain.evaluate(second).views["global"]


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_without_the_pull_a_clients_own_model_is_locals(norm: str, tmp_path: Path) -> None:
    """In full batches, whose order is another; running statistics are its own as well."""
    ours = make_lab(tmp_path / "1", "ditto", {"personal_pull": 0.0}, model__norm=norm, **FULL)
    local = make_lab(tmp_path / "2", "local", model__norm=norm, **FULL)
    server = ours.run()
    found = local.evaluate(local.run())
    for h in HOSPITALS:
        close(own(ours, h.id), local.private(h.id))
    assert ours.evaluate(server).clients["a"]["personal"] == pytest.approx(found.clients["a"]["personal"], abs=1e-4)
    pulled = make_lab(tmp_path / "3", "ditto", model__norm=norm, **FULL)
    pulled.run()
    with pytest.raises(AssertionError):
        close(own(pulled, "a"), local.private("a"))


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    """v_i is pulled to the model as received in the round, which three steps have by then moved away from."""
    lab = make_lab(
        tmp_path,
        "ditto",
        {"personal_pull": 2.0},
        optimiser__batch_size=99,
        optimiser__momentum=0.0,
        federation__local_epochs=3,
    )
    model = make_lab(tmp_path, "fedavg").site.model
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    v = {h.id: dict(theta) for h in HOSPITALS}

    def train(start: dict[str, Tensor], client: str, pull: float) -> dict[str, Tensor]:
        data = lab.task.client_data(client).train
        batch = data.batch(torch.arange(len(data)))
        now = {n: t.clone() for n, t in start.items()}
        for _ in range(3):
            for n, p in model.named_parameters():
                p.data.copy_(now[n])
            loss = functional.cross_entropy(model(batch.inputs).prediction, batch.target)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for n, g in zip(now, gradients, strict=True):
                now[n] -= 0.1 * (g + 1e-4 * now[n] + pull * (now[n] - theta[n]))
        return now

    for _ in range(2):
        v = {h.id: train(v[h.id], h.id, 2.0) for h in HOSPITALS}
        ends = {h.id: train(theta, h.id, 0.0) for h in HOSPITALS}
        theta = {n: torch.stack([h.train / 36 * ends[h.id][n] for h in HOSPITALS]).sum(0) for n in theta}
    server = lab.run()
    close(dict(server.shared), theta)
    for h in HOSPITALS:
        close(own(lab, h.id), v[h.id])


def test_a_strong_pull_ends_at_the_global_model(tmp_path: Path) -> None:
    """With eta lambda = 1 and plain SGD, v_i is one gradient's step away from the received model, wherever it was before."""
    changes: dict[str, Any] = {"optimiser__momentum": 0.0, "optimiser__lr": 1e-4, "engine": Spy}
    lab = make_lab(tmp_path, "ditto", {"personal_pull": 1e4}, **changes)
    lab.run()
    received = next(r for r in spy(lab).requests if (r.round, r.client) == (1, "d")).tensors
    close(own(lab, "d"), dict(received), atol=5e-4)


@pytest.mark.parametrize("buffers", ["average", "local", "drop"])
def test_what_is_scored_and_shown_is_the_clients_own_model(buffers: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "ditto", {"personal_pull": 0.1}, model__buffers=buffers, **NORM, federation__local_epochs=3)
    server = lab.run()
    v = own(lab, "b")
    assert set(v) == set(lab.site.model.state_dict())
    shown, batch = lab.site.predict(Request("evaluate", 2, "b", server.shared), torch.arange(6))
    plain = make_lab(tmp_path / "plain", **NORM).site.model
    predictions: list[Tensor] = []
    for tensors in (v, {**v, **server.shared}):
        plain.load_state_dict(tensors)
        plain.eval()
        with torch.no_grad():
            predictions.append(plain(batch.inputs).prediction)
    assert torch.equal(shown, predictions[0]) and not torch.allclose(shown, predictions[1], atol=1e-4)
    states = lab.site.handle(Request("evaluate", 2, "b", server.shared, settings={"split": "test", "view": "personal"})).extra
    torch.testing.assert_close(states["probability"].float(), predictions[0].softmax(1), atol=1e-6, rtol=1e-5)


def test_the_global_view_has_nothing_of_the_clients(tmp_path: Path) -> None:
    ours, plain = make_lab(tmp_path / "1", "ditto"), make_lab(tmp_path / "2")
    found = ours.evaluate(ours.run())
    assert found.views["global"] == plain.evaluate(plain.run()).views["global"] and ours.site.has_global()


def test_fine_tuning_starts_from_the_clients_own_model(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "ditto", {"personal_pull": 0.0}, **FULL)
    local = make_lab(tmp_path / "local", "local", **FULL)
    first = lab.evaluate(lab.run(), finetune=True)
    second = local.evaluate(local.run(), finetune=True)
    for h in HOSPITALS:
        assert first.clients[h.id]["finetuned"] == pytest.approx(second.clients[h.id]["finetuned"], abs=1e-4)


def test_a_clients_own_model_starts_from_what_it_receives_and_waits_for_it(tmp_path: Path) -> None:
    """c comes in the second round; a is away then, and keeps what it had."""
    schedule = [["a", "b"], ["b", "c"]]
    lab = make_lab(tmp_path / "1", "ditto", {"personal_pull": 0.0}, engine=Spy, schedule=schedule, **FULL)
    seen: list[dict[str, Tensor]] = []
    lab.after_round = lambda lab, server, done: seen.append(own(lab, "a"))
    server = lab.run()
    assert seen[0] and differing(seen[0], seen[1]) == []
    # Without the pull, v_c took the same full-batch steps as theta_c, from the same start.
    upload = next(r for r in spy(lab).trained(1) if r.client == "c").tensors
    close(own(lab, "c"), dict(upload))
    assert own(lab, "d") == {}
    request = Request("evaluate", 2, "d", server.shared)
    shown, batch = lab.site.predict(request, torch.arange(6))
    model = make_lab(tmp_path / "2").site.model
    model.load_state_dict(server.shared)
    with torch.no_grad():
        assert torch.equal(shown, model.eval()(batch.inputs).prediction)


def test_a_clients_own_model_never_leaves_it(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "ditto", engine=Spy, **NORM)
    secrets: set[bytes] = set()
    lab.after_round = lambda lab, server, done: secrets.update(
        t.numpy().tobytes() for h in HOSPITALS for t in own(lab, h.id).values() if t.numel() > 1
    )
    lab.evaluate(lab.run(), finetune=True)
    assert len(secrets) == 2 * len(HOSPITALS) * 8
    for message in spy(lab).messages():
        carried = [*message.tensors.values(), *message.extra.values()]
        assert not secrets & {t.contiguous().numpy().tobytes() for t in carried}
