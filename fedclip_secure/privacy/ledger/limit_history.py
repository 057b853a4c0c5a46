"""The limits that a silo held its runs to, as its ledger records them, beside the one that it has today."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedclip_secure.privacy.accounting.privacy_filter import Cap
from fedclip_secure.privacy.ledger.book import told
from fedclip_secure.privacy.ledger.entries import Begin, Chain, Limited, SetLimit


def limit_of(cap: Cap | None) -> SetLimit | None:
    """A limit as entries have it."""
    return None if cap is None else SetLimit(epsilon=float(cap.epsilon), delta=float(cap.delta))


def as_entry(cap: Cap | None) -> dict[str, Any] | None:
    """The same as plain data."""
    limit = limit_of(cap)
    return None if limit is None else limit.model_dump()


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
    if rises(newest.limit, today):
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


def rises(before: SetLimit | None, after: SetLimit | None) -> bool:
    """Whether the limit `after` lets a unit spend what `before` did not."""
    return any(new > old for old, new in zip(_pair(before), _pair(after), strict=True))


def _pair(limit: SetLimit | None) -> tuple[float, float]:
    return (math.inf, 1.0) if limit is None else (limit.epsilon, limit.delta)


def _named(limit: SetLimit | None) -> str:
    return "not set" if limit is None else f"{limit.epsilon:g} (delta {limit.delta:g})"
