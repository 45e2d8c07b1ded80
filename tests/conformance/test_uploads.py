"""What a client sends besides the model is judged before it counts, by every strategy, and a bad one harms nobody else."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omnifm.build import STRATEGIES
from omnifm.errors import FederationError
from omnifm.federation.messages import Reply
from omnifm.federation.state import ServerState
from tests.support import Altered, Lab, differing, make_lab

SENDS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    # strategy, options, what a client sends in a round; all others of the table send nothing
    "adcol": ("adcol", {}, ("adcol/counts", "adcol/prototypes")),
    "adcol, features": ("adcol", {"upload": "features"}, ("adcol/features",)),
    "f3ocus": ("f3ocus", {}, ("f3ocus/scores",)),
    "fediir": ("fediir", {}, ("fediir/batches", "fediir/sum/head.linear.bias", "fediir/sum/head.linear.weight")),
    "fedproto": ("fedproto", {}, ("fedproto/counts", "fedproto/prototypes")),
    "omnifm": ("omnifm", {}, ("prototypes/vectors", "prototypes/weight", "retrievals/count", "retrievals/row_id")),
    "scaffold": ("scaffold", {}, ()),
}
CASES = SENDS | {name: (name, {}, ()) for name in STRATEGIES if name not in SENDS}
MAY_LACK = re.compile(r"fediir/sum/")  # a part of a head that is for other clients has no gradient
Extra = Mapping[str, Tensor]


def damages(extra: Extra) -> dict[str, dict[str, Tensor]]:
    """Return an upload with each of its tensors missing, of other shapes, and not finite; and with one too many."""
    found = {"stowaway": {**extra, "stowaway": torch.zeros(1)}}
    for name, tensor in extra.items():
        if not MAY_LACK.match(name):
            found[f"{name} missing"] = {n: t for n, t in extra.items() if n != name}
        found[f"{name} in a box"] = {**extra, name: tensor[None]}
        found[f"{name} longer"] = {**extra, name: torch.cat([tensor.reshape(-1)] * 2)}
        if tensor.dim():
            found[f"{name} as one number"] = {**extra, name: tensor.reshape(-1)[0]}
        found[f"{name} empty"] = {**extra, name: tensor.reshape(-1)[:0]}
        for value in (float("nan"), float("inf")):
            found[f"{name} {value}"] = {**extra, name: torch.full_like(tensor, value, dtype=torch.float32)}
    return found


def lab_of(name: str, folder: Path, **changes: Any) -> Lab:
    strategy, options, _ = CASES[name]
    return make_lab(folder, strategy, options, **changes)


@pytest.mark.parametrize("name", CASES)
def test_every_upload_that_does_not_fit_is_refused_before_anything_is_made_of_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = lab_of(name, tmp_path / "judged")
    vet, sent, taken = lab.strategy.vet, set[str](), list[str]()

    def judge(server: ServerState, reply: Reply) -> None:
        if reply.client == "a":  # the first of a round: nobody else has said how long anything is
            sent.update(reply.extra)
            for damage, extra in damages(reply.extra).items():
                try:
                    vet(server, replace(reply, extra=extra))
                    taken.append(f"round {reply.round}: {damage}")
                except FederationError as error:
                    assert "\n" not in str(error)
        vet(server, reply)

    monkeypatch.setattr(lab.strategy, "vet", judge)
    found = lab.run()
    assert taken == []
    expected = CASES[name][2]
    assert sent == set(expected) or (name == "scaffold" and all(n.startswith("scaffold/change/") for n in sent) and sent)
    plain = lab_of(name, tmp_path / "plain").run()
    assert differing(found.shared, plain.shared) == [] and differing(found.extra, plain.extra) == [], "it is judged, and changed"


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {"NaN": lambda t: t * float("nan"), "shape": lambda t: t[None]}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", SENDS)
def test_a_bad_upload_names_the_client_and_with_skip_the_others_alone_count(name: str, change: str, tmp_path: Path) -> None:
    def bend(reply: Reply) -> Reply:
        if (reply.kind, reply.round, reply.client) != ("train", 1, "d"):
            return reply
        worst = max(reply.extra, key=lambda n: (reply.extra[n].is_floating_point(), n))
        return replace(reply, extra={**reply.extra, worst: CHANGES[change](reply.extra[worst])})

    lab = lab_of(name, tmp_path / "bad", security__refused="skip")
    lab.engine = Altered(lab.site, bend)
    server = lab.run()
    (event,) = (e for e in lab.events if e["event"] == "client" and "discarded" in e)
    assert (event["client"], event["round"]) == ("d", 1)
    alone = lab_of(name, tmp_path / "alone", schedule=[("a", "b", "c", "d"), ("a", "b", "c")]).run()
    assert differing(server.shared, alone.shared) == [] and differing(server.extra, alone.extra) == []
    if change == "NaN":
        strict = lab_of(name, tmp_path / "strict")
        strict.engine = Altered(strict.site, bend)
        with pytest.raises(FederationError, match=r"^client d, round 1: [^\n]+$"):
            strict.run()
