"""Engines and trainers with one fault each, to be handed to the audit."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedclip_secure.audit.audited_parts import TrainingEngine
from fedclip_secure.config.plan import PrivacyPlan
from fedclip_secure.methods.base import Batch, Phase
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.device_records import select
from fedclip_secure.training.private.clipping import clipped_sum
from fedclip_secure.training.private.dp_sgd import Coins, PrivateTrainer, set_gradients, system_coins
from fedclip_secure.training.private.gaussian import GaussianMechanism
from fedclip_secure.training.private.gradients import Integers
from fedclip_secure.training.private.poisson import draw_members
from fedclip_secure.training.shared_parameters import parameters_like

Bools = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]


class Honest:
    """The engine that trains; each fault replaces one part."""

    def __init__(self, privacy: PrivacyPlan, noise_multiplier: float) -> None:
        self.privacy, self.noise_multiplier = privacy, noise_multiplier
        self.engine = TrainingEngine(privacy, noise_multiplier)

    def members(self, units: int) -> Bools:
        return self.engine.members(units)

    def clipped_sum(self, module: nn.Module, phase: Phase, batch: Batch, units: Integers) -> Doubles:
        return self.engine.clipped_sum(module, phase, batch, units)

    def release(self, total: Doubles) -> Floats:
        return self.engine.release(total)

    def with_noise(self, total: Doubles, normals: Doubles) -> Floats:
        """`total` with noise of the plan's deviation made of `normals`."""
        noisy = total + self.noise_multiplier * self.privacy.max_grad_norm * normals
        return (noisy / self.privacy.update_divisor).astype(np.float32)


class NoiseOff(Honest):
    def release(self, total: Doubles) -> Floats:
        return self.with_noise(total, np.zeros_like(total))


class NoiseShortByOnePercent(Honest):
    factor = 0.99

    def release(self, total: Doubles) -> Floats:
        return TrainingEngine(self.privacy, self.noise_multiplier * self.factor).release(total)


class NoiseShortByHalf(NoiseShortByOnePercent):
    factor = 0.5


class NoiseShortByRootOfBatch(NoiseShortByOnePercent):
    factor = 64**-0.5


class SameNoiseEveryStep(Honest):
    def __init__(self, privacy: PrivacyPlan, noise_multiplier: float) -> None:
        super().__init__(privacy, noise_multiplier)
        self.key = os.urandom(32)

    def release(self, total: Doubles) -> Floats:
        privacy = self.privacy
        mechanism = GaussianMechanism(self.noise_multiplier, privacy.max_grad_norm, privacy.update_divisor)
        return mechanism.release(total, self.key)


class NoiseTwiceInAStep(Honest):
    def release(self, total: Doubles) -> Floats:
        half = -(-total.size // 2)
        normals = np.random.default_rng().standard_normal(half)
        return self.with_noise(total, np.tile(normals, 2)[: total.size])


class NoiseFromASeed(Honest):
    def release(self, total: Doubles) -> Floats:
        return self.with_noise(total, torch.randn(total.size, dtype=torch.float64).numpy())


class UniformNoise(Honest):
    def release(self, total: Doubles) -> Floats:
        return self.with_noise(total, np.random.default_rng().uniform(-(3**0.5), 3**0.5, total.size))


class ShuffledBatches(Honest):
    """Every unit once in a pass over the data, in batches of one size."""

    def __init__(self, privacy: PrivacyPlan, noise_multiplier: float) -> None:
        super().__init__(privacy, noise_multiplier)
        self.left = np.zeros(0, dtype=np.int64)

    def members(self, units: int) -> Bools:
        size = round(units * self.privacy.sample_rate)
        if len(self.left) < size:
            self.left = np.random.default_rng().permutation(units)
        chosen, self.left = self.left[:size], self.left[size:]
        return np.isin(np.arange(units), chosen)


class CyclicBatches(Honest):
    """Batches of binomial size, one after the other through the units in one order."""

    def __init__(self, privacy: PrivacyPlan, noise_multiplier: float) -> None:
        super().__init__(privacy, noise_multiplier)
        self.start = 0

    def members(self, units: int) -> Bools:
        size = int(self.engine.members(units).sum())
        chosen = (self.start + np.arange(size)) % units
        self.start = (self.start + size) % units
        return np.isin(np.arange(units), chosen)


class NeighboursTogether(Honest):
    """One coin for every two units."""

    def members(self, units: int) -> Bools:
        return np.repeat(self.engine.members(-(-units // 2)), 2)[:units]


class MembershipFromASeed(Honest):
    def members(self, units: int) -> Bools:
        members: Bools = (torch.rand(units, dtype=torch.float64) < self.privacy.sample_rate).numpy()
        return members


class MembershipFromItsOwnSeed(Honest):
    def __init__(self, privacy: PrivacyPlan, noise_multiplier: float) -> None:
        super().__init__(privacy, noise_multiplier)
        self.generator = np.random.default_rng(42)

    def members(self, units: int) -> Bools:
        members: Bools = self.generator.random(units) < self.privacy.sample_rate
        return members


class ClippedBatchMean(Honest):
    """What clips the gradient of the batch's mean loss, and makes a sum of it again."""

    def clipped_sum(self, module: nn.Module, phase: Phase, batch: Batch, units: Integers) -> Doubles:
        count = max(1, len(np.unique(units)))
        mean = clipped_sum(module, phase, batch, np.zeros_like(units), 1e30) / count
        return count * mean * min(1.0, self.privacy.max_grad_norm / max(1e-30, float(np.linalg.norm(mean))))


class ClippedBatchSum(Honest):
    """What clips the gradient of the whole batch once."""

    def clipped_sum(self, module: nn.Module, phase: Phase, batch: Batch, units: Integers) -> Doubles:
        return clipped_sum(module, phase, batch, np.zeros_like(units), self.privacy.max_grad_norm)


class ClippedRecordByRecord(Honest):
    def clipped_sum(self, module: nn.Module, phase: Phase, batch: Batch, units: Integers) -> Doubles:
        return clipped_sum(module, phase, batch, np.arange(len(units)), self.privacy.max_grad_norm)


class CoupledRecords(Honest):
    """Takes for a record's gradient that of its loss and of the next record's, as where a loss couples a batch."""

    def clipped_sum(self, module: nn.Module, phase: Phase, batch: Batch, units: Integers) -> Doubles:
        parameters = list(parameters_like(module, phase.parameters).values())
        if not len(units):
            return np.zeros(sum(value.numel() for value in parameters))
        losses = phase.loss(module, batch)
        found = torch.autograd.grad(losses, parameters, torch.eye(len(losses)), is_grads_batched=True)
        rows = torch.cat([gradient.flatten(1) for gradient in found], dim=1).double().numpy()
        rows = rows + np.roll(rows, 1, axis=0)
        norms = np.maximum(1e-30, np.linalg.norm(rows, axis=1))
        total: Doubles = np.minimum(1.0, self.privacy.max_grad_norm / norms) @ rows
        return total


class NotANumber(Honest):
    def clipped_sum(self, module: nn.Module, phase: Phase, batch: Batch, units: Integers) -> Doubles:
        return self.engine.clipped_sum(module, phase, batch, units) * (np.nan if len(units) else 1.0)


class LooseOnLargeWeights(Honest):
    """Clips to C a model of small weights, and lets a large one through with twice as much."""

    def clipped_sum(self, module: nn.Module, phase: Phase, batch: Batch, units: Integers) -> Doubles:
        large = any(bool((value.abs() > LARGE_WEIGHT).any()) for value in module.parameters())
        return self.engine.clipped_sum(module, phase, batch, units) * (2.0 if large else 1.0)


LARGE_WEIGHT = 2.0


class LooseInTheSecondPhase(Honest):
    def clipped_sum(self, module: nn.Module, phase: Phase, batch: Batch, units: Integers) -> Doubles:
        return self.engine.clipped_sum(module, phase, batch, units) * (2.0 if phase.parameters == ("local.*",) else 1.0)


class LooseAtOddWidths(Honest):
    """As a library that multiplies matrices of such widths by another program."""

    def clipped_sum(self, module: nn.Module, phase: Phase, batch: Batch, units: Integers) -> Doubles:
        return self.engine.clipped_sum(module, phase, batch, units) * (1.001 if batch.images.shape[-1] % 4 else 1.0)


class LastBitsOfTheBatch(Honest):
    """A record adds what it should but for the last bit, which depends on how many others there are."""

    def clipped_sum(self, module: nn.Module, phase: Phase, batch: Batch, units: Integers) -> Doubles:
        return self.engine.clipped_sum(module, phase, batch, units) * (1.0 + 2.0**-52 * len(units))


class CopiedTrainer(PrivateTrainer):
    """PrivateTrainer with a step of its own, which does the same; each fault replaces one part.

    Attributes:
        round: from 1.
        place: of the release in its round, from 0.
    """

    def __init__(self, *made_of: Any, **options: Any) -> None:
        super().__init__(*made_of, **options)
        self.round = self.place = 0

    def train(self, received: AdapterState) -> Doubles:
        self.round, self.place = self.round + 1, 0
        return super().train(received)

    def step(self, phase: Phase, optimizer: torch.optim.Optimizer) -> None:
        rows = np.flatnonzero(draw_members(self._coins(), self._units, self._privacy.sample_rate)[self._unit_of])
        batch = select(self._records, torch.from_numpy(rows))
        total = clipped_sum(self._module, phase, batch, self._unit_of[rows], self._privacy.max_grad_norm)
        set_gradients(self._module, phase, self.released(total))
        optimizer.step()
        self.place += 1

    def released(self, total: Doubles) -> Floats:
        return self._mechanism.release(total, self.noise_key())

    def noise_key(self) -> bytes:
        return self._coins()


class NoiseLeftOut(CopiedTrainer):
    """Asks for the keys, and leaves the noise out where `noisy` is false."""

    def released(self, total: Doubles) -> Floats:
        if self.noisy():
            return super().released(total)
        self.noise_key()
        return (total / self._privacy.update_divisor).astype(np.float32)

    def noisy(self) -> bool:
        raise NotImplementedError


class NoNoiseFromStepFourOn(NoiseLeftOut):
    def noisy(self) -> bool:
        return self.place < 3 * len(self._phases)


class NoNoiseInTheSecondPhase(NoiseLeftOut):
    def noisy(self) -> bool:
        return self.place % 2 == 0


class NoNoiseInRoundTwo(NoiseLeftOut):
    def noisy(self) -> bool:
        return self.round == 1


class NoNoiseInTheVeryLastStep(NoiseLeftOut):
    def noisy(self) -> bool:
        return self.round == 1 or self.place < self._privacy.steps_per_round * len(self._phases) - 1


class NoiseShortInRoundTwo(CopiedTrainer):
    """By a hundredth."""

    def released(self, total: Doubles) -> Floats:
        privacy, key = self._privacy, self.noise_key()
        sigma = self._mechanism.noise_multiplier * (1.0 if self.round == 1 else 0.99)
        return GaussianMechanism(sigma, privacy.max_grad_norm, privacy.update_divisor).release(total, key)


class NoiseKeysOfRoundOne(CopiedTrainer):
    """Uses the noise keys of the first round in every round, and asks for new ones all the same."""

    def __init__(self, *made_of: Any, **options: Any) -> None:
        super().__init__(*made_of, **options)
        self.kept: list[bytes] = []

    def noise_key(self) -> bytes:
        asked = self._coins()
        if self.round == 1:
            self.kept.append(asked)
        return self.kept[self.place]


class NoiseKeysDrawnOnce(NoiseKeysOfRoundOne):
    """The same, and asks for none after the first round."""

    def noise_key(self) -> bytes:
        return self.kept[self.place] if self.round > 1 else super().noise_key()


class KeysRepeatAfterThreeSteps(NoiseKeysOfRoundOne):
    def noise_key(self) -> bytes:
        asked = self._coins()
        if len(self.kept) < 3:
            self.kept.append(asked)
        return self.kept[self.place % 3]


class SameKeyForBothPhases(NoiseKeysOfRoundOne):
    def noise_key(self) -> bytes:
        asked = self._coins()
        if self.place % 2 == 0:
            self.kept.append(asked)
        return self.kept[-1]


class MovesWithoutNoise(CopiedTrainer):
    """Releases what it should, and moves the parameters by something of its own besides."""

    def step(self, phase: Phase, optimizer: torch.optim.Optimizer) -> None:
        super().step(phase, optimizer)
        with torch.no_grad():
            next(self._module.parameters()).add_(0.01)


class CoinsUnlessTold:
    """Coins of 32 bytes that come again after `period` draws."""

    def __init__(self, period: int) -> None:
        self.keys = [os.urandom(32) for _ in range(period)]
        self.drawn = 0

    def __call__(self) -> bytes:
        self.drawn += 1
        return self.keys[self.drawn % len(self.keys)]


def keys_come_again_unless_told(*made_of: Any, coins: Coins | None = None, **options: Any) -> PrivateTrainer:
    return PrivateTrainer(*made_of, coins=coins or CoinsUnlessTold(7), **options)


def one_key_for_all(*made_of: Any, coins: Coins = system_coins, **options: Any) -> PrivateTrainer:
    """A trainer that draws a key once and goes on using it."""
    key = coins()
    return PrivateTrainer(*made_of, coins=lambda: key, **options)


def keys_from_the_seed(*made_of: Any, coins: Coins = system_coins, **options: Any) -> PrivateTrainer:
    """A trainer whose coins come from torch's generator, whatever it is told."""
    return PrivateTrainer(*made_of, coins=_seeded, **options)


def keys_from_the_seed_unless_told(*made_of: Any, coins: Coins | None = None, **options: Any) -> PrivateTrainer:
    return PrivateTrainer(*made_of, coins=coins or _seeded, **options)


def _seeded() -> bytes:
    return bytes(torch.randint(256, (32,), dtype=torch.uint8).tolist())


def half_the_noise(plan: Any, noise_multiplier: float, *made_of: Any, **options: Any) -> PrivateTrainer:
    return PrivateTrainer(plan, noise_multiplier / 2, *made_of, **options)


def one_step_more(plan: Any, *made_of: Any, **options: Any) -> PrivateTrainer:
    privacy = plan.privacy.model_copy(update={"steps_per_round": plan.privacy.steps_per_round + 1})
    return PrivateTrainer(plan.model_copy(update={"privacy": privacy}), *made_of, **options)
