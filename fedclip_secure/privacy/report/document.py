"""The privacy report as typed data: what it may hold, and nothing else. Its JSON Schema is docs/report.schema.json.

A report is `{"body": ..., "signature": ...}` in canonical JSON. A body holds facts (what was agreed, what the
ledger says, what the coordinator signed) and what follows from them (the claim, its figures and its wording), which
whoever reads the report can work out again. No field depends on the training data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import FailFast, Field, StringConstraints, TypeAdapter, model_validator

from fedclip_secure.config.fields import LATER, Name, Number, Sha256, Strict, Text
from fedclip_secure.config.lock import Contract, FederationLock
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.errors import TrustError
from fedclip_secure.names import MAX_SILOS, NAME_PATTERN
from fedclip_secure.pki.roster import Roster
from fedclip_secure.privacy.canonical_json import encode
from fedclip_secure.privacy.ledger.entries import HOUR

_LABEL = b"fedclip/v1/privacy-report\x00"
FORMAT = "fedclip-privacy-report"
VERSION: Literal[2] = 2  # of what is written; version 1 is read

Words = Annotated[str, Field(max_length=2000)]
# What is stated freely. Latin-1 has no sign that could turn, hide or overprint the text around it but the soft hyphen.
Plain = Annotated[str, StringConstraints(pattern=r"^[ -~\u00a1-\u00ac\u00ae-\u00ff]{1,500}$")]
Hex64 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
Wire = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2}){1,1000}$")]  # bytes in hexadecimal digits
Count = Annotated[int, Field(ge=0, le=2**53)]
Epsilon = Annotated[Number, Field(ge=0, le=1e6)]
Probability = Annotated[Number, Field(ge=0, le=1)]
Hour = Annotated[int, Field(ge=0, le=2**53, multiple_of=HOUR)]  # seconds since 1970
State = Literal["shown", "said", "stated", "open", "tested"]  # the last in version 1 alone, for what is now `said`
TESTS = (  # of a whole audit, in its order
    "sensitivity",
    "records_apart",
    "noise_deviation",
    "noise_shape",
    "noise_across_steps",
    "noise_across_coordinates",
    "noise_across_runs",
    "batch_sizes",
    "participation",
    "membership_independence",
    "membership_across_runs",
    "trainer_keys",
    "trainer",
    "trainer_noise",
    "trainer_noise_across_steps",
    "canary_scores",
    "one_run_attack",
)
# Of a whole audit of version 0.1, whose audits name neither hour nor code.
FIRST_TESTS = tuple(name for name in TESTS if name != "records_apart" and not name.startswith("trainer_"))
TestName = Annotated[str, StringConstraints(pattern=rf"^({'|'.join(TESTS)})$")]


class Agreement(Strict):
    """What was agreed before anything was trained; `digest` is what a silo pins."""

    digest: Sha256
    plan: FederationPlan
    lock: FederationLock

    @classmethod
    def of(cls, contract: Contract) -> Agreement:
        """The contract with its digest."""
        return cls(digest=contract.digest.hex(), plan=contract.plan, lock=contract.lock)

    @property
    def contract(self) -> Contract:
        """Plan and lock, whatever `digest` says."""
        return Contract(self.plan, self.lock)


class Member(Strict):
    """A name of the roster and its Ed25519 public key."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    key: Sha256  # 32 bytes as digits


class Members(Strict):
    """The roster; `digest` is what a silo pins."""

    digest: Sha256
    members: Annotated[list[Member], FailFast()] = Field(max_length=MAX_SILOS + 1)

    @classmethod
    def of(cls, roster: Roster) -> Members:
        """The roster with its digest."""
        return cls(
            digest=roster.digest.hex(), members=[Member(name=name, key=key.hex()) for name, key in roster.members]
        )

    @property
    def roster(self) -> Roster:
        """The roster itself, whatever `digest` says.

        Raises:
            TrustError: an impossible one.
        """
        return Roster(tuple((member.name, bytes.fromhex(member.key)) for member in self.members))


class Limit(Strict):
    """The silo's own limit over all plans and years."""

    epsilon: Annotated[Number, Field(gt=0)]
    delta: Annotated[Number, Field(gt=0, lt=1)]


class LedgerEntry(Strict):
    """One entry of the ledger and the Ed25519 signature over it, by the key that it names."""

    entry: dict[str, Any]
    signature: Hex64


class LedgerPart(Strict):
    """The ledger from its first entry on, and the coordinator's receipts for this run's uploads."""

    entries: Annotated[list[LedgerEntry], FailFast()] = Field(max_length=1_000_000)
    uploaded: Annotated[list[Annotated[int, Field(ge=1)]], FailFast()]  # rounds, rising
    receipts: Annotated[list[Wire], FailFast()]


class Estimate(Strict):
    """Epsilon of the whole plan by another accountant, which a reader of the report cannot run without its library."""

    library: Plain
    epsilon: Epsilon


class SelfTest(Strict):
    """One test of the mechanism on synthetic records, through the code that trains."""

    name: TestName
    passed: bool
    shows: Plain


class Rates(Strict):
    """One threshold of an attack: shares of absent and of present units that it calls present."""

    false_positives: Probability
    true_positives: Probability


class Attack(Strict):
    """A measured attack on synthetic records: a lower bound of epsilon, with little power."""

    canaries: Count
    guesses: Count
    right: Count
    confidence: Probability
    epsilon_at_least: Epsilon
    curve: Annotated[list[Rates], FailFast()] = Field(max_length=200)

    @model_validator(mode="after")
    def _possible(self) -> Attack:
        if not self.right <= self.guesses <= self.canaries:
            raise ValueError("an attack cannot have more right guesses than guesses, or more of these than canaries")
        return self


class Audit(Strict):
    """What the silo says that it tested on its own machine. It depends on no real record."""

    at: Annotated[Hour | None, LATER] = None  # when the tests ended; None in version 1
    code: Annotated[Sha256 | None, LATER] = None  # of what was tested, as `software.code_sha256`; None in version 1
    received: Annotated[Sha256 | None, LATER] = None  # the model that the silo had received last by then; None: none
    self_tests: Annotated[list[SelfTest], FailFast()] = Field(max_length=100)
    attack: Attack | None


class RoundModel(Strict):
    """The digest of the model that a round ended with."""

    round: Annotated[int, Field(ge=1)]
    digest: Sha256


class Group(Strict):
    """Epsilon for persons with several units."""

    units: Annotated[int, Field(ge=1)]
    epsilon: Epsilon | None  # None: so much that no number expresses it


class Spent(Strict):
    """What the ledger has reserved for this run until now, whether or not the round came to an end."""

    reservations: Count
    trained: Annotated[list[Annotated[int, Field(ge=1)]], FailFast()]  # rounds that were settled, rising
    retrains: Count
    epsilon: Epsilon
    replace_one: Epsilon


class Claim(Strict):
    """What is promised of everything that the silo's training data put into its uploads of this run."""

    sentence: Words
    unit: Literal["record", "patient"]
    epsilon: Epsilon  # add/remove one unit; all rounds and retrains of the plan
    delta: Probability
    replace_one: Epsilon
    groups: Annotated[list[Group], FailFast()]
    spent: Spent


class Scope(Strict):
    """One thing that leaves the silo."""

    id: Name
    what: Words
    status: Literal["accounted", "public", "unprotected"]
    because: Words


class Accounting(Strict):
    """How the claim's figures came about."""

    library: Plain
    pld: Epsilon
    rdp: Epsilon
    prv: Estimate | None
    agree: bool | None  # whether PLD and PRV differ by at most max(0.02, 0.5 %); None: there is no PRV


class Mechanism(Strict):
    """What is done to the data, with every parameter that the claim depends on."""

    method: Text
    name: Words
    unit: Literal["record", "patient"]
    max_grad_norm: Number
    noise_multiplier: Number
    sample_rate: Probability
    steps_per_round: Count
    releases: Count
    rounds: Count
    max_retrains: Count
    update_divisor: Number
    loss: Text | None  # None: the method has none
    notes: Annotated[list[Words], FailFast()]


class Lifetime(Strict):
    """All runs of the ledger together, as the limit counts them: RDP at one order fixed in advance."""

    runs: Count  # of this ledger, this one included
    limit: Limit
    order: Annotated[int, Field(ge=2)]
    budget: Number
    this_run: Number  # RDP of the whole plan
    every_run: Number  # RDP of a unit in every reservation of the ledger and in the rest of this run
    sentence: Words


class Note(Strict):
    """A question and its answer, or a thing that is not covered and why."""

    id: Name
    text: Words
    because: Words


class Assumption(Strict):
    """What the claim rests on, and how far that is known.

    `shown`: by this file. `said`: by tests, says the silo. `stated`: by somebody's word. `open`: not at all.
    """

    id: Name
    text: Words
    state: State
    because: Words


class SiloBody(Strict):
    """The report of one silo over one run."""

    format: Literal["fedclip-privacy-report"] = "fedclip-privacy-report"
    version: Literal[1, 2] = VERSION
    kind: Literal["silo"] = "silo"
    at: Annotated[int, Field(ge=0, le=2**53)]  # seconds since 1970, by the silo's clock
    federation: Name
    silo: Name
    contract: Agreement
    roster: Members
    units_at_least: Annotated[int, Field(ge=1, le=2**53)] | None
    limit: Limit | None
    ledger: LedgerPart | None
    models: Annotated[list[RoundModel], FailFast()]
    audit: Audit | None
    versions: dict[Plain, Plain] = Field(max_length=100)  # of the software that wrote this, not of what trained
    claim: Claim | None
    scope: Annotated[list[Scope], FailFast()]
    not_covered: Annotated[list[Note], FailFast()]
    trust: Annotated[list[Note], FailFast()]
    assumptions: Annotated[list[Assumption], FailFast()]
    mechanism: Mechanism | None
    accounting: Accounting | None
    lifetime: Lifetime | None


class Signature(Strict):
    """Ed25519 (RFC 8032) over a constant label and the canonical JSON of the body."""

    silo: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]  # or `aggregator`
    key: Sha256
    value: Hex64


class SiloReport(Strict):
    """A silo's body and its signature."""

    body: SiloBody
    signature: Signature


class SiloSummary(Strict):
    """One silo of the roster: what its report says, or that there is none."""

    silo: Name
    reported: bool
    trained: Annotated[list[Annotated[int, Field(ge=1)]], FailFast()]
    retrains: Count
    epsilon: Epsilon | None  # spent until now, add/remove
    replace_one: Epsilon | None


class Together(Strict):
    """The claim over silos, for the plan's full length in each silo of the roster."""

    sentence: Words
    delta: Probability
    worst_silo: Epsilon  # for persons who are at one silo alone
    all_silos: Epsilon | None  # for persons who may be at every silo; None: as in Group


class FederationBody(Strict):
    """The coordinator's report: the silos' reports whole, so that one file can be checked alone."""

    format: Literal["fedclip-privacy-report"] = "fedclip-privacy-report"
    version: Literal[1, 2] = VERSION
    kind: Literal["federation"] = "federation"
    at: Annotated[int, Field(ge=0, le=2**53)]
    federation: Name
    contract: Agreement
    roster: Members
    planned_rounds: Annotated[int, Field(ge=1)]
    models: Annotated[list[RoundModel], FailFast()]  # of the rounds that ended
    receipts: Annotated[list[Wire], FailFast()]  # those that the coordinator holds
    versions: dict[Plain, Plain] = Field(max_length=100)
    claim: Together | None
    silos: Annotated[list[SiloSummary], FailFast()] = Field(max_length=MAX_SILOS)
    not_covered: Annotated[list[Note], FailFast()]
    reports: Annotated[list[SiloReport], FailFast()] = Field(max_length=MAX_SILOS)


class FederationReport(Strict):
    """The coordinator's body and its signature."""

    body: FederationBody
    signature: Signature


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of both kinds of report."""
    either: TypeAdapter[SiloReport | FederationReport] = TypeAdapter(SiloReport | FederationReport)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:fedclip-secure:privacy-report:2",
        "title": "Privacy report of fedclip-secure, versions 1 and 2",
        **either.json_schema(mode="serialization"),
    }


def as_data(model: Strict) -> dict[str, Any]:
    """Plain JSON data; equal models give equal bytes."""
    return model.model_dump(mode="json")


def sign_report(body: dict[str, Any], signer: str, sign: Callable[[bytes], bytes], public: bytes) -> bytes:
    """The report's bytes: canonical JSON of `body` and the Ed25519 signature of `signer`, a name of the roster.

    `sign` and `public` (32 bytes) are of the key that the roster has for that name.
    """
    signature = Signature(silo=signer, key=public.hex(), value=sign(_LABEL + encode(body)).hex())
    return encode({"body": body, "signature": as_data(signature)})


def check_signature(body: Any, signature: Signature, key: bytes) -> None:
    """Check that `key` (32 bytes) signed `body`.

    Raises:
        TrustError: another key, or an edited body.
    """
    if bytes.fromhex(signature.key) != key:
        raise TrustError(f"the report names another key than the one that the roster has for {signature.silo}")
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(bytes.fromhex(signature.value), _LABEL + encode(body))
    except (InvalidSignature, ValueError) as error:
        raise TrustError(f"the signature is not by {signature.silo}: the report was edited since") from error
