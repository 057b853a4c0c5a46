"""A silo's first contact: from an invitation to an identity, without trust on first use."""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedclip_secure.errors import TransportError, TrustError
from fedclip_secure.pki.authority import certificate_fingerprint
from fedclip_secure.pki.certificates import federation_of, parse_certificate
from fedclip_secure.pki.identity import Enrolment, Identity, create_key, read_enrolment, signing_request
from fedclip_secure.pki.invitation import Invitation
from fedclip_secure.pki.keys import SigningKey
from fedclip_secure.transport.client import Client, Patience, Waiting, parse_server
from fedclip_secure.transport.messages import EnrolAnswer, EnrolRequest, parse
from fedclip_secure.transport.tls import bootstrap_context, enrolment_context

AUTHORITY_PATH = "/v1/authority"  # GET, without a client certificate: the authority's certificate as PEM
ENROL_PATH = "/v1/enrol"  # POST, without a client certificate: EnrolRequest to EnrolAnswer
_MAX_ANSWER = 16 * 2**10  # bytes
_PATIENCE = Patience(tries=5)  # a person sits before it


async def enroll(url: str, token: str, folder: Path, waiting: Waiting) -> Identity:
    """Make this silo's key in `folder` and get its certificate; what broke off may be repeated with the same token.

    Raises:
        ConfigError: the URL or the token is mistyped.
        TrustError: the server is not the one that the invitation names, or answered with a wrong certificate;
            `folder` belongs to another silo.
        TransportError: the server cannot be reached or says no; `code` is the problem's, as `token-used`.
        ProtocolError: the answer is not a message of this protocol.
        DataError: the disk refuses.
    """
    invitation = Invitation.decode(token)
    server = str(parse_server(url)).rstrip("/")
    _check_free(folder, invitation.name)
    authority = await _fetch_authority(server, invitation, waiting)
    key = create_key(folder)
    answer = await _request_certificate(server, authority, invitation, key, waiting)
    certificate = parse_certificate(answer.certificate, f"the certificate from {server}")
    enrolment = Enrolment(name=invitation.name, server=server, federation=answer.federation)
    try:
        if answer.federation != federation_of(authority):
            raise TrustError(f"it is for {answer.federation}, the authority for {federation_of(authority)}")
        identity = Identity(folder, enrolment, key, certificate, authority)
    except TrustError as error:
        raise TrustError(f"{server}: answered with a certificate that cannot be used: {error}") from error
    identity.save()
    return identity


def _check_free(folder: Path, name: str) -> None:
    present = read_enrolment(folder)
    if present is not None and present.name != name:
        raise TrustError(f"'{folder}': holds the identity of {present.name}; choose another folder for {name}")


async def _fetch_authority(server: str, invitation: Invitation, waiting: Waiting) -> x509.Certificate:
    async with Client(server, bootstrap_context(), waiting, _PATIENCE) as client:
        answer = await client.get(AUTHORITY_PATH, limit=_MAX_ANSWER)
    authority = parse_certificate(answer.body, f"the authority from {server}")
    if certificate_fingerprint(authority) != invitation.authority_fingerprint:
        raise TrustError(
            f"{server}: its authority is not the one in the invitation; check that URL and token come from the same "
            f"coordinator, and that no proxy opens TLS to this host. Nothing secret was sent"
        )
    return authority


async def _request_certificate(
    server: str, authority: x509.Certificate, invitation: Invitation, key: SigningKey, waiting: Waiting
) -> EnrolAnswer:
    """Over a fresh connection, verified against the authority: only now does the token's secret leave."""
    context = enrolment_context(authority.public_bytes(Encoding.PEM).decode())
    request = EnrolRequest(token=invitation.secret, csr=signing_request(key, invitation.name))
    async with Client(server, context, waiting, _PATIENCE) as client:
        answer = await client.post(ENROL_PATH, request.encode(), limit=_MAX_ANSWER)
    if answer.status != HTTPStatus.OK:
        raise TransportError(f"{server}: answered HTTP {answer.status} to the enrolment; is it a fedclip-agg?")
    return parse(EnrolAnswer, answer.body)
