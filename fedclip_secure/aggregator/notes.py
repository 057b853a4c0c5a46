"""What a coordinator will want to know of a run: events in the store, and sentences on what an attempt waits for."""

from __future__ import annotations

import time
from collections import Counter

from fedclip_secure.aggregator.attempt import LiveAttempt
from fedclip_secure.aggregator.store import Event, Store
from fedclip_secure.errors import ProtocolError
from fedclip_secure.secagg.terms import Terms

_LISTED = 10  # names in one sentence
_REFUSALS = 20  # noted of one silo in one attempt: it could fill the disk with them
REASON = 500  # characters of a refusal that are noted


class Notes:
    """Events of one attempt after the other."""

    def __init__(self, store: Store, terms: Terms) -> None:
        self._store, self._terms = store, terms
        self._refused: Counter[str] = Counter()  # messages in the present attempt, by silo

    def begin(self) -> None:
        """Another attempt."""
        self._refused.clear()

    def event(self, live: LiveAttempt, kind: str, silo: str | None, reason: str) -> None:
        """Note something, at the stage that the attempt is at."""
        stage = live.session.phase.name.lower()
        self._store.add_event(Event(time.time(), kind, live.row.round, live.row.number, silo, stage, reason))

    def missing(self, live: LiveAttempt, seconds: float) -> None:
        """Who did not answer in the present stage."""
        for silo in sorted(live.session.missing()):
            self.event(live, "dropped", silo, f"no answer within {seconds:.0f} s")

    def refusal(self, live: LiveAttempt, silo: str, error: ProtocolError) -> None:
        """That a message was refused, and why."""
        if error.code == "late" or self._refused[silo] >= _REFUSALS:
            return
        self._refused[silo] += 1
        last = "; further ones are not noted" if self._refused[silo] == _REFUSALS else ""
        self.event(live, "refused", silo, f"refused ({error.code}): {str(error)[:REASON]}{last}")

    def stuck(self, live: LiveAttempt, idle: set[str]) -> str:
        """Why too few can go on together, as the end of a sentence; `idle` silos sit the present model out."""
        reasons = []
        if len(set(self._terms.roster.silos) - idle) < self._terms.floor:
            reasons.append(
                f"{listed(sorted(idle))} cannot send an update over this model any more; with fewer than "
                f"{self._terms.floor} silos left the run cannot go on: start a new one"
            )
        reasons += _bound(live)
        for reason in reasons:
            self.event(live, "blocked", None, reason)
        return "".join(f". {reason}" for reason in reasons)


def name_of(live: LiveAttempt, terms: Terms) -> str:
    """An attempt as people call it."""
    return f"{terms.round_name(live.row.round)}, attempt {live.row.number}"


def waits_for(live: LiveAttempt, terms: Terms) -> str:
    """What an attempt is waiting for, for a silo that has nothing to do."""
    missing = listed(sorted(live.session.missing())) or "the silos that are expected"
    return f"{name_of(live, terms)} is at stage {live.session.phase.name.lower()} and waits for {missing}"


def listed(names: list[str]) -> str:
    """Names for a sentence that travels to a silo: with 255 silos not all of them."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _bound(live: LiveAttempt) -> list[str]:
    """Of silos that go on with the names they agreed to or not at all."""
    ads, reasons = live.session.ads, []
    for names in sorted({tuple(ad.body.agreed) for ad in ads.values()} - {()}):
        bound = sorted(name for name, ad in ads.items() if tuple(ad.body.agreed) == names)
        reasons.append(
            f"{listed(bound)} agreed to the sum over {listed(list(names))} and go on with exactly these; "
            f"missing: {listed(sorted(set(names) - set(ads))) or 'none'}. If one is gone for good, each that "
            f"agreed may give the round up: fedclip-silo train --abandon-round {live.row.round}"
        )
    return reasons
