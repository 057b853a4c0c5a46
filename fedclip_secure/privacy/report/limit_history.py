"""The limits that a silo held its runs to, as its ledger records them, beside the one that it has today."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from fedclip_secure.privacy.accounting.privacy_filter import Cap
from fedclip_secure.privacy.ledger.book import told
from fedclip_secure.privacy.ledger.entries import Begin, Chain, Limited, SetLimit
from fedclip_secure.privacy.report.document import Lifetime

# What holds over all runs.
Bound = Literal["none", "removed", "raised", "above", "lowered", "unrecorded", "unspent", "fits", "kept"]
CHANGED: frozenset[Bound] = frozenset({"raised", "above", "lowered"})
_ROUNDING = 1 + 1e-9


def limit_of(cap: Cap | None) -> SetLimit | None:
    """A limit as entries have it."""
    return None if cap is None else SetLimit(epsilon=float(cap.epsilon), delta=float(cap.delta))


def as_entry(cap: Cap | None) -> dict[str, Any] | None:
    """The same as plain data."""
    limit = limit_of(cap)
    return None if limit is None else limit.model_dump()


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
        ("raised", any(_rises(before, after) for before, after in steps)),
        ("above", lifetime.this_run > lifetime.budget * _ROUNDING),
        ("lowered", any(before != after for before, after in steps)),
        ("unrecorded", not all(run.begin.limits for run in chain.runs.values())),
        ("unspent", not chain.runs),
        ("fits", fits and stood),
    )
    return next((bound for bound, holds in found if holds), "kept")


def changed(chain: Chain, silo: str, cap: Cap | None) -> str | None:
    """That the silo's limit is another than at its newest run, for its own screen; None where nothing is to be said."""
    mine = [entry for entry in chain.entries if isinstance(entry, Begin | Limited) and entry.silo == silo]
    if not mine:
        return None
    newest, today = mine[-1], limit_of(cap)
    if isinstance(newest, Begin) and not newest.limits:
        if today is None:
            return None
        return (
            f"the ledger does not record the max_epsilon of this silo's run of {told(newest.at)}: if it was raised "
            "since, what held for the old limit does not hold for the new one"
        )
    if newest.limit == today:
        return None
    federation = chain.runs[newest.run].begin.federation
    fact = (
        f"policy.max_epsilon was {_named(newest.limit)} for the run of federation {federation} (entry of "
        f"{told(newest.at)}), and is now {_named(today)}"
    )
    if _rises(newest.limit, today):
        return (
            f"{fact}: what held for the old limit does not hold for the new one, and reports say that it was "
            "raised; set it back unless that was decided"
        )
    return f"{fact}: units that have spent more take part in no further run, and reports say that it was lowered"


def recorded(chain: Chain, silo: str) -> Sequence[tuple[int, SetLimit | None]]:
    """The limits that a silo's entries name, each with its hour, in order."""
    found: list[tuple[int, SetLimit | None]] = []
    for entry in chain.entries:
        if isinstance(entry, Begin | Limited) and entry.silo == silo:
            found += [(entry.at, limit) for limit in (entry.limits if isinstance(entry, Begin) else (entry.limit,))]
    return found


def _rises(before: SetLimit | None, after: SetLimit | None) -> bool:
    return any(new > old for old, new in zip(_pair(before), _pair(after), strict=True))


def _pair(limit: SetLimit | None) -> tuple[float, float]:
    return (math.inf, 1.0) if limit is None else (limit.epsilon, limit.delta)


def _named(limit: SetLimit | None) -> str:
    return "not set" if limit is None else f"{limit.epsilon:g} (delta {limit.delta:g})"
