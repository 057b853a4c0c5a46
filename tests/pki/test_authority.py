from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedclip_secure.errors import ConfigError, TrustError
from fedclip_secure.pki.authority import AUTHORITY_KEY, Authority, create_authority, load_authority
from fedclip_secure.pki.identity import signing_request
from fedclip_secure.pki.keys import SigningKey, spki_sha256


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return create_authority(tmp_path_factory.mktemp("authority"), "lung-xray")


def fresh() -> SigningKey:
    return SigningKey(Ed25519PrivateKey.generate())


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def subject(*names: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])


def test_authority_may_sign_leaves_and_no_authorities(authority: Authority) -> None:
    extensions = authority.certificate.extensions
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    assert (usage.critical, usage.value.key_cert_sign, usage.value.crl_sign) == (True, True, True)
    assert not usage.value.digital_signature
    assert isinstance(authority.key.curve, ec.SECP256R1)


def test_authority_is_good_for_ten_years_and_for_clocks_behind(authority: Authority) -> None:
    now = datetime.now(UTC)
    assert authority.certificate.not_valid_before_utc <= now - timedelta(minutes=4)
    assert authority.certificate.not_valid_after_utc >= now + timedelta(days=3649)


def test_authority_is_loaded_as_it_was_created(tmp_path: Path) -> None:
    created = create_authority(tmp_path, "lung-xray")
    loaded = load_authority(tmp_path)
    assert (loaded.fingerprint, loaded.federation) == (created.fingerprint, "lung-xray")
    assert loaded.fingerprint == created.certificate.fingerprint(hashes.SHA256())
    assert stat.S_IMODE((tmp_path / AUTHORITY_KEY).stat().st_mode) == 0o600


def test_authority_is_never_overwritten(tmp_path: Path) -> None:
    create_authority(tmp_path, "lung-xray")
    with pytest.raises(TrustError, match="there is an authority already"):
        create_authority(tmp_path, "lung-xray")


def test_key_and_certificate_of_two_authorities_are_refused(tmp_path: Path) -> None:
    create_authority(tmp_path / "a", "lung-xray")
    create_authority(tmp_path / "b", "lung-xray")
    (tmp_path / "a" / AUTHORITY_KEY).write_bytes((tmp_path / "b" / AUTHORITY_KEY).read_bytes())
    with pytest.raises(TrustError, match="are no pair; restore both"):
        load_authority(tmp_path / "a")


def test_longest_federation_name_fits(tmp_path: Path) -> None:
    assert create_authority(tmp_path, "f" * 63).federation == "f" * 63


def test_server_certificate_has_exactly_its_hosts(authority: Authority) -> None:
    key, certificate = authority.issue_server(["agg.example.org", "192.0.2.7", "2001:db8::7"])
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [
        x509.DNSName("agg.example.org"),
        x509.IPAddress(ip_address("192.0.2.7")),
        x509.IPAddress(ip_address("2001:db8::7")),
    ]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert spki_sha256(certificate) == spki_sha256(key.public_key())
    certificate.verify_directly_issued_by(authority.certificate)


@pytest.mark.parametrize(
    "host", ["https://agg.example.org", "agg.example.org:443", "*.example.org", "zürich.ch", "", "-a"]
)
def test_host_that_is_no_host_is_refused(authority: Authority, host: str) -> None:
    with pytest.raises(ConfigError, match="neither a DNS name nor an IP address"):
        authority.issue_server([host])


def test_server_without_hosts_is_refused(authority: Authority) -> None:
    with pytest.raises(ConfigError, match="at least one host"):
        authority.issue_server([])


def test_silo_certificate_is_for_its_key_and_name_alone(authority: Authority) -> None:
    key = fresh()
    certificate = authority.issue_silo("st-marys", signing_request(key, "st-marys"))
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (list(usage), basic.ca) == ([ExtendedKeyUsageOID.CLIENT_AUTH], False)
    assert spki_sha256(certificate) == spki_sha256(key.public)
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == timedelta(days=397, minutes=5)
    assert authority.client_name(der(certificate)) == "st-marys"


def test_serial_numbers_are_random(authority: Authority) -> None:
    request = signing_request(fresh(), "st-marys")
    first, second = (authority.issue_silo("st-marys", request).serial_number for _ in range(2))
    assert first != second
    assert max(first, second) > 2**100


def test_nothing_but_the_key_is_taken_from_a_request(authority: Authority) -> None:
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "another federation"),
            x509.NameAttribute(NameOID.COMMON_NAME, "st-marys"),
        ]
    )
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("agg.example.org")]), critical=False)
        .sign(fresh().private, None)
    )
    certificate = authority.issue_silo("st-marys", request.public_bytes(Encoding.DER))
    plain = authority.issue_silo("st-marys", signing_request(fresh(), "st-marys"))
    assert certificate.subject == plain.subject
    assert [item.oid for item in certificate.extensions] == [item.oid for item in plain.extensions]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_request_for_another_kind_of_key_is_refused(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(subject("st-marys")).sign(key, hashes.SHA256())
    with pytest.raises(TrustError, match="a key that is not Ed25519"):
        authority.issue_silo("st-marys", request.public_bytes(Encoding.DER))


@pytest.mark.parametrize("names", [("charite",), (), ("st-marys", "charite"), ("St-Marys",)])
def test_request_under_another_name_is_refused(authority: Authority, names: tuple[str, ...]) -> None:
    request = x509.CertificateSigningRequestBuilder().subject_name(subject(*names)).sign(fresh().private, None)
    with pytest.raises(TrustError, match="the invitation is for st-marys, the request for"):
        authority.issue_silo("st-marys", request.public_bytes(Encoding.DER))


def test_request_with_a_broken_signature_is_refused(authority: Authority) -> None:
    request = bytearray(signing_request(fresh(), "st-marys"))
    request[-1] ^= 1
    with pytest.raises(TrustError, match="not signed by the key that it names"):
        authority.issue_silo("st-marys", bytes(request))


def test_request_for_somebody_elses_key_is_refused(authority: Authority) -> None:
    theirs, mine = fresh(), fresh()
    request = signing_request(mine, "st-marys").replace(mine.public_bytes, theirs.public_bytes)
    with pytest.raises(TrustError, match="not signed by the key that it names"):
        authority.issue_silo("st-marys", request)


@pytest.mark.parametrize("request_", [b"", b"garbage", b"\x30\x03\x02\x01\x00"])
def test_garbage_is_no_request(authority: Authority, request_: bytes) -> None:
    with pytest.raises(TrustError, match="not a certificate request"):
        authority.issue_silo("st-marys", request_)


def test_request_with_trailing_bytes_is_refused(authority: Authority) -> None:
    with pytest.raises(TrustError, match="not a certificate request"):
        authority.issue_silo("st-marys", signing_request(fresh(), "st-marys") + b"\0")


def test_client_of_another_authority_has_no_name_here(authority: Authority, tmp_path: Path) -> None:
    """Its subject is the same, letter for letter: only the signature tells."""
    other = create_authority(tmp_path, "lung-xray")
    certificate = other.issue_silo("st-marys", signing_request(fresh(), "st-marys"))
    with pytest.raises(TrustError, match="not issued by this federation's authority"):
        authority.client_name(der(certificate))


def test_server_certificate_is_no_silo(authority: Authority) -> None:
    with pytest.raises(TrustError, match="not a silo's"):
        authority.client_name(der(authority.issue_server(["agg.example.org"])[1]))


def test_authority_itself_is_no_silo(authority: Authority) -> None:
    with pytest.raises(TrustError, match="not a silo's"):
        authority.client_name(der(authority.certificate))


def test_client_certificate_that_is_none_is_refused(authority: Authority) -> None:
    with pytest.raises(TrustError, match=r"the client's certificate: is not an X\.509 certificate"):
        authority.client_name(b"garbage")
