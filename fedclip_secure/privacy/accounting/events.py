"""What was done to private data: events, as frozen facts, apart from the arithmetic that turns them into ε."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedclip_secure.config.fields import LEAST_NOISE, MOST_NOISE
from fedclip_secure.errors import ConfigError

POISSON_GAUSSIAN = "poisson_gaussian"


@dataclass(frozen=True, slots=True)
class Event:
    """`steps` times: a sum over units, each in it with probability `sample_rate`, clipped to C, plus Gaussian noise.

    Units are drawn afresh and independently in every step (Poisson sampling); the noise has a deviation of
    `noise_multiplier`·C in every coordinate. Refuses with ConfigError what no accountant could charge.
    """

    noise_multiplier: float  # σ, in units of the clipping norm C
    sample_rate: float  # q
    steps: int
    mechanism: str = POISSON_GAUSSIAN

    def __post_init__(self) -> None:
        if self.mechanism != POISSON_GAUSSIAN:
            raise ConfigError(
                f"mechanism {self.mechanism!r} is unknown, so nothing can be charged for it; use {POISSON_GAUSSIAN!r}"
            )
        if not LEAST_NOISE <= self.noise_multiplier <= MOST_NOISE:  # refuses NaN too
            raise ConfigError(
                f"noise_multiplier {self.noise_multiplier} cannot be accounted for; give a value from {LEAST_NOISE:g} "
                f"to {MOST_NOISE:g}"
            )
        if not 0 < self.sample_rate <= 1:  # refuses NaN too
            raise ConfigError(f"sample_rate {self.sample_rate} is no probability of taking part; give 0 < q <= 1")
        if type(self.steps) is not int or self.steps < 1:
            raise ConfigError(f"steps {self.steps!r} cannot be counted; give a whole number of at least 1")


def merged(events: Iterable[Event]) -> tuple[Event, ...]:
    """Events of equal parameters added up, in an order that does not depend on the order they came in."""
    steps: Counter[Event] = Counter()
    for event in events:
        steps[replace(event, steps=1)] += event.steps
    order = sorted(steps, key=lambda event: (event.mechanism, event.noise_multiplier, event.sample_rate))
    return tuple(replace(event, steps=steps[event]) for event in order)
