"""What a run may cost, as it is fixed when the run begins."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from fedclip_secure.names import Normalisation
from fedclip_secure.privacy.accounting.events import Event


@dataclass(frozen=True, slots=True)
class RunTerms:
    """What a run may cost, whoever's data it trains on. `plan` is the contract's digest.

    `code` is the hash of the program that trains (hexadecimal); it may change within a run, and is then noted.
    """

    federation: str
    plan: bytes
    roster: bytes
    unit: Literal["record", "patient"]
    noise_multiplier: float
    sample_rate: float
    steps_per_round: int
    releases: int  # of one step, each of a batch of its own
    rounds: int
    max_retrains: int
    max_grad_norm: float
    update_divisor: float
    delta: float
    features: Literal["computed here", "stated to be per record"]
    code: str
    patients: tuple[Normalisation, ...] = ()  # what was done to patients' ids; nothing where units are records

    def per_round(self) -> Event:
        """What one round releases."""
        return Event(self.noise_multiplier, self.sample_rate, self.steps_per_round * self.releases)

    def total(self) -> Event:
        """What the run may release at most."""
        rounds = self.rounds + self.max_retrains
        return Event(self.noise_multiplier, self.sample_rate, self.steps_per_round * self.releases * rounds)

    def fields(self) -> dict[str, Any]:
        """As a begin entry has them."""
        plain = {"plan": self.plan.hex(), "roster": self.roster.hex(), "patients": list(self.patients)}
        return dataclasses.asdict(self) | plain
