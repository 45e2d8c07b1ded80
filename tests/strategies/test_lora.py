from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from omnifm.backbones.build import build_trunk
from omnifm.build import make_site, strategy_options
from omnifm.config import parse
from omnifm.errors import ConfigError
from omnifm.federation.low_rank import LowRank
from omnifm.federation.messages import Reply
from omnifm.federation.strategies.lora import refactorised
from tests.run.jobs import data_folder, raw_config
from tests.support import HOSPITALS, NEIGHBOURS, Altered, Lab, Spy, differing, make_config, make_lab, spy

LAYER = "backbone.conv.parametrizations.weight."
BASE, DOWN, UP = LAYER + "original", LAYER + "0.down", LAYER + "0.up"
PRODUCT = {"average": "exact"}


def factors(tensors: Any) -> tuple[np.ndarray, np.ndarray]:
    return tensors[DOWN].double().numpy(), tensors[UP].double().numpy()


def shifting(reply: Reply) -> Reply:
    """Clients whose factors have little in common."""
    g = torch.Generator().manual_seed(ord(reply.client))
    drawn = {n: torch.randn(t.shape, generator=g) for n, t in reply.tensors.items() if n in (DOWN, UP)}
    return replace(reply, tensors={**reply.tensors, **drawn})


@pytest.mark.parametrize("options", [{}, {"rank": 2, "alpha": 3.0}])
def test_untrained_it_is_the_plain_network_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    ours, plain = make_lab(tmp_path / "1", "lora", options), make_lab(tmp_path / "2")
    train = plain.task.client_data("a").train
    inputs = train.batch(torch.arange(10)).inputs
    assert torch.equal(ours.site.model(inputs).prediction, plain.site.model(inputs).prediction)


def test_the_change_is_alpha_over_r_times_the_product() -> None:
    weight = torch.randn(6, 3, 2, 2)
    change = LowRank(weight, 4, 10.0)
    change.up.data.normal_()
    expected = weight.clone()
    for i, j in np.ndindex(6, 12):
        expected.view(6, 12)[i, j] += 10 / 4 * sum(change.up[i, k] * change.down[k, j] for k in range(4)).item()
    torch.testing.assert_close(change(weight), expected)
    assert LowRank(torch.randn(3, 9), 8, 6.0).down.shape == (3, 9), "no more dimensions than the layer has"
    assert LowRank(torch.randn(3, 9), 8, 6.0).scale == 2.0


def test_every_layer_of_the_backbone_has_one(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "lora", {"rank": 2})
    model = lab.site.model
    trained = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {DOWN: (2, 16), UP: (8, 2), "head.linear.weight": (3, 8), "head.linear.bias": (3,)}
    layers = [m for m in model.backbone.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert layers and all(nn.utils.parametrize.is_parametrized(layer, "weight") for layer in layers)


def test_the_base_never_travels_and_never_changes(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "lora", engine=Spy, model__norm="batch", optimiser__weight_decay=0.1)
    frozen = {BASE, "backbone.conv.bias", "backbone.norm.weight", "backbone.norm.bias"}
    before = {n: t.clone() for n, t in lab.site.model.state_dict().items() if n in frozen}
    lab.evaluate(lab.run(), finetune=True)
    assert set(lab.site.sharing.frozen) == frozen
    assert differing(before, {n: t for n, t in lab.site.model.state_dict().items() if n in frozen}) == []
    for message in [*spy(lab).trained(), *(r for r in spy(lab).requests if r.kind != "describe")]:
        assert not frozen & message.tensors.keys() and not message.extra
        assert {DOWN, UP, "head.linear.weight"} <= message.tensors.keys()


def test_a_round_agrees_with_one_written_by_hand(tmp_path: Path) -> None:
    """Two rounds of a lone client: gradients of A and B through W + alpha / r B A, the base left alone."""
    changes: dict[str, Any] = {"hospitals": HOSPITALS[:1], "optimiser__batch_size": 10, "optimiser__momentum": 0.0}
    lab = make_lab(tmp_path / "1", "lora", {"rank": 2, "alpha": 3.0}, **changes)
    start = lab.start().shared
    down, up = (start[n].clone().requires_grad_() for n in (DOWN, UP))
    model = make_lab(tmp_path / "2", **changes).site.model
    conv, norm = model.backbone.get_submodule("conv"), model.backbone.get_submodule("norm")
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.GroupNorm)
    train = lab.task.client_data("a").train
    batch = train.batch(torch.arange(len(train)))
    parameters = [down, up, *model.head.parameters()]
    for _ in range(2):
        weight = conv.weight.detach() + 1.5 * (up @ down).view(8, 1, 4, 4)
        tokens = norm(functional.conv2d(batch.image - 0.5, weight, conv.bias, stride=4)).relu().flatten(2)
        loss = functional.cross_entropy(model.head.get_submodule("linear")(tokens.mean(2)), batch.target)
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data -= 0.1 * (g + 1e-4 * p.data)
    found = lab.run().shared
    names = [DOWN, UP, *(f"head.{n}" for n, _ in model.head.named_parameters())]
    assert set(names) == set(found)
    for name, tensor in zip(names, parameters, strict=True):
        torch.testing.assert_close(found[name], tensor.detach(), atol=2e-6, rtol=1e-5)


# --------------------------------------------------------------------------- the two means
def run_of(folder: Path, options: dict[str, Any], **changes: Any) -> tuple[Lab, list[Reply], dict[str, Tensor]]:
    lab = make_lab(folder, "lora", options, federation__rounds=1, **changes)
    replies: list[Reply] = []

    def keep(reply: Reply) -> Reply:
        replies.append(shifting(reply))
        return replies[-1]

    lab.engine = Altered(lab.site, keep)
    return lab, replies, lab.run().shared


def mean_product(replies: list[Reply], weights: list[float]) -> np.ndarray:
    products = [up @ down for down, up in (factors(r.tensors) for r in replies)]
    return sum(w * p for w, p in zip(weights, products, strict=True)) / sum(weights)


@pytest.mark.parametrize(("rank", "weighting"), [(8, "examples"), (3, "examples"), (3, "equal"), (1, "examples")])
def test_the_exact_mean_is_the_best_of_its_rank(rank: int, weighting: str, tmp_path: Path) -> None:
    lab, replies, shared = run_of(tmp_path, {**PRODUCT, "rank": rank}, federation__weighting=weighting)
    weights = [h.train if weighting == "examples" else 1 for h in HOSPITALS]
    mean = mean_product(replies, weights)
    u, s, v = np.linalg.svd(mean, full_matrices=False)
    best = u[:, :rank] * s[:rank] @ v[:rank]
    down, up = factors(shared)
    np.testing.assert_allclose(up @ down, best, atol=1e-5)
    (event,) = [e for e in lab.events if e["event"] == "round"]
    assert event["lora"]["lost"] == pytest.approx((s[rank:] ** 2).sum() / (s**2).sum(), abs=1e-9)
    # Balanced: both factors carry the same share.
    np.testing.assert_allclose(up.T @ up, down @ down.T, atol=1e-4)


def test_the_plain_mean_is_of_the_factors_and_not_of_the_products(tmp_path: Path) -> None:
    """The pitfall that `exact` is there for: mean(B) mean(A) is not mean(B A)."""
    weights = [h.train for h in HOSPITALS]
    _, replies, plain = run_of(tmp_path / "1", {})
    for name in (DOWN, UP):
        mean = sum(w * r.tensors[name].double() for w, r in zip(weights, replies, strict=True)) / 36
        torch.testing.assert_close(plain[name].double(), mean, atol=1e-6, rtol=1e-6)
    mean = mean_product(replies, weights)
    _, _, exact = run_of(tmp_path / "2", PRODUCT)
    off = [np.abs(up @ down - mean).max() for down, up in (factors(plain), factors(exact))]
    assert off[0] > 0.1 and off[1] < 1e-5
    rest = [n for n in plain if n not in (DOWN, UP)]
    assert differing({n: plain[n] for n in rest}, {n: exact[n] for n in rest}) == []


def test_a_lone_client_keeps_its_product(tmp_path: Path) -> None:
    _, (reply,), shared = run_of(tmp_path, {**PRODUCT, "rank": 2}, hospitals=HOSPITALS[:1])
    (a, b), (c, d) = factors(reply.tensors), factors(shared)
    np.testing.assert_allclose(d @ c, b @ a, atol=1e-5)


def test_a_server_step_moves_the_product_that_part_of_the_way(tmp_path: Path) -> None:
    lab, replies, first = run_of(tmp_path, {**PRODUCT, "server_step": 0.25})
    mean = mean_product(replies, [h.train for h in HOSPITALS])
    down, up = factors(first)
    np.testing.assert_allclose(up @ down, 0.25 * mean, atol=1e-5)
    server = lab.start()
    server.shared = {**first}
    replies.clear()
    lab.run(server)
    after = factors(server.shared)
    expected = 0.75 * up @ down + 0.25 * mean_product(replies, [h.train for h in HOSPITALS])
    np.testing.assert_allclose(after[1] @ after[0], expected, atol=1e-5)


def test_dimensions_that_the_mean_does_not_have_can_still_be_trained() -> None:
    """Two factors that are 0 would have no gradient ever again."""
    spare, up = torch.randn(3, 5), torch.zeros(7, 3)
    down, found, values = refactorised([(1.0, torch.randn(3, 5), up)] * 3, spare)
    assert torch.equal(down, spare) and not bool(found.any()) and not bool(values.any())
    up[:, 1] = torch.randn(7)
    one = torch.randn(3, 5)
    down, found, values = refactorised([(0.5, one, up), (0.5, one, up)], spare)
    torch.testing.assert_close(found @ down, up @ one)
    assert torch.equal(down[1:], spare[1:]) and not bool(found[:, 1:].any())


# --------------------------------------------------------------------------- one of the factors alone
OWN_B, SAME_A = {"average": "share_a"}, {"average": "freeze_a"}


@pytest.mark.parametrize("changes", [{}, {"model__norm": "batch", "federation__participation": 0.5}])
def test_b_never_leaves_its_client_where_a_alone_is_shared(changes: dict[str, Any], tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "lora", OWN_B, engine=Spy, federation__rounds=3, **changes)
    values: set[bytes] = set()
    lab.after_round = lambda lab, server, done: values.update(
        lab.private(h.id)[UP].numpy().tobytes() for h in HOSPITALS if lab.private(h.id)
    )
    server = lab.run()
    found = lab.evaluate(server, finetune=True)
    taken = {c for sampled in lab.schedule for c in sampled}
    assert len(values) == sum(len(sampled) for sampled in lab.schedule), "every client has its own, another after each round"
    for message in spy(lab).messages():
        carried = {**message.tensors, **message.extra}
        assert UP not in carried and not {t.contiguous().numpy().tobytes() for t in carried.values()} & values
    assert all(DOWN in reply.tensors for reply in spy(lab).trained()) and DOWN in server.shared
    assert all(set(lab.private(c)) == {UP} for c in taken)
    assert found.views["global"] is None and found.views["personal"] is not None


def test_a_alone_is_averaged_and_b_goes_on_from_where_it_was(tmp_path: Path) -> None:
    lab = make_lab(tmp_path / "1", "lora", OWN_B, engine=Spy, federation__rounds=1)
    shared = lab.run().shared
    mean = sum(r.num_examples / 36 * r.tensors[DOWN].double() for r in spy(lab).trained())
    torch.testing.assert_close(shared[DOWN].double(), mean, atol=1e-7, rtol=1e-6)
    # The first round starts from one A and B = 0: what clients send is what they send in `plain`, B aside.
    plain = make_lab(tmp_path / "2", "lora", engine=Spy, federation__rounds=1)
    plain.run()
    for ours, theirs in zip(spy(lab).trained(), spy(plain).trained(), strict=True):
        assert differing(dict(ours.tensors), {n: t for n, t in theirs.tensors.items() if n != UP}) == []
        assert torch.equal(lab.private(ours.client)[UP], theirs.tensors[UP])


def test_a_lone_client_does_not_notice_whether_b_is_its_own(tmp_path: Path) -> None:
    one: dict[str, Any] = {"hospitals": HOSPITALS[:1], "federation__rounds": 3}
    lab, plain = make_lab(tmp_path / "1", "lora", OWN_B, **one), make_lab(tmp_path / "2", "lora", **one)
    assert differing({**lab.run().shared, **lab.private("a")}, plain.run().shared) == []


def test_a_that_is_frozen_never_changes_and_never_travels(tmp_path: Path) -> None:
    lab = make_lab(tmp_path / "1", "lora", SAME_A, engine=Spy, optimiser__weight_decay=0.1, federation__rounds=3)
    same = {n: t.clone() for n, t in lab.site.model.state_dict().items() if n in (BASE, DOWN)}
    lab.evaluate(lab.run(), finetune=True)
    assert differing(same, {n: lab.site.model.state_dict()[n] for n in same}) == [] and bool(same[DOWN].any())
    for message in spy(lab).messages():
        assert not same.keys() & message.tensors.keys() and not message.extra.keys() & same.keys()
    assert all(UP in reply.tensors for reply in spy(lab).trained())
    # Every site draws the same one, and it is that of `plain`.
    assert torch.equal(same[DOWN], make_lab(tmp_path / "2", "lora").site.model.state_dict()[DOWN])


def test_the_mean_of_products_is_the_product_of_means_exactly_where_a_is_frozen(tmp_path: Path) -> None:
    """To the last bits of float64; bit for bit with whole numbers and four clients that count the same."""
    replies: list[Reply] = []

    def whole(reply: Reply) -> Reply:
        g = torch.Generator().manual_seed(ord(reply.client))
        drawn = torch.randint(-8, 9, reply.tensors[UP].shape, generator=g).float()
        replies.append(replace(reply, tensors={**reply.tensors, UP: drawn}))
        return replies[-1]

    lab = make_lab(tmp_path, "lora", SAME_A, federation__rounds=1, federation__weighting="equal")
    lab.engine = Altered(lab.site, whole)
    up = lab.run().shared[UP]
    down = lab.site.model.state_dict()[DOWN].double()
    products = lambda a: sum((r.tensors[UP].double() @ a for r in replies), torch.zeros(8, 16)) / 4  # noqa: E731
    torch.testing.assert_close(up.double() @ down, products(down), atol=1e-13, rtol=1e-13)
    whole_down = (64 * down).round()
    assert torch.equal(up.double() @ whole_down, products(whole_down)) and up.unique().numel() > 10


@pytest.mark.parametrize("options", [OWN_B, SAME_A, PRODUCT])
def test_a_run_is_resumed_to_the_same_bits_whatever_is_averaged(options: dict[str, Any], tmp_path: Path) -> None:
    whole, cut = (make_lab(tmp_path / n, "lora", options, federation__rounds=3, checkpoint=True) for n in ("whole", "cut"))
    cut.schedule = cut.schedule[:2]
    cut.run()
    resumed = make_lab(tmp_path / "cut", "lora", options, federation__rounds=3, checkpoint=True)
    assert resumed.checkpoint is not None
    server = resumed.run(resumed.checkpoint.load()[0], 2)
    assert differing(whole.snapshot(whole.run()), resumed.snapshot(server)) == []


@pytest.mark.parametrize("options", [OWN_B, SAME_A])
def test_one_factor_goes_with_spectral_neighbourhoods(options: dict[str, Any], tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "lora", {**options, **NEIGHBOURS})
    server = lab.run()
    assert lab.evaluate(server).views["personal"] is not None
    sent = [lab.strategy.shared_for(server, h.id) for h in HOSPITALS]
    assert all(set(tensors) == set(server.shared) for tensors in sent)


def test_products_are_averaged_for_all_together_alone() -> None:
    with pytest.raises(ConfigError, match='average = "exact" is of one mean for all') as caught:
        strategy_options(make_config("lora", {**PRODUCT, **NEIGHBOURS}))
    assert "\n" not in str(caught.value)


def test_a_backbone_without_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnifm.federation.low_rank._LAYERS", (nn.Conv3d,))
    with pytest.raises(ConfigError, match="neither linear layers nor convolutions"):
        make_lab(tmp_path, "lora")


def test_the_base_may_come_from_a_file(tmp_path: Path) -> None:
    """The weights that `model.weights` names are what is changed."""
    raw = raw_config(data_folder(tmp_path), "lora")
    given = build_trunk(parse(raw).model, 1)[0].state_dict()
    given = {n: torch.randn(t.shape) if t.is_floating_point() else t for n, t in given.items()}
    save_file(given, tmp_path / "trunk.safetensors")
    raw["model"]["weights"] = str(tmp_path / "trunk.safetensors")
    site = make_site(parse(raw), tmp_path / "clients")
    state = site.model.state_dict()
    prefix = "backbone.trunk."
    found = {n.removeprefix(prefix).replace(".parametrizations.weight.original", ".weight"): t for n, t in state.items()}
    assert differing(given, {n: found[n] for n in given}) == []
    moving = ("running_mean", "running_var", "num_batches_tracked", ".0.down", ".0.up")
    assert all(n.endswith(moving) for n in site.initial_shared() if n.startswith(prefix))
