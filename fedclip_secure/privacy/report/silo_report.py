"""Make a silo's privacy report out of facts: what was agreed, what its ledger says, what the coordinator signed.

No files, no clock, no network here. What a report may hold is in `document.py`; nothing of it depends on the
training data, and a claim stands in it only where the plan has differential privacy. It never calls anything
compliant or anonymous.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import PrivacyPlan
from fedclip_secure.errors import TrustError
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.roster import Roster
from fedclip_secure.privacy.accounting.plan_cost import PlannedRun
from fedclip_secure.privacy.canonical_json import decode
from fedclip_secure.privacy.ledger.entries import HOUR, Chain, Clock, Reserve, Run, Settle, SignedEntry, chain_of
from fedclip_secure.privacy.ledger.receipts import open_receipt
from fedclip_secure.privacy.report import wording
from fedclip_secure.privacy.report.assumptions import Audited, AuditTime, Evidence, Ran, Verdict, assumptions
from fedclip_secure.privacy.report.document import (
    FIRST_TESTS,
    TESTS,
    VERSION,
    Accounting,
    Agreement,
    Audit,
    Claim,
    Estimate,
    LedgerEntry,
    LedgerPart,
    Lifetime,
    Limit,
    Mechanism,
    Members,
    RoundModel,
    SiloBody,
    Spent,
    as_data,
    sign_report,
)
from fedclip_secure.privacy.report.figures import Charges, accounting, claimed, epsilon, groups
from fedclip_secure.privacy.report.limit_bound import CHANGED, bound_of

__all__ = ["SiloFacts", "report_body", "sign_report"]


@dataclass(frozen=True, slots=True)
class SiloFacts:
    """All that a report is made of. `entries` are the whole ledger, `receipts` those of this run, as they came."""

    contract: Contract
    roster: Roster
    silo: str
    at: int  # seconds since 1970
    entries: Sequence[SignedEntry] = ()
    receipts: Sequence[bytes] = ()
    models: Mapping[int, bytes] = field(default_factory=dict)  # round: digest of the model it ended with
    prv: Estimate | None = None  # epsilon of the whole plan, add/remove, by Opacus's PRV accountant
    audit: Audit | None = None
    limit: Limit | None = None  # silo.yaml's max_epsilon and delta
    units_at_least: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)  # of the software, and hashes of its code


@dataclass(frozen=True, slots=True)
class History:
    """A checked chain, and what it says of one run."""

    chain: Chain
    run: Run | None  # None: this silo has begun no such run

    @classmethod
    def of(cls, entries: Sequence[SignedEntry], contract: Contract, roster: Roster, silo: str) -> History:
        """Check `entries` and look for the silo's run of this contract with this roster.

        Raises:
            TrustError: which entry breaks which rule.
        """
        chain = chain_of(entries)
        return cls(chain, chain.found(silo, contract.digest.hex(), roster.digest.hex()))

    @property
    def ended(self) -> bool:
        """Whether nothing more can be charged in the run."""
        return self.run is not None and self.run.ended

    @property
    def trained(self) -> list[int]:
        """Rounds that were settled, rising."""
        run = self.run
        return sorted({run.reservations[entry].round for entry in run.settled}) if run else []

    def settled_at(self, round_number: int) -> int | None:
        """The number of the entry that first settled this round; None where it never was."""
        if self.run is None:
            return None
        mine = {entry for entry in self.run.settled if self.run.reservations[entry].round == round_number}
        entries = self.chain.entries
        return next((item.number for item in entries if isinstance(item, Settle) and item.reservation in mine), None)

    def spent(self, planned: PlannedRun) -> Spent:
        """What is reserved until now."""
        reservations = len(self.run.reservations) if self.run else 0
        return Spent(
            reservations=reservations,
            trained=self.trained,
            retrains=self.run.retrains if self.run else 0,
            epsilon=epsilon(planned, reservations),
            replace_one=epsilon(planned, reservations, "replace_one"),
        )


def report_body(facts: SiloFacts) -> dict[str, Any]:
    """The body of a silo's report, as plain JSON data for `sign_report`.

    Raises:
        ConfigError: noise too small for any claim, a limit too small, a loss that couples records.
        TrustError: the ledger's chain is broken, or a receipt is not the coordinator's.
    """
    plan = facts.contract.plan
    planned = PlannedRun.of(facts.contract)
    history = History.of(facts.entries, facts.contract, facts.roster, facts.silo)
    ledger = _ledger(facts) if planned else None
    figures = accounting(planned, facts.prv) if planned else None
    lifetime = lifetime_of(planned, history, facts.limit, silo=facts.silo, version=VERSION)
    models = [RoundModel(round=number, digest=digest.hex()) for number, digest in sorted(facts.models.items())]
    body = SiloBody(
        at=facts.at,
        federation=plan.federation,
        silo=facts.silo,
        contract=Agreement.of(facts.contract),
        roster=Members.of(facts.roster),
        units_at_least=facts.units_at_least,
        limit=facts.limit,
        ledger=ledger,
        models=models,
        audit=facts.audit,
        versions=dict(facts.versions),
        claim=_claim(facts, planned, figures, history) if planned and figures else None,
        scope=wording.scope(plan),
        not_covered=wording.not_covered(plan),
        trust=wording.trust(plan),
        assumptions=assumptions(
            plan,
            evidence(history, ledger, figures, facts.audit, lifetime, silo=facts.silo, models=models, version=VERSION),
        ),
        mechanism=mechanism(facts.contract, planned) if planned else None,
        accounting=figures,
        lifetime=lifetime,
    )
    return as_data(body)


def _ledger(facts: SiloFacts) -> LedgerPart:
    key = dict(facts.roster.members)[AGGREGATOR]
    opened = [open_receipt(wire, key) for wire in facts.receipts]
    for receipt in opened:
        if (receipt.silo, receipt.plan, receipt.roster) != (
            facts.silo,
            facts.contract.digest,
            facts.roster.digest,
        ):
            raise TrustError("a receipt is of another silo, plan or roster; give those of this run alone")
    return LedgerPart(
        entries=[LedgerEntry(entry=decode(item.entry), signature=item.signature.hex()) for item in facts.entries],
        uploaded=sorted({receipt.round for receipt in opened}),
        receipts=[wire.hex() for wire in facts.receipts],
    )


def _claim(facts: SiloFacts, planned: PlannedRun, figures: Accounting, history: History) -> Claim:
    one, unit = claimed(figures), planned.privacy.unit
    return Claim(
        sentence=wording.claim_sentence(facts.silo, facts.contract.plan.federation, unit, one, planned.delta),
        unit=unit,
        epsilon=one,
        delta=planned.delta,
        replace_one=max(one, epsilon(planned, planned.rounds, "replace_one")),
        groups=groups(planned, one),
        spent=history.spent(planned),
    )


def lifetime_of(
    planned: PlannedRun | None, history: History, limit: Limit | None, *, silo: str, version: int
) -> Lifetime | None:
    """What the silo's limit says of all runs of its ledger; None without a limit or without privacy."""
    if planned is None or limit is None:
        return None
    reserved = [entry.event for entry in history.chain.entries if isinstance(entry, Reserve)]
    left = planned.rounds - (len(history.run.reservations) if history.run else 0)
    if left > 0 and not history.ended:
        reserved.append(planned.after(left))
    charges = Charges.of(limit, planned, reserved)
    found = Lifetime(
        runs=len(history.chain.runs),
        limit=limit,
        order=charges.order,
        budget=charges.budget,
        this_run=charges.this_run,
        every_run=charges.every_run,
        sentence=wording.lifetime_sentence(planned.privacy.unit, limit.epsilon, limit.delta),
    )
    if bound_of(history.chain, silo, found, version) in CHANGED:
        changed = wording.changed_limit_sentence(limit.epsilon, limit.delta)
        return found.model_copy(update={"sentence": changed})
    return found


def mechanism(contract: Contract, planned: PlannedRun) -> Mechanism:
    """Every parameter that the claim depends on."""
    privacy: PrivacyPlan = planned.privacy
    method = contract.plan.method
    one_sum = method.name in wording.ONE_SUM
    return Mechanism(
        method=method.name,
        name=wording.MECHANISM_OF_ONE_SUM if one_sum else wording.MECHANISM,
        unit=privacy.unit,
        max_grad_norm=privacy.max_grad_norm,
        noise_multiplier=planned.per_round.noise_multiplier,
        sample_rate=privacy.sample_rate,
        steps_per_round=privacy.steps_per_round,
        releases=contract.lock.releases,
        rounds=contract.plan.training.rounds,
        max_retrains=privacy.max_retrains,
        update_divisor=privacy.update_divisor,
        loss=None if one_sum else method.loss,
        notes=wording.MECHANISM_NOTES,
    )


def evidence(
    history: History,
    ledger: LedgerPart | None,
    figures: Accounting | None,
    audit: Audit | None,
    lifetime: Lifetime | None,
    *,
    silo: str,
    models: Sequence[RoundModel],
    version: int,
) -> Evidence:
    """What the states of the assumptions follow from, in a report of `version`."""
    return Evidence(
        version=version,
        agree=figures.agree if figures else None,
        receipts=bool(ledger and ledger.receipts),
        self_tests=_tested(audit),
        ran=_ran(history.run),
        audited=_audited(audit, history.run),
        audit_time=_audit_time(audit, history.run, models),
        features=history.run.begin.features if history.run else None,
        bound=bound_of(history.chain, silo, lifetime, version),
        clock_was_wrong=any(isinstance(entry, Clock) for entry in history.chain.entries),
    )


def _tested(audit: Audit | None) -> Verdict:
    tests = audit.self_tests if audit else []
    if not all(test.passed for test in tests):
        return "failed"
    whole = FIRST_TESTS if audit is not None and audit.code is None else TESTS
    return "passed" if tuple(test.name for test in tests) == whole else None


def codes_of(run: Run | None) -> Sequence[str]:
    """Hashes of the code that trained, in the order in which the ledger names them; none where it does not."""
    return run.codes if run else ()


def first_charge(run: Run | None) -> int | None:
    """The hour of the first reservation, in seconds since 1970."""
    first = next(iter(run.reservations.values()), None) if run else None
    return None if first is None else first.at // HOUR * HOUR


def _ran(run: Run | None) -> Ran:
    if run is None:
        return "nothing"
    if run.begin.code is None:  # begun by version 0.1, whoever goes on with it
        return "unrecorded"
    return "one" if len(set(codes_of(run))) == 1 else "several"


def _audited(audit: Audit | None, run: Run | None) -> Audited | None:
    if audit is None or run is None:
        return None
    if audit.code is None or _ran(run) == "unrecorded":
        return "unknown"
    return "same" if set(codes_of(run)) == {audit.code} else "other"


def _audit_time(audit: Audit | None, run: Run | None, models: Sequence[RoundModel]) -> AuditTime | None:
    charged = first_charge(run)
    if audit is None or audit.at is None or run is None or charged is None:
        return None
    first = next(iter(run.reservations.values())).round
    if any(model.digest == audit.received and model.round >= first for model in models):
        return "after"  # a model that came out of the silo's first round, or of a later one, was there before
    if audit.at == charged:
        return "same hour"
    return "before" if audit.at < charged else "after"
