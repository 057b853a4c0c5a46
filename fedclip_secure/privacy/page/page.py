"""The page that people read: one HTML file made from the signed report alone, without scripts or anything remote."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedclip_secure.errors import TrustError
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.privacy.accounting.plan_cost import PlannedRun
from fedclip_secure.privacy.canonical_json import encode
from fedclip_secure.privacy.ledger.entries import HOUR, Clock, Entry, Run, SetLimit, Settle, SignedEntry
from fedclip_secure.privacy.ledger.limit_history import recorded
from fedclip_secure.privacy.ledger.receipts import Receipt, open_receipt
from fedclip_secure.privacy.ledger.spending import percent
from fedclip_secure.privacy.page.curves import most_true_positives, over_rounds, profile, surely_reached
from fedclip_secure.privacy.page.plots import profile_svg, roc_svg, rounds_svg
from fedclip_secure.privacy.report import wording
from fedclip_secure.privacy.report.document import (
    Assumption,
    FederationBody,
    FederationReport,
    SiloBody,
    SiloReport,
)
from fedclip_secure.privacy.report.parties import agreed, costs, most_hurt, parties
from fedclip_secure.privacy.report.silo_report import History, codes_of, first_charge
from fedclip_secure.privacy.verification.verify import failed_tests, read_report, verify

_MARKS = {
    "shown": "✓",
    "accounted": "✓",
    "said": "◆",
    "public": "◆",
    "stated": "“",
    "open": "✕",
    "unprotected": "✕",
}
_LABELS = {"tested": "said"}  # what version 1 wrote, in the words of today
_DAY = 86_400  # seconds
_MOST_ROWS = 60  # of the ledger; the file has all
_FALSE_POSITIVES = 0.01  # of the sentence about what an attacker gets


def render_page(data: bytes) -> str:
    """The page of a report, silo's or federation's.

    Raises:
        TrustError: the report does not pass, and the first check that says so; nobody should read its claims.
    """
    for check in verify(data).failures:
        raise TrustError(f"no page is made of a report that does not pass: {check.name}: {check.shows}")
    report = read_report(data)
    plan = report.body.contract.plan
    values = _of_silo(report) if isinstance(report, SiloReport) else _of_federation(report)
    template = _environment().get_template(f"{report.body.kind}.html")
    return template.render(
        body=report.body,
        fingerprint=report.body.roster.roster.fingerprint(report.signature.silo),
        sha256=hashlib.sha256(data).hexdigest(),
        marks=_MARKS,
        labels=_LABELS,
        cannot_show=wording.CANNOT_SHOW,
        claim=report.body.claim,
        failed_tests=failed_tests(report),
        agreed=agreed(plan, report.body.contract.lock),
        parties=parties(plan, report.body.roster.roster),
        costs=costs(plan),
        most_hurt=most_hurt,
        **values,
    )


def _environment() -> Environment:
    loader = PackageLoader("fedclip_secure.privacy.page", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    filters: dict[str, Callable[[Any], object]] = {
        "date": _date,
        "hour": _hour,
        "number": lambda value: f"{value:.6g}",
        "percent": percent,
        "small": wording.small,
        "times": wording.times,
        "groups": _groups,
    }
    environment.filters.update(filters)
    return environment


def _of_silo(report: SiloReport) -> dict[str, Any]:
    body = report.body
    planned, history = PlannedRun.of(body.contract.contract), _history(body)
    values: dict[str, Any] = {
        "planned": planned,
        "unit": planned.privacy.unit if planned else None,
        "mechanism": body.mechanism,
        "accounting": body.accounting,
        "lifetime": body.lifetime,
        "over_runs": body.assumptions[-1],
        "limits": _limits(body, history),
        "ended": history.ended,
        "ledger": _ledger(body, history),
        "codes": list(dict.fromkeys(codes_of(history.run))),
        "audited": _audited(body, history),
        "plots": {},
        "recognised": "",
    }
    if planned is not None and body.claim is not None:
        pairs = profile(planned, body.claim.epsilon)
        values["plots"] = {
            "rounds": rounds_svg(over_rounds(planned), body.claim),
            "profile": profile_svg(pairs, body.claim),
            "roc": roc_svg(pairs, surely_reached(body.audit.attack) if body.audit and body.audit.attack else None),
        }
        values["recognised"] = _percent(float(most_true_positives(pairs, np.array([_FALSE_POSITIVES]))[0]))
    return values


def _of_federation(report: FederationReport) -> dict[str, Any]:
    body: FederationBody = report.body
    return {
        "missing": [silo.silo for silo in body.silos if not silo.reported],
        "fingerprints": {member.name: body.roster.roster.fingerprint(member.name) for member in body.roster.members},
        "resting": _resting(body.reports),
        "unprotected": [item for item in wording.scope(body.contract.plan) if item.status == "unprotected"],
        "receipts": _receipts(body),
        "most_rows": _MOST_ROWS,
    }


def _history(body: SiloBody) -> History:
    given = body.ledger.entries if body.ledger else []
    entries = [SignedEntry(encode(item.entry), bytes.fromhex(item.signature)) for item in given]
    return History.of(entries, body.contract.contract, body.roster.roster, body.silo)


def _limits(body: SiloBody, history: History) -> list[str]:
    """Those that the ledger names for this silo, and today's, where they are not all the same."""
    named = [(f"{_hour(at)} UTC", limit) for at, limit in recorded(history.chain, body.silo)]
    today = None if body.limit is None else SetLimit(epsilon=body.limit.epsilon, delta=body.limit.delta)
    changes = [one for one, before in zip(named, [None, *named], strict=False) if before is None or one[1] != before[1]]
    if all(limit == today for _, limit in changes):
        return []
    return [f"{when}: {_limit(limit)}" for when, limit in [*changes, ("now", today)]]


def _limit(limit: SetLimit | None) -> str:
    return "none" if limit is None else f"ε = {limit.epsilon:g} at δ = {wording.small(limit.delta)}"


def _audited(body: SiloBody, history: History) -> str:
    """When, beside the first charge and the report."""
    if body.audit is None or body.audit.at is None:
        return "When they were run is not said."
    at, charged = body.audit.at, first_charge(history.run)
    apart = ["in the hour of this report" if body.at - at < HOUR else f"{_apart(body.at - at)} before this report"]
    if charged is not None:
        order = "before" if at < charged else "after"
        beside = "in the hour of" if at == charged else f"{_apart(abs(charged - at))} {order}"
        apart.insert(0, f"{beside} the first charge of this run")
    return f"Run at {_hour(at)} UTC, says the silo: {' and '.join(apart)}."


def _apart(seconds: int) -> str:
    number, unit = (seconds // _DAY, "day") if seconds >= _DAY else (seconds // HOUR, "hour")
    return f"{number} {unit}{'s' if number > 1 else ''}"


def _receipts(body: FederationBody) -> list[Receipt]:
    key = dict(body.roster.roster.members)[AGGREGATOR]
    return [open_receipt(bytes.fromhex(wire), key) for wire in body.receipts]


def _resting(reports: Sequence[SiloReport]) -> list[tuple[Assumption, list[str]]]:
    """What reports do not show by themselves, each with the silos that it is said of."""
    found: dict[str, tuple[Assumption, list[str]]] = {}
    for report in reports:
        for item in report.body.assumptions:
            if item.state != "shown":
                found.setdefault(item.id, (item, []))[1].append(report.body.silo)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Row:
    """One charge of this run."""

    number: int
    at: int
    round: int
    again: bool
    steps: int
    sigma: float
    rate: float
    settled: bool
    uploaded: bool


@dataclass(frozen=True, slots=True)
class LedgerTable:
    """The run's charges, the newest ones if there are many."""

    rows: Sequence[Row]
    hidden: int
    entries: int
    other: int


def _ledger(body: SiloBody, history: History) -> LedgerTable:
    uploaded = set(body.ledger.uploaded) if body.ledger else set()
    entries = history.chain.entries
    if history.run is None:
        return LedgerTable((), 0, len(entries), len(entries))
    run, rows, seen = history.run, [], set[int]()
    for digest, entry in run.reservations.items():
        settled = digest in run.settled
        row = Row(
            entry.number,
            entry.at,
            entry.round,
            entry.round in seen,
            entry.steps,
            entry.noise_multiplier,
            entry.sample_rate,
            settled,
            settled and entry.round in uploaded,
        )
        rows.append(row)
        seen.add(entry.round)
    others = sum(_is_of_another(entry, run) for entry in entries)
    return LedgerTable(rows[-_MOST_ROWS:], max(0, len(rows) - _MOST_ROWS), len(entries), others)


def _is_of_another(entry: Entry, run: Run) -> bool:
    """Whether an entry is of another run; one about the clock is of none."""
    if isinstance(entry, Clock):
        return False
    return entry.reservation not in run.reservations if isinstance(entry, Settle) else entry.run != run.begin.run


def _groups(digits: str) -> list[str]:
    return [digits[i : i + 4] for i in range(0, len(digits), 4)]


def _date(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return f"second {seconds}"


def _hour(seconds: int) -> str:
    """Ledgers tell whole hours."""
    return f"{_date(seconds).partition(':')[0]} h"


def _percent(share: float) -> str:
    rounded = np.ceil(share * 1000 - 1e-9) / 10
    return f"{min(rounded, 100.0):.1f} %"
