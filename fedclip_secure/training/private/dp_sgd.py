"""A silo's share of one round under differential privacy: DP-SGD (Abadi et al. 2016, arXiv:1607.00133).

Each phase of each step draws its own batch and is one release, a Poisson-subsampled Gaussian mechanism: every unit is
in the batch with probability q by itself; the gradient of each is clipped to C; the sum gets noise of deviation σ·C and
is divided by the plan's constant. What follows - the optimiser with its state, the next steps, the update - is
post-processing, and nothing but the sum depends on how many records there are: an empty batch steps like any other.
"""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.data.dataset import Counts, FeatureSet, Task
from fedclip_secure.errors import ConfigError, DataError
from fedclip_secure.features.encoder import Encoder
from fedclip_secure.methods.base import Method, Phase
from fedclip_secure.methods.registry import find_method
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.device_records import load_records, select
from fedclip_secure.training.local_training import make_optimizer
from fedclip_secure.training.private.bounds import check_bounded, check_terms
from fedclip_secure.training.private.clipping import clipped_sum
from fedclip_secure.training.private.gaussian import GaussianMechanism
from fedclip_secure.training.private.independence import check_records_apart
from fedclip_secure.training.private.poisson import draw_members
from fedclip_secure.training.shared_parameters import load_shared, parameters_like, read_private, update_since
from fedclip_secure.training.unshared_state import PrivateState


class Coins(Protocol):
    """Where membership and noise come from."""

    def __call__(self) -> bytes:
        """32 bytes that key one stream, and are never used again."""


def system_coins() -> bytes:
    """From the operating system. Nothing in a plan or in silo.yaml can put anything else in its place."""
    return os.urandom(32)


class PrivateTrainer:
    """Trains by a plan with `privacy` on `features`, whose records belong to `units` (N, 32) uint8.

    No records at all train like many: whether there are some must not show.

    Attributes:
        records: N, for this silo's own eyes.

    Raises:
        ConfigError, ModelError: the method cannot be trained with privacy.
    """

    def __init__(  # noqa: PLR0917 - each is a thing of its own
        self,
        plan: FederationPlan,
        noise_multiplier: float,
        task: Task,
        features: FeatureSet,
        units: npt.NDArray[np.uint8],
        device: torch.device,
        *,
        encoder: Encoder | None = None,
        silo: str | None = None,
        private_state: PrivateState | None = None,
        coins: Coins = system_coins,
    ) -> None:
        if plan.privacy is None:
            raise ConfigError("federation.yaml: privacy is missing; a plan without it has no private training")
        if units.shape != (len(features), 32) or units.dtype != np.uint8:
            raise DataError(f"{features.source}: {units.shape} {units.dtype} unit ids for {len(features)} records")
        check_terms(plan.privacy, task.logit_scale)
        self._method = find_method(plan.method)
        check_private(self._method)
        self._privacy, self._optimizer, self._coins = plan.privacy, plan.training.optimizer, coins
        self._mechanism = GaussianMechanism(noise_multiplier, plan.privacy.max_grad_norm, plan.privacy.update_divisor)
        self._phases = tuple(self._method.phases(silo))
        self._private_state = PrivateState() if private_state is None else private_state
        self._module = self._method.build(task, encoder).to(device).train()
        self._task, self._shape, self._device = task, features.taken.shape[1:], device
        self._check_records_apart()
        self._checked = b""  # digest of the model that is loaded and was checked
        self._records = load_records(features, task, device)
        self._unit_of, self._units = _numbered(units)
        self.records = len(features)

    def check(self, received: AdapterState) -> None:
        """Load `received`, and refuse what is not trained with privacy. No record is touched.

        Raises:
            ModelError: it is not of the plan's method, too large, or made to mix records.
        """
        check_bounded(received)
        load_shared(self._module, self._method.spec, received)
        self._private_state.begin(self._module, self._method.spec, received)
        if self._method.spec.private:
            check_bounded(read_private(self._module, self._method.spec))
        self._method.begin_round(self._module)
        self._check_records_apart()
        self._checked = received.digest

    def train(self, received: AdapterState) -> npt.NDArray[np.float64]:
        """One round from `received`: the update, trained minus received, (received.layout.size,) float64.

        Every optimiser starts afresh, as the silo may have missed rounds.

        Raises:
            ModelError: as `check`; or training ran to NaN or infinity.
            DataError: a step has more records than rounding is bounded for.
        """
        if self._checked != received.digest:
            self.check(received)
        self._checked = b""  # the module is about to change
        steps = [(phase, self.make_optimizer(phase)) for phase in self._phases]
        for _ in range(self._privacy.steps_per_round):
            for phase, optimizer in steps:
                self.step(phase, optimizer)
        update = update_since(self._module, self._method.spec, received)
        self._private_state.finish(self._module, self._method.spec)
        return update

    def validate(self, state: AdapterState) -> Counts:  # noqa: ARG002 - with privacy there is nothing to count
        """0 of 0: counts of records would leave without noise."""
        return Counts(0, 0)

    def make_optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        """The plan's, over the phase's parameters."""
        return make_optimizer(parameters_like(self._module, phase.parameters).values(), self._optimizer)

    def step(self, phase: Phase, optimizer: torch.optim.Optimizer) -> None:
        """One release, of a batch that is drawn here, and the step that the phase's parameters take on it."""
        members = draw_members(self._coins(), self._units, self._privacy.sample_rate)
        rows = np.flatnonzero(members[self._unit_of])
        batch = select(self._records, torch.from_numpy(rows).to(self._records.labels.device))
        total = clipped_sum(self._module, phase, batch, self._unit_of[rows], self._privacy.max_grad_norm)
        set_gradients(self._module, phase, self._mechanism.release(total, self._coins()))
        optimizer.step()

    def _check_records_apart(self) -> None:
        for phase in self._phases:
            check_records_apart(self._module, phase, self._task, self._shape, self._device)


def check_private(method: Method) -> None:
    """Refuse what a method says of itself that does not go with privacy.

    Raises:
        ConfigError: the loss couples records, or a part that gets no noise decides gradients of the shared one.
    """
    if not method.spec.per_record_loss:
        raise ConfigError(
            "federation.yaml: method.loss: with `privacy` each record must have a loss of its own, and this one "
            "(`inbatch`) couples the records of a batch: clipping would not bound what one of them moves; set "
            "`loss: cross_entropy`, or leave `privacy` out"
        )
    noisy = {pattern for phase in method.phases() for pattern in phase.parameters}
    plain = sorted(set(method.spec.private) - noisy)
    if method.spec.private_feeds_shared and plain:
        raise ConfigError(
            f"federation.yaml: method: its private part ({', '.join(plain)}) decides gradients of the shared one and "
            "is not trained with noise; with `privacy` choose another method"
        )


def set_gradients(module: nn.Module, phase: Phase, flat: npt.NDArray[np.float32]) -> None:
    """Cut `flat` (d,) into the gradients of the phase's parameters, in the module's order."""
    start = 0
    for value in parameters_like(module, phase.parameters).values():
        part = torch.from_numpy(flat[start : start + value.numel()])
        value.grad = part.view_as(value).to(value.device)
        start += value.numel()


def _numbered(units: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], int]:
    """A number from 0 for the unit of each record, and how many units there are."""
    whole = np.ascontiguousarray(units).view(np.dtype((np.void, 32))).reshape(-1)
    found, numbers = np.unique(whole, return_inverse=True)
    return numbers.astype(np.int64).reshape(-1), len(found)
