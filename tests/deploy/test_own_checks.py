"""A hospital checks by itself what the server checks before a run, and counts what left by what was done, not by the config."""

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dp_accounting", reason="needs the extra omnifm[privacy]")
pytest.importorskip("opacus", reason="needs the extra omnifm[privacy]")

from omnifm import build
from omnifm.config import Config, dump, parse
from omnifm.deploy.data import public
from omnifm.deploy.hospital import Hospital
from omnifm.deploy.ledger import Ledger
from omnifm.deploy.policy import Policy
from omnifm.engines.calls import Call, pack, unpack
from omnifm.federation.messages import Kind, Request, decode, encode
from tests.run import jobs

DELTA = 1e-5
KINDS: tuple[Kind, ...] = ("train", "describe", "evaluate", "secagg")
BUDGET = {"example_clip": 1.0, "example_noise": 10.0, "prototype_clip": 1.0, "prototype_noise": 100.0}
EXAMPLE = {"example_clip": 1.0, "example_noise": 10.0}
SECURE = {"secure_aggregation": True}
FALSE_PROMISES: dict[str, tuple[str, dict[str, Any], str]] = {
    # what the config promises and the strategy, task or engine does not keep; what the hospital says
    "exact class means": ("fedproto", {"privacy": BUDGET}, "privacy.example_clip: strategy fedproto trains or sends otherwise"),
    "single amplitudes": ("feddg", {"privacy": BUDGET}, "privacy.example_clip: strategy feddg trains or sends otherwise"),
    "twice the steps": ("ditto", {"privacy": EXAMPLE}, "privacy.example_clip: strategy ditto trains or sends otherwise"),
    "two phases": ("fedrep", {"privacy": EXAMPLE}, "privacy.example_clip: strategy fedrep trains or sends otherwise"),
    "bf16": ("fedavg", {"privacy": EXAMPLE, "engine": {"precision": "bf16"}}, "privacy.example_clip: set engine.precision"),
    "a floor of variance": (
        "omnifm",
        {"privacy": BUDGET, "strategies": {"omnifm": {"dim": 8, "band": 8, "neighbourhood_band": 8, "variance_floor": 0.1}}},
        "strategies.omnifm: variance_floor",
    ),
    "control variates in the open": (
        "scaffold",
        {"privacy": SECURE},
        "privacy.secure_aggregation: the server of strategy scaffold",
    ),
    "gradients in the open": ("fediir", {"privacy": SECURE}, "privacy.secure_aggregation: the server of strategy fediir"),
    "rounded updates": ("fedavg", {"privacy": SECURE, "compression": {"upload": "int8"}}, "compression.upload: "),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.data_folder(tmp_path_factory.getbasetemp())


class Attacked:
    """A hospital, scan-0, that insists on little noise, and a server that checks nothing."""

    def __init__(self, data: Path, store: Path, config: Config, policy: Policy) -> None:
        head = {"config": dump(public(config))}
        clients = ("scan-0", "scan-1", "echo-0", "echo-1")
        hospitals = [Hospital(data / c[:4], c, store / c, str(data / "cache"), policy=policy) for c in clients]
        heard = [dict(unpack(h.answer(pack(Call("introduce", head)))).header) for h in hospitals]
        self.hospital, self.header = hospitals[0], {**head, "introductions": heard}
        self.ledger = store / "scan-0" / "ledger-scan-0.json"

    def ask(self, kind: Kind, *, tensors: bool = False) -> tuple[str, Any]:
        shared = self.hospital._opened(self.header).site.initial_shared() if tensors else {}
        request = Request(kind, 0, "scan-0", shared, settings={"epochs": 1, "steps": 1, "split": "test"})
        answer = unpack(self.hospital.answer(pack(Call("answer", self.header, encode(request)))))
        return answer.kind, decode(answer.body) if answer.kind == "reply" else answer.header["message"]


@pytest.mark.parametrize("name", FALSE_PROMISES)
def test_a_config_that_promises_what_the_run_cannot_keep_gets_no_answer(name: str, data: Path, tmp_path: Path) -> None:
    strategy, changes, line = FALSE_PROMISES[name]
    promised = changes["privacy"]
    policy = Policy(secure_aggregation="secure_aggregation" in promised, min_example_noise=promised.get("example_noise", 0.0))
    attacked = Attacked(data, tmp_path, jobs.config(data, strategy, **changes), policy)
    for kind in KINDS if name == "exact class means" else KINDS[:1]:
        found, said = attacked.ask(kind)
        assert found == "mistake" and line in said and "\n" not in said
    assert not attacked.ledger.exists()


@pytest.mark.parametrize(("strategy", "kind"), [("fedproto", "train"), ("feddg", "describe")])
def test_what_went_past_the_noise_is_worth_everything_whatever_the_config_says(
    strategy: str, kind: Kind, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second line behind the checks, which are left out here."""
    monkeypatch.setattr(build, "make_schedule", lambda *_: ())
    config = parse(jobs.raw_config(data, strategy, privacy=BUDGET))
    free = Attacked(data, tmp_path / "free", config, Policy())
    assert free.ask(kind, tensors=True)[0] == "reply" and Ledger(free.ledger).epsilon(DELTA) == math.inf
    strict = Attacked(data, tmp_path / "strict", config, Policy(max_epsilon=50.0))
    found, said = strict.ask(kind, tensors=True)
    assert found == "mistake" and "an epsilon of inf" in said and not strict.ledger.exists()


def test_what_a_run_can_keep_is_answered(data: Path, tmp_path: Path) -> None:
    strategies = {"omnifm": {"dim": 8, "band": 8, "neighbourhood_band": 8, "bank": {"prototypes": 1, "capacity": 12}}}
    honest = Attacked(
        data, tmp_path, jobs.config(data, "omnifm", privacy=BUDGET, strategies=strategies), Policy(max_epsilon=50.0)
    )
    assert honest.ask("train", tensors=True)[0] == "reply" and 0 < Ledger(honest.ledger).epsilon(DELTA) < 50
