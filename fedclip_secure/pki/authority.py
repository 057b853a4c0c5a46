"""The coordinator's certificate authority (RFC 5280): one key, one self-signed certificate, two kinds below it.

It says who may connect. It is not trusted to say who takes part: the roster that people compare does that.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from fedclip_secure.errors import ConfigError, TrustError
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.certificates import (
    check_dates,
    federation_of,
    parse_certificate,
    read_certificate,
    silo_name,
    write_certificate,
)
from fedclip_secure.pki.keys import PublicKey, read_private_key, spki_sha256, write_private_key

AUTHORITY_KEY = "authority-key.pem"
AUTHORITY_CERTIFICATE = "authority.pem"
_SKEW = timedelta(minutes=5)  # a silo's clock may be behind by this much
_AUTHORITY_LIFE = timedelta(days=3650)
_LIFE = timedelta(days=397)  # of a server's or a silo's certificate; the most that public authorities give
_HOST_LABEL = r"(?!-)[a-z0-9-]{1,63}(?<!-)"  # RFC 1123 section 2.1


@dataclass(frozen=True, slots=True)
class Authority:
    """The authority of one federation."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)  # P-256: TLS stacks and browsers all take it
    certificate: x509.Certificate

    @property
    def federation(self) -> str:
        """The federation that this authority serves."""
        return federation_of(self.certificate)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate's DER; 32 bytes. An invitation carries it."""
        return certificate_fingerprint(self.certificate)

    def issue_server(self, hosts: Sequence[str]) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        """A fresh P-256 key and its certificate for exactly these DNS names and IP addresses.

        Raises:
            ConfigError: no host, or one that is neither a DNS name nor an IP address.
            TrustError: the authority itself has expired.
        """
        names = server_names(hosts)
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._leaf(AGGREGATOR, key.public_key(), ExtendedKeyUsageOID.SERVER_AUTH)
        return key, builder.add_extension(names, critical=False).sign(self.key, hashes.SHA256())

    def renew_server(self, certificate: x509.Certificate) -> x509.Certificate:
        """The server's certificate for the same key and hosts, with a life from today.

        Raises:
            TrustError: the authority itself has expired, or `certificate` names no hosts.
        """
        key = certificate.public_key()
        names = [item.value for item in certificate.extensions if isinstance(item.value, x509.SubjectAlternativeName)]
        if not isinstance(key, ec.EllipticCurvePublicKey) or not names:
            raise TrustError("the server's certificate is none that `fedclip-agg init` made; restore it")
        builder = self._leaf(AGGREGATOR, key, ExtendedKeyUsageOID.SERVER_AUTH)
        return builder.add_extension(names[0], critical=False).sign(self.key, hashes.SHA256())

    def issue_silo(self, name: str, csr: bytes) -> x509.Certificate:
        """Certify the Ed25519 key of `csr` (PKCS #10, DER) for the silo that was invited as `name`.

        Only the key is taken from the request: its subject must agree, its extensions are ignored.

        Raises:
            TrustError: not a request, not signed by its own key, another kind of key, or another name.
        """
        key = _requested_key(csr, name)
        return self._leaf(name, key, ExtendedKeyUsageOID.CLIENT_AUTH).sign(self.key, hashes.SHA256())

    def client_name(self, certificate: bytes) -> str:
        """The silo that this authority issued `certificate` (DER) to; the certificate must be valid now.

        Raises:
            TrustError: issued by somebody else, for another purpose, or outside its dates.
        """
        return silo_name(parse_certificate(certificate, "the client's certificate"), self.certificate)

    def _leaf(self, name: str, key: PublicKey, usage: ObjectIdentifier) -> x509.CertificateBuilder:
        check_dates(
            self.certificate, f"the authority of {self.federation}", "start a new federation: `fedclip-agg init`"
        )
        now = datetime.now(UTC)
        issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return (
            _builder(_subject(self.federation, name), self.certificate.subject, key)
            .not_valid_before(max(now - _SKEW, self.certificate.not_valid_before_utc))
            .not_valid_after(min(now + _LIFE, self.certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(issuer_id, critical=False)
        )


def create_authority(folder: Path, federation: str) -> Authority:
    """Make the key and the self-signed certificate, good for ten years, and write both to `folder`.

    Raises:
        TrustError: there is an authority already.
        DataError: the disk refuses.
    """
    if (folder / AUTHORITY_CERTIFICATE).exists():
        raise TrustError(f"'{folder}': there is an authority already; every silo trusts it, so choose another folder")
    key = ec.generate_private_key(ec.SECP256R1())
    subject, now = _subject(federation, "authority"), datetime.now(UTC)
    certificate = (
        _builder(subject, subject, key.public_key())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_private_key(folder / AUTHORITY_KEY, key)
    write_certificate(folder / AUTHORITY_CERTIFICATE, certificate)
    return Authority(key, certificate)


def load_authority(folder: Path) -> Authority:
    """Read what `create_authority` wrote.

    Raises:
        TrustError: missing, damaged, open to others on this machine, or key and certificate do not belong together.
    """
    certificate = read_certificate(folder / AUTHORITY_CERTIFICATE)
    key = read_private_key(folder / AUTHORITY_KEY)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or spki_sha256(certificate) != spki_sha256(key.public_key()):
        raise TrustError(f"'{folder}': {AUTHORITY_KEY} and {AUTHORITY_CERTIFICATE} are no pair; restore both")
    return Authority(key, certificate)


def certificate_fingerprint(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the DER; 32 bytes."""
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest()


def _builder(subject: x509.Name, issuer: x509.Name, key: PublicKey) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())  # 159 random bits: RFC 5280 section 4.1.2.2
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _subject(federation: str, name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def server_names(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    """The names of a server's certificate.

    Raises:
        ConfigError: no host, or one that is neither a DNS name nor an IP address.
    """
    if not hosts:
        raise ConfigError("a server's certificate needs at least one host; give the name that silos connect to")
    return x509.SubjectAlternativeName([_general_name(host) for host in hosts])


def _general_name(host: str) -> x509.GeneralName:
    """A TLS client compares an IP address with IP entries alone, so the type counts (RFC 9525 section 6.4)."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if len(host) > 253 or not re.fullmatch(rf"{_HOST_LABEL}(\.{_HOST_LABEL})*", host.lower()):
            raise ConfigError(
                f"{host!r} is neither a DNS name nor an IP address; write agg.example.org or 192.0.2.7, "
                f"without https:// and port, and international names in their xn-- form"
            ) from None
        return x509.DNSName(host.lower())


def _requested_key(csr: bytes, name: str) -> Ed25519PublicKey:
    try:
        request = x509.load_der_x509_csr(csr)
        key = request.public_key()
        signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise TrustError(f"{name}: what was sent is not a certificate request; enrol with fedclip-silo") from error
    if not isinstance(key, Ed25519PublicKey):
        raise TrustError(f"{name}: the request is for a key that is not Ed25519; enrol with fedclip-silo")
    if not signed:
        raise TrustError(f"{name}: the request is not signed by the key that it names; enrol again")
    names = [attribute.value for attribute in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [name]:
        raise TrustError(f"the invitation is for {name}, the request for {', '.join(map(repr, names)) or 'nobody'}")
    return key
