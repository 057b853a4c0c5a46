"""Which units a run may train on, and why a plan is refused: by the silo's cap, and by facts of its data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedclip_secure.errors import PolicyError
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.privacy.accounting.privacy_filter import Cap
from fedclip_secure.privacy.ledger.unit_sets import Charges, Numbers

MAX_EXPOSED = 0.1  # units: with delta = 1/units a mechanism that publishes one random unit would pass


@dataclass(frozen=True, slots=True)
class Need:
    """What a run may still cost each unit."""

    per_round: Event
    rounds: int  # still to come at most, retrains included

    @property
    def total(self) -> Event | None:
        """All of it."""
        one = self.per_round
        return Event(one.noise_multiplier, one.sample_rate, one.steps * self.rounds) if self.rounds else None


def check_delta(delta: float, units: int, cap: Cap | None) -> None:
    """Refuse a plan whose delta is larger than the silo's own, or means nothing for so few units.

    Raises:
        PolicyError: one of the two.
    """
    if cap is not None and delta > cap.delta:
        raise PolicyError(
            f"the plan has delta {delta:g}, more than policy.delta {cap.delta:g} in silo.yaml; "
            "ask the coordinator for a plan with a smaller delta"
        )
    if delta * units > MAX_EXPOSED:
        raise PolicyError(
            f"the plan's delta {delta:g} is too large for the {units} units here: it would allow to publish some of "
            f"them whole; ask the coordinator for a plan with a smaller one, such as {MAX_EXPOSED / 2 / units:.0e}"
        )


def fitting(mine: Numbers, charges: Charges, need: Need, cap: Cap | None) -> npt.NDArray[np.bool_]:
    """Which of `mine` (units,) could pay for all that the run needs, each by its own history alone."""
    if cap is None:
        return np.ones(len(mine), dtype=np.bool_)
    fits: npt.NDArray[np.bool_] = charges.spent(cap, need.total)[mine] <= cap.budget
    return fits


def nobody_fits(
    mine: Numbers, charges: Charges, committed: Charges, need: Need, cap: Cap | None, *, held_by: str, could_pay: bool
) -> PolicyError:
    """Why no unit can take part, what would fit, and what to do. `committed` has what unfinished runs hold, too.

    `could_pay`: some could, and were left out of the run before.
    """
    if cap is None or could_pay:
        return PolicyError(
            "every unit of the data was left out when the run began, or cannot pay for it; restore the data of the run"
        )
    if need.total is None:
        return PolicyError(
            f"every unit has spent more than policy.max_epsilon {cap.epsilon:g} allows; nothing of this run is left to "
            "pay for, so set the limit back to what it was to see it end"
        )
    taken = committed.spent(cap)[mine]
    least = int(taken.argmin())
    spent = float(charges.spent(cap)[mine][least])
    return PolicyError(f"no unit can take part: {in_words(cap, need, spent, float(taken[least]), held_by)}")


def in_words(cap: Cap, need: Need, spent: float = 0.0, taken: float = 0.0, held_by: str = "") -> str:
    """What a plan would cost a unit that has spent so much (RDP at the cap's order), and what would fit instead.

    `taken` is what is spent or held by unfinished runs, which `held_by` names.
    """
    total = need.total
    if total is None:
        return "nothing of the plan is left"
    least = (
        f"the unit charged least has spent ε {cap.epsilon_of(spent):.4g}"
        if spent > 0
        else "for a unit that has spent nothing"
    )
    if held_by:
        least += f", unfinished runs hold what may bring it to ε {cap.epsilon_of(taken):.4g} ({held_by})"
    rounds, sigma = cap.rounds_that_fit(taken, need.per_round), cap.sigma_that_fits(taken, total)
    free = "; free what is held by a run that nobody goes on with (`fedclip-silo budget --end FEDERATION`)"
    return (
        f"policy.max_epsilon is {cap.epsilon:g} (delta {cap.delta:g}), {least}, and the plan's {need.rounds} rounds "
        f"(retrains included) would bring it to ε {cap.epsilon_of(taken + cap.cost((total,))):.4g}, counted over all "
        f"plans at the one order that this limit allows, which is stricter than the plan's own figure; {rounds} such "
        f"rounds would fit, or {'no noise_multiplier' if sigma is None else f'all with noise_multiplier {sigma:g}'}"
        f"{free if held_by else ''}; ask the coordinator for such a plan, or sit this one out"
    )
