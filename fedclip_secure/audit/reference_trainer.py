"""What a trainer must do, done by hand beside it: from the keys that it draws, release by release."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import special
from torch import Tensor, nn
from torch.optim import Optimizer

from fedclip_secure.audit.evidence import Doubles, chi_square_p, normal_p
from fedclip_secure.audit.made_up_records import Scene
from fedclip_secure.audit.release_watch import Floats, Recorder, flat_gradients, flat_values
from fedclip_secure.config.plan import FederationPlan, PrivacyPlan
from fedclip_secure.config.plan import Optimizer as Options
from fedclip_secure.methods.base import Phase
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.local_training import make_optimizer
from fedclip_secure.training.private.clipping import clipped_sum
from fedclip_secure.training.private.dp_sgd import set_gradients
from fedclip_secure.training.private.gaussian import GaussianMechanism
from fedclip_secure.training.private.gradients import Integers
from fedclip_secure.training.private.poisson import draw_members
from fedclip_secure.training.shared_parameters import load_shared, parameters_like, update_since


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A plan's mechanism on a scene's records."""

    plan: FederationPlan
    privacy: PrivacyPlan
    noise_multiplier: float
    scene: Scene

    @property
    def mechanism(self) -> GaussianMechanism:
        """The noise of each release."""
        return GaussianMechanism(self.noise_multiplier, self.privacy.max_grad_norm, self.privacy.update_divisor)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Coordinates of a release of each phase."""
        module = self.scene.module
        found = (parameters_like(module, phase.parameters).values() for phase in self.scene.method.phases())
        return tuple(sum(value.numel() for value in parameters) for parameters in found)

    @property
    def in_a_round(self) -> int:
        """Releases."""
        return self.privacy.steps_per_round * len(self.sizes)

    def in_deviations(self, released: Floats, total: Doubles | float = 0.0) -> Doubles:
        """`released` (d,) without the clipped sum `total`, in deviations of the noise."""
        noisy = released.astype(np.float64) * self.privacy.update_divisor
        noise: Doubles = (noisy - total) / self.mechanism.deviation
        return noise


@dataclass(slots=True, eq=False)
class Noises:
    """The noise of many releases, each in deviations: its size, and its values at some `coordinates`.

    Attributes:
        p_values: of each release's size and mean, standard normal coordinates given.
        rows: of each release, its values at `coordinates`, (k,).
    """

    coordinates: Integers
    p_values: list[float] = field(default_factory=list)
    rows: list[Doubles] = field(default_factory=list)
    _squares: float = 0.0
    _size: int = 0

    @classmethod
    def of(cls, releases: int, sizes: tuple[int, ...], values: int) -> Noises:
        """For `releases` of these sizes: as many coordinates, drawn anew, as give `values` in all, and at least 64."""
        least, wanted = min(sizes), max(64, values // releases)
        if wanted >= least:
            return cls(np.arange(least))
        drawn = np.frombuffer(os.urandom(8 * wanted), dtype="<u8") % np.uint64(least)
        return cls(np.unique(drawn).astype(np.int64))

    def add(self, noise: Doubles) -> None:
        """Of one release, (d,), d above all `coordinates`."""
        squares = float(noise @ noise)
        self.p_values += [chi_square_p(squares, noise.size), normal_p(float(noise.sum()) / math.sqrt(noise.size))]
        self.rows.append(noise[self.coordinates])
        self._squares, self._size = self._squares + squares, self._size + noise.size

    def add_covered(self, covered: Doubles, most: float) -> None:
        """Of one release, (d,), with a sum in it of norm `most` at most: what that may have done shows nothing."""
        norm = float(np.linalg.norm(covered))
        shorter, longer = special.chdtr(covered.size, (norm + most) ** 2), max(0.0, norm - most) ** 2
        self.p_values.append(float(min(1.0, 2 * min(shorter, special.chdtrc(covered.size, longer)))))

    @property
    def deviation(self) -> float:
        """Of all the noise that was added."""
        return math.sqrt(self._squares / self._size)

    def all_p_values(self) -> list[float]:
        """Those of the releases, and of all of them together."""
        return [*self.p_values, chi_square_p(self._squares, self._size)]


class Lockstep:
    """Does by hand what a trainer does that draws its keys from `coins`, and compares each release with its own.

    Attributes:
        releases: how many there were.
        looked: how many of them were made by hand.
        apart: the largest difference of a release from the one by hand, in deviations of the noise.
        strayed: the largest distance of what the optimiser moves from where the steps by hand led, relative.
        fault: in words, what ended the comparison; None where nothing did.
    """

    def __init__(self, work: Work, coins: Recorder, noises: Noises, by_hand: frozenset[int] | None = None) -> None:
        """`by_hand` are the numbers of the releases to be made by hand; None: all."""
        self.releases = self.looked = 0
        self.apart, self.strayed = [0.0], [0.0]
        self.fault: str | None = None
        self._work, self._coins, self._noises, self._by_hand = work, coins, noises, by_hand
        self._mechanism, self._steps = work.mechanism, list[_Step]()

    def begin(self, received: AdapterState) -> None:
        """As the trainer begins a round."""
        scene, options = self._work.scene, self._work.plan.training.optimizer
        load_shared(scene.module, scene.method.spec, received)
        scene.method.begin_round(scene.module)
        self._steps = [
            _Step.of(scene.module, phase, options) for phase in scene.method.phases(self._work.scene.setting.silo)
        ]

    def end(self, received: AdapterState) -> Doubles:
        """The update by hand of the round that began from `received`."""
        return update_since(self._work.scene.module, self._work.scene.method.spec, received)

    def see(self, moved: list[Tensor]) -> None:
        """Before the trainer's optimiser steps on the parameters `moved`: as `watching`."""
        number, keys = self.releases, self._coins.since()
        step = self._steps[number % len(self._steps)]
        self.releases += 1
        released = flat_gradients(moved)
        if self.fault is not None:
            return
        if len(keys) != 2:
            self.fault = f"release {number + 1} asked for {len(keys)} key(s) in place of 2"
        elif released.size != step.size:
            self.fault = f"release {number + 1} moves {released.size} parameters in place of {step.size}"
        else:
            self.strayed.append(step.follow(moved))
            step.take(self._work.scene.module, self._compared(number, step.phase, released, keys))

    def _compared(self, number: int, phase: Phase, released: Floats, keys: list[bytes]) -> Floats:
        """What should have been released; where it was not worked out, what was."""
        work, scene, privacy = self._work, self._work.scene, self._work.privacy
        members = draw_members(keys[0], scene.units, privacy.sample_rate)
        if self._by_hand is not None and number not in self._by_hand:
            self._noises.add_covered(work.in_deviations(released), int(members.sum()) / work.noise_multiplier)
            return released
        rows = np.flatnonzero(members[scene.unit_of])
        total = clipped_sum(scene.module, phase, scene.batch(rows), scene.unit_of[rows], privacy.max_grad_norm)
        wanted = self._mechanism.release(total, keys[1])
        self._noises.add(work.in_deviations(released, total))
        self.apart.append(float(np.abs(work.in_deviations(released - wanted)).max()))
        self.looked += 1
        return wanted


@dataclass(slots=True, eq=False)
class _Step:
    """One phase's parameters and optimiser, by hand."""

    phase: Phase
    parameters: list[nn.Parameter]
    optimizer: Optimizer
    before: Floats | None = None  # the last step by hand

    @classmethod
    def of(cls, module: nn.Module, phase: Phase, options: Options) -> _Step:
        parameters = list(parameters_like(module, phase.parameters).values())
        return cls(phase, parameters, make_optimizer(parameters, options))

    @property
    def size(self) -> int:
        return sum(value.numel() for value in self.parameters)

    @torch.no_grad()
    def follow(self, moved: list[Tensor]) -> float:
        """How far `moved` are from the parameters here, relative to the last step, and from then on not at all.

        Two devices' last bits would otherwise add up over the steps.
        """
        here, there = flat_values(list(self.parameters)), flat_values(moved)
        scale = float(np.linalg.norm(here if self.before is None else here - self.before))
        distance = float(np.linalg.norm(there - here))
        for own, value in zip(self.parameters, moved, strict=True):
            own.copy_(value)
        return distance / scale if scale else (math.inf if distance else 0.0)

    def take(self, module: nn.Module, released: Floats) -> None:
        """Step on `released` (d,)."""
        self.before = flat_values(list(self.parameters))
        set_gradients(module, self.phase, released)
        self.optimizer.step()
