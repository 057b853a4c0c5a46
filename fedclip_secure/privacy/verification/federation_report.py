"""The coordinator's report over a run: what was planned, what the silos' reports say, and who has not reported.

It holds the silos' reports whole, so that a stranger can check one file alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

from fedclip_secure.config.lock import Contract
from fedclip_secure.errors import TrustError
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.roster import Roster
from fedclip_secure.privacy.accounting.plan_cost import PlannedRun
from fedclip_secure.privacy.ledger.receipts import Receipt, open_receipt
from fedclip_secure.privacy.report import wording
from fedclip_secure.privacy.report.document import (
    Agreement,
    FederationBody,
    FederationReport,
    Members,
    RoundModel,
    SiloReport,
    SiloSummary,
    Together,
    as_data,
)
from fedclip_secure.privacy.report.figures import epsilon, everywhere
from fedclip_secure.privacy.verification.silo_checks import Expected, at_least, check_agreed, check_silo
from fedclip_secure.privacy.verification.verdict import Checks, StoppedError, expect


@dataclass(frozen=True, slots=True)
class FederationFacts:
    """What the coordinator knows of a run. `receipts` are the newest that it signed for each silo."""

    contract: Contract
    roster: Roster
    at: int  # seconds since 1970
    reports: Sequence[SiloReport] = ()
    receipts: Sequence[bytes] = ()
    models: Mapping[int, bytes] = field(default_factory=dict)  # round: digest of the model it ended with
    versions: Mapping[str, str] = field(default_factory=dict)


def combine(facts: FederationFacts) -> dict[str, Any]:
    """The body of the federation's report, for `sign_report` with the aggregator's key.

    Raises:
        TrustError: a silo's report does not pass, and which check found it; or a silo has two.
        ConfigError: noise too small for any claim.
    """
    reports = sorted(facts.reports, key=lambda report: report.body.silo)
    for one, other in pairwise(reports):
        if one.body.silo == other.body.silo:
            raise TrustError(f"two reports are of {one.body.silo}; give the newer one of them alone")
    checks = Checks()
    with suppress(StoppedError):
        _check_reports(checks, reports, facts.contract, facts.roster, facts.receipts)
    for check in checks.done:
        if not check.passed:
            raise TrustError(f"a report cannot be taken in: {check.name}: {check.shows}; ask that silo for a new one")
    body = FederationBody(
        at=facts.at,
        federation=facts.contract.plan.federation,
        contract=Agreement.of(facts.contract),
        roster=Members.of(facts.roster),
        planned_rounds=facts.contract.plan.training.rounds,
        models=_models(facts),
        receipts=[wire.hex() for wire in facts.receipts],
        versions=dict(facts.versions),
        claim=together(facts.contract, facts.roster, reports),
        silos=summaries(facts.roster, reports),
        not_covered=wording.not_covered(facts.contract.plan),
        reports=reports,
    )
    return as_data(body)


def _models(facts: FederationFacts) -> list[RoundModel]:
    planned = facts.contract.plan.training.rounds
    models = [RoundModel(round=number, digest=digest.hex()) for number, digest in sorted(facts.models.items())]
    return [model for model in models if model.round <= planned]  # a closing round only validates the last model


def together(contract: Contract, roster: Roster, reports: Sequence[SiloReport]) -> Together | None:
    """The claim over all silos of the roster, reported or not: each may spend the whole plan."""
    run = PlannedRun.of(contract)
    if run is None:
        return None
    alone = epsilon(run, run.rounds)
    worst = max([alone, *(report.body.claim.epsilon for report in reports if report.body.claim)])
    everyone = everywhere(run, len(roster.silos))
    return Together(
        sentence=wording.together_sentence(contract.plan.federation, run.privacy.unit, worst, everyone, run.delta),
        delta=run.delta,
        worst_silo=worst,
        all_silos=None if everyone is None else max(worst, everyone),
    )


def summaries(roster: Roster, reports: Sequence[SiloReport]) -> list[SiloSummary]:
    """One line for each silo of the roster."""
    found = {report.body.silo: report for report in reports}
    return [_summary(silo, found.get(silo)) for silo in roster.silos]


def _summary(silo: str, report: SiloReport | None) -> SiloSummary:
    spent = report.body.claim.spent if report and report.body.claim else None
    return SiloSummary(
        silo=silo,
        reported=report is not None,
        trained=spent.trained if spent else [],
        retrains=spent.retrains if spent else 0,
        epsilon=spent.epsilon if spent else None,
        replace_one=spent.replace_one if spent else None,
    )


def check_federation(checks: Checks, report: FederationReport, expected: Expected) -> None:
    """Run every check on a federation's report whose form is right, those of the silos' reports included."""
    body = report.body
    with suppress(StoppedError):
        agreed = check_agreed(checks, report, expected)
        wires = [*map(bytes.fromhex, body.receipts), *expected.receipts]
        _check_reports(checks, body.reports, agreed.contract, agreed.roster, wires)
        checks.run("silos", lambda: _check_silos(body, agreed.roster), "the lines on the silos are those of reports")
        checks.run(
            "arithmetic",
            lambda: _check_together(body, agreed.contract, agreed.roster),
            "no figure is lower than what a new computation gives (PLD)",
        )


def _check_reports(
    checks: Checks, reports: Sequence[SiloReport], contract: Contract, roster: Roster, wires: Sequence[bytes]
) -> None:
    """Each silo's report by itself, as one of this run, and against the coordinator's receipts."""
    receipts = checks.need(
        "receipts", lambda: _by_silo(wires, contract, roster), "the coordinator signed every receipt, for this run"
    )
    pins = contract.pin, roster.pin
    for report in reports:
        inner = Checks(prefix=f"{report.body.silo}: ", done=checks.done)
        mine = receipts.get(report.body.silo, ())
        check_silo(inner, report, Expected(*pins, receipts=mine, pins_of="it is that of the federation's report"))
        known = partial(_check_known, report, mine)
        inner.run("uploads", known, "the coordinator knows of its uploads, if there are any")


def _check_known(report: SiloReport, receipts: Sequence[bytes]) -> None:
    body = report.body
    fact = f"{body.silo} shows uploads, and no receipt for one is here from the coordinator's own store"
    expect(bool(receipts) or not (body.ledger and body.ledger.uploaded), fact)


def _by_silo(wires: Sequence[bytes], contract: Contract, roster: Roster) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for wire in wires:
        receipt: Receipt = open_receipt(wire, dict(roster.members)[AGGREGATOR])
        of_run = (receipt.plan, receipt.roster) == (contract.digest, roster.digest) and receipt.silo in roster.silos
        expect(of_run, f"the receipt of {receipt.silo} in round {receipt.round} is of another run")
        found.setdefault(receipt.silo, []).append(wire)
    return found


def _check_silos(body: FederationBody, roster: Roster) -> None:
    versions = {report.body.version for report in body.reports}
    expect(max(versions, default=1) <= body.version, "a silo's report is of a newer version than this one")
    names = [report.body.silo for report in body.reports]
    expect(names == sorted(set(names)), "the silos' reports are not in order, or one stands twice")
    expect(body.silos == summaries(roster, body.reports), "a line on a silo says something else than its report")
    expect(body.planned_rounds == body.contract.plan.training.rounds, "the planned rounds are not the plan's")
    rounds = [model.round for model in body.models]
    in_order = rounds == sorted(set(rounds)) and all(number <= body.planned_rounds for number in rounds)
    expect(in_order, "the models are not of rounds of the plan, in order")
    same = body.not_covered == wording.not_covered(body.contract.plan)
    expect(same, "what is not covered is not what the plan gives")
    _check_models(body)


def _check_models(body: FederationBody) -> None:
    mine = {model.round: model.digest for model in body.models}
    for report in body.reports:
        for model in report.body.models:
            same = mine.get(model.round, model.digest) == model.digest
            expect(same, f"{report.body.silo} has another model of round {model.round} than the coordinator")


def _check_together(body: FederationBody, contract: Contract, roster: Roster) -> None:
    given, new = body.claim, together(contract, roster, body.reports)
    if given is None or new is None:
        expect(given is new, "a claim goes with a plan that has privacy, and only then")
        return
    at_least(given.worst_silo, new.worst_silo, "ε of the worst silo")
    at_least(given.all_silos, new.all_silos, "ε over all silos")
    expect(given.delta == new.delta, "δ is not the plan's")
    plan, unit = contract.plan, body.contract.plan.privacy.unit if body.contract.plan.privacy else ""
    wanted = wording.together_sentence(plan.federation, unit, given.worst_silo, given.all_silos, given.delta)
    expect(given.sentence == wanted, "the sentence says something else than the claim")
