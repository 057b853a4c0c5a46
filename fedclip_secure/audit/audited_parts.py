"""What the audit tests: the parts of a step of private training, as the trainer puts them together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import nn

from fedclip_secure.config.plan import PrivacyPlan
from fedclip_secure.methods.base import Batch, Phase
from fedclip_secure.training.private.clipping import clipped_sum
from fedclip_secure.training.private.dp_sgd import system_coins
from fedclip_secure.training.private.gaussian import GaussianMechanism
from fedclip_secure.training.private.gradients import Integers
from fedclip_secure.training.private.poisson import draw_members


class Engine(Protocol):
    """One run's source of steps."""

    def members(self, units: int) -> npt.NDArray[np.bool_]:
        """Which of `units` units are in the next step, (units,)."""

    def clipped_sum(self, module: nn.Module, phase: Phase, batch: Batch, units: Integers) -> npt.NDArray[np.float64]:
        """The clipped gradients of the batch's units, added up: (d,)."""

    def release(self, total: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """`total` (d,) with noise, divided by the plan's constant."""


class MakeEngine(Protocol):
    """Makes the engine of a new run: nothing of an earlier one may come back in it."""

    def __call__(self, privacy: PrivacyPlan, noise_multiplier: float) -> Engine:
        """For a run by `privacy` with this sigma."""


@dataclass(frozen=True, slots=True)
class TrainingEngine:
    """The engine that trains: the very functions that PrivateTrainer calls, with the system's coins."""

    privacy: PrivacyPlan
    noise_multiplier: float

    def members(self, units: int) -> npt.NDArray[np.bool_]:
        """As Engine."""
        return draw_members(system_coins(), units, self.privacy.sample_rate)

    def clipped_sum(self, module: nn.Module, phase: Phase, batch: Batch, units: Integers) -> npt.NDArray[np.float64]:
        """As Engine."""
        return clipped_sum(module, phase, batch, units, self.privacy.max_grad_norm)

    def release(self, total: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """As Engine."""
        privacy = self.privacy
        mechanism = GaussianMechanism(self.noise_multiplier, privacy.max_grad_norm, privacy.update_divisor)
        return mechanism.release(total, system_coins())
