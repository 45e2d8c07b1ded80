import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from omnifm.errors import FederationError
from omnifm.federation.messages import Reply
from omnifm.federation.strategies import feddg
from omnifm.federation.strategies.feddg import boundary_loss
from omnifm.spectral.fft import window_amplitude, with_window
from omnifm.tasks.base import Batch, ClientData, Inputs
from tests.support import HOSPITALS, SIZE, Altered, Lab, MemorySplit, Spy, differing, make_lab, spy

SHAPE = f"feddg/amplitude/1x{SIZE}x{SIZE}"


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a and a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_without_styles_it_is_fedavg_bit_for_bit(norm: str, tmp_path: Path) -> None:
    ours, plain = make_lab(tmp_path / "1", "feddg", {"styles": 0}, model__norm=norm), make_lab(tmp_path / "2", model__norm=norm)
    assert differing(ours.snapshot(ours.run()), plain.snapshot(plain.run())) == []


def test_who_has_nobody_to_learn_from_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    """A client's own amplitudes never come back to it."""
    ours = make_lab(tmp_path / "1", "feddg", hospitals=HOSPITALS[:1]).run()
    assert set(ours.extra) == {f"{SHAPE}/a"}
    assert differing(ours.shared, make_lab(tmp_path / "2", hospitals=HOSPITALS[:1]).run().shared) == []


def test_the_bank_is_a_part_of_everybodys_images_without_ones_own(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "feddg", {"window": 0.07, "bank_share": 0.3}, engine=Spy)
    server = lab.run()
    assert {n: len(t) for n, t in server.extra.items()} == {f"{SHAPE}/{h.id}": math.ceil(0.3 * h.train) for h in HOSPITALS}
    for h in HOSPITALS:
        train = lab.task.client_data(h.id).train
        known = window_amplitude(train.batch(torch.arange(len(train))).image, 1)
        found = [int((known == one).flatten(1).all(dim=1).nonzero()) for one in server.extra[f"{SHAPE}/{h.id}"]]
        assert len(set(found)) == len(found), "no image twice"
    for request in spy(lab).requests:
        others = {f"{SHAPE}/{h.id}" for h in HOSPITALS if h.id != request.client}
        assert set(request.extra) == (set() if request.kind == "describe" else others)
    assert all(not r.extra for r in spy(lab).trained())


class Passes:
    """Collects what the network trains on: the images, and where it stands."""

    def __init__(self, lab: Lab) -> None:
        self.images: list[Tensor] = []
        self.weights: list[Tensor] = []
        backbone = lab.site.model.backbone
        forward = backbone.forward

        def look(inputs: Inputs) -> Any:
            if backbone.training:
                self.images.append(inputs.image.clone())
                self.weights.append(backbone.get_parameter("conv.weight").detach().clone())
            return forward(inputs)

        backbone.forward = look  # type: ignore[method-assign]


def test_the_outer_images_have_others_amplitudes_and_their_own_phase(tmp_path: Path) -> None:
    options = {"window": 0.07, "bank_share": 0.5, "styles": 2}
    grey = {h.id: in_the_middle(make_lab(tmp_path / "0").task.client_data(h.id)) for h in HOSPITALS}
    lab = make_lab(tmp_path / "1", "feddg", options, data=grey, schedule=[["c"]], federation__rounds=1)
    passes = Passes(lab)
    bank = lab.run().extra
    assert len(passes.images) == 3 * 3  # three batches, each seen three times
    donors: list[str] = []
    for i in (0, 3, 6):
        x = passes.images[i]
        for styled in passes.images[i + 1 : i + 3]:
            window = window_amplitude(styled, 1)
            torch.testing.assert_close(with_window(styled, window_amplitude(x, 1)), x, atol=1e-5, rtol=0)
            for one in window:
                fits = [name for name, known in bank.items() if bool(((known - one).abs().amax(dim=(1, 2, 3)) < 1e-4).any())]
                assert len(fits) == 1
                donors += fits
        assert not torch.equal(passes.images[i + 1], passes.images[i + 2])
    assert set(donors) == {f"{SHAPE}/{client}" for client in "abd"}, "every image has a donor of its own"


def in_the_middle(data: ClientData) -> ClientData:
    """Images of little contrast, so that no amplitude takes them out of [0, 1]."""
    return ClientData(*(MemorySplit(0.5 + 0.2 * (s.images - 0.5), s.labels) for s in vars(data).values()))


def test_the_outer_images_are_clipped_to_the_range_of_images(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "feddg", {"window": 0.2}, schedule=[["c"]], federation__rounds=1)
    passes = Passes(lab)
    lab.run()
    outer = torch.cat(passes.images[1::2])
    assert float(outer.min()) == 0 and float(outer.max()) == 1


@pytest.mark.parametrize("clip", [100.0, 1e-2])
def test_a_step_agrees_with_one_written_by_hand(clip: float, tmp_path: Path) -> None:
    """Inner gradient at theta, outer gradient at theta', both applied at theta; the outer images are those that were seen."""
    changes: dict[str, Any] = {"optimiser__batch_size": 99, "optimiser__momentum": 0.0, "federation__rounds": 1}
    options = {"window": 0.2, "inner_lr": 0.5, "inner_clip": clip, "styles": 2}
    lab = make_lab(tmp_path / "1", "feddg", options, schedule=[["c"]], **changes)
    passes = Passes(lab)
    server = lab.run()
    first, *outer = passes.images
    assert len(outer) == 2
    train = lab.task.client_data("c").train
    images = train.batch(torch.arange(len(train))).image
    labels = torch.stack([(images == x).flatten(1).all(dim=1).nonzero()[0, 0] for x in first]) % 3
    model = make_lab(tmp_path / "2").site.model
    parameters = list(model.parameters())

    def gradient(image: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(functional.cross_entropy(model(Inputs(image)).prediction, labels), parameters)

    start = [p.detach().clone() for p in parameters]
    inner = gradient(first)
    for p, g in zip(parameters, inner, strict=True):
        p.data -= 0.5 * g.clamp(-clip, clip)
    assert all(torch.allclose(w, dict(model.named_parameters())["backbone.conv.weight"], atol=1e-6) for w in passes.weights[1:])
    one, two = (gradient(image) for image in outer)
    for p, s, g, h, k in zip(parameters, start, inner, one, two, strict=True):
        p.data = s - 0.1 * (g + (h + k) / 2 + 1e-4 * s)
    close(server.shared, dict(model.state_dict()))


def test_interpolation_lies_between_both_amplitudes(tmp_path: Path) -> None:
    options = {"interpolate": True, "bank_share": 0.01}
    lab = make_lab(tmp_path, "feddg", options, hospitals=HOSPITALS[:2], schedule=[["a"]], federation__rounds=1)
    passes = Passes(lab)
    given = lab.run().extra[f"{SHAPE}/b"]
    shares = []
    for x, styled in zip(passes.images[::2], passes.images[1::2], strict=True):
        own, now = (window_amplitude(image, 0).flatten() for image in (x, styled))
        shares += ((now - own) / (given.flatten() - own)).tolist()
    assert len(shares) == 10 and all(-1e-3 < s < 1.001 for s in shares) and max(shares) - min(shares) > 0.2


def test_the_outer_pass_leaves_running_statistics_alone(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model__norm": "batch", "federation__rounds": 1, "optimiser__batch_size": 99}
    ours = make_lab(tmp_path / "1", "feddg", **changes).run().shared
    plain = make_lab(tmp_path / "2", **changes).run().shared
    moving = [n for n in plain if "running" in n or "tracked" in n]
    assert len(moving) == 3 and differing({n: ours[n] for n in moving}, {n: plain[n] for n in moving}) == []
    assert not torch.equal(ours["backbone.conv.weight"], plain["backbone.conv.weight"])


def test_amplitudes_that_do_not_fit_name_the_client(tmp_path: Path) -> None:
    def alter(reply: Reply) -> Reply:
        return replace(reply, extra={n: -t for n, t in reply.extra.items()}) if reply.client == "c" else reply

    lab = make_lab(tmp_path, "feddg", engine=lambda site: Altered(site, alter))
    with pytest.raises(FederationError, match="client c, round 0: its part of the bank is not finite, or negative") as caught:
        lab.run()
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------- the boundary term
def disc(*radii: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(16) - 8, torch.arange(16) - 8, indexing="ij")
    return torch.stack([(y * y + x * x < r * r).long() for r in radii])


def masked(target: Tensor) -> Batch:
    return Batch(torch.zeros(len(target), 1, 16, 16), target, torch.arange(len(target)))


def slow_boundary(tokens: Tensor, others: Tensor, masks: Tensor) -> float:
    """Pixel by pixel and pair by pair."""
    named: list[tuple[str, Tensor]] = []
    for field in (tokens, others):
        for i, mask in enumerate(masks):
            weights = {kind: torch.zeros(16) for kind in ("contour", "background")}
            for y in range(16):
                for x in range(16):
                    near, wide = (mask[max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1] > 0 for r in (1, 5))
                    cell = 4 * (y // 4) + x // 4
                    weights["contour"][cell] += bool(mask[y, x] > 0 and not near.all())
                    weights["background"][cell] += bool(mask[y, x] == 0 and wide.any())
            for kind, weight in weights.items():
                mean = (weight[:, None] * field[i]).sum(0) / weight.sum()
                named.append((kind, mean / mean.norm()))
    terms = []
    for i, (kind, z) in enumerate(named):
        unlike = sum(float((z @ other / 0.05).exp()) for k, other in named if k != kind)
        for j, (k, other) in enumerate(named):
            if k == kind and j != i:
                alike = float((z @ other / 0.05).exp())
                terms.append(-math.log(alike / (alike + unlike)))
    return sum(terms) / len(terms)


def test_the_boundary_term_agrees_with_a_slow_one() -> None:
    g = torch.Generator().manual_seed(1)
    tokens, others = torch.randn(2, 3, 16, 5, generator=g)
    masks = disc(3, 5, 6)
    found = boundary_loss(tokens, others, masked(masks))
    assert found is not None
    assert float(found) == pytest.approx(slow_boundary(tokens, others, masks), rel=1e-5)
    # An image without foreground has no contour; it takes no part.
    more = torch.cat([masks, torch.zeros_like(masks[:1])])
    again = boundary_loss(*(torch.cat([t, torch.randn(1, 16, 5, generator=g)]) for t in (tokens, others)), masked(more))
    assert again is not None and float(again) == pytest.approx(float(found))


def test_only_masks_have_a_boundary() -> None:
    tokens = torch.randn(3, 16, 5)
    for target in (torch.tensor([0, 1, 2]), disc(3, 4, 5).float(), torch.zeros(3, 16, 16, dtype=torch.int64)):
        assert boundary_loss(tokens, tokens, masked(target)) is None
    assert boundary_loss(tokens[:, :15], tokens[:, :15], masked(disc(3, 4, 5))) is None


def test_its_gradient_is_finite_and_goes_through_the_styled_images_alone() -> None:
    tokens, others = (torch.randn(2, 16, 5, requires_grad=True) for _ in range(2))
    loss = boundary_loss(tokens.detach(), others, masked(disc(3, 5)))
    assert loss is not None
    (gradient,) = torch.autograd.grad(loss, others)
    assert bool(gradient.isfinite().all()) and bool(gradient.any())


def test_the_boundary_term_is_added_with_its_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a term that is the sum of the head's bias, the outer gradient grows by its weight there."""
    changes: dict[str, Any] = {"optimiser__batch_size": 99, "optimiser__momentum": 0.0, "federation__rounds": 1}
    plain = make_lab(tmp_path / "1", "feddg", **changes).run().shared["head.linear.bias"]
    lab = make_lab(tmp_path / "2", "feddg", **changes)
    bias = lab.site.model.head.get_parameter("linear.bias")
    monkeypatch.setattr(feddg, "boundary_loss", lambda tokens, others, batch: bias.sum())
    torch.testing.assert_close(lab.run().shared["head.linear.bias"], plain - 0.1 * 0.1)
