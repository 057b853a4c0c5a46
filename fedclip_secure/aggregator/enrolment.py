"""The server's side of enrolment: one token, one key, one certificate."""

from __future__ import annotations

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedclip_secure.aggregator.store import Member, Store
from fedclip_secure.errors import TrustError
from fedclip_secure.pki.authority import Authority
from fedclip_secure.pki.invitation import secret_hash
from fedclip_secure.pki.roster import Roster
from fedclip_secure.transport.messages import EnrolAnswer, EnrolRequest, parse


def enrol(store: Store, authority: Authority, federation: str, body: bytes, now: float) -> EnrolAnswer:
    """Answer a request. The same token with the same request gets the same certificate again.

    Raises:
        ProtocolError: not an `EnrolRequest`.
        TrustError: token unknown, used or expired; request faulty; or, after the freeze, another key
            than the roster pins.
    """
    request = parse(EnrolRequest, body)
    token = secret_hash(request.token)
    silo, used = store.invited(token, request.csr, now)
    member = store.member(silo)
    if not used or member is None:
        member = _issue(store, authority, silo, request.csr)
        store.enrol(token, request.csr, member)
    return EnrolAnswer(certificate=member.certificate, federation=federation)


def _issue(store: Store, authority: Authority, silo: str, csr: bytes) -> Member:
    certificate = authority.issue_silo(silo, csr)
    public = certificate.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    _check_roster(store, silo, public)
    return Member(silo, certificate.public_bytes(Encoding.DER), public, certificate.not_valid_after_utc.timestamp())


def _check_roster(store: Store, silo: str, public: bytes) -> None:
    frozen = store.frozen()
    if frozen is None:
        return
    pinned = dict(Roster.decode(frozen[1]).members).get(silo)
    if pinned != public:
        raise TrustError(
            f"the roster is frozen and pins another key of {silo}, or none; enrol with the key that it had, "
            "or start a new federation"
        )
