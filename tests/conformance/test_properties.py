"""What every strategy of `build.STRATEGIES` must do; a new one is held to it the day it is in the table."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omnifm.build import STRATEGIES
from omnifm.federation.client import POOLED, STATE
from omnifm.federation.messages import Reply
from omnifm.federation.state import LocalJob, ServerState
from omnifm.federation.strategy import Strategy
from omnifm.spectral.psp import Suffix
from omnifm.tasks.base import Batch
from tests.support import HOSPITALS, NEEDS, Ahead, Altered, Hospital, Lab, Spy, Wire, differing, make_lab, spy

pytestmark = pytest.mark.parametrize("strategy", sorted(STRATEGIES))

# Their servers go on from the mean of the uploads, by what they remember.
MOVES_ON = {"fedavgm", "fedadam", "fedyogi", "feddyn"}
# A part of the model does not train for a part of the round.
STANDS_STILL = {"fedrep"}
# A client trains so many models in a round, each on all examples.
MODELS = {"ditto": 2}
ABSENT = [["a", "b"], ["b", "c"], ["a", "c"]]  # d never takes part


def aggregates(lab: Lab) -> bool:
    """Whether anything is shared; `local` shares nothing."""
    return bool(lab.site.sharing.shared)


def trained_by(lab: Lab) -> list[str]:
    """Return who holds private state if everybody took part."""
    return [POOLED] if lab.strategy.pooled else [h.id for h in lab.hospitals]


def test_two_runs_are_bitwise_equal(strategy: str, tmp_path: Path) -> None:
    labs = [make_lab(tmp_path / str(i), strategy, federation__participation=0.5) for i in range(2)]
    first, second = (lab.snapshot(lab.run()) for lab in labs)
    assert first and differing(first, second) == []
    assert labs[0].events == labs[1].events
    other = make_lab(tmp_path / "other", strategy, federation__participation=0.5, seed=1)
    assert differing(first, other.snapshot(other.run()))


def test_training_changes_what_trains(strategy: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy)
    before = dict(lab.site.model.state_dict())
    before = {n: t.clone() for n, t in before.items()}
    server = lab.run()
    after = server.shared if aggregates(lab) else lab.private("a")
    changed = {n for n, t in after.items() if not torch.equal(t, before[n])}
    backbone = {n for n in ("backbone.conv.weight", "backbone.norm.bias") if n in after}
    # Where the backbone stays as it came, what was put into it changes.
    assert changed >= (backbone or {n for n, p in lab.site.model.named_parameters() if p.requires_grad and n in after})


def test_the_order_of_the_clients_in_the_config_does_not_matter(strategy: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path / "1", strategy, federation__participation=0.5)
    turned = make_lab(tmp_path / "2", strategy, federation__participation=0.5, hospitals=HOSPITALS[::-1])
    first, second = lab.snapshot(lab.run()), turned.snapshot(turned.run())
    # A bank row says who uploaded it by the client's place in the config.
    names = [n for n in first if not n.endswith(("bank/rows.client", "bank/client"))]
    assert len(first) - len(names) <= 1 + len(HOSPITALS)
    assert differing({n: first[n] for n in names}, {n: t for n, t in second.items() if n in names}) == []
    assert lab.evaluate(lab.run()).views == turned.evaluate(turned.run()).views


class PrivateValues:
    """Collects the bytes of every private tensor that training left at a client."""

    def __init__(self, lab: Lab, private: frozenset[str]) -> None:
        self.seen: dict[bytes, str] = {}
        initial = {name: t.clone() for name, t in lab.site.model.state_dict().items()}
        save = lab.store.save

        def listen(client: str, round_index: int, tensors: dict[str, Tensor], *rounds: Sequence[int]) -> None:
            for name in private & tensors.keys():
                # What nothing has trained yet is no secret: every site builds it from the seed. Single counters are everywhere.
                if tensors[name].numel() > 1 and not torch.equal(tensors[name], initial[name]):
                    self.seen[tensors[name].numpy().tobytes()] = name
            save(client, round_index, tensors, *rounds)

        lab.store.save = listen  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("buffers", ["average", "local"])
def test_private_tensors_never_travel_and_every_shared_one_does(strategy: str, buffers: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy, engine=Spy, model__norm="batch", model__buffers=buffers)
    sharing = lab.site.sharing
    private = frozenset(sharing.private)
    secrets = PrivateValues(lab, private)
    lab.evaluate(lab.run(), finetune=True)
    assert bool(secrets.seen) == bool(private)
    for message in spy(lab).messages():
        carried = {**message.tensors, **message.extra}
        assert not private & carried.keys() and not any(name.startswith(STATE) for name in carried)
        leaked = [secrets.seen.get(tensor.contiguous().numpy().tobytes()) for tensor in carried.values()]
        assert not any(leaked), f"the value of {leaked} is in a message"
    for reply in spy(lab).replies:
        assert set(reply.tensors) == (set(sharing.shared) if reply.kind == "train" else set())
    for request in spy(lab).requests:
        assert set(request.tensors) == (set() if request.kind == "describe" else set(sharing.shared))


def test_what_is_for_training_alone_is_sent_for_training_alone(strategy: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy, engine=Spy)
    server = lab.run()
    lab.evaluate(server, finetune=True)
    for request in (r for r in spy(lab).requests if r.kind == "evaluate"):
        expected = dict(lab.strategy.extra_for(server, request.client)) if lab.strategy.predicts_with_extra else {}
        assert differing(dict(request.extra), expected) == []


def test_the_four_sets_are_the_whole_state(strategy: str, tmp_path: Path) -> None:
    for buffers in ("average", "local", "drop"):
        site = make_lab(tmp_path, strategy, model__norm="batch", model__buffers=buffers).site
        sets = (site.sharing.shared, site.sharing.private, site.sharing.frozen, site.sharing.dropped)
        names = [name for part in sets for name in part]
        assert sorted(names) == sorted(site.model.state_dict())


def test_a_suffix_never_leaves_its_client(strategy: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy, engine=Spy)
    suffixes = [f"{name}.token" for name, module in lab.site.model.named_modules() if isinstance(module, Suffix)]
    lab.run()
    assert suffixes or strategy != "omnifm"
    for name in suffixes:
        assert all(name not in message.tensors for message in spy(lab).messages())
        held = [lab.private(h.id)[name] for h in HOSPITALS]
        assert not torch.equal(held[0], held[1])


def test_clients_that_do_not_take_part_keep_their_private_state(strategy: str, tmp_path: Path) -> None:
    seen: list[dict[str, dict[str, Tensor]]] = []
    lab = make_lab(tmp_path, strategy, schedule=ABSENT, federation__rounds=3)
    lab.after_round = lambda lab, server, done: seen.append({h.id: lab.private(h.id) for h in HOSPITALS})
    server = lab.run()
    lab.evaluate(server, finetune=True)
    final = {h.id: lab.private(h.id) for h in HOSPITALS}
    keeps = any(final.values())  # private tensors, or a state of the strategy's
    assert keeps or not lab.site.sharing.private or lab.strategy.pooled
    assert differing(final["d"], {}) == [] and differing(final["b"], seen[1]["b"]) == []
    for index, sampled in enumerate(ABSENT):
        before = seen[index - 1] if index else {h.id: {} for h in HOSPITALS}
        for h in HOSPITALS:
            changed = bool(differing(before[h.id], seen[index][h.id]))
            assert changed == (keeps and not lab.strategy.pooled and h.id in sampled)


def test_a_client_that_never_takes_part_can_be_evaluated(strategy: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy, schedule=ABSENT, federation__rounds=3)
    found = lab.evaluate(lab.run(), finetune=True)
    for view in ("personal", "finetuned"):
        scores = found.clients["d"][view]
        assert scores is not None and scores["accuracy"] is not None
    assert lab.private("d") == {}


def test_one_client_may_be_all_that_takes_part(strategy: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy, federation__participation=0.01, federation__rounds=3)
    assert [len(sampled) for sampled in lab.schedule] == [1, 1, 1]
    lab.evaluate(lab.run())
    assert [len(e["clients"]) for e in lab.events if e["event"] == "round"] == [1, 1, 1]


def test_equal_uploads_average_to_exactly_these(strategy: str, tmp_path: Path) -> None:
    """The weights of a mean sum to 1, whatever the sizes of the clients and whoever is sampled."""
    chosen: dict[str, Tensor] = {}

    def same(reply: Reply) -> Reply:
        return replace(reply, tensors=chosen) if reply.kind == "train" else reply

    lab = make_lab(tmp_path, strategy, engine=lambda site: Altered(site, same), schedule=ABSENT, federation__rounds=3)
    generator = torch.Generator().manual_seed(0)
    chosen |= {n: torch.randn(t.shape, generator=generator) for n, t in lab.start().shared.items()}
    if strategy in MOVES_ON:
        chosen |= lab.start().shared  # what the clients were sent: there is nothing to go on by
    server = lab.run()
    assert differing(server.shared, chosen) == []
    for h in HOSPITALS:
        assert differing(dict(lab.strategy.shared_for(server, h.id)), chosen) == []


def test_a_lone_client_gets_its_own_model_back(strategy: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy, hospitals=HOSPITALS[:1], engine=Spy, federation__rounds=3)
    server = lab.run()
    requests = [r for r in spy(lab).requests if r.kind == "train"]
    uploads = [reply.tensors for reply in spy(lab).trained()]
    if strategy in MOVES_ON:
        assert differing(server.shared, dict(uploads[-1]))
        return
    for request, upload in zip(requests[1:], uploads, strict=False):
        assert differing(dict(request.tensors), dict(upload)) == []
    assert differing(server.shared, dict(uploads[-1])) == []


def test_messages_survive_the_wire_bitwise(strategy: str, tmp_path: Path) -> None:
    direct, wired = make_lab(tmp_path / "1", strategy), make_lab(tmp_path / "2", strategy, engine=Wire)
    first, second = direct.run(), wired.run()
    assert differing(direct.snapshot(first), wired.snapshot(second)) == []
    assert direct.events == wired.events
    assert direct.evaluate(first, finetune=True) == wired.evaluate(second, finetune=True)


def test_what_a_client_is_sent_does_not_depend_on_who_answered_before(strategy: str, tmp_path: Path) -> None:
    lazy, ahead = make_lab(tmp_path / "1", strategy), make_lab(tmp_path / "2", strategy, engine=Ahead)
    assert differing(lazy.snapshot(lazy.run()), ahead.snapshot(ahead.run())) == []
    assert lazy.events == ahead.events


class Killed(Exception):
    """The server's process ends here."""


@pytest.mark.parametrize("completed", [0, 1, 2])
def test_a_run_killed_in_any_round_resumes_to_the_same_bits(strategy: str, completed: int, tmp_path: Path) -> None:
    whole = make_lab(tmp_path / "whole", strategy, federation__rounds=3, optimiser__schedule="cosine")
    cut = make_lab(tmp_path / "cut", strategy, federation__rounds=3, optimiser__schedule="cosine", checkpoint=True)
    kill_in_round(cut, completed)
    resumed = make_lab(tmp_path / "cut", strategy, federation__rounds=3, optimiser__schedule="cosine", checkpoint=True)
    assert resumed.checkpoint is not None
    server = resumed.checkpoint.load()[0] if completed else None
    first, second = whole.snapshot(whole.run()), resumed.snapshot(resumed.run(server, completed))
    assert differing(first, second) == []
    assert [e for e in whole.events if e.get("round", -1) >= completed] == [e for e in resumed.events if "round" in e]


def kill_in_round(lab: Lab, index: int) -> None:
    """Run until the first client of round `index` has trained and saved its private state."""
    event = lab.event

    def stop(record: dict[str, object]) -> None:
        event(record)
        if record["event"] == "client" and record["round"] == index:
            raise Killed

    lab.event = stop  # type: ignore[method-assign, assignment]
    with pytest.raises(Killed):
        lab.run()


@pytest.mark.parametrize("participation", [0.5, 1.0])
def test_every_strategy_sees_the_same_number_of_examples(strategy: str, participation: float, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy, federation__participation=participation, federation__local_epochs=2)
    seen: list[int] = []
    prepare = lab.site.strategy.prepare

    def count(job: LocalJob, batch: Batch) -> Batch:
        # Once for every step, however many passes the step takes.
        seen.append(len(batch.target))
        return prepare(job, batch)

    lab.site.strategy.prepare = count  # type: ignore[method-assign]
    lab.run()
    sizes = lab.num_train
    assert sum(seen) == MODELS.get(strategy, 1) * 2 * sum(sizes[client] for sampled in lab.schedule for client in sampled)
    weights = [e["num_examples"] for e in lab.events if e["event"] == "client"]
    assert sum(weights) == sum(sizes[client] for sampled in lab.schedule for client in sampled)


def test_the_global_model_is_the_same_for_every_client(strategy: str, tmp_path: Path) -> None:
    """Where there is a global view, it is the shared model alone: what clients keep does not change it."""
    lab = make_lab(tmp_path, strategy)
    server = lab.run()
    views = lab.evaluate(server).views
    if not lab.site.has_global():
        assert views["global"] is None
        return
    for h in HOSPITALS:
        for path in (tmp_path / "clients" / h.id).glob("*"):
            path.unlink()
    assert lab.evaluate(server).views["global"] == views["global"]


def test_fine_tuning_before_a_score_leaves_everything_as_it_was(strategy: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy)
    server = lab.run()
    before = {n: t.clone() for n, t in lab.snapshot(server).items()}
    first = lab.evaluate(server, finetune=True)
    assert differing(before, lab.snapshot(server)) == []
    assert first == lab.evaluate(server, finetune=True)
    plain = lab.evaluate(server)
    assert plain.views["personal"] == first.views["personal"] and plain.views["finetuned"] is None


def test_the_strategy_object_holds_no_state_of_a_run(strategy: str, tmp_path: Path) -> None:
    """A second server, run by the same object after the first, ends where the first did."""
    lab = make_lab(tmp_path / "1", strategy)
    first = lab.snapshot(lab.run())
    again = make_lab(tmp_path / "2", strategy)
    again.strategy = lab.strategy
    assert differing(first, again.snapshot(again.run())) == []


def test_one_seed_one_model_whatever_the_strategy(strategy: str, tmp_path: Path) -> None:
    plain = make_lab(tmp_path, "fedavg").site.model.state_dict()
    found = make_lab(tmp_path, strategy).site.model.state_dict()
    model = {n.replace(".parametrizations.weight.original", ".weight"): t for n, t in found.items()}
    assert differing(dict(plain), {n: model[n] for n in plain}) == []


def test_mixed_precision_in_channels_last_trains_and_differs_little(strategy: str, tmp_path: Path) -> None:
    plain = make_lab(tmp_path / "1", strategy)
    fast = make_lab(tmp_path / "2", strategy, engine__precision="bf16", engine__channels_last=True)
    first, second = plain.snapshot(plain.run()), fast.snapshot(fast.run())
    weights = [n for n, t in first.items() if n.split(":")[1].startswith(("backbone", "head")) and t.is_floating_point()]
    assert weights and first.keys() == second.keys()
    assert any(not torch.equal(first[n], second[n]) for n in weights)
    for name in weights:
        assert second[name].dtype == first[name].dtype == torch.float32 and second[name].is_contiguous()
        torch.testing.assert_close(second[name], first[name], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("buffers", ["average", "local", "drop"])
def test_running_statistics_follow_their_policy(strategy: str, buffers: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy, engine=Spy, model__norm="batch", model__buffers=buffers)
    statistics = {f"backbone.norm.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    server = lab.run()
    sent = {name for message in spy(lab).messages() for name in message.tensors}
    if not aggregates(lab):
        assert not sent
        return
    own = statistics & set(lab.site.sharing.private)
    assert statistics & sent == (statistics - own if buffers == "average" else set())
    if own:
        check_own_statistics(lab, statistics)
    elif buffers == "drop":
        assert all(not statistics & lab.private(client).keys() for client in trained_by(lab))
        # Two rounds trained, one round counted: it started anew.
        assert 0 < int(lab.site.model.get_buffer("backbone.norm.num_batches_tracked")) <= steps_of_a_round(lab)
        assert set(lab.site.sharing.dropped) == statistics
    else:
        check_averaged_statistics(lab, server)


def steps_of_a_round(lab: Lab) -> int:
    sizes = lab.num_train.values()
    return max([sum(sizes)] if lab.strategy.pooled else sizes) // lab.config.optimiser.batch_size + 1


def check_own_statistics(lab: Lab, statistics: set[str]) -> None:
    for client in trained_by(lab):
        own = lab.private(client)
        size = sum(lab.num_train.values()) if client == POOLED else lab.num_train[client]
        batches = -(-size // lab.config.optimiser.batch_size)
        assert statistics <= own.keys()
        tracked = int(own["backbone.norm.num_batches_tracked"])
        # Where the backbone stands still for a part of the round, its statistics do too.
        assert 0 < tracked < 2 * batches if lab.config.strategy in STANDS_STILL else tracked == 2 * batches
    # Nobody's running statistics are a global model's.
    assert not lab.site.has_global()


def check_averaged_statistics(lab: Lab, server: ServerState) -> None:
    last = spy(lab).trained(1)
    weights = [lab.strategy.context.weight(reply.num_examples) for reply in last]
    sums = sum(w * r.tensors["backbone.norm.running_mean"].double() for w, r in zip(weights, last, strict=True))
    mean = sums / sum(weights)
    if lab.strategy.tolerates_nonfinite:
        # One hostile client moves a mean as far as it likes.
        mean = torch.stack([reply.tensors["backbone.norm.running_mean"].double() for reply in last]).quantile(0.5, dim=0)
    torch.testing.assert_close(server.shared["backbone.norm.running_mean"].double(), mean, atol=1e-7, rtol=1e-6)
    counts = [int(reply.tensors["backbone.norm.num_batches_tracked"]) for reply in last]
    assert int(server.shared["backbone.norm.num_batches_tracked"]) == max(counts)


def test_hooks_are_the_only_thing_a_strategy_changes(strategy: str, tmp_path: Path) -> None:
    lab = make_lab(tmp_path, strategy)
    public = {n for n in vars(type(lab.strategy)) if not n.startswith("_")}
    hooks = {n for n in vars(Strategy) if not n.startswith("_")}
    assert public - {"options"} <= hooks


def test_two_examples_and_one_epoch_are_enough(strategy: str, tmp_path: Path) -> None:
    least = 2 if "model__norm" in NEEDS.get(strategy, {}) else 1  # BatchNorm cannot train on one
    few = (Hospital("a", "CT", 2), Hospital("b", "US", least), Hospital("c", "MRI", 5, val=0, test=0))
    lab = make_lab(tmp_path, strategy, hospitals=few)
    found = lab.evaluate(lab.run(), finetune=True)
    assert found.clients["c"]["personal"] is None and found.views["personal"] is not None
