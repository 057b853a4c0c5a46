from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedclip_secure.errors import DataError, TrustError
from fedclip_secure.pki.authority import Authority, create_authority
from fedclip_secure.pki.certificates import federation_of, parse_certificate, silo_name
from fedclip_secure.pki.identity import CERTIFICATE, ENROLMENT, KEY, Enrolment, Identity, create_key, signing_request
from fedclip_secure.pki.keys import SigningKey, spki_sha256, write_private_key


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return create_authority(tmp_path / "authority", "lung-xray")


def enrol(folder: Path, authority: Authority, name: str = "st-marys") -> Identity:
    key = create_key(folder)
    certificate = authority.issue_silo(name, signing_request(key, name))
    enrolment = Enrolment(name=name, server="https://agg.example.org", federation="lung-xray")
    identity = Identity(folder, enrolment, key, certificate, authority.certificate)
    identity.save()
    return identity


def dated(authority: Authority, identity: Identity, start: timedelta, end: timedelta) -> x509.Certificate:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name)]))
        .issuer_name(authority.certificate.subject)
        .public_key(identity.key.public)
        .serial_number(1)
        .not_valid_before(now + start)
        .not_valid_after(now + end)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_key_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    create_key(tmp_path / "identity")
    assert (mode(tmp_path / "identity" / KEY), mode(tmp_path / "identity")) == (0o600, 0o700)


@pytest.mark.parametrize("wide", [0o640, 0o604, 0o660, 0o644])
def test_key_that_others_may_read_is_refused(tmp_path: Path, wide: int) -> None:
    create_key(tmp_path)
    (tmp_path / KEY).chmod(wide)
    with pytest.raises(
        TrustError, match=r"others on this machine may use this private key \(mode 06\d\d\); run `chmod"
    ):
        SigningKey.load(tmp_path / KEY)


def test_key_is_kept_when_enrolment_is_tried_again(tmp_path: Path) -> None:
    first, second = create_key(tmp_path), create_key(tmp_path)
    assert first.public_bytes == second.public_bytes
    assert signing_request(first, "st-marys") == signing_request(second, "st-marys")


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file': cannot be made"):
        create_key(tmp_path / "file")


def test_key_is_never_overwritten(tmp_path: Path) -> None:
    create_key(tmp_path)
    with pytest.raises(TrustError, match="there is a key already"):
        SigningKey.create(tmp_path / KEY)


def test_key_of_another_kind_is_named(tmp_path: Path) -> None:
    write_private_key(tmp_path / KEY, ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(TrustError, match="is not an Ed25519 key"):
        SigningKey.load(tmp_path / KEY)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_damaged_key_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / KEY).touch(mode=0o600)
    (tmp_path / KEY).write_bytes(content)
    with pytest.raises(TrustError, match=r"key\.pem': is not an unencrypted PEM private key"):
        SigningKey.load(tmp_path / KEY)


def test_encrypted_key_is_refused_without_a_prompt(tmp_path: Path) -> None:
    sealed = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (tmp_path / KEY).touch(mode=0o600)
    (tmp_path / KEY).write_bytes(sealed)
    with pytest.raises(TrustError, match="is not an unencrypted PEM private key"):
        SigningKey.load(tmp_path / KEY)


def test_rsa_key_is_refused(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / KEY).touch(mode=0o600)
    (tmp_path / KEY).write_bytes(key)
    with pytest.raises(TrustError, match="is a key of another kind"):
        SigningKey.load(tmp_path / KEY)


def test_private_key_does_not_show_in_messages(tmp_path: Path, authority: Authority) -> None:
    assert "Private" not in repr(enrol(tmp_path, authority))
    assert "Private" not in repr(authority)


def test_public_key_and_signature_are_those_of_rfc_8032() -> None:
    """Section 7.1, test 1."""
    secret = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(secret))
    assert key.public_bytes.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert key.sign(b"").hex().startswith("e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8")


def test_saved_identity_is_loaded_whole(tmp_path: Path, authority: Authority) -> None:
    saved = enrol(tmp_path / "identity", authority)
    loaded = Identity.load(tmp_path / "identity")
    assert (loaded.name, loaded.server, loaded.certificate) == (
        "st-marys",
        "https://agg.example.org",
        saved.certificate,
    )
    assert loaded.sign(b"data") == saved.sign(b"data")
    assert spki_sha256(loaded.certificate) == spki_sha256(saved.key.public)
    assert timedelta(days=396) < loaded.not_after - datetime.now(UTC) < timedelta(days=398)


def test_folder_without_identity_says_how_to_enrol(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="holds no identity; run `fedclip-silo enroll`"):
        Identity.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"name": 1, "server": "s", "federation": "f"}'])
def test_damaged_enrolment_is_named(tmp_path: Path, authority: Authority, content: bytes) -> None:
    enrol(tmp_path, authority)
    (tmp_path / ENROLMENT).write_bytes(content)
    with pytest.raises(TrustError, match=r"enrolment\.json': is damaged"):
        Identity.load(tmp_path)


def test_missing_certificate_is_named(tmp_path: Path, authority: Authority) -> None:
    enrol(tmp_path, authority)
    (tmp_path / CERTIFICATE).unlink()
    with pytest.raises(TrustError, match=r"certificate\.pem': the certificate is missing; restore"):
        Identity.load(tmp_path)


def test_certificate_for_another_key_is_refused(tmp_path: Path, authority: Authority) -> None:
    identity = enrol(tmp_path, authority)
    (tmp_path / KEY).unlink()
    create_key(tmp_path)
    with pytest.raises(TrustError, match=f"'{identity.folder}': the certificate is not for the key in key.pem"):
        Identity.load(tmp_path)


def test_certificate_of_another_authority_is_refused(tmp_path: Path, authority: Authority) -> None:
    identity = enrol(tmp_path / "a", authority)
    other = create_authority(tmp_path / "other", "lung-xray")
    with pytest.raises(TrustError, match="not issued by this federation's authority"):
        Identity(identity.folder, identity.enrolment, identity.key, identity.certificate, other.certificate)


def test_certificate_of_another_silo_is_refused(tmp_path: Path, authority: Authority) -> None:
    identity = enrol(tmp_path, authority)
    enrolment = identity.enrolment.model_copy(update={"name": "charite"})
    with pytest.raises(TrustError, match="was issued to st-marys, not to charite"):
        Identity(identity.folder, enrolment, identity.key, identity.certificate, authority.certificate)


def test_expired_certificate_gives_date_and_remedy(tmp_path: Path, authority: Authority) -> None:
    identity = enrol(tmp_path, authority)
    expired = dated(authority, identity, timedelta(days=-2), timedelta(days=-1))
    date = f"{expired.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    with pytest.raises(TrustError, match=rf"expired on {date} .*ask the coordinator for a new invitation"):
        Identity(tmp_path, identity.enrolment, identity.key, expired, authority.certificate)


def test_certificate_of_the_future_points_at_the_clock(tmp_path: Path, authority: Authority) -> None:
    identity = enrol(tmp_path, authority)
    early = dated(authority, identity, timedelta(days=1), timedelta(days=2))
    with pytest.raises(
        TrustError, match=r"is valid only from .*; set the clock if it is wrong; else it was made by a wrong one: ask"
    ):
        silo_name(early, authority.certificate)


def test_several_certificates_in_one_file_are_refused(authority: Authority) -> None:
    pem = authority.certificate.public_bytes(serialization.Encoding.PEM)
    with pytest.raises(TrustError, match="holds 2 certificates, one is expected"):
        parse_certificate(pem + pem, "authority.pem")


def test_certificate_carries_the_federation(tmp_path: Path, authority: Authority) -> None:
    assert federation_of(enrol(tmp_path, authority).certificate) == federation_of(authority.certificate) == "lung-xray"
