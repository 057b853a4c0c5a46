"""A silo's share of one round: train the received adapter on its own records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedclip_secure.config.plan import FederationPlan, Optimizer
from fedclip_secure.data.dataset import Counts, FeatureSet, Task
from fedclip_secure.errors import ConfigError, DataError
from fedclip_secure.features.encoder import Encoder
from fedclip_secure.methods.base import Batch, Phase
from fedclip_secure.methods.registry import find_method
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.device_records import load_records, select
from fedclip_secure.training.evaluation.evaluate import classify
from fedclip_secure.training.shared_parameters import load_shared, parameters_like, update_since
from fedclip_secure.training.unshared_state import PrivateState


class LocalTrainer:
    """Trains by the plan on `splits["train"]`, validates on `splits["validation"]`.

    `encoder` is there where the method trains inside it; `silo` is who trains. What the method keeps to itself
    lies in `private_state` (default: in memory).

    Attributes:
        records: training records, the silo's weight where weights count records.

    Raises:
        DataError: there is nothing to train on.
        ConfigError: the plan has no batch size, as one with privacy.
    """

    def __init__(
        self,
        plan: FederationPlan,
        task: Task,
        splits: Mapping[str, FeatureSet],
        device: torch.device,
        *,
        encoder: Encoder | None = None,
        silo: str | None = None,
        private_state: PrivateState | None = None,
    ) -> None:
        if plan.training.batch_size is None:
            raise ConfigError("federation.yaml: training.batch_size is missing; add it")
        self._training, self._batch_size = plan.training, plan.training.batch_size
        self._method = find_method(plan.method)
        self._task = task
        self._device = device
        self._validation = splits["validation"]
        train = splits["train"]
        self.records = len(train)
        least = 1 if self._method.spec.per_record_loss else 2
        if self.records < least:
            raise DataError(
                f"{train.source}: {self.records} record(s) fall into the training split, the plan's loss needs "
                f"{least}; add records, or ask for a larger `splits.train`"
            )
        self._module = self._method.build(task, encoder).to(device)
        self._phases = tuple(self._method.phases(silo))
        self._private_state = PrivateState() if private_state is None else private_state
        self._loaded = load_records(train, task, device)

    def check(self, received: AdapterState) -> None:
        """Nothing is refused here that `train` does not find."""

    def train(self, received: AdapterState) -> npt.NDArray[np.float64]:
        """One round from `received`: the update, trained minus received, (received.layout.size,) float64.

        Every optimiser starts afresh, as the silo may have missed rounds. The order of the records is
        new each time and comes from the operating system.

        Raises:
            ModelError: `received` is not of the plan's method, or training ran to NaN or infinity.
        """
        load_shared(self._module, self._method.spec, received)
        self._private_state.begin(self._module, self._method.spec, received)
        self._method.begin_round(self._module)
        self._module.train()
        steps = [(phase, self._optimizer(phase)) for phase in self._phases]
        shuffling = torch.Generator()
        shuffling.seed()
        for _ in range(self._training.local_epochs):
            for batch in self._shuffled(shuffling):
                for phase, optimizer in steps:
                    _step(self._module, phase, optimizer, batch)
        update = update_since(self._module, self._method.spec, received)
        self._private_state.finish(self._module, self._method.spec)
        return update

    def validate(self, state: AdapterState) -> Counts:
        """How `state` does on the validation split; 0 of 0 where it is empty.

        Raises:
            ModelError: `state` is not of the plan's method.
        """
        load_shared(self._module, self._method.spec, state)
        self._module.eval()
        found = classify(
            self._validation, self._task, self._device, lambda batch: self._method.predict(self._module, batch)
        )
        return Counts(int((found == self._validation.labels).sum()), len(found))

    def _optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        return make_optimizer(parameters_like(self._module, phase.parameters).values(), self._training.optimizer)

    def _shuffled(self, generator: torch.Generator) -> Iterable[Batch]:
        order = torch.randperm(self.records, generator=generator).to(self._device)
        for rows in torch.split(order, self._batch_size):
            # With one record a coupled loss is zero: a step would only decay weights.
            if len(rows) > 1 or self._method.spec.per_record_loss:
                yield select(self._loaded, rows)


def make_optimizer(parameters: Iterable[Tensor], options: Optimizer) -> torch.optim.Optimizer:
    """The plan's optimiser over `parameters`. Adam's weight decay is added to the gradient, AdamW's is not."""
    listed = list(parameters)
    if options.name == "sgd":
        return torch.optim.SGD(listed, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)
    kind: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.name]
    return kind(listed, lr=options.lr, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay)


def _step(module: nn.Module, phase: Phase, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(phase.loss(module, batch).mean())
    optimizer.step()
