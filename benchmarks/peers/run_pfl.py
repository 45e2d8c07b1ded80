"""pfl 0.6 on the job: FederatedAveraging with the simulated backend, one process, no evaluation."""

import dataclasses
from typing import Any

import numpy as np
import torch
from job import MOMENTUM, WEIGHT_DECAY, Assignment, Job, Net, Result, batch_order, build, client_data
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from run_bare import BareLoop
from torch import Tensor, nn
from torch.nn import functional


class PflNet(nn.Module):
    """The job's model with the two methods that pfl calls."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def loss(self, image: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy."""
        self.train()
        return functional.cross_entropy(self.net(image).float(), label)

    def metrics(self, image: Tensor, label: Tensor) -> dict[str, Any]:
        """Not part of the job."""
        raise NotImplementedError("the benchmark does not evaluate")


class TrainOnly(FederatedAveraging):  # type: ignore[misc]
    """FederatedAveraging without the evaluation that pfl always does in iteration 0."""

    def get_next_central_contexts(self, *args: Any) -> Any:
        """Switch evaluation off in every context."""
        contexts, model, metrics = super().get_next_central_contexts(*args)
        return contexts and tuple(dataclasses.replace(c, do_evaluation=False) for c in contexts), model, metrics


class Cohort:
    """Gives the clients in their order, with the examples in the order of the round."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._drawn = 0

    def next_client(self) -> int:
        """Return the client whose turn it is."""
        client = self._drawn % self._job.clients
        self._drawn += 1
        return client

    def dataset(self, client: int) -> Dataset:
        """Return a client's examples, shuffled for this round."""
        images, labels = client_data(self._job, client)
        order = batch_order(self._job, (self._drawn - 1) // self._job.clients, client)
        return Dataset((images[order], labels[order]), user_id=str(client))


class RoundTimer(TrainingProcessCallback):  # type: ignore[misc]
    """Times the rounds and lets the paired bare loop run between them."""

    def __init__(self, result: Result) -> None:
        self._result = result

    def on_train_begin(self, *, model: Any) -> Metrics:
        """The first round begins."""
        self._result.watch.begin()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int) -> tuple[bool, Metrics]:
        """A round has ended; the next one begins when this returns."""
        self._result.watch.end()
        self._result.after_round(central_iteration)
        self._result.watch.begin()
        return False, Metrics()


def local_sgd(parameters: Any, lr: float) -> torch.optim.SGD:
    """Return a client's optimiser."""
    return torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def main() -> None:
    assignment = Assignment.from_argv()
    job = assignment.job
    np.random.seed(job.seed)
    net = PflNet(build(job))
    # The central step adds the mean difference: SGD with rate 1.
    model = PyTorchModel(net, local_sgd, torch.optim.SGD(net.parameters(), lr=1.0))
    cohort, bare = Cohort(job), BareLoop(job)
    data = FederatedDataset(cohort.dataset, cohort.next_client)
    result = Result(assignment, bare.round)
    TrainOnly().run(
        NNAlgorithmParams(
            central_num_iterations=job.rounds, evaluation_frequency=job.rounds, train_cohort_size=job.clients, val_cohort_size=0
        ),
        SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(local_batch_size=job.batch, local_num_epochs=1, local_learning_rate=job.lr),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[RoundTimer(result)],
        send_metrics_to_platform=False,
    )
    result.save(net.net.state_dict(), bare.weights)


if __name__ == "__main__":
    main()
