from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from fedclip_secure.errors import TrustError
from fedclip_secure.transport.tls import bootstrap_context, client_context, enrolment_context, server_context
from tests.transport.loopback import Federation


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation.create(tmp_path)


def test_every_context_speaks_tls_1_3_alone(federation: Federation) -> None:
    client = client_context(federation.enrol("st-marys"))
    enrolment = enrolment_context((federation.folder / "authority.pem").read_text())
    for context in (federation.server_context(), client, enrolment, bootstrap_context()):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_3


def test_silo_believes_the_pinned_authority_alone(federation: Federation) -> None:
    context = client_context(federation.enrol("st-marys"))
    pinned = ssl.PEM_cert_to_DER_cert((federation.folder / "authority.pem").read_text())
    assert context.get_ca_certs(binary_form=True) == [pinned]
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


def test_missing_server_file_is_named(federation: Federation) -> None:
    with pytest.raises(TrustError, match=r"absent\.pem': is missing; restore it"):
        server_context(federation.folder / "absent.pem", federation.folder / "server-key.pem", federation.folder / "a")


def test_key_of_another_server_is_refused(federation: Federation, tmp_path: Path) -> None:
    other = Federation.create(tmp_path / "other")
    (federation.folder / "server-key.pem").write_bytes((other.folder / "server-key.pem").read_bytes())
    with pytest.raises(TrustError, match="restore them together"):
        federation.server_context()


def test_identity_whose_files_changed_is_refused(federation: Federation) -> None:
    identity = federation.enrol("st-marys")
    (identity.folder / "certificate.pem").write_text("garbage")
    with pytest.raises(TrustError, match="st-marys: cannot be used"):
        client_context(identity)


@pytest.mark.parametrize("pem", ["", "garbage"])
def test_authority_that_is_no_certificate_is_refused(pem: str) -> None:
    with pytest.raises(TrustError, match="not an authority's certificate"):
        enrolment_context(pem)
