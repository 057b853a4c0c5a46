"""What a plan allows each silo to spend, before anything is spent. Light: nothing here loads scipy."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import PrivacyPlan
from fedclip_secure.errors import ConfigError
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.privacy.accounting.rdp import least_noise, rdp_epsilon
from fedclip_secure.privacy.accounting.releases import check_releases

LARGEST_EPSILON = 1000.0  # by RDP; beyond it nothing is promised, and the arithmetic would need much memory


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """What a contract with privacy allows each silo to spend."""

    privacy: PrivacyPlan
    per_round: Event
    rounds: int  # retrains included

    @classmethod
    def of(cls, contract: Contract) -> PlannedRun | None:
        """None where the plan has no privacy.

        Raises:
            ConfigError: a lock without noise, a loss that couples records, noise too small for any claim, or
                another number of releases than the method has.
        """
        privacy, sigma = contract.plan.privacy, contract.lock.noise_multiplier
        if privacy is None:
            return None
        if sigma is None:
            raise ConfigError("the lock has no noise_multiplier although the plan has privacy; run `prepare` again")
        if contract.plan.method.loss == "inbatch":
            raise ConfigError("the in-batch loss couples records, so no unit's part in a sum is bounded; change it")
        check_releases(contract)
        per_round = Event(sigma, privacy.sample_rate, privacy.steps_per_round * contract.lock.releases)
        run = cls(privacy, per_round, contract.plan.training.rounds + privacy.max_retrains)
        if not rdp_epsilon([run.total], privacy.delta) <= LARGEST_EPSILON:
            raise ConfigError(_nothing_claimed(run.total, privacy.delta))
        return run

    @property
    def delta(self) -> float:
        """The plan's."""
        return self.privacy.delta

    @property
    def total(self) -> Event:
        """All rounds and retrains."""
        return self.after(self.rounds)

    def epsilon(self) -> float:
        """Of the whole run at the plan's delta, by PLD."""
        from fedclip_secure.privacy.accounting.accountant import epsilon  # noqa: PLC0415 - loads scipy, which takes a second

        return epsilon([self.total], self.delta)

    def after(self, rounds: int) -> Event:
        """So many rounds, at least one."""
        return replace(self.per_round, steps=rounds * self.per_round.steps)


def _nothing_claimed(total: Event, delta: float) -> str:
    needed = least_noise(LARGEST_EPSILON, delta, total.sample_rate, total.steps)
    remedy = "lower training.rounds, privacy.steps_per_round or sample_rate"
    if needed is not None:
        remedy = f"set privacy.noise_multiplier to at least {needed:g}"
    return (
        f"privacy: with noise_multiplier {total.noise_multiplier:g} epsilon over {total.steps} step(s) at sample_rate "
        f"{total.sample_rate:g} is above {LARGEST_EPSILON:g} (delta {delta:g}), so nothing can be claimed; {remedy}"
    )
