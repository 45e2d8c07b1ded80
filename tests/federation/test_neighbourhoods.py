from pathlib import Path
from typing import Any

import pytest
import torch

from omnifm.federation.neighbourhoods import NeighbourhoodOptions, Neighbourhoods
from omnifm.federation.state import ClientInfo, Context, ServerState
from omnifm.spectral.signature import client_signature
from tests.support import NEIGHBOURS, Hospital, Lab, Spy, differing, make_lab, spy

GROUPS = {"CT": ("a", "c", "e"), "US": ("b", "d")}
TWO = tuple(Hospital(c, m, n) for c, m, n in [("a", "CT", 8), ("b", "US", 6), ("c", "CT", 10), ("d", "US", 12), ("e", "CT", 6)])
HARD = {**NEIGHBOURS, "neighbourhood_weights": "hard", "neighbourhood_shrinkage": 0.0}


def group_of(server: ServerState) -> dict[str, int]:
    found = server.meta["neighbourhoods"]
    assert isinstance(found, dict)
    return found


def given(lab: Lab, server: ServerState, client: str) -> dict[str, torch.Tensor]:
    return dict(lab.strategy.shared_for(server, client))


@pytest.mark.parametrize("strategy", ["fedavg", "fedper", "fedprox"])
def test_two_kinds_of_spectra_are_two_federations(strategy: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path / "all", strategy, HARD, hospitals=TWO, federation__rounds=3)
    server = lab.run()
    assert {tuple(c for c, j in group_of(server).items() if j == g) for g in (0, 1)} == set(GROUPS.values())
    for modality, members in GROUPS.items():
        only = tuple(h for h in TWO if h.modality == modality)
        alone = make_lab(tmp_path / modality, strategy, hospitals=only, federation__rounds=3)
        state = alone.run()
        for client in members:
            assert differing(given(lab, server, client), state.shared) == []
            assert differing(lab.private(client), alone.private(client)) == []
    assert differing(given(lab, server, "a"), given(lab, server, "b"))


def test_the_global_model_is_the_mean_of_all_whatever_the_groups(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedavg", HARD, hospitals=TWO, engine=Spy, federation__rounds=3)
    server, replies = lab.run(), spy(lab).trained(2)
    for name, tensor in server.shared.items():
        mean = sum(r.num_examples * r.tensors[name].double() for r in replies) / sum(r.num_examples for r in replies)
        torch.testing.assert_close(tensor.double(), mean, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_there_are_never_more_neighbourhoods_than_allowed(most: int, tmp_path: Path) -> None:
    hospitals = (*TWO, Hospital("f", "MRI", 6), Hospital("g", "MRI", 6))
    options = {**HARD, "max_neighbourhoods": most, "neighbourhood_threshold": 0.99}
    lab = make_lab(tmp_path, "fedavg", options, hospitals=hospitals, federation__rounds=1)
    server = lab.run()
    models = {name.split("/")[1] for name in server.extra}
    assert len(set(group_of(server).values())) == len(models) == most


def test_a_client_alone_in_its_neighbourhood_gets_the_global_mean(tmp_path: Path) -> None:
    hospitals = (*TWO[:3], Hospital("z", "MRI", 8))
    options = {**HARD, "neighbourhood_threshold": 0.5}
    lab = make_lab(tmp_path, "fedavg", options, hospitals=hospitals)
    server = lab.run()
    lonely = [c for c, j in group_of(server).items() if list(group_of(server).values()).count(j) == 1]
    assert set(lonely) >= {"z"}
    for client in lonely:
        assert differing(given(lab, server, client), server.shared) == []


def test_a_client_alone_may_keep_to_what_it_sent(tmp_path: Path) -> None:
    hospitals = (*TWO[:3], Hospital("z", "MRI", 8))
    options = {**HARD, "neighbourhood_threshold": 0.5, "neighbourhood_alone": "own", "neighbourhood_shrinkage": 0.0}
    lab = make_lab(tmp_path, "fedavg", options, hospitals=hospitals, engine=Spy)
    server = lab.run()
    sent = next(r for r in reversed(spy(lab).trained()) if r.client == "z").tensors
    assert differing(given(lab, server, "z"), dict(sent)) == []
    assert differing(given(lab, server, "z"), server.shared) != []


def test_a_client_alone_shares_the_spectral_path(tmp_path: Path) -> None:
    hospitals = (*TWO[:3], Hospital("z", "MRI", 8))
    options = {"neighbourhood_weights": "hard", "neighbourhood_band": 4, "neighbourhood_shrinkage": 0.0}
    options |= {"neighbourhood_alone": "own", "band": 4, "patch": 2, "dim": 8}
    lab = make_lab(tmp_path, "omnifm", options, hospitals=hospitals, engine=Spy)
    server = lab.run()
    sent = next(r for r in reversed(spy(lab).trained()) if r.client == "z").tensors
    got = given(lab, server, "z")
    path = {n for n in got if n.startswith("path.")}
    assert path and differing({n: got[n] for n in path}, {n: server.shared[n] for n in path}) == []
    assert differing({n: got[n] for n in got.keys() - path}, {n: sent[n] for n in got.keys() - path}) == []
    assert differing({n: got[n] for n in path}, {n: sent[n] for n in path})


def test_the_order_of_the_clients_changes_no_bit(tmp_path: Path) -> None:
    labs = [
        make_lab(tmp_path / str(i), "fedavg", NEIGHBOURS, hospitals=order) for i, order in enumerate((TWO, (*TWO[1:], TWO[0])))
    ]
    first, second = (lab.run() for lab in labs)
    assert differing(first.extra, second.extra) == [] and first.meta == second.meta


def test_examples_are_counted_where_their_client_belongs(tmp_path: Path) -> None:
    schedule = [["a", "b"], ["b", "c", "d"]]
    lab = make_lab(tmp_path, "fedavg", NEIGHBOURS, hospitals=TWO, schedule=schedule)
    server = lab.run()
    groups, counts = group_of(server), server.meta["neighbourhood_examples"]
    assert counts[groups["a"]] == 8 + 10 and counts[groups["b"]] == 2 * 6 + 12


def test_equal_weighting_holds_in_neighbourhoods_too(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"federation__rounds": 1, "federation__weighting": "equal"}
    lab = make_lab(tmp_path, "fedavg", {**HARD, "neighbourhood_shrinkage": 0.0}, hospitals=TWO, engine=Spy, **changes)
    server = lab.run()
    members = [c for c, j in group_of(server).items() if j == group_of(server)["a"]]
    replies = [r for r in spy(lab).trained() if r.client in members]
    assert len(replies) > 1
    for name, tensor in given(lab, server, "a").items():
        mean = sum(r.tensors[name].double() for r in replies) / len(replies)
        torch.testing.assert_close(tensor.double(), mean, atol=1e-7, rtol=1e-6)


def test_a_neighbourhood_without_a_member_in_the_round_stays(tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    lab = make_lab(tmp_path, "fedavg", NEIGHBOURS, hospitals=TWO, schedule=[["a", "b"], ["b", "d"]])
    lab.after_round = lambda lab, server, done: seen.append({n: t.clone() for n, t in server.extra.items()})
    groups = group_of(lab.run())
    ours, theirs = f"neighbourhood/{groups['a']}/", f"neighbourhood/{groups['b']}/"
    changed = differing(seen[0], seen[1])
    assert not any(n.startswith(ours) for n in changed) and any(n.startswith(theirs) for n in changed)


def test_shrinkage_mixes_by_the_examples_seen(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedavg", {**HARD, "neighbourhood_shrinkage": 24.0}, hospitals=TWO, federation__rounds=1)
    server = lab.run()
    alpha = 24 / (24 + 24)  # a, c and e have 8 + 10 + 6 examples
    j = group_of(server)["a"]
    for name, tensor in given(lab, server, "a").items():
        own, whole = server.extra[f"neighbourhood/{j}/{name}"].double(), server.shared[name].double()
        torch.testing.assert_close(tensor.double(), (1 - alpha) * whole + alpha * own, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("changes", "shown"), [({"local_steps": 3}, 3 * 3 * 4), ({"local_epochs": 5}, 5 * 24)])
def test_examples_count_as_often_as_they_are_shown(changes: dict[str, int], shown: int, tmp_path: Path) -> None:
    federation = {f"federation__{name}": value for name, value in changes.items()}
    lab = make_lab(tmp_path, "fedavg", HARD, hospitals=TWO, federation__rounds=1, optimiser__batch_size=4, **federation)
    server = lab.run()
    assert server.meta["neighbourhood_examples"][group_of(server)["a"]] == shown  # a, c and e are in it


def test_before_the_first_round_everybody_gets_the_same_model(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedavg", HARD, hospitals=TWO, engine=Spy, federation__rounds=1)
    start = lab.start().shared
    lab.run()
    first = [q for q in spy(lab).requests if q.kind == "train"]
    assert len(first) == 5 and all(differing(dict(q.tensors), start) == [] for q in first)


def formed(signatures: dict[str, torch.Tensor], **values: Any) -> ServerState:
    context = Context(tuple(ClientInfo(c, "CT") for c in signatures), 0, 2)
    server = ServerState({"w": torch.zeros(2)})
    Neighbourhoods(NeighbourhoodOptions(neighbourhood_band=2, **values), context).form(server, signatures)
    return server


def make_signatures() -> dict[str, torch.Tensor]:
    noise = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    base = torch.eye(2, 8).repeat(2, 1)
    return dict(zip("wxyz", base + noise, strict=True))


def test_soft_weights_are_the_softmax_of_cosines_and_sum_to_one() -> None:
    signatures = make_signatures()
    server = formed(signatures, neighbourhood_temperature=0.5, neighbourhood_threshold=0.3)
    groups = group_of(server)
    assert groups == {"w": 0, "x": 1, "y": 0, "z": 1}
    mean = torch.stack(list(signatures.values())).double().mean(0)
    for client, weights in server.meta["neighbourhood_weights"].items():
        assert sum(weights) == pytest.approx(1) and min(weights) > 0 and weights[groups[client]] == max(weights)
        cosines = []
        for j in (0, 1):
            centre = torch.stack([signatures[c].double() - mean for c in signatures if groups[c] == j]).mean(0)
            cosines.append(torch.cosine_similarity(signatures[client].double() - mean, centre, dim=0) / 0.5)
        torch.testing.assert_close(torch.tensor(weights).double(), torch.stack(cosines).softmax(0), atol=1e-6, rtol=1e-6)


def test_hard_weights_are_one_and_nothing() -> None:
    server = formed(make_signatures(), neighbourhood_weights="hard", neighbourhood_threshold=0.3)
    assert server.meta["neighbourhood_weights"] == {"w": [1, 0], "x": [0, 1], "y": [1, 0], "z": [0, 1]}


def test_soft_means_are_weighted_by_examples_and_closeness(tmp_path: Path) -> None:
    lab = make_lab(
        tmp_path, "fedavg", {**NEIGHBOURS, "neighbourhood_temperature": 1.0}, hospitals=TWO, engine=Spy, federation__rounds=1
    )
    server, replies = lab.run(), spy(lab).trained()
    for j in (0, 1):
        share = {r.client: r.num_examples * server.meta["neighbourhood_weights"][r.client][j] for r in replies}
        for name in server.shared:
            mean = sum(share[r.client] * r.tensors[name].double() for r in replies) / sum(share.values())
            torch.testing.assert_close(server.extra[f"neighbourhood/{j}/{name}"].double(), mean, atol=1e-7, rtol=1e-6)


def test_a_description_is_one_averaged_spectrum(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, "fedavg", NEIGHBOURS, hospitals=TWO, engine=Spy, federation__rounds=1)
    lab.run()
    described = [r for r in spy(lab).replies if r.kind == "describe"]
    assert [r.client for r in described] == list("abcde")
    for reply in described:
        train = lab.task.client_data(reply.client).train
        expected = client_signature(train.batch(torch.arange(len(train))).image, 8)
        assert reply.extra.keys() == {"signature"} and not reply.tensors
        torch.testing.assert_close(reply.extra["signature"], expected)
    assert [e["bytes_up"] for e in lab.events if e["event"] == "description"] == [{"signature": 4 * 128}] * 5
