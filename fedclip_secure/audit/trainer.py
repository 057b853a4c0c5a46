"""Whether the trainer puts the audited parts together as planned: two whole rounds, seen release by release.

One trainer, made as a silo makes it, trains two rounds on made-up records, the second from the model that the first
made. Every step of every phase is made again by hand from the keys that the trainer asked for, and what its optimisers
are given is compared before each step: there noise that is missing or comes back shows, whatever an optimiser makes
of its size. Two more trainers, which draw their own keys and have no records, release their noise and nothing else.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from scipy import special
from torch import Tensor

from fedclip_secure.audit.evidence import (
    Doubles,
    Evidence,
    by_correlations,
    by_p_values,
    distance_from_uniform,
    distance_p,
    largest_correlation,
)
from fedclip_secure.audit.made_up_records import same_torch_seed
from fedclip_secure.audit.reference_trainer import Lockstep, Noises, Work
from fedclip_secure.audit.release_watch import Recorder, flat_gradients, watching
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.data.dataset import FeatureSet, Task
from fedclip_secure.features.encoder import Encoder
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.private.bounds import LARGEST_WEIGHT
from fedclip_secure.training.private.dp_sgd import Coins, PrivateTrainer
from fedclip_secure.training.shared_parameters import read_shared
from fedclip_secure.training.unshared_state import PrivateState

ROUNDS = 2
# Relative, or in deviations of the noise: float sums may differ in their last bits, which the noise's grid makes 2^-16
# of a deviation of; another key's noise differs by more than 1.
_SAME = 0.01
MOST_BY_HAND = 1_000_000_000  # coordinates
_FEWEST_BY_HAND = 32
_VALUES = 1 << 23  # of noise that are kept, of all releases together
_SHAPED = 1 << 21  # of them, whose distribution is looked at


class Trains(Protocol):
    """A trainer that was made for some records."""

    def train(self, received: AdapterState) -> npt.NDArray[np.float64]:
        """The update of one round."""


class MakeTrainer(Protocol):
    """PrivateTrainer, or what stands in its place."""

    def __call__(  # noqa: PLR0917 - as PrivateTrainer
        self,
        plan: FederationPlan,
        noise_multiplier: float,
        task: Task,
        features: FeatureSet,
        units: npt.NDArray[np.uint8],
        device: torch.device,
        *,
        encoder: Encoder | None = ...,
        silo: str | None = ...,
        private_state: PrivateState | None = ...,
        coins: Coins = ...,
    ) -> Trains:
        """As PrivateTrainer."""


@dataclass(frozen=True, slots=True, eq=False)
class Rehearsal:
    """What was seen of the trainer."""

    expected: int  # releases
    lockstep: Lockstep
    keys: Sequence[bytes]  # that it asked for
    updates: float  # largest difference of a round's update from the one by hand, relative
    bare: tuple[int, ...]  # releases of each trainer without records
    noises: Noises
    about: str  # what was trained


def rehearse(work: Work, make_trainer: MakeTrainer = PrivateTrainer, most_by_hand: int = MOST_BY_HAND) -> Rehearsal:
    """Train ROUNDS rounds beside the same by hand; then, without records, ROUNDS and one with the trainer's own keys.

    All releases are made again by hand where they have `most_by_hand` coordinates together, else as many as have, at
    least _FEWEST_BY_HAND, which nobody can know before; of the others, keys and size of the noise are checked.

    Changes the module of the work's scene.

    Raises:
        ModelError: the trainer refuses the model, or training runs to NaN.
    """
    expected = ROUNDS * work.in_a_round
    noises = Noises.of(2 * expected + work.in_a_round, work.sizes, _VALUES)
    coins, about = Recorder(), work.scene.about
    lockstep = Lockstep(work, coins, noises, _by_hand(expected, work, most_by_hand))
    start = read_shared(work.scene.module, work.scene.method.spec)
    updates = _train_beside(work, lockstep, partial(make_trainer, coins=coins), start)
    bare = tuple(_train_bare(work, noises, make_trainer, start, rounds) for rounds in (ROUNDS, 1))
    return Rehearsal(expected, lockstep, coins.drawn, updates, bare, noises, about)


def keys_fresh(found: Rehearsal) -> Evidence:
    """Two keys for each release, and no key twice. Chance makes 32 bytes come again once in 2^256 pairs."""
    different = len(set(found.keys))
    wanted = 2 * found.expected
    return Evidence(
        name="trainer_keys",
        passed=len(found.keys) == different == wanted,
        quantity="different keys that the trainer asked for; passes where they are as many as the bound, and no more",
        measured=different,
        bound=wanted,
        shows=f"in {ROUNDS} rounds of {found.expected // ROUNDS} release(s) the trainer asked for {len(found.keys):,} "
        f"keys, {different:,} of them different, for {wanted:,} that it needs ({found.about})",
        failure="Keys are used twice, or not asked for: what they hid can be taken off again.",
    )


def as_by_hand(found: Rehearsal) -> Evidence:
    """Whether every release, every step and every update is what the tested parts make of the trainer's keys.

    Nothing here is random: there is no false alarm.
    """
    steps, counts = found.lockstep, (found.lockstep.releases, *found.bare)
    wanted = (found.expected, found.expected, found.expected // ROUNDS)
    fault = steps.fault or (None if counts == wanted else f"there were {counts} releases in place of {wanted}")
    apart = float(np.max([*steps.apart, *steps.strayed, found.updates]))  # NaN, which does not pass, where there is one
    return Evidence(
        name="trainer",
        passed=fault is None and apart <= _SAME,
        quantity="largest difference of a release, a step or an update from the one by hand; passes up to the bound",
        measured=apart if fault is None else float("inf"),
        bound=_SAME,
        shows=f"of {steps.releases:,} releases of {ROUNDS} whole rounds {steps.looked:,} were made again by hand and "
        f"all steps followed; the largest difference is {apart:.1g}" + (f"; {fault}" if fault else ""),
        failure="The trainer does not put the tested parts together as planned, so their tests say nothing of it.",
    )


def noise_of_each(found: Rehearsal) -> Evidence:
    """Size, mean and shape of the noise in every release, of all phases and rounds, by itself and together."""
    noises = found.noises
    shaped = np.stack(noises.rows)[:, : max(1, _SHAPED // len(noises.rows))] if noises.rows else np.zeros((1, 1))
    distance = distance_from_uniform(special.ndtr(shaped))
    return by_p_values(
        "trainer_noise",
        [*noises.all_p_values(), distance_p(distance, shaped.size)],
        f"in each of {len(noises.rows):,} releases of the trainer the noise is as large as the plan says, "
        f"{noises.deviation:.5f} of sigma·C in all, and at most {distance:.5f} from the normal distribution",
        "The trainer leaves noise out, or adds other noise than the plan says, in some step, phase or round.",
    )


def noise_apart(found: Rehearsal) -> Evidence:
    """Correlation of the noise of every two releases, of all phases, rounds and trainers: a key used twice gives 1."""
    rows = np.stack(found.noises.rows) if len(found.noises.rows) > 1 else np.zeros((2, 1))
    failure = "The trainer's noise comes back in another step, phase or round: a difference of two is without it."
    pairs = len(rows) * (len(rows) - 1) // 2
    return by_correlations("trainer_noise_across_steps", largest_correlation(rows), pairs, failure)


def _by_hand(releases: int, work: Work, most: int) -> frozenset[int] | None:
    """The numbers of those to be made by hand; None: all."""
    size = max(work.sizes)
    if releases * size <= most:
        return None
    count = min(releases, max(_FEWEST_BY_HAND, most // size))
    return frozenset(secrets.SystemRandom().sample(range(releases), count))


def _train_beside(work: Work, lockstep: Lockstep, make: MakeTrainer, start: AdapterState) -> float:
    """The largest relative difference of the updates."""
    largest = 0.0
    scene, private_state = work.scene, PrivateState()
    private_state.begin(scene.module, scene.method.spec, start)  # the part that stays begins as it does by hand
    private_state.finish(scene.module, scene.method.spec)
    with same_torch_seed(), watching(lockstep.see):
        trainer = _trainer(work, make, np.arange(len(scene.unit_of)), private_state)
        for number in range(1, ROUNDS + 1):
            lockstep.begin(start)
            update = trainer.train(start)
            if lockstep.fault is None:
                largest = max(largest, _difference(update, lockstep.end(start)))
            if lockstep.fault is None and lockstep.releases != number * work.in_a_round:
                lockstep.fault = f"round {number} ended after {lockstep.releases} releases in all"
            start = _next(start, update)
    return largest


def _train_bare(work: Work, noises: Noises, make: MakeTrainer, start: AdapterState, rounds: int) -> int:
    """How many releases there were. Torch's generator is in the same state each time, and the keys are the trainer's.

    Without records all clipped sums are zero.
    """
    releases, sizes = 0, work.sizes

    def see(moved: list[Tensor]) -> None:
        nonlocal releases
        released = flat_gradients(moved)
        if released.size == sizes[releases % len(sizes)]:
            noises.add(work.in_deviations(released))
        releases += 1

    with same_torch_seed(), watching(see):
        trainer = _trainer(work, make, np.zeros(0, dtype=np.int64), PrivateState())
        for _ in range(rounds):
            start = _next(start, trainer.train(start))
    return releases


def _trainer(work: Work, make: MakeTrainer, rows: npt.NDArray[np.int64], private_state: PrivateState) -> Trains:
    """On the scene's records at `rows`."""
    scene = work.scene
    ids = np.zeros((len(rows), 32), dtype=np.uint8)
    ids[:, -8:] = scene.unit_of[rows].astype(">u8").view(np.uint8).reshape(-1, 8)
    images, labels = scene.records.images.cpu().numpy()[rows], scene.records.labels.cpu().numpy()[rows]
    flat = images.ndim == 2
    plain = images if flat else np.zeros((len(images), 1), dtype=np.float32)
    features = FeatureSet(plain, labels, ids, "made-up records", inputs=None if flat else images)
    return make(
        work.plan, work.noise_multiplier, scene.task, features, ids, scene.device,
        encoder=scene.encoder, silo=scene.setting.silo, private_state=private_state,
    )  # fmt: skip


def _next(start: AdapterState, update: Doubles) -> AdapterState:
    """What this silo's update alone would make of the model, within what a trainer takes."""
    moved = np.clip(start.vector + update, -LARGEST_WEIGHT, LARGEST_WEIGHT).astype(np.float32)
    return AdapterState(start.layout, moved)


def _difference(one: Doubles, other: Doubles) -> float:
    """Relative to the larger of the two; 0 where both are zero."""
    largest = max(np.linalg.norm(one), np.linalg.norm(other))
    return float(np.linalg.norm(one - other) / largest) if largest else 0.0
