"""What a ledger's entries come to, run by run and over all of them, for the silo's own screen.

The counts of units depend on the data: nothing of this leaves the house.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.privacy.accounting.privacy_filter import Cap
from fedclip_secure.privacy.ledger.admission import Need
from fedclip_secure.privacy.ledger.entries import Chain, Run
from fedclip_secure.privacy.ledger.unit_sets import Charges

PLAN_DIGITS = 8  # of a plan's digest, to tell runs of one federation's name apart


@dataclass(frozen=True, slots=True)
class RunAccount:
    """One run; epsilon is by PLD, add/remove one unit, at the run's own `delta`."""

    silo: str
    federation: str
    plan: str  # digest
    began_at: int  # seconds since 1970
    unit: str
    rounds: int  # of the plan
    max_retrains: int
    trained: tuple[int, ...]  # rounds that were settled
    without_result: int  # reservations that were not
    retrains: int
    noise_multiplier: float
    sample_rate: float
    steps: int  # reserved
    steps_at_most: int
    delta: float
    epsilon: float  # of what was reserved
    epsilon_at_most: float  # of all that the run may still reserve besides
    held: int  # rounds that are kept for it from other runs
    ended: bool  # nothing can be reserved in it any more


@dataclass(frozen=True, slots=True)
class Lifetime:
    """All runs together, as the cap's filter counts them, for the unit that was charged most."""

    epsilon: float  # spent
    cap_epsilon: float
    cap_delta: float
    share: float  # spent of the limit's budget, the RDP that it allows: each round like another takes the same of it
    epsilon_held: float  # once unfinished runs have spent all that is kept for them, for the unit that then has most
    share_held: float  # the same of the budget
    rounds_left: int  # as those of the newest run, beside what is kept; 0 before the first
    units: int  # that were ever in a set
    exhausted: int  # of these, units that could not pay for one more such round


@dataclass(frozen=True, slots=True)
class Account:
    """Every run, oldest first; `lifetime` is None without a cap: nothing holds then over plans not yet chosen."""

    runs: tuple[RunAccount, ...]
    lifetime: Lifetime | None

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def account_of(chain: Chain, charges: Charges, committed: Charges, cap: Cap | None) -> Account:
    """The account of a checked chain, its units' charges, and these with what is kept for unfinished runs."""
    runs = tuple(chain.runs.values())
    newest = runs[-1].begin.per_round if runs else None
    return Account(tuple(map(_run_account, runs)), None if cap is None else _lifetime(charges, committed, cap, newest))


def holders(runs: Iterable[Run]) -> str:
    """Runs that have room kept for them, for a person: which federation, at which silo, how many rounds."""
    return ", ".join(
        f"{run.begin.federation} at {run.begin.silo} (plan {run.begin.plan[:PLAN_DIGITS]}, begun {day(run.begin.at)}): "
        f"{run.held} round(s)"
        for run in runs
    )


def outlook(charges: Charges, committed: Charges, need: Need, cap: Cap) -> str:
    """What is spent of a limit and what a run would add, for the unit charged most, and whether that fits.

    `committed` has what other unfinished runs hold, too.
    """
    total, spent, kept = need.total, _most(charges, cap), _most(committed, cap)
    said = (
        f"policy.max_epsilon is {cap.epsilon:g} (delta {cap.delta:g}): of the limit's budget the unit charged most has "
        f"spent {percent(spent / cap.budget)} (epsilon {cap.epsilon_of(spent):.4g})"
    )
    if kept > spent:
        said += f", and {percent(kept / cap.budget)} with what is kept for other unfinished runs"
    if total is None:
        return f"{said}; nothing more of this run is to be paid for"
    added = cap.cost((total,))
    said += f"; this run adds at most {percent(added / cap.budget)}"
    if added > cap.budget:
        return f"{said}: it does not fit, not even for a unit that has spent nothing"
    if _most(committed, cap, total) > cap.budget:
        return f"{said}: it does not fit for that unit; `train` leaves out units that cannot pay for all of it"
    return f"{said}: it fits for every unit"


def percent(share: float) -> str:
    """A share, for a person."""
    return f"{100 * share:.1f} %"


def day(at: int) -> str:
    """A time of an entry, for a person."""
    return time.strftime("%Y-%m-%d", time.gmtime(at))


def remembered(chain: Chain, units: int) -> str | None:
    """How old a ledger is, and what it knows; None before its first entry."""
    if not chain.entries:
        return None
    first, newest = (day(entry.at) for entry in (chain.entries[0], chain.entries[-1]))
    runs = Counter(run.begin.federation for run in chain.runs.values())
    named = ", ".join(f"{count} of {federation}" for federation, count in runs.items())
    unit = next(iter(chain.runs.values())).begin.unit
    return f"first entry {first}, newest {newest}; it remembers {runs.total()} run(s) ({named}) and {units} {unit}(s)"


def _run_account(run: Run) -> RunAccount:
    begin, one = run.begin, run.begin.per_round
    rounds = [reserve.round for entry, reserve in run.reservations.items() if entry in run.settled]
    made = len(run.reservations)
    most = made + run.left
    return RunAccount(
        silo=begin.silo,
        federation=begin.federation,
        plan=begin.plan,
        began_at=begin.at,
        unit=begin.unit,
        rounds=begin.rounds,
        max_retrains=begin.max_retrains,
        trained=tuple(sorted(set(rounds))),
        without_result=made - len(run.settled),
        retrains=run.retrains,
        noise_multiplier=begin.noise_multiplier,
        sample_rate=begin.sample_rate,
        steps=one.steps * made,
        steps_at_most=one.steps * most,
        delta=begin.delta,
        epsilon=_epsilon(dataclasses.replace(one, steps=one.steps * made), begin.delta) if made else 0.0,
        epsilon_at_most=_epsilon(dataclasses.replace(one, steps=one.steps * most), begin.delta) if most else 0.0,
        held=run.held,
        ended=run.ended,
    )


def _lifetime(charges: Charges, committed: Charges, cap: Cap, newest: Event | None) -> Lifetime:
    spent, most = _most(charges, cap), _most(committed, cap)
    return Lifetime(
        epsilon=cap.epsilon_of(spent),
        cap_epsilon=cap.epsilon,
        cap_delta=cap.delta,
        share=spent / cap.budget,
        epsilon_held=cap.epsilon_of(most),
        share_held=most / cap.budget,
        rounds_left=cap.rounds_that_fit(most, newest) if newest else 0,
        units=len(charges.steps),
        exhausted=int((committed.spent(cap, newest) > cap.budget).sum()) if newest else 0,
    )


def _most(charges: Charges, cap: Cap, more: Event | None = None) -> float:
    """RDP of the unit that has most."""
    return float(charges.spent(cap, more).max(initial=0.0))


@functools.lru_cache(maxsize=1024)  # the runs of a ledger have few kinds of terms
def _epsilon(event: Event, delta: float) -> float:
    from fedclip_secure.privacy.accounting.accountant import epsilon  # noqa: PLC0415  # loads SciPy, which paying needs not

    return epsilon([event], delta)
