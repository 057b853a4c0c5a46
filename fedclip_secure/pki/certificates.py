"""Reading certificates (RFC 5280), and the one check of whether a silo's may be believed."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedclip_secure.disk import refused
from fedclip_secure.errors import DataError, TrustError
from fedclip_secure.files import write_atomically
from fedclip_secure.names import NAME_PATTERN

ENROL_AGAIN = "ask the coordinator for a new invitation and enrol again: the key, and so the roster, stays the same"


def parse_certificate(data: bytes, source: str) -> x509.Certificate:
    """One certificate in PEM or DER.

    Raises:
        TrustError: anything else, several certificates included; names `source`.
    """
    try:
        if data.lstrip().startswith(b"-----BEGIN"):
            certificates = x509.load_pem_x509_certificates(data)
        else:
            certificates = [x509.load_der_x509_certificate(data)]
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise TrustError(f"{source}: is not an X.509 certificate; get it again") from error
    if len(certificates) != 1:
        raise TrustError(f"{source}: holds {len(certificates)} certificates, one is expected; get it again")
    return certificates[0]


def read_certificate(path: Path) -> x509.Certificate:
    """Read one certificate.

    Raises:
        TrustError: missing, or not one certificate. DataError: the disk refuses.
    """
    try:
        return parse_certificate(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise TrustError(f"'{path}': the certificate is missing; restore it") from error
    except OSError as error:
        raise DataError(refused(error, path, otherwise="restore the certificate there")) from error


def write_certificate(path: Path, certificate: x509.Certificate) -> None:
    """Write `certificate` as PEM; certificates are public, so anybody may read it.

    Raises:
        DataError: the disk refuses.
    """
    write_atomically(path, certificate.public_bytes(Encoding.PEM))


def federation_of(authority: x509.Certificate) -> str:
    """The federation that an authority, or a certificate of its making, belongs to."""
    return _only(authority.subject, NameOID.ORGANIZATION_NAME)


def silo_name(certificate: x509.Certificate, authority: x509.Certificate) -> str:
    """The silo that `authority` issued `certificate` to.

    Raises:
        TrustError: issued by somebody else, for another purpose, or not valid now.
    """
    # 1. The signature first: whatever passes was made by `Authority`, so what follows reads no stranger's data.
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise TrustError("the certificate was not issued by this federation's authority; enrol here first") from error
    # 2. The server's certificate comes from the same authority, and so does its own; neither is a silo's.
    usages = [item.value for item in certificate.extensions if isinstance(item.value, x509.ExtendedKeyUsage)]
    if not any(ExtendedKeyUsageOID.CLIENT_AUTH in usage for usage in usages):
        raise TrustError("the certificate is the server's or the authority's, not a silo's; use the one of enrolment")
    # 3. The name, and the dates.
    name = _only(certificate.subject, NameOID.COMMON_NAME)
    if not re.fullmatch(NAME_PATTERN, name):
        raise TrustError("the certificate carries no silo's name; enrol again")
    check_dates(certificate, f"the certificate of {name}", ENROL_AGAIN)
    return name


def check_dates(certificate: x509.Certificate, what: str, remedy: str) -> None:
    """Refuse a certificate outside its dates; `remedy` is how another one is had.

    Raises:
        TrustError: gives the date and the remedy.
    """
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise TrustError(
            f"{what} expired on {utc_time(certificate.not_valid_after_utc)} "
            f"(this machine's clock says {utc_time(now)}); {remedy}"
        )
    if now < certificate.not_valid_before_utc:
        raise TrustError(
            f"{what} is valid only from {utc_time(certificate.not_valid_before_utc)} "
            f"and this machine's clock says {utc_time(now)}; set the clock if it is "
            f"wrong; else it was made by a wrong one: {remedy}"
        )


def _only(subject: x509.Name, oid: x509.ObjectIdentifier) -> str:
    values = subject.get_attributes_for_oid(oid)
    return str(values[0].value) if len(values) == 1 else ""


def utc_time(when: datetime) -> str:
    """As messages give a time."""
    return f"{when:%Y-%m-%d %H:%M} UTC"
