"""How a run stands, from the store alone: works beside a running server and without one."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from fedclip_secure.aggregator.home import Home
from fedclip_secure.aggregator.store import Event, RoundRow, Store, ended
from fedclip_secure.config.lock import Contract
from fedclip_secure.pki.certificates import read_certificate
from fedclip_secure.pki.roster import Roster
from fedclip_secure.secagg.aggregator_session import Phase
from fedclip_secure.secagg.terms import Terms


@dataclass(frozen=True, slots=True)
class SiloStatus:
    """One silo, as its coordinator sees it. Times are seconds since 1970."""

    name: str
    enrolled: bool
    certificate_ends: float | None
    last_seen: float | None
    rounds_averaged: int  # of the plan's training rounds
    rounds_missed: int
    dropped: dict[str, int]  # stage: how often it did not answer in time


@dataclass(frozen=True, slots=True)
class RunStatus:
    """The run as a whole."""

    federation: str
    serving: bool  # whether a server runs on this folder
    state: str  # enrolling, frozen, running, finished or halted
    reason: str
    round: int  # the one going on, or the last
    rounds: int  # training rounds of the plan
    attempt: int
    stage: str | None
    answered: list[str]  # in the present stage
    server_certificate_ends: float  # seconds since 1970
    floor: int | None
    absent_tolerated: int | None
    silos: list[SiloStatus]
    finished_rounds: list[dict[str, Any]]
    events: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def read_status(home: Home, now: float) -> RunStatus:
    """Read how the run of `home` stands.

    Raises:
        ConfigError: there is no federation here.
    """
    plan = home.plan()
    store = home.store_to_read()
    try:
        frozen, terms = store.frozen(), None
        if frozen is not None:  # what the file says by now does not count any more
            contract = Contract.decode(frozen[0], "the store")
            plan, terms = contract.plan, Terms.of(contract, Roster.decode(frozen[1]))
        state, reason = _state(store, terms)
        last = store.last_attempt()
        running = last is not None and last.ended is None
        stage = Phase(last.closed) if running and last is not None else None
        return RunStatus(
            federation=plan.federation,
            serving=store.locked(),
            state=state,
            reason=reason,
            round=last.round if last is not None else 0,
            rounds=plan.training.rounds,
            attempt=last.number if last is not None else 0,
            stage=None if stage is None else stage.name.lower(),
            answered=[] if stage is None or last is None else [s for s, _ in store.messages(last.number, stage)],
            server_certificate_ends=read_certificate(home.server_certificate).not_valid_after_utc.timestamp(),
            floor=None if terms is None else terms.floor,
            absent_tolerated=None if terms is None else terms.absent_tolerated,
            silos=_silos(store, now, plan.training.rounds),
            finished_rounds=[_round(row) for row in store.rounds()],
            events=[asdict(event) for event in store.events()],
        )
    finally:
        store.close()


def _state(store: Store, terms: Terms | None) -> tuple[str, str]:
    if terms is None:
        return "enrolling", "the roster is not frozen yet"
    halted = store.halted()
    if halted is not None:
        return "halted", halted[0]
    rounds, last = store.rounds(), store.last_attempt()
    if ended(rounds, terms) and last is not None and last.ended is not None:
        newest = rounds[-1]
        still = terms.moved_nothing(newest.round, newest.start_model, newest.model)
        return "finished", terms.still(newest.round) if still else ""
    return ("running", "") if last is not None else ("frozen", "`fedclip-agg serve` starts the run")


def _silos(store: Store, now: float, training_rounds: int) -> list[SiloStatus]:
    members = {member.silo: member for member in store.members()}
    invited = {} if store.frozen() else dict(store.open_invitations(now))
    presence, events = store.presence(), store.events()
    trained = [row for row in store.rounds() if row.round <= training_rounds]
    return [
        SiloStatus(
            name=name,
            enrolled=name in members,
            certificate_ends=members[name].not_after if name in members else None,
            last_seen=presence.get(name),
            rounds_averaged=sum(name in row.survivors for row in trained),
            rounds_missed=sum(name not in row.survivors for row in trained) if name in members else 0,
            dropped=_drops(events, name),
        )
        for name in sorted({*members, *invited})
    ]


def _drops(events: list[Event], silo: str) -> dict[str, int]:
    return dict(Counter(event.stage for event in events if event.silo == silo and event.kind == "dropped"))


def _round(row: RoundRow) -> dict[str, Any]:
    return {
        "round": row.round,
        "attempt": row.attempt,
        "survivors": list(row.survivors),
        "correct": row.correct,
        "total": row.total,
        "model": row.model.hex(),
        "ended_at": row.ended_at,
    }
