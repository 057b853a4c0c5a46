from __future__ import annotations

import hashlib
import hmac
import os

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedclip_secure import canonical
from fedclip_secure.secagg.keys import (
    AttemptSecrets,
    Peer,
    SeedKeys,
    salt_info,
    self_commitment,
    self_key,
    share_commitment,
    share_info,
    unmask_info,
    upload_info,
)

BASE, T2 = os.urandom(32), os.urandom(32)


def hkdf(secret: bytes, salt: bytes, length: int, *info: object) -> bytes:
    """RFC 5869 by its two steps."""
    key, okm, block = hmac.digest(salt, secret, "sha256"), b"", b""
    while len(okm) < length:
        block = hmac.digest(key, block + canonical.encode(list(info)) + bytes([len(okm) // 32 + 1]), "sha256")
        okm += block
    return okm[:length]


def test_hkdf_is_that_of_rfc_5869() -> None:
    # Appendix A.1.
    okm = HKDF(SHA256(), 42, bytes.fromhex("000102030405060708090a0b0c"), bytes.fromhex("f0f1f2f3f4f5f6f7f8f9"))
    assert okm.derive(b"\x0b" * 22).hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


def test_x25519_is_that_of_rfc_7748() -> None:
    # Section 6.1.
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    public = X25519PrivateKey.from_private_bytes(bob).public_key()
    assert X25519PrivateKey.from_private_bytes(alice).exchange(public).hex() == (
        "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    )


def test_everything_derived_from_the_seed_has_a_label_of_its_own() -> None:
    keys = SeedKeys(BASE, os.urandom(32))
    private = X25519PrivateKey.from_private_bytes(hkdf(keys.seed, BASE, 32, "fedclip/v1/mask-key"))
    assert keys.mask_public == private.public_key().public_bytes_raw()
    assert keys.salt_seal.private == hkdf(keys.seed, BASE, 96, "fedclip/v1/salt-seal-key")
    assert keys.salt_for("a", "b") == hkdf(keys.seed, BASE, 32, "fedclip/v1/pair-salt", "a", "b")


def test_the_pair_key_is_the_formula_of_the_protocol() -> None:
    low, high = SeedKeys(BASE, os.urandom(32)), SeedKeys(BASE, os.urandom(32))
    private = X25519PrivateKey.from_private_bytes(hkdf(low.seed, BASE, 32, "fedclip/v1/mask-key"))
    shared = private.exchange(X25519PublicKey.from_public_bytes(high.mask_public))
    secret = shared + low.salt_for("bern", "zuerich") + high.salt_for("zuerich", "bern")
    expected = hkdf(secret, T2, 32, "fedclip/v1/pair", "bern", "zuerich")
    mine = low.pair_key(T2, "bern", Peer("zuerich", high.mask_public, high.salt_for("zuerich", "bern")))
    theirs = high.pair_key(T2, "zuerich", Peer("bern", low.mask_public, low.salt_for("bern", "zuerich")))
    assert mine == theirs == expected


def test_a_pair_key_changes_with_transcript_names_and_either_salt() -> None:
    low, high = SeedKeys(BASE, os.urandom(32)), SeedKeys(BASE, os.urandom(32))
    salt = high.salt_for("b", "a")
    keys = {
        low.pair_key(T2, "a", Peer("b", high.mask_public, salt)),
        low.pair_key(bytes(32), "a", Peer("b", high.mask_public, salt)),
        low.pair_key(T2, "a", Peer("c", high.mask_public, salt)),
        low.pair_key(T2, "a", Peer("b", high.mask_public, bytes(32))),
        SeedKeys(bytes(32), low.seed).pair_key(T2, "a", Peer("b", high.mask_public, salt)),
    }
    assert len(keys) == 5


def test_the_own_mask_key_is_the_formula_of_the_protocol() -> None:
    b = os.urandom(32)
    assert self_key(b, T2, "bern") == hkdf(b, T2, 32, "fedclip/v1/self", "bern")
    formula = canonical.encode(["fedclip/v1/self-commit", T2, "bern", b])
    assert self_commitment(T2, "bern", b) == hashlib.sha256(formula).digest()


def test_share_commitments_bind_transcript_owner_holder_kind_and_share() -> None:
    share = os.urandom(32)
    variants = [
        (T2, "a", "b", "seed", share),
        (BASE, "a", "b", "seed", share),
        (T2, "c", "b", "seed", share),
        (T2, "a", "c", "seed", share),
        (T2, "a", "b", "b", share),
        (T2, "a", "b", "seed", bytes(32)),
    ]
    assert len({share_commitment(*variant) for variant in variants}) == len(variants)


def test_no_two_infos_are_alike() -> None:
    infos = [share_info(T2, "a", "b"), salt_info(T2, "a", "b"), upload_info(T2, "a"), unmask_info(T2, T2, "a")]
    assert len({canonical.encode(info) for info in infos}) == 4
    assert all(isinstance(info[0], str) and info[0].startswith("fedclip/v1/") for info in infos)


def test_secrets_of_two_attempts_have_nothing_in_common() -> None:
    one, two = AttemptSecrets.fresh(BASE), AttemptSecrets.fresh(BASE)
    for a, b in [(one.keys.seed, two.keys.seed), (one.b, two.b), (one.share_seal.private, two.share_seal.private)]:
        assert a != b


def test_the_key_for_shares_does_not_follow_from_the_seed() -> None:
    # Who learns a drop-out's seed learns its mask key and the salts it was sent, not the shares of the living.
    secrets = AttemptSecrets.fresh(BASE)
    again = AttemptSecrets(SeedKeys(BASE, secrets.keys.seed), os.urandom(32), AttemptSecrets.fresh(BASE).share_seal)
    assert again.keys.salt_seal.public == secrets.keys.salt_seal.public
    assert again.share_seal.public != secrets.share_seal.public


def test_no_secret_shows_when_printed() -> None:
    secrets = AttemptSecrets.fresh(BASE)
    for value in (secrets.keys.seed, secrets.b, secrets.share_seal.private):
        assert repr(value) not in repr(secrets)
