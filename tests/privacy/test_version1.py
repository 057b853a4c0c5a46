"""Reports that version 0.1 wrote: they verify as they did, and nobody can write another one to call itself tested."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from fedclip_secure.privacy.canonical_json import decode
from fedclip_secure.privacy.page.page import render_page
from fedclip_secure.privacy.report.document import SiloReport
from fedclip_secure.privacy.report.silo_report import report_body
from fedclip_secure.privacy.verification.federation_report import FederationFacts, combine
from fedclip_secure.privacy.verification.verify import verify
from tests.privacy.reports import AUDIT, NOW, Site, body_of, replace
from tools import verify_report

FOLDER = Path(__file__).parent / "version1"  # made by version 0.1, whose keys nobody has kept
NAMES = ("silo", "plain", "federation")


def old(name: str) -> bytes:
    return (FOLDER / f"{name}.json").read_bytes()


def judged(data: bytes) -> bool:
    out = verify_report.Printed()
    options = argparse.Namespace(plan=None, roster=None)
    out.check("all", lambda: verify_report.check(out, verify_report.parse(data), options))
    assert verify(data).passed == (out.failed == 0)
    return out.failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_both_verifiers_take_it(name: str) -> None:
    body = body_of(old(name))
    assert body["version"] == 1
    assert judged(old(name))


@pytest.mark.parametrize("name", NAMES)
def test_its_page_calls_nothing_tested(name: str) -> None:
    page = render_page(old(name))
    assert ">tested<" not in page
    assert "chip tested" not in page
    if name == "silo":
        assert body_of(old(name))["assumptions"][6]["state"] == "tested"
        assert '<span class="chip said">' in page


def test_a_new_report_cannot_pass_for_an_old_one(tmp_path: Path) -> None:
    site = Site(tmp_path)
    facts = replace(site.trained(rounds=1), audit=AUDIT)
    body = report_body(facts)
    assert judged(site.signed(body))
    assert not judged(site.signed({**body, "version": 1}))
    undated = AUDIT.model_copy(update={"at": None, "code": None})
    assert not judged(site.signed({**report_body(replace(facts, audit=undated)), "version": 1}))


def test_an_audit_younger_than_its_report_is_refused(tmp_path: Path) -> None:
    site = Site(tmp_path)
    facts = replace(site.trained(rounds=1), audit=AUDIT)
    later = AUDIT.model_copy(update={"at": (NOW + 2_000_000) // 3600 * 3600})
    assert not judged(site.signed(report_body(replace(facts, audit=later))))


def test_a_federations_report_of_version_1_holds_none_of_version_2(tmp_path: Path) -> None:
    site = Site(tmp_path)
    report = site.report(rounds=1)
    wire = bytes.fromhex(body_of(report)["ledger"]["receipts"][-1])
    given = [SiloReport.model_validate(decode(report))]
    body = combine(FederationFacts(site.agreed, site.roster, NOW + 2_000_000, reports=given, receipts=[wire]))
    assert judged(site.signed(body, "aggregator"))
    assert not judged(site.signed({**body, "version": 1}, "aggregator"))
