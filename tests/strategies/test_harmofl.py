from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from omnifm.errors import FederationError
from omnifm.federation.messages import Reply
from omnifm.tasks.base import Batch
from tests.support import HOSPITALS, NEIGHBOURS, SIZE, Altered, Lab, Spy, differing, make_lab, spy

OFF: dict[str, Any] = {"amplitude_norm": False, "perturbation": 0.0}
NAME = f"harmofl/amplitude/1x{SIZE}x{SIZE}"


def images(lab: Lab, client: str) -> np.ndarray:
    train = lab.task.client_data(client).train
    return train.batch(torch.arange(len(train))).image.double().numpy()


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_with_both_halves_off_it_is_fedavg_with_equal_weights_bit_for_bit(norm: str, tmp_path: Path) -> None:
    ours = make_lab(tmp_path / "1", "harmofl", OFF, model__norm=norm)
    plain = make_lab(tmp_path / "2", "fedavg", federation__weighting="equal", model__norm=norm)
    assert differing(ours.snapshot(ours.run()), plain.snapshot(plain.run())) == []
    assert ours.evaluate(ours.run()).views == plain.evaluate(plain.run()).views


@pytest.mark.parametrize("log_mean", [False, True])
@pytest.mark.parametrize(("window", "radius"), [(0.0, 0), (0.07, 1), (0.2, 3), (0.49, 7)])
def test_the_amplitude_is_the_plain_mean_of_the_clients_means(window: float, radius: int, log_mean: bool, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "harmofl", {"window": window, "log_mean": log_mean}, federation__rounds=1)
    server = lab.run()
    forth, back = (np.log1p, np.expm1) if log_mean else (lambda a: a, lambda a: a)
    means = [forth(np.abs(np.fft.fft2(images(lab, h.id), norm="ortho"))).mean(axis=0) for h in HOSPITALS]
    expected = back(sum(means) / 4)
    found = server.extra[NAME]
    assert found.shape == (1, 2 * radius + 1, radius + 1)
    for fy in range(-radius, radius + 1):
        for fx in range(radius + 1):
            assert float(found[0, fy, fx]) == pytest.approx(expected[0, fy, fx], rel=1e-5)


def watched(lab: Lab, *, training: bool) -> list[Batch]:
    """Collect what the network sees in training or in prediction."""
    found: list[Batch] = []
    forward = lab.site.model.backbone.forward

    def look(inputs: Any) -> Any:
        if lab.site.model.training == training:
            found.append(inputs)
        return forward(inputs)

    lab.site.model.backbone.forward = look  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("training", [True, False])
def test_every_image_has_the_mean_amplitude_and_its_own_phase(training: bool, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "harmofl", {"window": 0.07, "perturbation": 0.0}, hospitals=HOSPITALS[1:3])
    found = watched(lab, training=training)
    server = lab.run()
    lab.evaluate(server)
    amplitude = server.extra[NAME].double().numpy()
    raw = {x.tobytes(): x for h in HOSPITALS[1:3] for s in ("train", "test") for x in whole(lab, h.id, s)}
    assert raw and len(found) >= 4
    phases = [np.angle(np.fft.rfft2(x)) for x in raw.values()]
    for inputs in found:
        spectrum = np.fft.rfft2(inputs.image.double().numpy(), norm="ortho")
        window = np.abs(spectrum)[:, :, :2, :2]
        np.testing.assert_allclose(window, np.broadcast_to(amplitude[:, :2], window.shape), atol=1e-5)
        for one in spectrum:
            away = [np.abs(np.exp(1j * np.angle(one)) - np.exp(1j * phase))[0, 1:4, 1:4].max() for phase in phases]
            assert min(away) < 1e-3
    # With the brightness alone all images have one mean.
    dark = make_lab(tmp_path / "2", "harmofl", {"perturbation": 0.0})
    seen = watched(dark, training=training)
    dark.evaluate(dark.run())
    means = torch.cat([inputs.image.mean(dim=(1, 2, 3)) for inputs in seen])
    assert float(means.max() - means.min()) < 1e-6


def whole(lab: Lab, client: str, split: str) -> Tensor:
    part = lab.task.client_data(client).split(split)
    return part.batch(torch.arange(len(part))).image.double().numpy()  # type: ignore[return-value]


def test_the_amplitude_is_sent_up_once_and_in_its_window_alone(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "harmofl", {"window": 0.07}, engine=Spy)
    lab.evaluate(lab.run())
    assert {r.kind: set(r.extra) for r in spy(lab).replies if r.kind != "evaluate"} == {"describe": {NAME}, "train": set()}
    for request in spy(lab).requests:
        assert {n: t.shape for n, t in request.extra.items()} == ({} if request.kind == "describe" else {NAME: (1, 3, 2)})


def test_the_gradient_is_that_of_the_worse_place(tmp_path: Path) -> None:
    """Two clients in full batches, momentum off; the perturbation is of all parameters together."""
    alpha = 0.3
    changes: dict[str, Any] = {"hospitals": HOSPITALS[:1], "optimiser__batch_size": 10, "optimiser__momentum": 0.0}
    lab = make_lab(tmp_path / "1", "harmofl", {"amplitude_norm": False, "perturbation": alpha}, **changes)
    model = make_lab(tmp_path / "2", **changes).site.model
    train = lab.task.client_data("a").train
    batch = train.batch(torch.arange(len(train)))
    parameters = list(model.parameters())

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(lab.task.loss(model(batch.inputs).prediction, batch), parameters)

    for _ in range(2):
        first = gradient()
        length = sum(g.square().sum() for g in first) ** 0.5
        for p, g in zip(parameters, first, strict=True):
            p.data += alpha * g / length
        second = gradient()
        for p, g, h in zip(parameters, first, second, strict=True):
            p.data -= alpha * g / length
            p.data -= 0.1 * (h + 1e-4 * p.data)
    server = lab.run()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(server.shared[name], tensor, atol=2e-6, rtol=1e-5)


def test_the_second_pass_leaves_running_statistics_alone(tmp_path: Path) -> None:
    """From one start, the first step's statistics are those of a plain run."""
    changes: dict[str, Any] = {"model__norm": "batch", "federation__rounds": 1, "optimiser__batch_size": 99}
    ours = make_lab(tmp_path / "1", "harmofl", {"amplitude_norm": False}, **changes).run().shared
    plain = make_lab(tmp_path / "2", federation__weighting="equal", **changes).run().shared
    moving = [n for n in plain if "running" in n or "tracked" in n]
    assert len(moving) == 3 and differing({n: ours[n] for n in moving}, {n: plain[n] for n in moving}) == []
    assert not torch.equal(ours["backbone.conv.weight"], plain["backbone.conv.weight"])


def test_amplitudes_that_do_not_fit_name_the_client(tmp_path: Path) -> None:
    def alter(reply: Reply) -> Reply:
        return replace(reply, extra={n: -t for n, t in reply.extra.items()}) if reply.client == "c" else reply

    lab = make_lab(tmp_path, "harmofl", engine=lambda site: Altered(site, alter))
    with pytest.raises(FederationError, match="client c, round 0: its mean amplitude is not finite, or negative") as caught:
        lab.run()
    assert "\n" not in str(caught.value)


def test_an_image_of_another_shape_is_refused(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "harmofl", engine=Spy)
    lab.run()
    request = next(r for r in spy(lab).requests if r.kind == "train")
    predict = lab.site.predictor(request)
    with pytest.raises(FederationError, match="client a: there is no mean amplitude for images of 1x8x8"):
        predict(Batch(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1)))


def test_without_amplitudes_neighbourhoods_still_form(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "harmofl", {**NEIGHBOURS, "amplitude_norm": False}, engine=Spy)
    server = lab.run()
    told = [r.extra for r in spy(lab).replies if r.kind == "describe"]
    assert len(told) == 4 and all(set(extra) == {"signature"} for extra in told)
    assert NAME not in server.extra and server.meta["neighbourhoods"]
