"""An attack on the mechanism, and the least epsilon that its success proves (`empirical_epsilon.py`).

Each canary is a unit whose clipped gradient is C in one coordinate of its own. The attacker sees every release, and
scores a canary by the sum of what was released in its coordinate; nothing is tuned. The bound that this proves is far
below the true epsilon (privacy lost in one run shows in few guesses), so it can refute a claim and never confirm one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import special, stats
from torch import Tensor, nn

from fedclip_secure.audit.audited_parts import Engine
from fedclip_secure.audit.evidence import (
    FALSE_ALARM,
    Doubles,
    Evidence,
    by_p_values,
    distance_from_uniform,
    distance_p,
)
from fedclip_secure.config.plan import PrivacyPlan
from fedclip_secure.methods.base import Batch, Phase
from fedclip_secure.privacy.accounting import accountant
from fedclip_secure.privacy.accounting.empirical_epsilon import CONFIDENCE, epsilon_at_least
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.training.device_records import select

_SIDE = 100  # of the canaries' weight matrix, each of whose entries is one canary's own
CANARIES = _SIDE**2
GUESSES = 4_000  # half of them "in", for the highest scores, half "out", for the lowest
MOST_STEPS = 200
_POINTS = 40  # of the attack's curve


@dataclass(frozen=True, slots=True)
class Attack:
    """What the attack guessed, and what that proves."""

    steps: int
    right: int  # of GUESSES
    epsilon_at_least: float  # at the plan's delta, with CONFIDENCE
    epsilon: float  # what is claimed for these steps
    curve: tuple[tuple[float, float], ...]  # false and true positive rates over thresholds of the score
    scores_p: float  # p-value of the scores, where the mechanism is as planned


def attack(engine: Engine, privacy: PrivacyPlan, noise_multiplier: float, steps: int) -> Attack:
    """Run `steps` steps (at most MOST_STEPS) with canaries and attack them."""
    event = Event(noise_multiplier, privacy.sample_rate, min(steps, MOST_STEPS))
    included = np.unpackbits(np.frombuffer(os.urandom(CANARIES // 8), dtype=np.uint8)).astype(bool)
    scores = _scores(engine, included, privacy, event.steps)
    right = right_guesses(scores, included)
    return Attack(
        steps=event.steps,
        right=right,
        epsilon_at_least=epsilon_at_least(right, GUESSES, CANARIES, privacy.delta, 1 - CONFIDENCE),
        epsilon=accountant.epsilon([event], privacy.delta),
        curve=_curve(scores, included),
        scores_p=_scores_p(scores, included, event),
    )


def as_planned(found: Attack) -> Evidence:
    """Whether the canaries' scores are distributed as the mechanism that was planned distributes them."""
    return by_p_values(
        "canary_scores",
        [found.scores_p],
        f"what the attack sees of {CANARIES:,} canaries in {found.steps} steps has a p-value of {found.scores_p:.2g} "
        "under the planned clipping, sampling and noise together",
        "The mechanism as a whole gives an attacker something else to see than the accounting is for.",
    )


def not_refuted(found: Attack) -> Evidence:
    """Whether the attack leaves the claim standing.

    By the theorem alone a true claim might fall in one audit of 20. So that it falls with FALSE_ALARM at most, it
    must also be out of the question that the scores are those of the planned mechanism (`as_planned`).
    """
    return Evidence(
        name="one_run_attack",
        passed=found.epsilon_at_least <= found.epsilon or found.scores_p >= FALSE_ALARM,
        quantity=f"epsilon that the attack proves with {CONFIDENCE:.0%} confidence; passes up to the bound",
        measured=found.epsilon_at_least,
        bound=found.epsilon,
        shows=f"{found.right:,} of {GUESSES:,} guesses about {CANARIES:,} canaries in {found.steps} steps were right, "
        f"which proves an epsilon of at least {found.epsilon_at_least:.2f} with {CONFIDENCE:.0%} confidence; "
        f"claimed for these steps: {found.epsilon:.2f}",
        failure="An attack succeeds better than the claimed epsilon allows: the mechanism is not what the plan says.",
    )


def right_guesses(scores: Doubles, included: npt.NDArray[np.bool_]) -> int:
    """How many of GUESSES guesses are right: "in" for the highest scores, "out" for the lowest."""
    order = np.argsort(scores, kind="stable")
    half = GUESSES // 2
    return int((~included[order[:half]]).sum() + included[order[-half:]].sum())


def _scores(engine: Engine, included: npt.NDArray[np.bool_], privacy: PrivacyPlan, steps: int) -> Doubles:
    """(CANARIES,): the sum over steps of what was released in each canary's coordinate, in units of C."""
    module = nn.Linear(_SIDE, _SIDE, bias=False)
    phase = Phase(("weight",), _loss(privacy.max_grad_norm))
    records = 2 if privacy.unit == "patient" else 1
    batch, unit_of = _canaries(np.flatnonzero(included), records)
    scores = np.zeros(CANARIES)
    for _ in range(steps):
        rows = np.flatnonzero(engine.members(int(included.sum()))[unit_of])
        total = engine.clipped_sum(module, phase, select(batch, torch.from_numpy(rows)), unit_of[rows])
        scores += engine.release(total)
    return scores * (privacy.update_divisor / privacy.max_grad_norm)


def _scores_p(scores: Doubles, included: npt.NDArray[np.bool_], event: Event) -> float:
    """p-value of `scores`, in units of C, for canaries that are in and for those that are out.

    Out: the noise of all steps. In: besides, one for each step that the canary is in, Binomial(steps, q).
    """
    deviation = event.noise_multiplier * math.sqrt(event.steps)
    times = np.arange(event.steps + 1)
    chances = stats.binom.pmf(times, event.steps, event.sample_rate)
    places_in = special.ndtr((scores[included][:, None] - times) / deviation) @ chances
    p_values = [
        distance_p(distance_from_uniform(places), places.size)
        for places in (places_in, special.ndtr(scores[~included] / deviation))
    ]
    return float(np.minimum(1.0, 2 * np.min(p_values)))  # NaN stays NaN


def _loss(max_grad_norm: float) -> Callable[[nn.Module, Batch], Tensor]:
    def loss(module: nn.Module, batch: Batch) -> Tensor:
        scores: Tensor = module(batch.images)
        return 2 * max_grad_norm * scores.gather(1, batch.labels[:, None])[:, 0]

    return loss


def _canaries(numbers: npt.NDArray[np.int64], records: int) -> tuple[Batch, npt.NDArray[np.int64]]:
    """The canaries with these `numbers`, of `records` records each: canary n's gradient lies in coordinate n alone."""
    number = torch.from_numpy(np.repeat(numbers, records))
    features = torch.eye(_SIDE)[number % _SIDE]
    return Batch(features, number // _SIDE, torch.eye(_SIDE), 1.0), np.repeat(np.arange(len(numbers)), records)


def _curve(scores: Doubles, included: npt.NDArray[np.bool_]) -> tuple[tuple[float, float], ...]:
    order = np.argsort(-scores, kind="stable")
    absent, present = np.cumsum(~included[order]), np.cumsum(included[order])
    places = np.unique(np.linspace(0, CANARIES - 1, _POINTS).astype(int))
    return tuple((float(absent[at] / absent[-1]), float(present[at] / present[-1])) for at in places)
