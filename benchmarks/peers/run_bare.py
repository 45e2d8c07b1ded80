"""The bare loop: what federated averaging costs without a framework. Every other system is measured against it."""

import torch
from job import Assignment, Job, Result, batch_order, build, client_data, optimiser
from torch import Tensor
from torch.nn import functional


class BareLoop:
    """FedAvg in plain torch: copy weights in, SGD steps, running mean in float64 as in `omnifm.federation.aggregation`."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._format = torch.channels_last if job.bf16 else torch.contiguous_format
        self._model = build(job).to(memory_format=self._format)  # type: ignore[call-overload]  # torch has it
        self._state = self._model.state_dict()
        self.weights = {name: tensor.clone() for name, tensor in self._state.items()}

    def round(self, index: int) -> None:
        """Train all clients once and replace the weights by their mean, weighted by examples."""
        sums: dict[str, Tensor] = {}
        total = 0
        for client in range(self._job.clients):
            with torch.no_grad():
                for name, tensor in self._state.items():
                    tensor.copy_(self.weights[name])
            self._train(index, client)
            with torch.no_grad():
                for name, tensor in self._state.items():
                    if name in sums:
                        sums[name].add_(tensor, alpha=self._job.examples)
                    else:
                        sums[name] = tensor.double().mul_(self._job.examples)
            total += self._job.examples
        self.weights = {name: (tensor / total).float() for name, tensor in sums.items()}

    def _train(self, index: int, client: int) -> None:
        images, labels = client_data(self._job, client)
        sgd = optimiser(self._model, self._job)
        self._model.train()
        for batch in batch_order(self._job, index, client).split(self._job.batch):
            image = images[batch].contiguous(memory_format=self._format)
            sgd.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=self._job.bf16):
                loss = functional.cross_entropy(self._model(image).float(), labels[batch])
            loss.backward()
            sgd.step()


def main() -> None:
    assignment = Assignment.from_argv()
    loop = BareLoop(assignment.job)
    result = Result(assignment, None)
    for index in range(assignment.job.rounds):
        with result.watch.round():
            loop.round(index)
    result.save(loop.weights)


if __name__ == "__main__":
    main()
