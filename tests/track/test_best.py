"""The best round: chosen by validation alone, the first of equals, and still whole when the run is over."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifm.federation.state import ServerState
from omnifm.federation.store import ClientStore
from omnifm.track.checkpoint import Checkpoint
from omnifm.track.recorder import RunRecorder
from tests.run.jobs import lines

Score = float | None
Rounds = st.lists(
    st.tuples(st.sets(st.sampled_from("abc"), min_size=1), st.none() | st.sampled_from([0.1, 0.2, 0.3, 0.4])),
    min_size=1,
    max_size=9,
)


def evaluation(round_index: int, score: Score, split: str = "val") -> dict[str, object]:
    return {"event": "evaluation", "round": round_index, "split": split, "personal": {"accuracy": score}}


def first_best(scores: list[Score]) -> int | None:
    """Rounds completed at the first highest score, by a plain loop."""
    best, place = -1.0, None
    for done, score in enumerate(scores, 1):
        if score is not None and score > best:
            best, place = score, done
    return place


@settings(max_examples=40)
@given(rounds=Rounds, crash=st.integers(1, 9))
def test_each_client_keeps_the_state_it_had_at_the_best_round(rounds: list[tuple[set[str], Score]], crash: int) -> None:
    """Clients and server as in `rounds.py`; once, the server is killed after a round and starts again."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = Checkpoint(folder / "checkpoint")
        store = ClientStore(checkpoint.clients)
        recorder = RunRecorder(folder, checkpoint, "accuracy")
        server = ServerState({"x": torch.zeros(1)})
        truth: list[dict[str, int]] = [{}]
        for index, (sampled, score) in enumerate(rounds):
            for client in sorted(sampled):
                assert float(store.load(client, index).get("v", torch.tensor(0.0))) == truth[-1].get(client, 0)
                store.save(client, index, {"v": torch.tensor(index + 1.0)}, keep=server.meta.get("keep", []))
            truth.append({**truth[-1], **dict.fromkeys(sampled, index + 1)})
            recorder.event(evaluation(index, score))
            recorder.commit(server, index + 1)
            if index + 1 == crash:
                recorder.close()
                if index + 1 < len(rounds):  # the next round had begun: one of its clients is a version ahead
                    store.save(min(rounds[index + 1][0]), index + 1, {"v": torch.tensor(-1.0)}, keep=server.meta["keep"])
                server, record = checkpoint.load()
                recorder = RunRecorder(folder, checkpoint, "accuracy")
                recorder.rewind(record)
        recorder.close()
        best = first_best([score for _, score in rounds])
        assert checkpoint.exists("best") == (best is not None)
        for moment in {len(rounds), best} - {None}:
            assert moment is not None
            for client in "abc":
                assert float(store.load(client, moment).get("v", torch.tensor(0.0))) == truth[moment].get(client, 0)
        if best is not None:
            assert checkpoint.load("best")[1]["rounds_completed"] == best
        for client in store.clients():
            assert len(store.versions(client)) <= 4, "old versions are deleted"


@given(scores=st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=8))
def test_the_first_best_is_kept(scores: list[Score]) -> None:
    with TemporaryDirectory() as name:
        recorder = RunRecorder(Path(name), Checkpoint(Path(name) / "checkpoint"), "accuracy")
        for index, score in enumerate(scores):
            recorder.event(evaluation(index, score))
        recorder.close()
        assert (recorder.best[0] if recorder.best else None) == first_best(scores)


def test_test_scores_never_choose(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path, Checkpoint(tmp_path / "checkpoint"), "accuracy")
    recorder.event(evaluation(0, 0.2))
    recorder.event(evaluation(1, 0.9, split="test"))
    recorder.event({**evaluation(2, None), "worst": {"accuracy": 0.99}, "global": {"accuracy": 0.99}})
    recorder.close()
    assert recorder.best == (1, 0.2)


@pytest.mark.parametrize("strategy", ["omnifm", "local", "fedavg"])
def test_the_best_state_gives_the_recorded_validation_score_again(
    strategy: str, data: Path, finished: Callable[[str], Path]
) -> None:
    from omnifm import build
    from omnifm.federation.evaluation import Evaluator
    from tests.run.jobs import config

    run, settings_ = finished(strategy), config(data, strategy)
    found = build.load_data(settings_)
    checkpoint = Checkpoint(run / "checkpoint")
    site = build.make_site(settings_, checkpoint.clients, found)
    sizes = {p.id: {"train": len(p.train), "val": len(p.val), "test": len(p.test)} for p in found.plans}
    engine = build.make_engine(settings_, site, checkpoint.clients)
    evaluator = Evaluator(
        site.task, site.strategy, engine, sizes, settings_.federation, settings_.optimiser, has_global=site.has_global()
    )
    server, record = checkpoint.load("best")
    done = record["rounds_completed"]
    events = {e["round"] + 1: e for e in lines(run / "events.jsonl") if e["event"] == "evaluation"}
    again = evaluator.evaluate(server, done, "val")
    assert again.views["personal"] == events[done]["personal"]
    assert record["best"] == [done, events[done]["personal"]["accuracy"]]
    assert done == first_best([events[r]["personal"]["accuracy"] for r in sorted(events)])
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["best_validation_round"] == metrics["best"]["round"] == done - 1
    assert evaluator.evaluate(server, done, "test").views["personal"] == metrics["best"]["test"]["personal"]
