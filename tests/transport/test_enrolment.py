from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedclip_secure.errors import ConfigError, FedClipError, ProtocolError, TransportError, TrustError
from fedclip_secure.pki.identity import AUTHORITY, CERTIFICATE, ENROLMENT, EPOCH, KEY, Identity
from fedclip_secure.pki.invitation import Invitation
from fedclip_secure.transport.client import Client
from fedclip_secure.transport.enrolment import AUTHORITY_PATH, ENROL_PATH, enroll
from fedclip_secure.transport.messages import EnrolAnswer, EnrolRequest, parse
from fedclip_secure.transport.problems import CONTENT_TYPE, Problem
from tests.transport.loopback import QUICK, Federation, Waits, serving, who
from tests.waiting import BOUND


@dataclass
class Coordinator:
    """The server's side of enrolment, as short as it can be."""

    federation: Federation
    invitations: dict[bytes, str] = field(default_factory=dict)  # secret's hash: silo
    used: dict[bytes, bytes] = field(default_factory=dict)  # secret's hash: the request it was used for
    alter: Callable[[EnrolAnswer], bytes] = EnrolAnswer.encode
    paths: list[str] = field(default_factory=list)

    def invite(self, name: str) -> str:
        invitation = Invitation.create(name, self.federation.authority.fingerprint)
        self.invitations[invitation.secret_hash()] = name
        return invitation.encode()

    async def handle(self, request: web.Request) -> web.Response:
        self.paths.append(request.path)
        if request.path == AUTHORITY_PATH:
            return web.Response(body=self.federation.authority.certificate.public_bytes(Encoding.PEM))
        assert request.path == ENROL_PATH
        message = parse(EnrolRequest, await request.read())
        key = Invitation("any", message.token, bytes(32)).secret_hash()
        name = self.invitations.get(key)
        if name is None:
            return _refuse(Problem.of("token-unknown", 403, "the token is unknown; ask for a new invitation"))
        if self.used.setdefault(key, message.csr) != message.csr:
            return _refuse(Problem.of("token-used", 409, "the token was used already; ask for a new invitation"))
        certificate = self.federation.authority.issue_silo(name, message.csr).public_bytes(Encoding.DER)
        return web.Response(body=self.alter(EnrolAnswer(certificate=certificate, federation="lung-xray")))


def _refuse(problem: Problem) -> web.Response:
    return web.Response(status=problem.status, body=problem.encode(), content_type=CONTENT_TYPE)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(Federation.create(tmp_path / "coordinator"))


def run(coordinator: Coordinator, token: str, folder: Path, context: ssl.SSLContext | None = None) -> Identity:
    async def scenario() -> Identity:
        server = context or coordinator.federation.server_context()
        async with serving(coordinator.handle, server) as port:
            return await asyncio.wait_for(enroll(f"https://127.0.0.1:{port}/", token, folder, Waits()), BOUND)

    return asyncio.run(scenario())


def test_invited_silo_gets_an_identity_that_lasts(coordinator: Coordinator, tmp_path: Path) -> None:
    identity = run(coordinator, coordinator.invite("st-marys"), tmp_path / "silo")
    assert Identity.load(tmp_path / "silo").certificate == identity.certificate
    assert (identity.name, identity.enrolment.federation) == ("st-marys", "lung-xray")
    assert identity.server.startswith("https://127.0.0.1:")
    assert sorted(path.name for path in (tmp_path / "silo").iterdir()) == [
        AUTHORITY,
        CERTIFICATE,
        ENROLMENT,
        EPOCH,
        KEY,
    ]


def test_enrolled_silo_is_known_at_once(coordinator: Coordinator, tmp_path: Path) -> None:
    identity = run(coordinator, coordinator.invite("st-marys"), tmp_path / "silo")

    async def scenario() -> bytes:
        port = int(identity.server.rsplit(":", 1)[1])
        client = Client.of(identity, Waits(), QUICK)
        async with serving(who, coordinator.federation.server_context(), port), client:
            return (await client.get("/v1/who")).body

    assert coordinator.federation.authority.client_name(asyncio.run(scenario())) == "st-marys"


def test_enrolment_that_broke_off_may_be_repeated_with_the_same_token(coordinator: Coordinator, tmp_path: Path) -> None:
    token = coordinator.invite("st-marys")
    first = run(coordinator, token, tmp_path / "silo")
    for name in (CERTIFICATE, AUTHORITY, ENROLMENT):
        (tmp_path / "silo" / name).unlink()
    assert run(coordinator, token, tmp_path / "silo").key.public_bytes == first.key.public_bytes


def test_used_token_is_told_from_a_mistyped_one(coordinator: Coordinator, tmp_path: Path) -> None:
    token = coordinator.invite("st-marys")
    run(coordinator, token, tmp_path / "silo")
    with pytest.raises(TransportError, match="the token was used already; ask for a new invitation") as caught:
        run(coordinator, token, tmp_path / "thief")
    assert (caught.value.code, caught.value.status) == ("token-used", 409)
    with pytest.raises(ConfigError, match="cut short or mistyped"):
        run(coordinator, token[:-3], tmp_path / "other")


def test_unknown_token_leaves_no_identity(coordinator: Coordinator, tmp_path: Path) -> None:
    token = Invitation.create("st-marys", coordinator.federation.authority.fingerprint).encode()
    with pytest.raises(TransportError, match="the token is unknown"):
        run(coordinator, token, tmp_path / "silo")
    with pytest.raises(TrustError, match="holds no identity"):
        Identity.load(tmp_path / "silo")


def test_server_with_another_authority_never_sees_the_secret(coordinator: Coordinator, tmp_path: Path) -> None:
    token = coordinator.invite("st-marys")
    interceptor = Coordinator(Federation.create(tmp_path / "interceptor"))
    with pytest.raises(TrustError, match="its authority is not the one in the invitation"):
        run(interceptor, token, tmp_path / "silo")
    assert interceptor.paths == [AUTHORITY_PATH]
    assert not (tmp_path / "silo").exists()


def test_interceptor_that_passes_the_true_authority_on_never_sees_the_secret(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    interceptor = Federation.create(tmp_path / "interceptor")
    with pytest.raises(TrustError, match="the server's certificate is not from this federation's authority"):
        run(coordinator, coordinator.invite("st-marys"), tmp_path / "silo", interceptor.server_context())
    assert coordinator.paths == [AUTHORITY_PATH]


def test_folder_of_another_silo_is_left_alone(coordinator: Coordinator, tmp_path: Path) -> None:
    run(coordinator, coordinator.invite("st-marys"), tmp_path / "silo")
    with pytest.raises(TrustError, match="holds the identity of st-marys; choose another folder for charite"):
        run(coordinator, coordinator.invite("charite"), tmp_path / "silo")


def test_new_invitation_renews_the_certificate_of_the_same_key(coordinator: Coordinator, tmp_path: Path) -> None:
    first = run(coordinator, coordinator.invite("st-marys"), tmp_path / "silo")
    second = run(coordinator, coordinator.invite("st-marys"), tmp_path / "silo")
    assert first.certificate != second.certificate
    assert first.key.public_bytes == second.key.public_bytes


def _other_federation(answer: EnrolAnswer) -> bytes:
    return answer.model_copy(update={"federation": "skin"}).encode()


def _authority_itself(answer: EnrolAnswer) -> bytes:
    issuer = x509.load_der_x509_certificate(answer.certificate).issuer
    return answer.model_copy(update={"certificate": issuer.public_bytes()}).encode()


@pytest.mark.parametrize(
    ("alter", "error", "said"),
    [
        (_other_federation, TrustError, "answered with a certificate that cannot be used: it is for skin"),
        (_authority_itself, TrustError, r"the certificate from .* is not an X\.509 certificate"),
        (lambda answer: b"", ProtocolError, "not valid CBOR"),
        (lambda answer: b"\xa0", ProtocolError, "not a valid EnrolAnswer: certificate: field required; federation"),
        (lambda answer: bytes(2**20), TransportError, "more than 16384 bytes"),
    ],
)
def test_wrong_answer_of_the_server_is_refused(
    coordinator: Coordinator,
    tmp_path: Path,
    alter: Callable[[EnrolAnswer], bytes],
    error: type[FedClipError],
    said: str,
) -> None:
    coordinator.alter = alter
    with pytest.raises(error, match=said):
        run(coordinator, coordinator.invite("st-marys"), tmp_path / "silo")
    assert not (tmp_path / "silo" / ENROLMENT).exists()


def test_certificate_for_somebody_elses_key_is_refused(coordinator: Coordinator, tmp_path: Path) -> None:
    other = run(coordinator, coordinator.invite("st-marys"), tmp_path / "other")
    theirs = other.certificate.public_bytes(Encoding.DER)
    coordinator.alter = lambda answer: answer.model_copy(update={"certificate": theirs}).encode()
    with pytest.raises(TrustError, match="cannot be used: the certificate is not for the key"):
        run(coordinator, coordinator.invite("st-marys"), tmp_path / "silo")
