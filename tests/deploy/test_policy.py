"""A hospital refuses a federation that falls short of its policy, says what falls short, and takes part in one that does not."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from omnifm.build import STRATEGIES, strategy_options
from omnifm.config import dump
from omnifm.deploy.data import public
from omnifm.deploy.hospital import Hospital
from omnifm.deploy.join import make_member
from omnifm.deploy.policy import Policy, read_policy
from omnifm.deploy.roster import Roster
from omnifm.engines.calls import Call, pack, unpack
from omnifm.errors import ConfigError, FederationError
from omnifm.federation.messages import Request, encode
from tests.deploy.storm import Calm
from tests.run import jobs

PRIVATE = {"secure_aggregation": True, "example_clip": 1.0, "example_noise": 1.5, "clip": 1.0, "noise_multiplier": 2.0}
FALLS_SHORT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # what the hospital insists on, what the server's config says, what the refusal says; without the second all is well
    "secure_aggregation": ({"secure_aggregation": True}, {}, "privacy.secure_aggregation = false"),
    "min_example_noise": (
        {"min_example_noise": 1.0},
        {"privacy": {"example_clip": 1.0, "example_noise": 0.5}},
        "privacy.example_noise = 0.5, at least 1 is wanted",
    ),
    "min_client_noise": ({"min_client_noise": 0.1}, {}, "privacy.noise_multiplier = 0, at least 0.1 is wanted"),
    "noise that is known": (
        {"min_example_noise": 1.0},
        {"privacy": {**PRIVATE, "noise": "seeded"}},
        'privacy.noise = "seeded", which anybody can take off',
    ),
    "strategies": ({"strategies": ["fedavg", "fedper"]}, {"strategy": "omnifm"}, "strategy = 'omnifm', allowed: fedavg, fedper"),
    "allow_bank": ({"allow_bank": False}, {"strategy": "omnifm"}, "strategies.omnifm has a bank"),
    "allow_extras": (
        {"allow_extras": False},
        {"strategy": "fedproto"},
        "strategy fedproto sends more than the model (class means)",
    ),
    "spectra": (
        {"allow_extras": False},
        {"strategies": {"fedavg": {"aggregation": "neighbours"}}},
        "strategy fedavg sends more than the model (mean spectra)",
    ),
    "max_rounds": ({"max_rounds": 2}, {}, "federation.rounds = 3, at most 2 are allowed"),
    "max_local_epochs": ({"max_local_epochs": 1}, {"federation": {"local_epochs": 2}}, "federation.local_epochs = 2, at most 1"),
    "fine-tuning": ({"max_local_epochs": 1}, {"federation": {"finetune_epochs": 2}}, "federation.finetune_epochs = 2, at most 1"),
    "max_local_steps": ({"max_local_steps": 9}, {"federation": {"local_steps": 10}}, "federation.local_steps = 10, at most 9"),
}
FINE: dict[str, dict[str, Any]] = {
    "secure_aggregation": {"privacy": {"secure_aggregation": True}},
    "min_example_noise": {"privacy": PRIVATE},
    "min_client_noise": {"privacy": PRIVATE},
    "noise that is known": {"privacy": PRIVATE},
    "allow_bank": {"strategies": {"omnifm": {"gskr": False, "eca": False, "spalign": False}}},
    "allow_extras": {"strategies": {"omnifm": {"gskr": False, "eca": False, "spalign": False, "aggregation": "mean"}}},
    "max_rounds": {"federation": {"rounds": 2}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.data_folder(tmp_path_factory.getbasetemp())


def header(data: Path, strategy: str = "fedavg", **changes: Any) -> dict[str, Any]:
    return {"config": dump(public(jobs.config(data, strategy, **changes)))}


def said(hospital: Hospital, call: Call) -> str:
    answer = unpack(hospital.answer(pack(call)))
    return f"{answer.kind}: {answer.header.get('message', '')}"


@pytest.mark.parametrize("name", FALLS_SHORT)
def test_what_falls_short_is_refused_and_named_and_without_the_policy_is_not(
    name: str, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted, changes, line = FALLS_SHORT[name]
    asked = Call("introduce", header(data, **changes))
    strict = Hospital(data / "scan", "scan-0", tmp_path, str(data / "cache"), policy=Policy(**wanted))
    with caplog.at_level(logging.WARNING):
        answer = said(strict, asked)
    assert answer.startswith("mistake: refused by this hospital's policy: ") and line in answer
    assert line in caplog.text, "nothing in the hospital's log"
    assert said(Hospital(data / "scan", "scan-0", tmp_path, str(data / "cache")), asked) == "introduction: "
    request = Call("answer", {**asked.header, "introductions": []}, encode(Request("train", 0, "scan-0")))
    assert line in said(strict, request), "a request with such a config is answered"


@pytest.mark.parametrize("name", FINE)
def test_what_is_as_it_should_be_is_not_refused(name: str, data: Path) -> None:
    strategy = "omnifm" if name.startswith("allow") else "fedavg"
    Policy(**FALLS_SHORT[name][0]).check(jobs.config(data, strategy, **FINE[name]))


def test_everything_that_falls_short_is_in_one_line(data: Path) -> None:
    with pytest.raises(FederationError) as caught:
        Policy(secure_aggregation=True, min_clients=5, max_rounds=1).check(jobs.config(data, "fedavg"), 4)
    line = str(caught.value)
    assert "\n" not in line and line.count(";") == 2 and line.endswith("4 clients, at least 5 are wanted")


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_without_extras_nothing_but_what_a_card_names_is_refused(strategy: str, data: Path) -> None:
    config = jobs.config(data, strategy)
    up = strategy_options(config)[0].card.up
    if not up:
        Policy(allow_extras=False).check(config)
        return
    with pytest.raises(FederationError, match=f"strategy {strategy} sends more than the model"):
        Policy(allow_extras=False).check(config)


def test_a_request_that_asks_for_more_than_its_config_is_refused(data: Path, tmp_path: Path) -> None:
    """The config that a server shows is one thing; what it asks for in a round is judged too."""
    strict = Hospital(data / "scan", "scan-0", tmp_path, str(data / "cache"), policy=Policy(max_local_epochs=1, max_rounds=3))
    for changes, line in (
        ({"settings": {"epochs": 5}}, "epochs = 5 in a request, at most 1 are allowed"),
        ({"settings": {"epochs": "many"}}, "epochs = 'many' in a request"),
        ({"round": 3}, "round 3, at most 3 rounds are allowed"),
        (
            {"kind": "evaluate", "settings": {"split": "test", "view": "personal", "finetune_epochs": 7}},
            "finetune_epochs = 7 in a request, at most 1 are allowed",
        ),
    ):
        request = Request(**{"kind": "train", "round": 0, "client": "scan-0", **changes})
        assert line in said(strict, Call("answer", header(data), encode(request)))


@pytest.mark.parametrize("split", ["train", "all", None, ["test"]])
def test_nothing_but_validation_and_test_is_scored_with_any_policy(split: object, data: Path, tmp_path: Path) -> None:
    """Labels and probabilities of the training images are no score."""
    hospital = Hospital(data / "scan", "scan-0", tmp_path, str(data / "cache"))
    for view in ("personal", "global", "reference"):
        asked = Request("evaluate", 0, "scan-0", settings={"split": split, "view": view} if split else {"view": view})
        line = said(hospital, Call("answer", header(data), encode(asked)))
        assert f"an evaluation of split {split!r}, where val and test are scored" in line and "\n" not in line


def test_a_hospital_may_keep_its_scores_to_itself(data: Path, tmp_path: Path) -> None:
    asked = Call("answer", header(data), encode(Request("evaluate", 0, "scan-0", settings={"split": "val", "view": "personal"})))
    quiet = Hospital(data / "scan", "scan-0", tmp_path, str(data / "cache"), policy=Policy(allow_scores=False))
    assert said(quiet, asked) == "mistake: refused by this hospital's policy: an evaluation, whose scores are not told"
    assert "lacks the introductions" in said(Hospital(data / "scan", "scan-0", tmp_path), asked), "by default it is not refused"


def test_few_clients_are_refused_once_it_is_known_how_few_they_are(data: Path, tmp_path: Path) -> None:
    asked = header(data)
    others = [
        Hospital(data / c.partition("-")[0], c, tmp_path / c, str(data / "cache"))
        for c in ("scan-0", "scan-1", "echo-0", "echo-1")
    ]
    heard = [dict(unpack(h.answer(pack(Call("introduce", asked)))).header) for h in others]
    request = Call("answer", {**asked, "introductions": heard}, encode(Request("train", 0, "scan-0")))
    for least, refused in ((4, False), (5, True)):
        strict = Hospital(data / "scan", "scan-0", tmp_path, str(data / "cache"), policy=Policy(min_clients=least))
        assert ("4 clients, at least 5 are wanted" in said(strict, request)) == refused


def test_the_server_is_told_what_falls_short(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(Exception):
        pass

    heard: list[str] = []

    def note(client: str, *, connected: bool, said: str = "") -> None:
        heard.append(said)
        raise Stop  # it would ask again for ever

    strict = Hospital(data / "scan", "scan-0", tmp_path, str(data / "cache"), policy=Policy(secure_aggregation=True))
    roster = Roster(Calm({"scan-0": strict}), {"scan-0": b""}, header(data)["config"], note)
    with pytest.raises(Stop), caplog.at_level(logging.WARNING):
        roster.gather()
    assert heard == ["refused by this hospital's policy: privacy.secure_aggregation = false"]
    assert heard[0] in caplog.text


def test_a_policy_is_a_file_that_join_reads(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omnifm.deploy.join.require_flower", lambda: None)
    path = tmp_path / "policy.toml"
    path.write_text('secure_aggregation = true\nmin_example_noise = 1.0\nmin_clients = 3\nstrategies = ["fedavg"]\n')
    member = make_member("localhost:1", data / "scan", "scan-0", None, tmp_path / "state", path)
    expected = Policy(secure_aggregation=True, min_example_noise=1.0, min_clients=3, strategies=["fedavg"])
    assert member.policy == expected and make_member("localhost:1", data / "scan", "a", None, tmp_path / "s").policy == Policy()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("secure_agregation = true", "secure_agregation: unknown key"),
        ('secure_aggregation = "yes"', "secure_aggregation: "),
        ("min_clients = -1", "min_clients: "),
        ("min_example_noise = inf", "min_example_noise: "),
        ('strategies = ["fedavgg"]', "strategies: there is no strategy 'fedavgg'"),
        ("x", "not a TOML file"),
    ],
)
def test_a_wrong_policy_is_one_line_with_file_and_key(text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"^{path}: {line}[^\n]*"):
        read_policy(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_policy(tmp_path / "attic.toml")


def test_the_docs_name_every_key() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "privacy.md").read_text(encoding="utf-8")
    missing = [key for key in Policy.model_fields if f"`{key}`" not in text]
    assert not missing, json.dumps(missing)
