"""The server's certificate ends, and the federation need not: `serve` makes it anew, `status` shows its end."""

from __future__ import annotations

import asyncio
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fedclip_secure.aggregator import serve as server_module
from fedclip_secure.aggregator.home import init_home, renew_server_certificate
from fedclip_secure.errors import DataError, TrustError
from fedclip_secure.pki.authority import Authority, load_authority
from fedclip_secure.pki.certificates import read_certificate, utc_time, write_certificate
from fedclip_secure.silo.run.link import Link
from tests.aggregator.site import Site
from tests.cli.test_agg_mistakes import run
from tests.disk import file_limit
from tests.waiting import until

DAY = timedelta(days=1)


def dated(home: Path, begins: timedelta, ends: timedelta) -> x509.Certificate:
    """Let the server's certificate have other dates, from now; what it was made to."""
    path, now = home / "server" / "certificate.pem", datetime.now(UTC)
    before = read_certificate(path)
    builder = (
        x509.CertificateBuilder()
        .subject_name(before.subject)
        .issuer_name(before.issuer)
        .public_key(before.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
    )
    for extension in before.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    made = builder.sign(load_authority(home / "authority").key, hashes.SHA256())
    write_certificate(path, made)
    return made


def test_a_server_whose_certificate_has_ended_makes_it_anew_and_silos_notice_nothing(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path)
    old = dated(site.home.folder, -3 * DAY, -1 * DAY)
    assert "ended on" in run("status", "--dir", str(site.home.folder)).output

    async def connect() -> None:
        async with site.serving(), site.client("lab-a") as client:
            await Link(client, tmp_path).offer(site.url)

    asyncio.run(connect())
    new = read_certificate(site.home.server_certificate)
    assert new.public_key() == old.public_key()
    assert new.not_valid_after_utc > datetime.now(UTC) + 390 * DAY
    ended = f"the server's certificate ended on {old.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; made anew until"
    assert any(line.startswith(ended) for line in site.said)
    shown = run("status", "--dir", str(site.home.folder)).output
    assert f"the server's certificate is valid until {new.not_valid_after_utc:%Y-%m-%d}" in shown


def test_a_server_that_outlives_its_certificate_shows_the_new_one_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site.frozen(tmp_path)
    monkeypatch.setattr(server_module, "_CERTIFICATE_POLL", 0.01)

    address = urlsplit(site.url)

    def shown() -> x509.Certificate:
        pem = ssl.get_server_certificate((str(address.hostname), int(address.port or 443)))
        return x509.load_pem_x509_certificate(pem.encode())

    async def connect() -> None:
        async with site.serving():
            first = await asyncio.to_thread(shown)
            dated(site.home.folder, -3 * DAY, timedelta(0))  # as if months had passed
            await until(lambda: any("made anew" in line for line in site.said))
            second = await asyncio.to_thread(shown)
            assert second == read_certificate(site.home.server_certificate) != first
            async with site.client("lab-a") as client:
                await Link(client, tmp_path).offer(site.url)

    asyncio.run(connect())


@pytest.mark.parametrize(("left", "renewed"), [(31, False), (29, True)])
def test_a_certificate_is_made_anew_in_its_last_month_and_not_before(tmp_path: Path, left: int, renewed: bool) -> None:
    home = init_home(tmp_path / "lung", "lung", ["agg.example.org", "::1"], 8443)
    before, authority = read_certificate(home.server_certificate), load_authority(home.authority_folder)
    told = renew_server_certificate(home, authority, before.not_valid_after_utc - left * DAY)
    after = read_certificate(home.server_certificate)
    assert (told is not None) == (after != before) == renewed
    for certificate in (before, after):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert {str(name.value) for name in names} == {"agg.example.org", "::1"}


def test_a_certificate_that_a_clock_ahead_has_made_is_made_anew_once_the_clock_is_right(tmp_path: Path) -> None:
    home = init_home(tmp_path / "lung", "lung", ["localhost"], 8443)
    old = dated(home.folder, 200 * DAY, 597 * DAY)
    now = datetime.now(UTC)
    told = renew_server_certificate(home, load_authority(home.authority_folder), now)
    new = read_certificate(home.server_certificate)
    assert new.not_valid_before_utc <= now < new.not_valid_after_utc
    assert new.public_key() == old.public_key()
    assert told == (
        f"the server's certificate was valid only from {utc_time(old.not_valid_before_utc)}, made by a clock that was "
        f"ahead; made anew until {utc_time(new.not_valid_after_utc)}"
    )


def test_an_authority_of_the_future_is_a_wrong_clock_and_stops_serve(tmp_path: Path) -> None:
    home = init_home(tmp_path / "lung", "lung", ["localhost"], 8443)
    early = Authority(load_authority(home.authority_folder).key, dated(home.folder, DAY, 2 * DAY))
    with pytest.raises(TrustError, match=r"valid only from \d{4}-.*clock says .*set the clock if it is wrong"):
        renew_server_certificate(home, early, datetime.now(UTC))


def test_a_disk_that_refuses_the_new_certificate_is_told_while_the_old_one_is_valid(tmp_path: Path) -> None:
    home = init_home(tmp_path / "lung", "lung", ["localhost"], 8443)
    authority = load_authority(home.authority_folder)
    old = dated(home.folder, -DAY, 27 * DAY)
    with file_limit(10):
        told = renew_server_certificate(home, authority, datetime.now(UTC))
    assert told is not None
    ends = utc_time(old.not_valid_after_utc)
    assert f"the server's certificate ends on {ends} and could not be made anew, is tried daily: '" in told
    assert "free space there" in told
    assert read_certificate(home.server_certificate) == old
    dated(home.folder, -3 * DAY, -DAY)
    with file_limit(10), pytest.raises(DataError, match="free space there"):
        renew_server_certificate(home, authority, datetime.now(UTC))


def test_the_end_of_the_authority_is_told_before_and_then_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = init_home(tmp_path / "lung", "lung", ["localhost"], 8443)
    authority, mine = load_authority(home.authority_folder), read_certificate(home.server_certificate)
    ending = Authority(authority.key, mine)  # ends when the server's certificate does
    last = mine.not_valid_after_utc
    told = renew_server_certificate(home, ending, last - 20 * DAY)
    assert told is not None
    assert f"ends on {last:%Y-%m-%d %H:%M} UTC, and with it every certificate" in told
    over = Authority(authority.key, dated(home.folder, -3 * DAY, -1 * DAY))
    with pytest.raises(TrustError, match=r"expired on .*start a new federation: `fedclip-agg init`"):
        renew_server_certificate(home, over, datetime.now(UTC))


def test_a_disk_that_refuses_the_new_certificate_is_told_by_a_server_that_runs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site.frozen(tmp_path)
    monkeypatch.setattr(server_module, "_CERTIFICATE_POLL", 0.01)

    def refuse(*_: object) -> str:
        raise DataError("'certificate.pem': cannot be written (No space left on device); free space there")

    async def serve() -> None:
        async with site.serving():
            monkeypatch.setattr(server_module, "renew_server_certificate", refuse)
            await until(lambda: any("could not be looked after: 'certificate.pem'" in line for line in site.said))
            async with site.client("lab-a") as client:
                await Link(client, tmp_path).offer(site.url)

    asyncio.run(serve())
