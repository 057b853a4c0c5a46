from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from fedclip_secure.errors import ConfigError, TrustError
from fedclip_secure.privacy.accounting.accountant import epsilon
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.privacy.report.document import TESTS, Attack, Audit, Estimate, Limit, SelfTest, json_schema
from fedclip_secure.privacy.report.figures import tolerance
from fedclip_secure.privacy.report.silo_report import SiloFacts, report_body
from fedclip_secure.privacy.report.wording import small, times
from fedclip_secure.privacy.verification.verify import verify
from tests.privacy.reports import AUDIT, NOW, Site, contract, plain_contract

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> SiloFacts:
    site = Site(tmp_path_factory.mktemp("site"))
    return site.trained(rounds=3, crash_in=2, limit=Limit(epsilon=8.0, delta=1e-5))


@pytest.fixture(scope="module")
def body(facts: SiloFacts) -> dict[str, Any]:
    return report_body(replace(facts, audit=AUDIT))


def test_claim_is_for_the_whole_plan_and_says_what_is_spent_beside_it(body: dict[str, Any]) -> None:
    claim = body["claim"]
    assert claim["epsilon"] == pytest.approx(epsilon([Event(1.0, 64 / 1200, 180)], 1e-5))
    assert claim["spent"]["epsilon"] == pytest.approx(epsilon([Event(1.0, 64 / 1200, 120)], 1e-5))
    assert claim["spent"]["epsilon"] < claim["epsilon"] < claim["replace_one"]
    assert (claim["spent"]["reservations"], claim["spent"]["trained"], claim["spent"]["retrains"]) == (4, [1, 2, 3], 1)
    assert [group["units"] for group in claim["groups"]] == [1, 2, 5, 10]
    assert claim["groups"][0]["epsilon"] == claim["epsilon"]


def test_sentence_has_the_silo_the_unit_and_both_figures(body: dict[str, Any]) -> None:
    sentence = body["claim"]["sentence"]
    for part in ("any one record", "oak", "lungs", f"ε = {body['claim']['epsilon']:.4f}", "10⁻⁵ (δ)"):
        assert part in sentence


def test_nothing_is_called_compliant_or_anonymous(body: dict[str, Any]) -> None:
    plain = report_body(SiloFacts(plain_contract(), _roster(), "oak", NOW))
    for made in (body, plain):
        text = json.dumps(made).lower()
        assert "complian" not in text
        assert "anonym" not in text


def _roster() -> Any:
    return Site(Path("/nonexistent")).roster


def test_a_plan_without_privacy_gets_a_report_that_claims_nothing() -> None:
    body = report_body(SiloFacts(plain_contract(), _roster(), "oak", NOW))
    assert body["claim"] is body["ledger"] is body["accounting"] is body["mechanism"] is body["lifetime"] is None
    states = {item["id"]: item["status"] for item in body["scope"]}
    assert states["update-plain"] == states["weight-masked"] == states["counts"] == "unprotected"
    assert "accounted" not in states.values()
    assert body["not_covered"][0]["id"] == "no-privacy"


def test_scope_follows_from_the_plan_alone(facts: SiloFacts, body: dict[str, Any], tmp_path: Path) -> None:
    other = report_body(replace(facts, entries=(), receipts=(), audit=None, units_at_least=None, limit=None, models={}))
    for part in ("scope", "not_covered", "trust", "mechanism"):
        assert body[part] == other[part]
    assert {item["status"] for item in body["scope"]} == {"accounted", "public", "unprotected"}


def test_two_accountants_that_agree_are_shown_and_pld_is_claimed(facts: SiloFacts) -> None:
    pld = report_body(facts)["accounting"]["pld"]
    made = report_body(replace(facts, prv=Estimate(library="opacus 1.6.0", epsilon=pld + 0.9 * tolerance(pld))))
    assert made["accounting"]["agree"] is True
    assert made["claim"]["epsilon"] == pld


def test_where_accountants_disagree_the_larger_is_claimed_and_flagged(facts: SiloFacts) -> None:
    pld = report_body(facts)["accounting"]["pld"]
    for prv, larger in ((pld + 0.5, pld + 0.5), (pld - 0.5, pld)):
        made = report_body(replace(facts, prv=Estimate(library="opacus 1.6.0", epsilon=prv)))
        assert made["accounting"]["agree"] is False
        assert made["claim"]["epsilon"] == larger
        (second,) = [item for item in made["assumptions"] if item["id"].startswith("second-accountant")]
        assert (second["id"], second["state"]) == ("second-accountant-differs", "open")


def test_that_a_second_accountant_agrees_is_the_silos_word(facts: SiloFacts) -> None:
    pld = report_body(facts)["accounting"]["pld"]
    made = report_body(replace(facts, prv=Estimate(library="opacus 1.6.0", epsilon=pld)))
    states = {item["id"]: item["state"] for item in made["assumptions"]}
    assert (states["arithmetic"], states["second-accountant"]) == ("shown", "stated")
    assert {item["id"]: item["state"] for item in report_body(facts)["assumptions"]}["second-accountant-none"] == "open"


def test_a_ledger_is_shown_only_up_to_its_last_receipt(facts: SiloFacts) -> None:
    (item,) = [item for item in report_body(facts)["assumptions"] if item["id"] == "ledger"]
    assert "before the last receipt" in item["text"]
    assert "left out together with its receipt" in item["because"]


def test_the_mechanism_is_said_to_be_tested_only_where_every_test_of_the_audit_is_there(facts: SiloFacts) -> None:
    def light(tests: list[SelfTest]) -> object:
        audit = AUDIT.model_copy(update={"self_tests": tests})
        made = report_body(replace(facts, audit=audit))["assumptions"]
        return next(item["id"] for item in made if item["id"].startswith("mechanism"))

    every = AUDIT.self_tests
    assert light(every) == "mechanism-said"
    for some in ([], every[:-1], [*every[:-1], every[0]], [*every, every[0]]):
        assert light(some) == "mechanism-unaudited"
    assert light([every[0].model_copy(update={"passed": False})]) == "mechanism-failed"


def test_the_tests_that_a_report_knows_are_those_of_the_audit() -> None:
    from fedclip_secure.audit.selftest import run_audit

    audit = run_audit(contract({"sample_rate": 0.1}).plan, 1.0).for_report()
    assert tuple(test.name for test in audit.self_tests) == TESTS
    assert Audit.model_validate(audit.model_dump()) == audit  # its texts can be printed


@pytest.mark.parametrize(
    "edit",
    [
        {"name": "certified by the ministry"},
        {"shows": "\u202edliw"},
        {"shows": "\x1b[2J"},
        {"shows": "zero\u200bwidth"},
        {"shows": ""},
        {"shows": "x" * 501},
    ],
    ids=ascii,
)
def test_a_test_has_a_known_name_and_a_text_that_cannot_act_on_a_screen(edit: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        SelfTest.model_validate({"name": "trainer", "passed": True, "shows": "fine", **edit})


def test_an_impossible_attack_is_refused() -> None:
    attack = AUDIT.attack
    assert attack is not None
    for values in ({"right": 4001}, {"guesses": 10_001}):
        with pytest.raises(ValidationError, match="more right guesses than guesses"):
            Attack.model_validate({**attack.model_dump(), **values})


def test_the_mechanism_names_the_method_and_a_loss_only_where_there_is_one() -> None:
    made = report_body(SiloFacts(contract(), _roster(), "oak", NOW))["mechanism"]
    assert (made["method"], made["loss"]) == ("fedclip", "cross_entropy")
    assert made["name"].startswith("DP-SGD")
    agreed = contract({"sample_rate": 1.0, "steps_per_round": 1}, method={"name": "private_prototypes"})
    made = report_body(SiloFacts(agreed, _roster(), "oak", NOW))["mechanism"]
    assert (made["method"], made["loss"]) == ("private_prototypes", None)
    assert made["name"].startswith("One Gaussian sum")


def test_pld_is_never_above_rdp(body: dict[str, Any]) -> None:
    assert body["accounting"]["pld"] <= body["accounting"]["rdp"]


def test_assumptions_are_lit_by_facts_not_by_epsilon(facts: SiloFacts, body: dict[str, Any]) -> None:
    def states(made: dict[str, Any]) -> dict[str, str]:
        return {item["id"]: item["state"] for item in made["assumptions"]}

    assert states(body)["mechanism-said"] == "said"
    assert "tested" not in states(body).values()
    assert states(body)["ledger"] == "shown"
    assert states(body)["runs-fit"] == "shown"
    bare = states(report_body(replace(facts, receipts=(), limit=None)))
    assert bare["ledger-unreceipted"] == "stated"
    assert bare["limit-removed"] == "open", "the ledger has one for this run"
    assert states(report_body(replace(facts, entries=(), receipts=(), limit=None)))["no-limit"] == "open"
    failed = AUDIT.model_copy(update={"self_tests": [AUDIT.self_tests[0].model_copy(update={"passed": False})]})
    assert states(report_body(replace(facts, audit=failed)))["mechanism-failed"] == "open"


def test_lifetime_counts_a_unit_in_every_run_and_the_rest_of_this_one(body: dict[str, Any]) -> None:
    life = body["lifetime"]
    assert life["runs"] == 1
    assert life["this_run"] == pytest.approx(life["every_run"])  # 4 rounds reserved and 2 left
    assert life["this_run"] < life["budget"]


def test_a_receipt_of_another_silo_is_not_taken_in(tmp_path: Path) -> None:
    site = Site(tmp_path)
    facts = site.trained(rounds=1)
    with pytest.raises(TrustError, match="another silo"):
        report_body(replace(facts, receipts=[site.receipt(bytes(32), 1, "birch")]))


@pytest.mark.parametrize(
    ("agreed", "fact"),
    [
        (contract({"noise_multiplier": 0.05, "sample_rate": 1.0}), "nothing can be claimed"),
        (contract(method={"name": "fedclip", "loss": "inbatch"}), "couples records"),
    ],
)
def test_what_nothing_can_be_claimed_for_is_refused(agreed: Any, fact: str) -> None:
    with pytest.raises(ConfigError, match=fact):
        report_body(SiloFacts(agreed, _roster(), "oak", NOW))


def test_every_release_of_a_step_is_charged() -> None:
    once, twice = contract(), contract(method={"name": "feddat"})
    claims = [report_body(SiloFacts(agreed, _roster(), "oak", NOW))["claim"]["epsilon"] for agreed in (once, twice)]
    assert claims[1] > claims[0]


def test_factors_and_probabilities_are_rounded_up_and_readable() -> None:
    assert [times(value) for value in (0.0, 0.01, 1.0, 5.0998, 10.0, 95.3)] == [
        "1.00",
        "1.02",
        "2.72",
        "164",
        "22,027",
        "10⁴²",
    ]
    assert [small(value) for value in (0.5, 1e-5, 2.5e-6)] == ["0.5", "10⁻⁵", "2.5·10⁻⁶"]


def test_schema_in_the_docs_is_that_of_the_models() -> None:
    written = json.loads((ROOT / "docs/report.schema.json").read_text("utf-8"))
    assert written == json_schema(), "write json_schema() to docs/report.schema.json, indented by 1, keys sorted"


def test_reports_keep_to_the_schema(tmp_path: Path, body: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    site = Site(tmp_path)
    reports = [site.report(rounds=2), site.federation([site.report("birch", rounds=1)])]
    plain = Site(tmp_path / "plain", plain_contract())
    reports.append(plain.signed(report_body(SiloFacts(plain.agreed, plain.roster, "oak", NOW))))
    for data in reports:
        validator.validate(json.loads(data))
        assert verify(data).passed
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(json.loads(reports[0]) | {"more": 1})
