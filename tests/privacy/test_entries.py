from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclip_secure.errors import TrustError
from fedclip_secure.pki.keys import SigningKey
from fedclip_secure.privacy.canonical_json import encode
from fedclip_secure.privacy.ledger.entries import (
    FIRST,
    Begin,
    Clock,
    Code,
    Data,
    End,
    Reserve,
    Settle,
    SignedEntry,
    chain_of,
)
from tests.privacy.books import TERMS

KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))
RUN, SET, SET_2 = "aa" * 16, "bb" * 16, "cc" * 16
EVENT = {"mechanism": "poisson_gaussian", "noise_multiplier": 20.0, "sample_rate": 1.0, "steps": 20}
BEGIN = {"kind": "begin", "run": RUN, "set": SET, **TERMS.fields()}
BEGIN_1 = {name: value for name, value in BEGIN.items() if name not in ("code", "patients")} | {"version": 1}
END, CLOCK, CODE = {"kind": "end", "run": RUN}, {"kind": "clock"}, {"kind": "code", "run": RUN, "code": "0d" * 32}
SECOND = {**BEGIN, "run": "dd" * 16, "set": "ee" * 16, "plan": "0" * 64}
OF_PATIENTS = {"unit": "patient", "patients": ["casefold", "strip_zeros"]}
Values = dict[str, Any]


def reserve(round_number: int, retrain: int = 0, **changed: Any) -> Values:
    return {"kind": "reserve", "run": RUN, "set": SET, "round": round_number, "retrain": retrain, **EVENT, **changed}


def chained(*entries: Values, key: SigningKey = KEY) -> list[SignedEntry]:
    """Entries after one another; a value given wins over the right one. A number as reservation is an entry's."""
    chain: list[SignedEntry] = []
    for number, values in enumerate(entries, 1):
        previous = chain[-1].hash.hex() if chain else FIRST
        common = {"version": 2, "number": number, "previous": previous, "at": 1000 + number, "silo": "lab-a"}
        entry = {**common, "key": key.public_bytes.hex(), **values}
        if isinstance(entry.get("reservation"), int):
            entry["reservation"] = chain[entry["reservation"] - 1].hash.hex()
        chain.append(SignedEntry.signed(entry, key.sign))
    return chain


WHOLE = (
    BEGIN, reserve(1), {"kind": "settle", "reservation": 2}, reserve(1, 1), reserve(2, 1),
    {"kind": "data", "run": RUN, "set": SET_2}, {"kind": "settle", "reservation": 5}, reserve(3, 1, set=SET_2),
)  # fmt: skip


def test_whole_chain_is_read_as_typed_entries() -> None:
    kinds = [type(entry) for entry in chain_of(chained(*WHOLE)).entries]
    assert kinds == [Begin, Reserve, Settle, Reserve, Reserve, Data, Settle, Reserve]
    assert chain_of([]).entries == []


def old(*entries: Values) -> list[Values]:
    """As version 0.1 wrote them."""
    return [BEGIN_1 if entry is BEGIN else {**entry, "version": 1} for entry in entries]


def test_ledger_of_version_1_is_read_and_gone_on_with_in_version_2() -> None:
    chain = chain_of(chained(*old(*WHOLE), CODE, {"kind": "settle", "reservation": 8}, END, SECOND))
    first, second = chain.runs.values()
    assert [entry.version for entry in chain.entries] == [1] * 8 + [2] * 4
    assert (first.codes, second.codes) == (["0d" * 32], ["0c" * 32])
    assert (first.begin.normalised, first.ended, first.left, second.ended) == ([], True, 0, False)
    assert chain_of(chained(*old(*WHOLE))).runs[RUN].codes == []


def test_programs_of_a_run_are_told_in_order() -> None:
    codes = chain_of(chained(BEGIN, reserve(1), CODE, reserve(2), {**CODE, "code": "0c" * 32})).runs[RUN].codes
    assert codes == ["0c" * 32, "0d" * 32, "0c" * 32]


def test_only_the_word_that_the_clock_was_wrong_may_be_older_than_what_was_before() -> None:
    entries = chain_of(chained({**BEGIN, "at": 9000}, {**CLOCK, "at": 1000}, reserve(1, at=1000), END)).entries
    assert [type(entry) for entry in entries] == [Begin, Clock, Reserve, End]


def test_run_holds_what_it_may_still_reserve_until_all_its_rounds_are_trained_or_it_is_ended() -> None:
    held = []
    for count in range(1, 8):
        entries = (BEGIN, reserve(1), reserve(1, 1), reserve(2, 1), reserve(3, 1), *(
            {"kind": "settle", "reservation": number} for number in (2, 4, 5)
        ))[: count + 1]  # fmt: skip
        held.append(chain_of(chained(*entries)).runs[RUN].held)
    assert held == [3, 2, 1, 0, 0, 0, 0]
    trained = (BEGIN, *(reserve(number) for number in (1, 2, 3)), *SETTLED)
    assert (chain_of(chained(*trained[:-1])).runs[RUN].held, chain_of(chained(*trained)).runs[RUN].held) == (1, 0)
    assert chain_of(chained(*trained)).runs[RUN].left == 1, "it may train a round again, if there is room"
    assert chain_of(chained(BEGIN, reserve(1), END)).runs[RUN].held == 0


SETTLED = tuple({"kind": "settle", "reservation": number} for number in (2, 3, 4))


def test_entries_of_kinds_that_version_1_did_not_have_are_typed() -> None:
    kinds = [type(entry) for entry in chain_of(chained(BEGIN, CODE, END, {**CLOCK, "at": 5})).entries]
    assert kinds == [Begin, Code, End, Clock]


def test_bytes_and_hash_and_signature_of_an_entry_are_pinned() -> None:
    (entry,) = chained({**BEGIN_1, "key": KEY.public_bytes.hex()})
    assert entry.entry.startswith(
        b'{"at":1001,"delta":1e-05,"features":"computed here","federation":"pets","key":"03a1'
    )
    assert entry.hash.hex() == "31ae4e3bfdfef19357c1b470d8b54f5621137247680ebbcfb8e835f44841fe8c"
    assert entry.signature.hex()[:32] == "596bca7d3bc09e0fa7385ee7a80b6e15"
    (entry,) = chained({**BEGIN, "key": KEY.public_bytes.hex()})
    assert entry.entry.startswith(b'{"at":1001,"code":"0c0c')
    assert entry.hash.hex() == "2a6b8404d01b3c1f21a65a4791322efdb4a0b37b73ed3097b975faf6c37d810f"


def test_any_one_byte_edit_of_any_entry_or_signature_is_found() -> None:
    chain = chained(*WHOLE)
    for number, signed in enumerate(chain):
        for at in range(0, len(signed.entry), 7):
            edited = bytearray(signed.entry)
            edited[at] ^= 1
            with pytest.raises(TrustError, match=rf"^entry {number + 1} of the ledger: "):
                chain_of([*chain[:number], SignedEntry(bytes(edited), signed.signature), *chain[number + 1 :]])
        wrong = bytes([signed.signature[0] ^ 1]) + signed.signature[1:]
        with pytest.raises(TrustError, match=rf"^entry {number + 1} of the ledger: the signature is not by the key"):
            chain_of([*chain[:number], SignedEntry(signed.entry, wrong), *chain[number + 1 :]])


@pytest.mark.parametrize("number", range(len(WHOLE) - 1))
def test_dropped_entry_is_found(number: int) -> None:
    chain = chained(*WHOLE)
    del chain[number]
    with pytest.raises(TrustError, match=rf"^entry {number + 1} of the ledger: .*missing or in another order"):
        chain_of(chain)


@pytest.mark.parametrize("number", range(len(WHOLE) - 1))
def test_exchanged_entries_are_found(number: int) -> None:
    chain = chained(*WHOLE)
    chain[number], chain[number + 1] = chain[number + 1], chain[number]
    with pytest.raises(TrustError, match=rf"^entry {number + 1} of the ledger: "):
        chain_of(chain)


@pytest.mark.parametrize("number", range(len(WHOLE) - 1))
def test_entry_signed_again_by_its_own_key_breaks_the_chain_after_it(number: int) -> None:
    chain = chained(*WHOLE)
    values = json.loads(chain[number].entry) | {"at": 1000 + number}
    chain[number] = SignedEntry.signed(values, KEY.sign)
    with pytest.raises(TrustError, match=r"^entry \d of the ledger: "):
        chain_of(chain)


def test_fork_is_found_where_it_is_joined() -> None:
    left, right = chained(*WHOLE), chained(BEGIN, reserve(2), *WHOLE[2:])
    with pytest.raises(TrustError, match=r"^entry 3 of the ledger: it does not follow"):
        chain_of([*left[:2], *right[2:]])


SETTLE = {"kind": "settle", "reservation": 2}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ((reserve(1),), "about a run or a reservation that is not here"),
        ((BEGIN, {"kind": "settle", "reservation": "0" * 64}), "about a run or a reservation that is not here"),
        ((BEGIN, {"kind": "settle", "reservation": 1}), "about a run or a reservation that is not here"),
        ((BEGIN, reserve(1), SETTLE, SETTLE), "settles what was settled before"),
        ((BEGIN, BEGIN), "begins a run that was begun before"),
        ((BEGIN, {**BEGIN, "run": "dd" * 16, "set": SET_2}), "begins a run that was begun before"),
        ((BEGIN, {**SECOND, "run": RUN}), "begins a run that was begun before"),
        ((BEGIN, {**SECOND, "unit": "patient"}), "charges each patient, and the entries before it each record"),
        (({**BEGIN, **OF_PATIENTS}, {**SECOND, "unit": "patient"}), "normalises patients' ids in another way"),
        (({**BEGIN_1, "unit": "patient"}, {**SECOND, **OF_PATIENTS}), "normalises patients' ids in another way"),
        ((BEGIN, {**BEGIN_1, "run": "dd" * 16, "set": SET_2, "plan": "0" * 64}), "of an older version than"),
        ((BEGIN, reserve(1, version=1)), "of an older version than the entry before it"),
        ((BEGIN_1, reserve(1)), "does not say which program trains"),
        ((BEGIN, {**CODE, "code": "0c" * 32}), "notes the program that its run has already"),
        ((BEGIN, CODE, CODE), "notes the program that its run has already"),
        ((BEGIN, {**CODE, "run": "dd" * 16}), "about a run or a reservation that is not here"),
        ((BEGIN, {**END, "run": "dd" * 16}), "about a run or a reservation that is not here"),
        ((BEGIN, {**END, "silo": "lab-b"}), "a run that another silo or another key began"),
        ((BEGIN, END, END), "about a run that was ended before"),
        ((BEGIN, END, CODE), "about a run that was ended before"),
        ((BEGIN, END, reserve(1)), "about a run that was ended before"),
        ((BEGIN, END, {"kind": "data", "run": RUN, "set": SET_2}), "about a run that was ended before"),
        ((BEGIN, END, BEGIN), "begins a run that was begun before"),
        ((CLOCK,), "it is not older than the entry before"),
        ((BEGIN, {**CLOCK, "at": 1001}), "it is not older than the entry before"),
        ((BEGIN, CLOCK), "it is not older than the entry before"),
        ((BEGIN, {**CLOCK, "at": 500}, reserve(1, at=499)), "it is older than the entry before"),
        ((BEGIN, {**SECOND, "set": SET}), "gives the name of a set of units to another"),
        ((BEGIN, {"kind": "data", "run": RUN, "set": SET}), "gives the name of a set of units to another"),
        ((BEGIN, reserve(1, silo="lab-b")), "a run that another silo or another key began"),
        ((BEGIN, reserve(1, noise_multiplier=20.01)), "something else than its run began with"),
        ((BEGIN, reserve(1, sample_rate=0.99)), "something else than its run began with"),
        ((BEGIN, reserve(1, steps=19)), "something else than its run began with"),
        ((BEGIN, reserve(1, set=SET_2)), "something else than its run began with"),
        ((BEGIN, reserve(4)), "something else than its run began with"),
        ((BEGIN, reserve(1, 1)), "does not count how often"),
        ((BEGIN, reserve(1), reserve(1)), "does not count how often"),
        ((BEGIN, reserve(1), reserve(1, 1), reserve(2)), "does not count how often"),
        ((BEGIN, reserve(1), reserve(1, 1), reserve(1, 2)), "more often than the 1 times"),
        ((BEGIN, reserve(1, at=1000)), "older than the entry before"),
        ((BEGIN, reserve(1, number=3)), "says that it is number 3"),
        ((BEGIN, reserve(1, previous=FIRST)), "does not follow the entry before"),
        (({**BEGIN, "previous": "1" * 64},), "does not follow the entry before"),
    ],
)  # fmt: skip
def test_entry_that_breaks_a_rule_is_refused_though_it_is_signed(entries: tuple[Values, ...], said: str) -> None:
    with pytest.raises(TrustError, match=rf"^entry {len(entries)} of the ledger: .*{said}"):
        chain_of(chained(*entries))


def test_run_that_another_key_began_cannot_be_gone_on_with() -> None:
    values = {"number": 2, "at": 1002, "silo": "lab-a", "version": 2, "key": OTHER.public_bytes.hex(), **reserve(1)}
    chain = chained(BEGIN)
    chain.append(SignedEntry.signed({**values, "previous": chain[0].hash.hex()}, OTHER.sign))
    with pytest.raises(TrustError, match=r"^entry 2 of the ledger: .*another key began"):
        chain_of(chain)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"version": 3}, "of version 3, which a newer fedclip-silo writes; use that one"),
        ({"version": True}, "version: "),
        ({"version": 1.0}, "version: "),
        ({"kind": "gift"}, "the whole: "),
        ({"extra": 1}, "extra: "),
        ({"plan": "P" * 64}, "plan: "),
        ({"run": "aa"}, "run: "),
        ({"silo": "aggregator"}, "silo: "),
        ({"silo": "a/b"}, "silo: "),
        ({"rounds": True}, "rounds: "),
        ({"rounds": 0}, "rounds: "),
        ({"rounds": 3.0}, "rounds: "),
        ({"max_retrains": -1}, "max_retrains: "),
        ({"noise_multiplier": 1}, "noise_multiplier: .*decimal point"),
        ({"noise_multiplier": 0.0}, "noise_multiplier: "),
        ({"sample_rate": 1.5}, "sample_rate: "),
        ({"delta": 1.0}, "delta: "),
        ({"delta": "1e-5"}, "delta: "),
        ({"features": "whatever"}, "features: "),
        ({"at": -1}, "at: "),
        ({"key": "ff" * 32}, "the signature is not by the key"),
        ({"key": None}, "key: "),
        ({"version": 1}, "code and patients go with version 2"),
        ({"limit": {"epsilon": 8, "delta": 1e-5}}, "limit.epsilon: must have a decimal point"),
        ({"code": None}, "code or patients is null"),
        ({"patients": None}, "code or patients is null"),
        ({"code": "0c"}, "code: "),
        ({"patients": ["lower"]}, "patients.0: "),
        ({"unit": "patient", "patients": ["strip_zeros", "casefold"]}, "not in order, or twice"),
        ({"unit": "patient", "patients": ["casefold", "casefold"]}, "not in order, or twice"),
        ({"patients": ["casefold"]}, "named where the unit is a record"),
    ],
)
def test_entry_of_another_form_is_refused_by_its_key(changed: Values, said: str) -> None:
    with pytest.raises(TrustError, match=rf"^entry 1 of the ledger: .*{said}"):
        chain_of(chained({**BEGIN, **changed}))


@pytest.mark.parametrize("data", [b"", b"[]", b"1", b"{}", b"null", b'{"version":[]}', b"\xff", b"[" * 100_000])
def test_bytes_that_are_no_entry_are_refused(data: bytes) -> None:
    with pytest.raises(TrustError, match=r"^entry 1 of the ledger: "):
        chain_of([SignedEntry(data, KEY.sign(data))])


def test_entry_that_is_not_canonical_is_refused_though_it_is_signed() -> None:
    values = json.loads(chained(BEGIN)[0].entry)
    spaced = json.dumps(values, sort_keys=True).encode()
    label = b"fedclip/v1/ledger-entry\x00"
    chain_of([SignedEntry(encode(values), KEY.sign(label + encode(values)))])
    with pytest.raises(TrustError, match="not canonical JSON"):
        chain_of([SignedEntry(spaced, KEY.sign(label + spaced))])
