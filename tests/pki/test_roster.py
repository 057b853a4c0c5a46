from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclip_secure import canonical
from fedclip_secure.errors import FedClipError, TrustError
from fedclip_secure.pki.keys import SigningKey
from fedclip_secure.pki.roster import Roster


def key(seed: int) -> SigningKey:
    return SigningKey(Ed25519PrivateKey.from_private_bytes(seed.to_bytes(32, "big")))


KEYS = {name: key(i) for i, name in enumerate(["st-marys", "aggregator", "charite", "zuerich", "bern"])}
ROSTER = Roster.of({name: key.public_bytes for name, key in KEYS.items()})


def of(count: int) -> Roster:
    silos = {f"silo-{i:03d}": key(i).public_bytes for i in range(count)}
    return Roster.of({**silos, "aggregator": key(1000).public_bytes})


def test_members_stand_in_the_order_of_names() -> None:
    assert [name for name, _ in ROSTER.members] == ["aggregator", "bern", "charite", "st-marys", "zuerich"]
    assert ROSTER.silos == ("bern", "charite", "st-marys", "zuerich")


def test_evaluation_points_count_silos_alone() -> None:
    assert [ROSTER.index(name) for name in ROSTER.silos] == [1, 2, 3, 4]
    assert of(255).index("silo-254") == 255


@pytest.mark.parametrize("name", ["aggregator", "nobody"])
def test_who_is_no_silo_has_no_evaluation_point(name: str) -> None:
    with pytest.raises(TrustError, match="is not a silo of the pinned roster"):
        ROSTER.index(name)


def test_digest_is_the_formula_of_the_protocol() -> None:
    # RFC 8410 section 4: an Ed25519 SubjectPublicKeyInfo is this prefix and the raw key.
    prefix = bytes.fromhex("302a300506032b6570032100")
    pairs = [[name, hashlib.sha256(prefix + key).digest()] for name, key in ROSTER.members]
    assert ROSTER.digest == hashlib.sha256(canonical.encode(pairs)).digest()
    assert ROSTER.pin == f"sha256:{ROSTER.digest.hex()}"


def test_digest_changes_with_any_key_and_any_name() -> None:
    members = {name: key.public_bytes for name, key in KEYS.items()}
    other_key = Roster.of({**members, "bern": key(77).public_bytes})
    renamed = Roster.of({("basel" if name == "bern" else name): value for name, value in members.items()})
    assert len({ROSTER.digest, other_key.digest, renamed.digest}) == 3


def test_roster_survives_the_wire() -> None:
    assert Roster.decode(ROSTER.encode()) == ROSTER


def test_signature_by_the_pinned_key_is_accepted() -> None:
    ROSTER.verify("bern", KEYS["bern"].sign(b"data"), b"data")
    ROSTER.verify("aggregator", KEYS["aggregator"].sign(b"data"), b"data")


@pytest.mark.parametrize("signature", [KEYS["charite"].sign(b"data"), KEYS["bern"].sign(b"other"), b"", bytes(64)])
def test_signature_by_another_key_or_over_other_data_is_refused(signature: bytes) -> None:
    with pytest.raises(TrustError, match="not by the key that the pinned roster has for bern"):
        ROSTER.verify("bern", signature, b"data")


def test_signature_of_a_stranger_is_refused() -> None:
    with pytest.raises(TrustError, match="'basel' is not in the pinned roster"):
        ROSTER.verify("basel", KEYS["bern"].sign(b"data"), b"data")


def test_fingerprint_is_read_out_in_groups_of_four() -> None:
    groups = ROSTER.fingerprint("bern").split(" ")
    assert (len(groups), {len(group) for group in groups}) == (8, {4})
    assert "".join(groups) == ROSTER.spki_sha256("bern").hex()[:32]


@pytest.mark.parametrize(("silos", "said"), [(2, "needs 3; invite more"), (256, "255 is the most")])
def test_too_few_or_too_many_silos_are_refused(silos: int, said: str) -> None:
    with pytest.raises(TrustError, match=said):
        of(silos)


def test_three_and_255_silos_are_enough_and_not_too_many() -> None:
    assert (len(of(3).silos), len(of(255).silos)) == (3, 255)


def test_roster_without_aggregator_is_refused() -> None:
    with pytest.raises(TrustError, match="lacks the aggregator's own key"):
        Roster(ROSTER.members[1:])


def test_repeated_name_is_refused() -> None:
    with pytest.raises(TrustError, match="repeats a name"):
        Roster(tuple(sorted((*ROSTER.members, ("bern", key(99).public_bytes)))))


def test_repeated_key_is_refused_and_its_holders_named() -> None:
    members = {name: key.public_bytes for name, key in KEYS.items()}
    with pytest.raises(TrustError, match="gives bern and charite the same key"):
        Roster.of({**members, "bern": members["charite"]})


def test_unsorted_roster_is_refused() -> None:
    with pytest.raises(TrustError, match="not in the order of names"):
        Roster(ROSTER.members[::-1])


@pytest.mark.parametrize("name", ["Bern", "", "a" * 64, "bern\n", "bern/.."])
def test_impossible_name_is_refused(name: str) -> None:
    members = {name: key.public_bytes for name, key in KEYS.items()}
    with pytest.raises(TrustError, match="the roster holds the name"):
        Roster.of({**members, name: key(99).public_bytes})


def test_key_of_another_length_is_refused() -> None:
    with pytest.raises(TrustError, match="key of bern has 31 bytes"):
        Roster.of({**{name: key.public_bytes for name, key in KEYS.items()}, "bern": bytes(31)})


@pytest.mark.parametrize(
    "value", [None, {}, [], [["bern"]], [["bern", "text"]], [["bern", b"", 1]], [[1, b""]], "text"]
)
def test_other_shapes_are_no_roster(value: object) -> None:
    with pytest.raises(FedClipError, match="roster"):
        Roster.decode(canonical.encode(value))
