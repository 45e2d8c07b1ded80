"""Make flower.json: what Flower 1.41.0's own strategies make of some rounds of made-up replies.

    python3 -m venv flwr-env && flwr-env/bin/pip install flwr==1.41.0 && flwr-env/bin/python make_flower.py

Every strategy is called as Flower's loop calls it (`configure_train`, `aggregate_train`), a stand-in for the grid apart. Where
Flower is another rule by design, it is set to the paper's here:

* FedAdam divides its step by a bias correction, sqrt(1 - beta2^(r+1)) / (1 - beta1^(r+1)) in round r = 1, 2, ...; eta is given
  divided by it. Algorithm 2 of the paper has none.
* FedAdam and FedYogi start v from 0; here from tau^2, as in the paper.
* MultiKrum weighs the chosen by examples; here all clients have one example. How many are chosen and how many are hostile are
  fixed numbers there, and shares of a round's clients in omnifm: set anew for every round.
* FedTrimmedAvg cuts beta m rounded down, omnifm rounded up; here beta m is whole.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import flwr
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvgM, FedMedian, FedTrimmedAvg, FedYogi, Krum, MultiKrum
from flwr.supercore.task_identity import TaskIdentity

SHAPES = {"w": (3, 2), "b": (2,)}
CLIENTS = 10
ADAPTIVE = {"server_step": 0.05, "beta1": 0.8, "beta2": 0.7, "tau": 0.02}


def draw(rng):
    """Return numbers that JSON keeps whole."""
    return {name: np.round(rng.normal(size=shape), 4) for name, shape in SHAPES.items()}


def record(arrays):
    """Return an ArrayRecord."""
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def rounds(strategy, start, counts, equal, before):
    """Feed `counts` replies a round to a strategy; return what came in and what came out."""
    rng, now, told = np.random.default_rng(len(counts) + counts[0]), start, []
    grid = SimpleNamespace(get_node_ids=lambda: list(range(1, CLIENTS + 1)))
    for index, count in enumerate(counts, start=1):
        before(strategy, index, count, now)
        requests = list(strategy.configure_train(index, record(now), ConfigRecord(), grid))
        moves = [draw(rng) for _ in range(count)]
        examples = [1 if equal else int(n) for n in rng.integers(5, 50, count)]
        replies = []
        for request, move, n in zip(requests[:count], moves, examples, strict=True):
            arrays = record({name: now[name] + move[name] for name in SHAPES})
            content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": n})})
            replies.append(Message(content, reply_to=request))
        after, _ = strategy.aggregate_train(index, replies)
        now = {name: np.array(array.numpy()) for name, array in after.items()}
        told.append({"examples": examples, "moves": [plain(m) for m in moves], "after": plain(now)})
    return told


def plain(arrays):
    """Return lists."""
    return {name: np.asarray(value).tolist() for name, value in arrays.items()}


def nothing(strategy, index, count, now):
    """Leave Flower as it is."""


def as_paper(strategy, index, count, now):
    """Start v from tau^2 and take the bias correction out."""
    if strategy.v_t is None:
        strategy.v_t = {name: np.full_like(value, ADAPTIVE["tau"] ** 2) for name, value in now.items()}
    if isinstance(strategy, FedAdam):
        correction = math.sqrt(1 - strategy.beta_2 ** (index + 1)) / (1 - strategy.beta_1 ** (index + 1))
        strategy.eta = ADAPTIVE["server_step"] / correction


def fifth(strategy, index, count, now):
    """Fear a fifth, rounded up; Multi-Krum chooses the rest."""
    strategy.num_malicious_nodes = math.ceil(count / 5)
    if not isinstance(strategy, Krum):
        strategy.num_nodes_to_select = count - strategy.num_malicious_nodes


def main():
    """Write the file."""
    assert flwr.__version__ == "1.41.0"
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # messages say who sent them
    numbers = {"eta": ADAPTIVE["server_step"], "beta_1": ADAPTIVE["beta1"], "beta_2": ADAPTIVE["beta2"], "tau": ADAPTIVE["tau"]}
    start = draw(np.random.default_rng(0))
    momentum = FedAvgM(server_learning_rate=1.3, server_momentum=0.7)
    cases = {
        "FedAvgM": ("fedavgm", {"beta": 0.7, "server_step": 1.3}, momentum, [3, 4, 2, 4], False, nothing),
        "FedAdam": ("fedadam", ADAPTIVE, FedAdam(**numbers), [3, 4, 2, 4], False, as_paper),
        "FedYogi": ("fedyogi", ADAPTIVE, FedYogi(**numbers), [3, 4, 2, 4], False, as_paper),
        "FedMedian": ("median", {}, FedMedian(), [5, 4, 2, 9], False, nothing),
        "FedTrimmedAvg": ("trimmed_mean", {"beta": 0.2}, FedTrimmedAvg(beta=0.2), [5, 10, 5], False, nothing),
        "Krum": ("multikrum", {"hostile": 0.2, "chosen": 1}, Krum(), [5, 10, 6, 8, 9, 7], True, fifth),
        "MultiKrum": ("multikrum", {"hostile": 0.2, "chosen": 0}, MultiKrum(), [5, 10, 6, 8, 9, 7], True, fifth),
    }
    found = {
        name: {"strategy": ours, "options": options, "rounds": rounds(theirs, start, counts, equal, before)}
        for name, (ours, options, theirs, counts, equal, before) in cases.items()
    }
    text = json.dumps({"flwr": flwr.__version__, "start": plain(start), "cases": found}, separators=(",", ":"))
    Path(__file__).with_name("flower.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
