"""The checks of one silo's report. `verify.py` says what they prove together, and what they cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from fedclip_secure.config.lock import Contract
from fedclip_secure.errors import TrustError
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.roster import Roster
from fedclip_secure.privacy.accounting.empirical_epsilon import CONFIDENCE, MOST_CANARIES, epsilon_at_least
from fedclip_secure.privacy.accounting.plan_cost import PlannedRun
from fedclip_secure.privacy.canonical_json import encode
from fedclip_secure.privacy.ledger.entries import Begin, SignedEntry
from fedclip_secure.privacy.ledger.receipts import Receipt, open_receipt
from fedclip_secure.privacy.report import wording
from fedclip_secure.privacy.report.assumptions import assumptions
from fedclip_secure.privacy.report.document import (
    Accounting,
    Audit,
    Claim,
    FederationReport,
    SiloBody,
    SiloReport,
    as_data,
    check_signature,
)
from fedclip_secure.privacy.report.figures import accounting, claimed, epsilon, groups, tolerance
from fedclip_secure.privacy.report.silo_report import History, evidence, lifetime_of, mechanism
from fedclip_secure.privacy.verification.verdict import Checks, StoppedError, expect

SLACK = 0.00015  # of epsilons, which are rounded up to 4 decimals: two machines may differ by one digit


@dataclass(frozen=True, slots=True)
class Expected:
    """What the reader knows from elsewhere."""

    plan_pin: str | None = None  # as `fedclip-silo accept` shows it
    roster_pin: str | None = None
    receipts: Sequence[bytes] = ()  # that the coordinator holds for uploads of this silo
    pins_of: str = "it is the one that was given to compare with"  # where they are known from


@dataclass(frozen=True, slots=True)
class Agreed:
    """Contract and roster of a report, whose digests are right."""

    contract: Contract
    roster: Roster


def check_silo(checks: Checks, report: SiloReport, expected: Expected) -> None:
    """Run every check on a report whose form is right."""
    body = report.body
    with suppress(StoppedError):
        agreed = check_agreed(checks, report, expected)
        history = checks.need(
            "ledger",
            lambda: _history(body, agreed),
            "the ledger is one unbroken chain, each entry signed by the key that it names",
        )
        checks.run("run", lambda: _check_run(body, history, agreed), "the entries of this run keep to the plan")
        checks.run("receipts", lambda: _check_receipts(body, history, agreed, expected), _receipts_show(body))
        checks.run("audit", lambda: _check_audit_form(body), _audit_shows(body))
        planned = checks.need(
            "mechanism", lambda: _mechanism(body, agreed), "the mechanism is known, with the plan's parameters"
        )
        checks.run("arithmetic", lambda: _check_figures(body, planned, history), _arithmetic_shows(planned))
        checks.run("wording", lambda: _check_wording(body, history), "the texts are those that plan and facts give")


def check_agreed(checks: Checks, report: SiloReport | FederationReport, expected: Expected) -> Agreed:
    """Contract, roster, the signature by a key of that roster, and the reader's pins.

    Raises:
        StoppedError: contract or roster are not what their digests say, or it is not signed by such a key.
    """
    body, signature = report.body, report.signature
    signer = body.silo if isinstance(body, SiloBody) else AGGREGATOR
    contract = checks.need(
        "contract", lambda: _contract(report), "the fingerprint of the plan is that of the plan and lock in here"
    )
    roster = checks.need("roster", lambda: _roster(report), "the fingerprint of the roster is that of the keys in here")

    def signed() -> None:
        expect(signature.silo == signer, f"it is signed in the name of {signature.silo}, not of {signer}")
        expect(signer == AGGREGATOR or signer in roster.silos, f"{signer} is no silo of the roster")
        check_signature(as_data(body), signature, dict(roster.members)[signer])

    checks.need("signature", signed, f"the key that the roster has for {signer} signed exactly this")
    _check_pins(checks, Agreed(contract, roster), expected)
    return Agreed(contract, roster)


def _check_pins(checks: Checks, agreed: Agreed, expected: Expected) -> None:
    _check_pin(checks, "plan pin", expected.plan_pin, agreed.contract.pin, expected.pins_of)
    _check_pin(checks, "roster pin", expected.roster_pin, agreed.roster.pin, expected.pins_of)


def _check_pin(checks: Checks, name: str, wanted: str | None, found: str, shows: str) -> None:
    fact = f"the report is about {found}, not about {wanted}"
    if wanted is not None:
        checks.run(name, lambda: expect(wanted == found, fact), shows)


def _contract(report: SiloReport | FederationReport) -> Contract:
    given = report.body.contract
    contract = given.contract
    expect(given.digest == contract.digest.hex(), "the plan or the lock is another than the fingerprint says")
    expect(contract.lock.plan == contract.plan.digest.hex(), "the lock belongs to another plan")
    expect(report.body.federation == contract.plan.federation, "the plan is of another federation")
    return contract


def _roster(report: SiloReport | FederationReport) -> Roster:
    roster = report.body.roster.roster
    expect(report.body.roster.digest == roster.digest.hex(), "the keys are others than the fingerprint says")
    return roster


def _history(body: SiloBody, agreed: Agreed) -> History:
    given = body.ledger.entries if body.ledger else []
    entries = [SignedEntry(encode(item.entry), bytes.fromhex(item.signature)) for item in given]
    history = History.of(entries, agreed.contract, agreed.roster, body.silo)
    newest = max((entry.version for entry in history.chain.entries), default=1)
    expect(body.version >= newest, f"a report of version {body.version} cannot hold entries of version {newest}")
    return history


def _check_audit_form(body: SiloBody) -> None:
    if body.audit is None:
        return
    dated = any(value is not None for value in (body.audit.at, body.audit.code, body.audit.received))
    expect(body.version > 1 or not dated, "reports of version 1 do not say when it was done, and on what code")
    expect((body.audit.at or 0) <= body.at, "it is younger than the report")


def _audit_shows(body: SiloBody) -> str:
    if body.audit is None:
        return "there is none: no test of the mechanism is spoken of"
    if body.audit.at is None:
        return "it does not say when it was done; that its tests were run, and what came of them, is the silo's word"
    return "it is not younger than the report; that its tests were run, and what came of them, is the silo's word"


def _check_run(body: SiloBody, history: History, agreed: Agreed) -> None:
    plan, lock = agreed.contract.plan, agreed.contract.lock
    expect((body.ledger is None) == (plan.privacy is None), "a ledger goes with a plan that has privacy, and only then")
    expect(
        not history.chain.entries or history.chain.entries[-1].at <= body.at, "the ledger is younger than the report"
    )
    numbers = [model.round for model in body.models]
    expect(numbers == sorted(set(numbers)), "the rounds of the models are not in order")
    expect(not numbers or numbers[-1] <= plan.training.rounds, "a model is of a round that the plan does not have")
    if history.run is None or plan.privacy is None:
        return
    begin, privacy = history.run.begin, plan.privacy
    expect(begin.key == dict(agreed.roster.members)[body.silo].hex(), "the run was begun with another key")
    wanted = {
        "federation": plan.federation,
        "unit": privacy.unit,
        "noise_multiplier": lock.noise_multiplier,
        "sample_rate": privacy.sample_rate,
        "steps_per_round": privacy.steps_per_round,
        "releases": lock.releases,
        "rounds": plan.training.rounds,
        "max_retrains": privacy.max_retrains,
        "max_grad_norm": privacy.max_grad_norm,
        "update_divisor": privacy.update_divisor,
        "delta": privacy.delta,
    }
    _check_terms(begin, wanted)


def _check_terms(begin: Begin, wanted: Mapping[str, object]) -> None:
    for name, value in wanted.items():
        found = getattr(begin, name)
        expect(found == value, f"the ledger began this run with {name} {found}, the plan has {value}")


def _check_receipts(body: SiloBody, history: History, agreed: Agreed, expected: Expected) -> None:
    key = dict(agreed.roster.members)[AGGREGATOR]
    ledger = body.ledger
    opened = [open_receipt(bytes.fromhex(wire), key) for wire in (ledger.receipts if ledger else [])]
    for receipt in [*opened, *(open_receipt(wire, key) for wire in expected.receipts)]:
        _check_receipt(receipt, body, history, agreed)
    attempts = [receipt.attempt for receipt in opened]
    expect(attempts == sorted(set(attempts)), "the receipts are not in the order of attempts")
    places = [(receipt.round, history.chain.numbers[receipt.head]) for receipt in opened]
    expect(places == sorted(places), "a later round has an older state of the ledger")
    uploaded = ledger.uploaded if ledger else []
    with_receipt = sorted({receipt.round for receipt in opened})
    expect(uploaded == with_receipt, f"rounds {uploaded} are said to be uploaded, but receipts are of {with_receipt}")


def _check_receipt(receipt: Receipt, body: SiloBody, history: History, agreed: Agreed) -> None:
    name = f"the receipt of round {receipt.round}"
    expect(receipt.silo == body.silo, f"{name} is of {receipt.silo}")
    expect(receipt.plan == agreed.contract.digest, f"{name} is of another plan")
    expect(receipt.roster == agreed.roster.digest, f"{name} is of another roster")
    place = history.chain.numbers.get(receipt.head)
    if place is None:
        raise TrustError(f"{name} is for a state that this ledger never had: it was rewritten or shortened")
    settled = history.settled_at(receipt.round)
    expect(settled is not None and settled <= place, f"{name} is for a state before that round was trained")


def _receipts_show(body: SiloBody) -> str:
    count = len(body.ledger.receipts) if body.ledger else 0
    if count == 0:
        return "there are none: whoever holds the silo's key could have written the ledger anew"
    return f"the coordinator signed for {count} upload(s), and each state of the ledger is in this chain"


def _mechanism(body: SiloBody, agreed: Agreed) -> PlannedRun | None:
    planned = PlannedRun.of(agreed.contract)
    wanted = mechanism(agreed.contract, planned) if planned else None
    expect(body.mechanism == wanted, "the mechanism is described with other parameters than the plan has")
    return planned


def _arithmetic_shows(planned: PlannedRun | None) -> str:
    if planned is None:
        return "the plan has no differential privacy, and the report claims none"
    return "no figure of the claim is lower than what a new computation gives (PLD)"


def _check_figures(body: SiloBody, planned: PlannedRun | None, history: History) -> None:
    if planned is None:
        expect(
            (body.claim, body.accounting, body.lifetime) == (None, None, None),
            "figures are claimed for a plan without privacy",
        )
        return
    claim, given = body.claim, body.accounting
    if claim is None or given is None:
        raise TrustError("a plan with privacy, and no claim or no accounting of it")
    _check_accounting(given, accounting(planned, given.prv))
    expect((claim.unit, claim.delta) == (planned.privacy.unit, planned.delta), "unit or δ are not the plan's")
    expect(claim.epsilon >= claimed(given), "the claim is lower than its own accounting")
    at_least(claim.replace_one, epsilon(planned, planned.rounds, "replace_one"), "ε for replace-one")
    wanted = groups(planned, claim.epsilon)
    expect([group.units for group in claim.groups] == [group.units for group in wanted], "groups are left out")
    expect(claim.groups[0].epsilon == claim.epsilon, "ε for 1 unit is another than that of the claim")
    for group, least in zip(claim.groups, wanted, strict=True):
        at_least(group.epsilon, least.epsilon, f"ε for {group.units} units")
    _check_audit(body.audit, claim, body.version)
    _check_spent(claim, planned, history)
    _check_lifetime(body, planned, history)


def _check_accounting(given: Accounting, new: Accounting) -> None:
    at_least(given.pld, new.pld, "ε by PLD")
    at_least(given.rdp, new.rdp, "ε by RDP")
    at_least(given.rdp, given.pld, "ε by RDP, which is above PLD,")
    agree = None if given.prv is None else abs(given.pld - given.prv.epsilon) <= tolerance(given.pld)
    expect(given.agree is agree, "whether the two accountants agree is said wrongly")


def _check_audit(audit: Audit | None, claim: Claim, version: int) -> None:
    if audit is None or audit.attack is None:
        return
    attack, proven = audit.attack, audit.attack.epsilon_at_least
    if version > 1:
        expect(attack.canaries <= MOST_CANARIES, f"an attack has {attack.canaries} canaries, more than any audit")
        expect(attack.confidence == CONFIDENCE, "what an attack proves is said with another confidence than 0.95")
        least = epsilon_at_least(attack.right, attack.guesses, attack.canaries, claim.delta, 1 - CONFIDENCE)
        fact = f"the attack's guesses prove an ε of at least {least:.4f}, and {proven:.4f} is given"
        expect(abs(proven - least) <= SLACK, fact)
    # A test that failed is shown as an open assumption.
    expect(
        proven <= claim.epsilon or not all(test.passed for test in audit.self_tests),
        f"an attack is said to prove an ε of at least {proven:.4f}, above the claim of {claim.epsilon:.4f}, while no "
        "test failed",
    )


def _check_spent(claim: Claim, planned: PlannedRun, history: History) -> None:
    spent, wanted = claim.spent, history.spent(planned)
    expect(
        (spent.reservations, spent.trained, spent.retrains) == (wanted.reservations, wanted.trained, wanted.retrains),
        "what was spent is not what the ledger says",
    )
    at_least(spent.epsilon, wanted.epsilon, "ε spent until now")
    at_least(spent.replace_one, wanted.replace_one, "ε spent until now for replace-one")


def _check_lifetime(body: SiloBody, planned: PlannedRun, history: History) -> None:
    given = body.lifetime
    new = lifetime_of(planned, history, body.limit, silo=body.silo, version=body.version)
    if given is None or new is None:
        expect(given is new, "a limit and what is said of it go together")
        return
    expect((given.runs, given.limit, given.sentence) == (new.runs, new.limit, new.sentence), "the lifetime is another")
    pairs = ((given.order, new.order), (given.budget, new.budget), (given.this_run, new.this_run))
    near = all(abs(one - other) <= 1e-6 * other for one, other in (*pairs, (given.every_run, new.every_run)))
    expect(near, "the figures of the limit are not those of this ledger")
    fits = given.this_run <= given.budget * (1 + 1e-9)
    expect(fits or body.version > 1, "the whole run does not fit the limit, and a report of version 1 cannot say so")


def at_least(given: float | None, least: float | None, what: str) -> None:
    """Refuse a figure that is lower than a new computation; None is above all numbers.

    Raises:
        TrustError: both figures.
    """
    if given is None:
        return
    if least is None:
        raise TrustError(f"{what} is given as {given:.4f}, but no number expresses it")
    expect(given >= least - SLACK, f"{what} is given as {given:.4f}, but is {least:.4f}")


def _check_wording(body: SiloBody, history: History) -> None:
    plan, claim = body.contract.plan, body.claim
    if claim is not None:
        sentence = wording.claim_sentence(body.silo, body.federation, claim.unit, claim.epsilon, claim.delta)
        expect(claim.sentence == sentence, "the sentence says something else than the claim")
    expect(body.scope == wording.scope(plan), "what leaves the silo is described in another way than the plan gives")
    expect(body.not_covered == wording.not_covered(plan), "what is not covered is not what the plan gives")
    expect(body.trust == wording.trust(plan), "who can see what is not what the plan gives")
    found = evidence(
        history,
        body.ledger,
        body.accounting,
        body.audit,
        body.lifetime,
        silo=body.silo,
        models=body.models,
        version=body.version,
    )
    expect(body.assumptions == assumptions(plan, found), "the assumptions, or their states, are not what follows")
