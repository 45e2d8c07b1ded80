"""A hospital counts what leaves it by itself, and stops where its policy says, whatever the server asks for."""

import json
import math
import os
import stat
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("dp_accounting", reason="needs the extra omnifm[privacy]")
pytest.importorskip("opacus", reason="needs the extra omnifm[privacy]")

import torch

from omnifm.config import Config, PrivacyConfig, dump, parse
from omnifm.deploy.data import public
from omnifm.deploy.hospital import Hospital
from omnifm.deploy.ledger import Answer, Ledger
from omnifm.deploy.policy import Policy
from omnifm.engines.calls import Call, pack, unpack
from omnifm.errors import CheckpointError, FederationError
from omnifm.federation.messages import Reply, Request, decode, encode
from omnifm.federation.release import Passed, Release
from omnifm.privacy.accounting import NO_RELEASES, Releases, Steps, epsilon_of_all, epsilon_of_examples
from tests.deploy.post import Post, hurry, open_bays
from tests.deploy.test_server import serve
from tests.run import jobs

DELTA = 1e-5
PRIVATE = {"example_clip": 1.0, "example_noise": 1.0}
PAIR = ("scan-0", "echo-0")
EXAMPLES = 24
"""Training images of each of the pair."""

kinds = st.sampled_from([0.8, 1.0, 2.0])
answers = st.builds(
    Answer,
    st.one_of(st.just(Answer().steps), st.builds(Steps, kinds, st.sampled_from([0.01, 1.0]), st.integers(0, 5))),
    st.one_of(st.just(NO_RELEASES), st.builds(Releases, kinds, st.just(1))),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.data_folder(tmp_path_factory.getbasetemp())


def make_config(data: Path, strategy: str = "fedavg", **privacy: Any) -> Config:
    cohorts = [{"path": str(data / name)} for name in ("scan", "echo")]
    federation = {"cohorts": cohorts, "rounds": 2, "participation": 1.0, "finetune_epochs": 0}
    bank = {"omnifm": {"dim": 8, "band": 8, "neighbourhood_band": 8, "bank": {"prototypes": 1, "capacity": 12}}}
    return parse(jobs.raw_config(data, strategy, federation=federation, privacy=privacy, strategies=bank))


class Asked:
    """A hospital, scan-0, and a server that asks it for what it likes."""

    def __init__(self, data: Path, config: Config, store: Path, policy: Policy | None = None) -> None:
        head = {"config": dump(public(config))}
        self.hospital, other = (
            Hospital(data / c.partition("-")[0], c, store / c, str(data / "cache"), policy=policy) for c in PAIR
        )
        heard = [dict(unpack(h.answer(pack(Call("introduce", head)))).header) for h in (self.hospital, other)]
        self.header, self.path = {**head, "introductions": heard}, store / "scan-0" / "ledger-scan-0.json"
        self._shared: dict[str, torch.Tensor] = {}

    def __call__(self, kind: str, number: int = 0, epochs: int = 1) -> Reply | str:
        """Return the reply, or the line that refuses."""
        wanted = {"train": {"epochs": epochs}, "evaluate": {"split": "val", "view": "personal"}}.get(kind, {})
        request = Request(kind, number, "scan-0", self._tensors(), settings=wanted)  # type: ignore[arg-type]
        answer = unpack(self.hospital.answer(pack(Call("answer", self.header, encode(request)))))
        if answer.kind != "reply":
            return str(answer.header["message"])
        found = decode(answer.body)
        assert isinstance(found, Reply)
        return found

    def _tensors(self) -> dict[str, torch.Tensor]:
        if not self._shared:
            self._shared = self.hospital._opened(self.header).site.initial_shared()
        return self._shared


@settings(max_examples=25)
@given(st.lists(answers, max_size=6))
def test_what_is_added_in_any_order_is_worth_what_all_of_it_is(
    tmp_path_factory: pytest.TempPathFactory, left: list[Answer]
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.json"
    ledger = Ledger(path)
    for answer in left:
        ledger.add(answer)
    whole = epsilon_of_all(DELTA, [a.steps for a in left], [a.releases for a in left])
    assert ledger.epsilon(DELTA) == pytest.approx(whole, rel=1e-9)
    assert Ledger(path).epsilon(DELTA) == ledger.epsilon(DELTA)
    assert Ledger(path).epsilon(DELTA, Answer(Steps(1.0, 1.0, 3))) >= ledger.epsilon(DELTA)


def test_an_entry_is_on_the_disk_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut may otherwise bring back the ledger from before an answer that has left."""
    synced: list[bool] = []
    monkeypatch.setattr("os.fsync", lambda place: synced.append(stat.S_ISDIR(os.fstat(place).st_mode)))
    Ledger(tmp_path / "ledger.json").add(Answer(Steps(1.0, 0.5, 3)))
    assert synced == [False, True], "first what is in the file, then its name"


def test_of_volumes_slices_count(tmp_path: Path) -> None:
    """They are what is drawn and clipped, though the server hears of rows alone."""
    (tmp_path / "data").mkdir()
    volumes = jobs.write_volumes(tmp_path / "data")
    slices = jobs.VOLUMES["train"] * jobs.DEPTH
    asked = Asked(volumes, make_config(volumes, **PRIVATE), tmp_path / "store")
    reply = asked("train")
    assert isinstance(reply, Reply) and reply.num_examples == slices
    assert Ledger(asked.path).epsilon(DELTA) == epsilon_of_examples(1.0, DELTA, slices // 4, 4 / slices)


def test_a_round_that_is_asked_for_twice_counts_twice_and_steps_count_as_asked(data: Path, tmp_path: Path) -> None:
    asked = Asked(data, make_config(data, **PRIVATE), tmp_path)
    steps = EXAMPLES // 4  # batches of four
    for times, epochs in ((1, 1), (2, 1), (5, 3)):
        assert isinstance(asked("train", 0, epochs), Reply)
        assert Ledger(asked.path).epsilon(DELTA) == epsilon_of_examples(1.0, DELTA, times * steps, 4 / EXAMPLES)
    assert isinstance(asked("evaluate", 1), Reply)
    assert json.loads(asked.path.read_text())["steps"] == [{"noise_multiplier": 1.0, "rate": 4 / EXAMPLES, "count": 5 * steps}]


def test_noise_from_a_seed_that_the_server_knows_counts_as_none(data: Path, tmp_path: Path) -> None:
    asked = Asked(data, make_config(data, **PRIVATE, noise="seeded"), tmp_path)
    assert isinstance(asked("train"), Reply)
    assert math.isinf(Ledger(asked.path).epsilon(DELTA))
    assert json.loads(asked.path.read_text())["steps"][0]["noise_multiplier"] == 0.0


def test_what_would_be_too_much_does_not_leave_and_does_not_count(data: Path, tmp_path: Path) -> None:
    config, steps = make_config(data, **PRIVATE), EXAMPLES // 4
    one, two = (epsilon_of_examples(1.0, DELTA, n * steps, 4 / EXAMPLES) for n in (1, 2))
    asked = Asked(data, config, tmp_path, Policy(max_epsilon=(one + two) / 2))
    assert isinstance(asked("train"), Reply)
    before = asked.path.read_bytes()
    said = asked("train")
    assert isinstance(said, str) and "\n" not in said and asked.path.read_bytes() == before
    assert said == (
        f"refused by this hospital's policy: with this answer one example has an epsilon of {two:.3g} (delta 1e-05), "
        f"at most {(one + two) / 2:g} is allowed"
    )
    # Neither a new start of the hospital nor a new federation gives the budget back.
    again = Asked(data, make_config(data, **{**PRIVATE, "example_noise": 0.8}), tmp_path, Policy(max_epsilon=(one + two) / 2))
    assert isinstance(again("train"), str) and asked.path.read_bytes() == before
    assert isinstance(Asked(data, config, tmp_path, Policy())("train"), Reply), "without a policy nothing is refused"


def test_what_once_left_without_noise_is_remembered(data: Path, tmp_path: Path) -> None:
    assert isinstance(Asked(data, make_config(data), tmp_path)("train"), Reply)
    private = Asked(data, make_config(data, **PRIVATE), tmp_path, Policy(max_epsilon=1e6))
    assert Ledger(private.path).epsilon(DELTA) == math.inf
    assert "an epsilon of inf" in str(private("train"))


@pytest.mark.parametrize("noise", [1e-200, 1e-153, 1e-20])
def test_next_to_no_noise_is_no_noise(noise: float, data: Path, tmp_path: Path) -> None:
    """The accountant's NaN read as 0, and every later answer cost nothing."""
    config = make_config(data, **{**PRIVATE, "example_noise": noise})
    with pytest.raises(FederationError, match=rf"privacy\.example_noise = {noise:g}, with which no epsilon of 1e\+06 can be"):
        Policy(max_epsilon=1e6).check(config)
    asked = Asked(data, config, tmp_path)
    assert isinstance(asked("train"), Reply) and Ledger(asked.path).epsilon(DELTA) == math.inf
    later = Asked(data, make_config(data, **PRIVATE), tmp_path, Policy(max_epsilon=1e6))
    assert "an epsilon of inf" in str(later("train"))


@pytest.mark.parametrize("kept", [{"steps": [Steps(1e-153, 0.25, 6)]}, {"releases": [Releases(1e-200, 1)]}])
def test_a_ledger_that_was_written_with_next_to_no_noise_is_worth_everything(kept: dict[str, list[Any]], tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    good = {"steps": [asdict(Steps(1.0, 0.25, 6))], "releases": [asdict(Releases(1.0, 1))]}
    path.write_text(json.dumps({name: [*map(asdict, kept.get(name, [])), *entries] for name, entries in good.items()}))
    assert Ledger(path).epsilon(DELTA) == Ledger(path).epsilon(DELTA, Answer(Steps(1.0, 0.25, 6))) == math.inf


@pytest.mark.parametrize("epsilon", [math.nan, math.inf, 3.1])
def test_an_epsilon_that_is_no_number_is_not_below_the_limit(epsilon: float) -> None:
    Policy(max_epsilon=3.0).check_epsilon(3.0)
    with pytest.raises(FederationError, match="at most 3 is allowed"):
        Policy(max_epsilon=3.0).check_epsilon(epsilon)


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_a_mean_spectrum_is_a_release(noise: float, data: Path, tmp_path: Path) -> None:
    budget = {**PRIVATE, "prototype_clip": 1.0, "prototype_noise": noise} if noise else {}
    asked = Asked(data, make_config(data, "omnifm", **budget), tmp_path)
    reply = asked("describe")
    assert isinstance(reply, Reply) and "signature" in reply.extra
    expected = epsilon_of_examples(1.0, DELTA, 0, 1.0, Releases(noise, 1))
    assert Ledger(asked.path).epsilon(DELTA) == expected and math.isfinite(expected) == bool(noise)


def test_masks_are_no_release_and_what_has_no_noise_is_worth_everything(data: Path) -> None:
    config = make_config(data, **PRIVATE, secure_aggregation=False)
    request = Request("train", 0, "scan-0", settings={"epochs": 1})
    told, masked = (
        Reply("train", 0, "scan-0", EXAMPLES, extra={name: torch.zeros(3)}) for name in ("prototypes/vectors", "secagg/masked")
    )
    noisy = Passed([0.5], {"prototypes/vectors"})
    assert Answer.to(request, config, EXAMPLES, masked, Passed()).releases == NO_RELEASES
    assert Answer.to(request, config, EXAMPLES, told, Passed()).releases == Releases(0.0, 1)
    assert Answer.to(request, config, EXAMPLES, told, noisy).releases == Releases(0.5, 1)
    more = replace(told, extra={**told.extra, "amplitudes": torch.zeros(3)})
    assert Answer.to(request, config, EXAMPLES, more, noisy).releases == Releases(0.0, 1), "something went past the noise"
    assert Answer.to(Request("evaluate", 0, "scan-0"), config, EXAMPLES, told, noisy) == Answer()


@pytest.mark.parametrize(("changes", "factor"), [({}, 1), ({"clip": 1.0, "noise_multiplier": 2.0}, 7)])
def test_a_release_says_with_which_noise_what_left(changes: dict[str, float], factor: int) -> None:
    release = Release(PrivacyConfig(**PRIVATE, prototype_clip=1.0, prototype_noise=0.7, **changes), 0)
    release.mean(torch.ones(3, 2), "before")
    passed = release.watch()
    release.told({"signature": release.mean(torch.ones(7, 2), "spectrum")})
    assert passed == Passed([0.7 * factor], {"signature"}), "with client-level privacy the noise is on the mean"


def test_the_ledgers_of_an_honest_run_say_what_its_metrics_say(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two counts that share no code: the server's, from the config, and the hospitals', of what they sent."""
    hurry(monkeypatch)
    budget = {"prototype_clip": 1.0, "prototype_noise": 2.0}
    serve(make_config(data, "omnifm", **PRIVATE, **budget), Post(open_bays(data, tmp_path / "h", PAIR)), tmp_path / "run", PAIR)
    (unit,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["privacy"]["combined"]["units"]
    own = [Ledger(tmp_path / "h" / client / f"ledger-{client}.json").epsilon(DELTA) for client in PAIR]
    assert max(own) == unit["together"] and min(own) > 0
    sent = json.loads((tmp_path / "h" / "scan-0" / "ledger-scan-0.json").read_text())
    assert Counter({r["noise_multiplier"]: r["count"] for r in sent["releases"]}) == {2.0: 2}, (
        "spectrum and prototypes, once each"
    )


def test_on_a_disk_that_refuses_nothing_leaves(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(data, make_config(data, **PRIVATE), tmp_path)
    assert isinstance(asked("train"), Reply)
    before, fsync = asked.path.read_bytes(), os.fsync

    def refuse(number: int) -> None:
        if "ledger" in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(28, "No space left on device")
        fsync(number)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("which file is written is asked of /proc")
    monkeypatch.setattr(os, "fsync", refuse)
    assert "ledger-scan-0.json: cannot be written (No space left on device)" in str(asked("train", 1))
    assert asked.path.read_bytes() == before


@pytest.mark.parametrize("text", ["{", "[]", '{"steps": [{"noise": 1}]}', '{"releases": [3]}'])
def test_a_damaged_ledger_is_one_line_and_no_hospital_opens(text: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "ledger-scan-0.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"^\S*ledger-scan-0\.json: [^\n]+$"):
        Hospital(data / "scan", "scan-0", tmp_path)


def test_orders_that_the_accountant_leaves_out_are_nobodys_concern(caplog: pytest.LogCaptureFixture) -> None:
    """dp-accounting warns of seven of them here, in every round of a hospital's log."""
    assert epsilon_of_examples(1.0, DELTA, 1, 1 / 6) > 0
    assert "order" not in caplog.text


def test_a_budget_that_cannot_be_kept_is_refused_beforehand(data: Path) -> None:
    policy = Policy(max_epsilon=3.0)
    with pytest.raises(FederationError, match=r"privacy\.example_noise = 0, with which no epsilon of 3 can be kept"):
        policy.check(make_config(data))
    with pytest.raises(FederationError, match="which anybody can take off"):
        policy.check(make_config(data, **PRIVATE, noise="seeded"))
    policy.check(make_config(data, **PRIVATE))
