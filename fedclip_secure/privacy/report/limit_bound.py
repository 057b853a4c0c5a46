"""What a report can say of a silo's limit over all runs, by the limits that its ledger records and the one of today."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from fedclip_secure.privacy.ledger.entries import Chain, SetLimit
from fedclip_secure.privacy.ledger.limit_history import recorded, rises
from fedclip_secure.privacy.report.document import Lifetime

# What holds over all runs.
Bound = Literal["none", "removed", "raised", "above", "lowered", "unrecorded", "unspent", "fits", "kept"]
CHANGED: frozenset[Bound] = frozenset({"raised", "above", "lowered"})
_ROUNDING = 1 + 1e-9


def bound_of(chain: Chain, silo: str, lifetime: Lifetime | None, version: int) -> Bound:
    """What a report of `version` can say of the silo's limit over all runs of its ledger."""
    if lifetime is None:
        had_one = any(limit is not None for _, limit in recorded(chain, silo))
        return "removed" if had_one else "none"
    fits = lifetime.every_run <= lifetime.budget
    if version == 1:
        return "fits" if fits else "kept"
    today = SetLimit(epsilon=lifetime.limit.epsilon, delta=lifetime.limit.delta)
    steps = list(pairwise([*(limit for _, limit in recorded(chain, silo)), today]))
    stood = all(limit == today for run in chain.runs.values() for limit in run.limits)  # its order was fixed by then
    found: tuple[tuple[Bound, bool], ...] = (
        ("raised", any(rises(before, after) for before, after in steps)),
        ("above", lifetime.this_run > lifetime.budget * _ROUNDING),
        ("lowered", any(before != after for before, after in steps)),
        ("unrecorded", not all(run.begin.limits for run in chain.runs.values())),
        ("unspent", not chain.runs),
        ("fits", fits and stood),
    )
    return next((bound for bound, holds in found if holds), "kept")
