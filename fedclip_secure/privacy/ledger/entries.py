"""The entries of a ledger: typed, hashed, chained, signed, and the rules that a chain of them keeps.

Nothing in an entry depends on the data: a set of units goes by a random name. Bytes are lowercase hex digits.
A ledger that version 0.1 wrote (entries of version 1) is gone on with by entries of version 2, and never back.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BeforeValidator, Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from fedclip_secure.config.fields import LEAST_NOISE, MOST_NOISE, Name, Sha256, Strict
from fedclip_secure.errors import TrustError
from fedclip_secure.names import Normalisation
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.privacy.canonical_json import decode, encode

VERSION = 2  # of what is written; 1 is still read
HOUR = 3600  # seconds; ledgers and reports tell whole hours alone, so that no time a training took shows
FIRST = "0" * 64  # what the first entry has as the hash of the one before
_LABEL = b"fedclip/v1/ledger-entry\x00"


def _real(value: object) -> object:
    """JSON has one spelling for 1.0 and another for 1; a signed entry has one alone."""
    if not isinstance(value, float):
        raise ValueError("must have a decimal point")
    return value


Hex16 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Real = Annotated[float, BeforeValidator(_real)]
Counter = Annotated[int, Field(ge=1, le=2**53)]
Time = Annotated[int, Field(ge=0, le=2**53)]  # seconds since 1970
_SINCE_2 = {"code", "patients"}  # fields of a begin entry


class SetLimit(Strict):
    """What a silo had set as its limit over all runs."""

    epsilon: Annotated[Real, Field(gt=0)]
    delta: Annotated[Real, Field(gt=0, lt=1)]


class _Entry(Strict):
    """What every entry has."""

    version: Annotated[int, Field(ge=1, le=VERSION)]
    number: Counter
    previous: Sha256  # hash of the entry before
    at: Time
    silo: Name
    key: Sha256  # Ed25519 public key of the signer


class _NewerEntry(_Entry):
    """Of a kind that version 1 did not have."""

    version: Annotated[int, Field(ge=2, le=VERSION)]


class Begin(_Entry):
    """A run begins; what it may cost is fixed here."""

    kind: Literal["begin"]
    run: Hex16  # random
    federation: Name
    plan: Sha256  # the contract's digest
    roster: Sha256
    unit: Literal["record", "patient"]
    set: Hex16  # random name of the units that take part
    noise_multiplier: Annotated[Real, Field(ge=LEAST_NOISE, le=MOST_NOISE)]
    sample_rate: Annotated[Real, Field(gt=0, le=1)]
    steps_per_round: Counter
    releases: Counter  # of one step, each of a batch of its own
    rounds: Counter
    max_retrains: Annotated[int, Field(ge=0, le=2**53)]
    max_grad_norm: Annotated[Real, Field(gt=0)]
    update_divisor: Annotated[Real, Field(gt=0)]
    delta: Annotated[Real, Field(gt=0, lt=1)]
    features: Literal["computed here", "stated to be per record"]
    code: Sha256 | None = None  # of the program that is to train; from version 2 on, as `patients`
    patients: list[Normalisation] | None = None  # what was done to patients' ids; nothing where units are records
    limit: SetLimit | None = None  # that the silo held it to; None: to none; not given: that is not recorded

    @model_validator(mode="after")
    def _of_its_version(self) -> Begin:
        if self.model_fields_set & _SINCE_2 != (_SINCE_2 if self.version > 1 else set()):
            raise ValueError("code and patients go with version 2, and only with it")
        if self.version == 1 and self.limits:
            raise ValueError("limit goes with version 2, and only with it")
        if self.version > 1 and (self.code is None or self.patients is None):
            raise ValueError("code or patients is null")
        if self.normalised != [name for name in get_args(Normalisation) if name in self.normalised]:
            raise ValueError("patients are not in order, or twice")
        if self.unit == "record" and self.normalised:
            raise ValueError("patients are named where the unit is a record")
        return self

    @property
    def normalised(self) -> list[Normalisation]:
        """What was done to patients' ids; version 1 left them as they were."""
        return self.patients or []

    @property
    def limits(self) -> list[SetLimit | None]:
        """The limit, where it is recorded."""
        return [self.limit] if "limit" in self.model_fields_set else []

    @property
    def per_round(self) -> Event:
        """What one round releases."""
        return Event(self.noise_multiplier, self.sample_rate, self.steps_per_round * self.releases)


class Data(_Entry):
    """The run's data changed: from here on another set of units takes part."""

    kind: Literal["data"]
    run: Hex16
    set: Hex16


class Reserve(_Entry):
    """A round is about to be trained; it is paid for from here on, whatever becomes of it."""

    kind: Literal["reserve"]
    run: Hex16
    round: Counter
    retrain: Annotated[int, Field(ge=0, le=2**53)]  # how often the run has trained again, this time included
    mechanism: Literal["poisson_gaussian"]
    noise_multiplier: Annotated[Real, Field(ge=LEAST_NOISE, le=MOST_NOISE)]
    sample_rate: Annotated[Real, Field(gt=0, le=1)]
    steps: Counter
    set: Hex16

    @property
    def event(self) -> Event:
        """What it pays for."""
        return Event(self.noise_multiplier, self.sample_rate, self.steps, self.mechanism)


class Settle(_Entry):
    """The round was trained. Without it the reservation stays spent all the same."""

    kind: Literal["settle"]
    reservation: Sha256  # hash of the reserve entry


class Code(_NewerEntry):
    """From here on another program trains the run."""

    kind: Literal["code"]
    run: Hex16
    code: Sha256


class Limited(_NewerEntry):
    """From here on the silo holds the run to another limit, or to none."""

    kind: Literal["limit"]
    run: Hex16
    limit: SetLimit | None


class End(_NewerEntry):
    """Nothing is reserved in the run any more."""

    kind: Literal["end"]
    run: Hex16


class Clock(_NewerEntry):
    """The signer's word that the clock was ahead at the entries before; only this one may be older than they are."""

    kind: Literal["clock"]


Entry = Begin | Data | Reserve | Settle | Code | Limited | End | Clock
_PARSER: TypeAdapter[Entry] = TypeAdapter(Annotated[Entry, Field(discriminator="kind")])


@dataclass(frozen=True, slots=True)
class SignedEntry:
    """The canonical JSON of an entry, and the Ed25519 signature (64 bytes) by the key that it names."""

    entry: bytes
    signature: bytes

    @property
    def hash(self) -> bytes:
        """32 bytes; what the next entry, receipts and settlements call it by."""
        return hashlib.sha256(_LABEL + self.entry).digest()

    @classmethod
    def signed(cls, values: Mapping[str, Any], sign: Callable[[bytes], bytes]) -> SignedEntry:
        """Encode and sign; `sign` is Ed25519 (RFC 8032)."""
        entry = encode(dict(values))
        return cls(entry, sign(_LABEL + entry))

    def opened(self) -> Entry:
        """Check form and signature, by the entry's own key: whose key that is, the reader must know.

        Raises:
            TrustError: it is no entry of this version, or was edited.
        """
        entry = _parse(self.entry)
        try:
            _public(entry.key).verify(self.signature, _LABEL + self.entry)
        except (InvalidSignature, ValueError) as error:
            raise TrustError("the signature is not by the key that it names") from error
        return entry


def _parse(data: bytes) -> Entry:
    value = decode(data)
    version = value.get("version") if isinstance(value, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise TrustError(f"it is of version {version}, which a newer fedclip-silo writes; use that one")
    try:
        return _PARSER.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][1:]) or "the whole"
        fact = first["msg"].removeprefix("Value error, ")
        raise TrustError(f"it is no entry of a ledger ({key}: {fact})") from error


@functools.lru_cache(maxsize=256)
def _public(key: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))


@dataclass(slots=True)
class Run:
    """What a chain says of one run until now."""

    begin: Begin
    sets: list[str]  # the last is in use
    reservations: dict[str, Reserve] = field(default_factory=dict)  # by hash, in order
    settled: set[str] = field(default_factory=set)  # hashes of reservations
    rounds: set[int] = field(default_factory=set)  # that were ever reserved
    codes: list[str] = field(init=False)  # hashes of all programs that were to train it, in order; version 1 has none
    limits: list[SetLimit | None] = field(init=False)  # all that it was held to, in order, as far as entries name them
    ended: bool = False

    def __post_init__(self) -> None:
        self.codes = [self.begin.code] if self.begin.code else []
        self.limits = list(self.begin.limits)

    @property
    def trained(self) -> set[int]:
        """Rounds that were settled."""
        return {self.reservations[entry].round for entry in self.settled}

    @property
    def retrains(self) -> int:
        """How often a round was reserved that had been before."""
        return len(self.reservations) - len(self.rounds)

    @property
    def retrains_left(self) -> int:
        """How often a round may still be reserved again."""
        return self.begin.max_retrains - self.retrains

    def may_train(self, round_number: int) -> bool:
        """Whether its terms allow this round, for the first time or again."""
        known = 1 <= round_number <= self.begin.rounds and not self.ended
        return known and (round_number not in self.rounds or self.retrains_left > 0)

    @property
    def left(self) -> int:
        """How many reservations its terms still allow."""
        return 0 if self.ended else self.begin.rounds + self.begin.max_retrains - len(self.reservations)

    @property
    def held(self) -> int:
        """How many reservations are kept for it from other runs: none once every round of it was trained.

        It may then still train one again, if others leave room for that.
        """
        return 0 if len(self.trained) == self.begin.rounds else self.left


class Chain:
    """Entries whose every rule holds: numbers, hashes, times, signatures, and that a run keeps to its terms."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.signed: list[SignedEntry] = []
        self.runs: dict[str, Run] = {}  # by its random name, in the order they began
        self.numbers: dict[bytes, int] = {}  # of entries, by hash
        self._begun: dict[tuple[str, str, str], Run] = {}  # by silo, plan and roster
        self._reserved: dict[str, Run] = {}  # by hash of the reservation
        self._sets: set[str] = set()
        self._head = FIRST

    @property
    def head(self) -> bytes:
        """Hash of the newest entry; zeros before the first."""
        return bytes.fromhex(self._head)

    def found(self, silo: str, plan: str, roster: str) -> Run | None:
        """This silo's run of a plan with a roster."""
        return self._begun.get((silo, plan, roster))

    def check(self, signed: SignedEntry) -> Entry:
        """Whether this can be the next entry.

        Raises:
            TrustError: which entry it would be, and which rule it breaks.
        """
        try:
            entry = signed.opened()
            self._check_place(entry)
            self._check_run(entry)
        except TrustError as error:
            raise TrustError(f"entry {len(self.entries) + 1} of the ledger: {error}") from error
        return entry

    def take(self, signed: SignedEntry, entry: Entry) -> None:
        """Take the next entry, which `check` has returned."""
        digest = signed.hash
        self.entries.append(entry)
        self.signed.append(signed)
        self._head = digest.hex()
        self.numbers[digest] = entry.number
        if isinstance(entry, Begin):
            self._sets.add(entry.set)
            run = self.runs[entry.run] = Run(entry, [entry.set])
            self._begun[entry.silo, entry.plan, entry.roster] = run
        elif isinstance(entry, Settle):
            self._reserved[entry.reservation].settled.add(entry.reservation)
        elif not isinstance(entry, Clock):
            self._take_of_run(entry, self.runs[entry.run])

    def _take_of_run(self, entry: Data | Reserve | Code | Limited | End, run: Run) -> None:
        if isinstance(entry, Data):
            self._sets.add(entry.set)
            run.sets.append(entry.set)
        elif isinstance(entry, Reserve):
            run.reservations[self._head] = entry
            run.rounds.add(entry.round)
            self._reserved[self._head] = run
        elif isinstance(entry, Code):
            run.codes.append(entry.code)
        elif isinstance(entry, Limited):
            run.limits.append(entry.limit)
        else:
            run.ended = True

    def _check_place(self, entry: Entry) -> None:
        if entry.number != len(self.entries) + 1:
            raise TrustError(f"it says that it is number {entry.number}: entries are missing or in another order")
        if entry.previous != self._head:
            raise TrustError("it does not follow the entry before it: one of the two was edited or exchanged")
        before = self.entries[-1] if self.entries else entry
        if entry.version < before.version:
            raise TrustError("it is of an older version than the entry before it")
        if isinstance(entry, Clock) != (entry.at < before.at):
            fact = "not older" if isinstance(entry, Clock) else "older"
            raise TrustError(f"it is {fact} than the entry before it")

    def _check_run(self, entry: Entry) -> None:
        if isinstance(entry, Clock):
            return
        if isinstance(entry, Begin):
            self._check_begin(entry)
            return
        run = self._run_of(entry)
        if (entry.silo, entry.key) != (run.begin.silo, run.begin.key):
            raise TrustError("it is about a run that another silo or another key began")
        if isinstance(entry, Settle):
            if entry.reservation in run.settled:
                raise TrustError("it settles what was settled before")
            return
        if run.ended:
            raise TrustError("it is about a run that was ended before")
        if isinstance(entry, Reserve):
            _check_reserve(entry, run)
        elif isinstance(entry, Data):
            self._check_new_set(entry.set)
        elif isinstance(entry, Code) and [entry.code] == run.codes[-1:]:
            raise TrustError("it notes the program that its run has already")
        elif isinstance(entry, Limited) and [entry.limit] == run.limits[-1:]:
            raise TrustError("it notes the limit that its run has already")

    def _run_of(self, entry: Data | Reserve | Settle | Code | Limited | End) -> Run:
        run = self._reserved.get(entry.reservation) if isinstance(entry, Settle) else self.runs.get(entry.run)
        if run is None:
            raise TrustError("it is about a run or a reservation that is not here")
        return run

    def _check_begin(self, entry: Begin) -> None:
        if entry.run in self.runs or self.found(entry.silo, entry.plan, entry.roster) is not None:
            raise TrustError("it begins a run that was begun before")
        first = next(iter(self.runs.values()), None)
        if first is not None and first.begin.unit != entry.unit:
            raise TrustError(f"it charges each {entry.unit}, and the entries before it each {first.begin.unit}")
        if first is not None and first.begin.normalised != entry.normalised:
            raise TrustError("it normalises patients' ids in another way than the entries before it")
        self._check_new_set(entry.set)

    def _check_new_set(self, name: str) -> None:
        if name in self._sets:
            raise TrustError("it gives the name of a set of units to another one")


def _check_reserve(entry: Reserve, run: Run) -> None:
    begin = run.begin
    if entry.event != begin.per_round or entry.round > begin.rounds or entry.set != run.sets[-1]:
        raise TrustError("it reserves something else than its run began with")
    if entry.retrain != run.retrains + (entry.round in run.rounds):
        raise TrustError("it does not count how often its run has trained again")
    if entry.version > 1 and not run.codes:
        raise TrustError("it does not say which program trains")
    if entry.retrain > begin.max_retrains:
        raise TrustError(f"its run trains again more often than the {begin.max_retrains} times that it began with")


def chain_of(entries: Iterable[SignedEntry]) -> Chain:
    """The checked chain of a whole ledger, from the first entry on.

    Whether the keys are those of the silos, and whether newer entries were cut off, a chain cannot show.

    Raises:
        TrustError: which entry breaks which rule.
    """
    chain = Chain()
    for signed in entries:
        chain.take(signed, chain.check(signed))
    return chain
