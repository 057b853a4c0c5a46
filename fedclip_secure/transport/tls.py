"""The four TLS contexts. TLS 1.3 only (RFC 8446); no authority but the federation's own is ever believed."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

from fedclip_secure.disk import refused
from fedclip_secure.errors import DataError, TrustError
from fedclip_secure.pki.identity import AUTHORITY, CERTIFICATE, KEY, Identity


def server_context(certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """The coordinator's side. A client may come without a certificate; one that it shows must be the authority's.

    Routes demand the certificate (`peer_certificate`), so that enrolment can do without on the same port.

    Raises:
        TrustError: a file is missing or damaged, or key and certificate do not belong together.
        DataError: the disk refuses.
    """
    _readable(certificate, key, authority)
    context = _tls13(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.num_tickets = 0  # no resumption: who connects again proves again that it has the key
    try:
        context.load_verify_locations(cafile=authority)
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise TrustError(
            f"{certificate}, {key}, {authority}: cannot be used as the server's certificate, key and authority "
            f"({error.strerror or error}); restore them together"
        ) from error
    return context


def _readable(*files: Path) -> None:
    """OpenSSL does not say which file it could not open, nor always why.

    Raises:
        TrustError: one is missing. DataError: the disk refuses one.
    """
    for file in files:
        try:
            file.open("rb").close()
        except FileNotFoundError as error:
            raise TrustError(f"'{file}': is missing; restore it") from error
        except OSError as error:
            raise DataError(refused(error, file, otherwise="restore the file there")) from error


def client_context(identity: Identity) -> ssl.SSLContext:
    """A silo's side: shows the silo's certificate, believes only the pinned authority, checks the host's name.

    Raises:
        TrustError: the files changed since `identity` was loaded. DataError: the disk refuses.
    """
    _readable(*(identity.folder / name for name in (AUTHORITY, CERTIFICATE, KEY)))
    context = _client()
    try:
        context.load_verify_locations(cafile=identity.folder / AUTHORITY)
        context.load_cert_chain(identity.folder / CERTIFICATE, identity.folder / KEY)
    except ssl.SSLError as error:
        raise TrustError(f"{identity.folder}: cannot be used ({error.strerror or error}); restore its files") from error
    return context


def enrolment_context(authority_pem: str) -> ssl.SSLContext:
    """A silo that has no certificate yet, once it has checked the authority against its invitation.

    Raises:
        TrustError: not a certificate.
    """
    context = _client()
    try:
        context.load_verify_locations(cadata=authority_pem)
    except (OSError, ValueError) as error:
        raise TrustError("what the server sent is not an authority's certificate; is it a fedclip-agg?") from error
    return context


def bootstrap_context() -> ssl.SSLContext:
    """Believes anybody: for the one fetch of the authority's certificate, which the invitation's hash then decides on.

    Nothing secret may be sent over it.
    """
    context = _client()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def peer_certificate(transport: asyncio.BaseTransport) -> bytes | None:
    """The certificate (DER) that the other end of a TLS connection showed and proved; None where it showed none."""
    connection = transport.get_extra_info("ssl_object")
    certificate = None if connection is None else connection.getpeercert(binary_form=True)
    return certificate if isinstance(certificate, bytes) else None


def _client() -> ssl.SSLContext:
    context = _tls13(ssl.PROTOCOL_TLS_CLIENT)
    context.hostname_checks_common_name = False  # RFC 9525: the subject alternative names alone count
    return context


def _tls13(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # RFC 5280 to the letter; our certificates keep to it
    return context
