from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedclip_secure.errors import TrustError
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.privacy.accounting.accountant import epsilon
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.privacy.report.silo_report import SiloFacts, report_body
from fedclip_secure.privacy.verification.federation_report import FederationFacts, combine
from fedclip_secure.privacy.verification.verify import verify
from tests.privacy.reports import NOW, SILOS, Site, body_of, plain_contract, rewrite

Body = dict[str, Any]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def facts(site: Site) -> dict[str, SiloFacts]:
    return {
        "oak": site.trained("oak", rounds=5, crash_in=2),
        "birch": site.trained("birch", rounds=3),
    }


@pytest.fixture(scope="module")
def data(site: Site, facts: dict[str, SiloFacts]) -> bytes:
    reports = [site.signed(report_body(made), silo) for silo, made in facts.items()]
    return site.federation(reports, [made.receipts[-1] for made in facts.values()])


def failed(data: bytes) -> list[str]:
    return [check.name for check in verify(data).failures]


def test_it_passes_and_holds_the_silos_reports_whole(data: bytes, site: Site) -> None:
    verdict = verify(data)
    assert verdict.passed, verdict.failures
    names = {check.name for check in verdict.checks}
    assert {"signature", "oak: ledger", "birch: receipts", "arithmetic"} <= names
    assert verdict.roster_pin == site.roster.pin


def test_it_says_who_has_not_reported_and_what_the_others_did(data: bytes) -> None:
    lines = {line["silo"]: line for line in body_of(data)["silos"]}
    assert tuple(lines) == SILOS
    assert not lines["cedar"]["reported"]
    assert lines["cedar"]["epsilon"] is None
    assert (lines["oak"]["trained"], lines["oak"]["retrains"]) == ([1, 2, 3, 4, 5], 1)
    assert lines["birch"]["trained"] == [1, 2, 3]


def test_the_worst_silo_and_all_silos_together_are_both_claimed(data: bytes) -> None:
    claim = body_of(data)["claim"]
    assert claim["worst_silo"] == epsilon([Event(1.0, 64 / 1200, 6 * 30)], 1e-5)
    assert claim["all_silos"] == epsilon([Event(1.0, 64 / 1200, 3 * 6 * 30)], 1e-5)


def test_a_report_of_a_run_without_privacy_claims_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path, plain_contract())
    made = site.signed(report_body(SiloFacts(site.agreed, site.roster, "oak", NOW)))
    data = site.federation([made])
    assert verify(data).passed
    assert body_of(data)["claim"] is None


def test_a_closing_round_that_only_validates_ends_with_no_model_of_its_own(tmp_path: Path) -> None:
    site = Site(tmp_path, plain_contract())
    models = {number: bytes(32) for number in (1, 2, 3)}  # of 2 rounds
    body = combine(FederationFacts(site.agreed, site.roster, NOW, models=models))
    assert [model["round"] for model in body["models"]] == [1, 2]
    assert verify(site.signed(body, AGGREGATOR)).passed


def test_a_report_that_does_not_pass_is_not_taken_in(site: Site, facts: dict[str, SiloFacts]) -> None:
    body = report_body(facts["oak"])
    body["claim"]["epsilon"] = 1.0
    with pytest.raises(TrustError, match=r"oak: arithmetic.*ask that silo"):
        site.federation([site.signed(body)])


def test_a_report_that_lacks_an_upload_is_not_taken_in(site: Site, facts: dict[str, SiloFacts]) -> None:
    full = facts["oak"]
    short = report_body(replace(full, entries=full.entries[:-2], receipts=full.receipts[:-1]))
    site.federation([site.signed(short)])  # by itself it is whole
    with pytest.raises(TrustError, match="never had: it was rewritten or shortened"):
        site.federation([site.signed(short)], [full.receipts[-1]])


def test_a_report_of_another_run_is_not_taken_in(site: Site, tmp_path: Path) -> None:
    other = Site(tmp_path)
    with pytest.raises(TrustError, match="oak: roster pin"):
        site.federation([other.report("oak", rounds=1)], [])
    with pytest.raises(TrustError, match="not one that the coordinator of this roster signed"):
        site.federation([other.report("oak", rounds=1)])


def test_two_reports_of_one_silo_are_refused_by_its_name(site: Site, facts: dict[str, SiloFacts]) -> None:
    one = site.signed(report_body(facts["birch"]), "birch")
    with pytest.raises(TrustError, match="two reports are of birch"):
        site.federation([one, one])


def test_uploads_that_a_silo_shows_need_a_receipt_of_the_coordinators_own(
    site: Site, facts: dict[str, SiloFacts], data: bytes
) -> None:
    with pytest.raises(TrustError, match="oak: uploads: oak shows uploads, and no receipt"):
        site.federation([site.signed(report_body(facts["oak"]))], [])
    body = body_of(data)
    body["receipts"].pop()
    assert failed(site.signed(body, AGGREGATOR)) == ["birch: uploads"]


def put(*path: Any, value: Any) -> Callable[[Body], None]:
    def edit(body: Body) -> None:
        place: Any = body
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return edit


EDITS: dict[str, tuple[str, Callable[[Body], None]]] = {
    "a report left out": ("silos", lambda body: body["reports"].pop()),
    "a report twice": ("silos", lambda body: body["reports"].append(body["reports"][0])),
    "a silo said to have reported": ("silos", put("silos", 1, "reported", value=True)),
    "fewer retrains": ("silos", put("silos", 2, "retrains", value=0)),
    "less spent": ("silos", put("silos", 2, "epsilon", value=0.5)),
    "a silo left out": ("silos", lambda body: body["silos"].pop()),
    "fewer rounds planned": ("silos", put("planned_rounds", value=1)),
    "not covered": ("silos", put("not_covered", value=[])),
    "another model": ("silos", put("models", 0, "digest", value="7" * 64)),
    "a model of no round": ("silos", put("models", 4, "round", value=99)),
    "the worst silo lower": ("arithmetic", put("claim", "worst_silo", value=1.0)),
    "all silos lower": ("arithmetic", put("claim", "all_silos", value=5.0)),
    "the sentence": ("arithmetic", put("claim", "sentence", value="All is well.")),
    "no claim": ("arithmetic", put("claim", value=None)),
    "a silo's claim": ("oak: signature", put("reports", 1, "body", "claim", "epsilon", value=1.0)),
    "a receipt that is none": ("receipts", put("receipts", 0, value="00")),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_signed_with_the_coordinators_key_is_caught_by(site: Site, data: bytes, name: str) -> None:
    check, edit = EDITS[name]
    body = body_of(data)
    edit(body)
    assert check in failed(site.signed(body, AGGREGATOR))


def test_a_silo_cannot_sign_it(site: Site, data: bytes) -> None:
    assert failed(site.signed(body_of(data), "oak")) == ["signature"]


def test_a_silo_and_the_coordinator_who_edit_together_still_need_the_receipts(site: Site, data: bytes) -> None:
    body = body_of(data)
    inner = body["reports"][1]["body"]

    def without_the_crash(entries: list[Body]) -> None:
        del entries[3]
        for entry in entries:
            entry["retrain"] = 0 if entry["kind"] == "reserve" else entry.get("retrain")
            if entry["retrain"] is None:
                del entry["retrain"]

    rewrite(inner, site.keys["oak"], without_the_crash)
    from fedclip_secure.privacy.canonical_json import decode

    body["reports"][1] = decode(site.signed(inner))
    assert "oak: receipts" in failed(site.signed(body, AGGREGATOR))
