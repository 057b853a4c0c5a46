"""Who is there: a joining round waits for silos that were heard of lately."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fedclip_secure.aggregator.store import Store

PRESENT = 60.0  # seconds since a silo was last heard of, within which a joining round waits for it
_SEEN_EVERY = 5.0  # seconds between two notes of a silo's presence in the store


@dataclass(slots=True)
class Presence:
    """Who was heard of when, on this process's clock."""

    store: Store
    seen_at: dict[str, float] = field(default_factory=dict)  # silos that could join
    noted_at: dict[str, float] = field(default_factory=dict)
    idle: set[str] = field(default_factory=set)  # silos that sit the present model out

    def __post_init__(self) -> None:
        """Whoever was there just before a restart is about to come back."""
        now, ago = time.monotonic(), time.time()
        self.seen_at |= {silo: now - max(0.0, ago - at) for silo, at in self.store.presence().items()}

    def seen(self, silo: str, *, idle: bool) -> None:
        """A silo asked for something; an `idle` one sits the present model out."""
        now = time.monotonic()
        if idle:
            self.seen_at.pop(silo, None)
            self.idle.add(silo)
        else:
            self.seen_at[silo] = now
            self.idle.discard(silo)
        if now - self.noted_at.get(silo, -_SEEN_EVERY) >= _SEEN_EVERY:
            self.noted_at[silo] = now
            self.store.seen(silo, time.time())

    def present(self) -> set[str]:
        """Silos heard of lately that could join."""
        return {silo for silo, at in self.seen_at.items() if time.monotonic() - at <= PRESENT}
