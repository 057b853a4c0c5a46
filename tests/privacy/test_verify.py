from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedclip_secure.names import AGGREGATOR
from fedclip_secure.privacy.accounting.empirical_epsilon import epsilon_at_least
from fedclip_secure.privacy.canonical_json import encode
from fedclip_secure.privacy.report.document import Limit
from fedclip_secure.privacy.report.silo_report import SiloFacts, report_body
from fedclip_secure.privacy.verification.silo_checks import Expected
from fedclip_secure.privacy.verification.verdict import Verdict
from fedclip_secure.privacy.verification.verify import read_report, verify
from tests.privacy.reports import AUDIT, NOW, Site, body_of, contract, plain_contract, replace, rewrite

Body = dict[str, Any]


@dataclass
class Made:
    site: Site
    data: bytes

    def resigned(self, edit: Callable[[Body], None]) -> Verdict:
        """What a silo that edits its own report and signs it again gets."""
        body = body_of(self.data)
        edit(body)
        return verify(self.site.signed(body))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    site = Site(tmp_path_factory.mktemp("site"))
    return Made(site, site.report(rounds=5, crash_in=3, limit=Limit(epsilon=8.0, delta=1e-5)))


def failed(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.failures]


def test_a_report_passes_and_shows_its_fingerprints(made: Made) -> None:
    verdict = verify(made.data)
    assert verdict.passed, verdict.failures
    assert (verdict.plan_pin, verdict.roster_pin) == (made.site.agreed.pin, made.site.roster.pin)
    assert "receipts" in {check.name for check in verdict.checks}
    assert any("which program ran" in line for line in verdict.cannot_show)


def test_a_report_of_a_plan_without_privacy_passes(tmp_path: Path) -> None:
    site = Site(tmp_path, plain_contract())
    assert verify(site.signed(report_body(SiloFacts(site.agreed, site.roster, "oak", NOW)))).passed


def test_a_report_of_a_silo_that_has_not_trained_passes(tmp_path: Path) -> None:
    site = Site(tmp_path)
    assert verify(site.signed(report_body(SiloFacts(site.agreed, site.roster, "oak", NOW)))).passed


def test_a_ledger_with_an_earlier_run_of_another_plan_passes(tmp_path: Path) -> None:
    earlier = Site(tmp_path)
    earlier.trained(rounds=1)
    later = Site(tmp_path, contract(federation="hearts"))
    later.keys, later.roster = earlier.keys, earlier.roster
    later._ticks = earlier._ticks
    verdict = verify(later.report(rounds=2))
    assert verdict.passed, verdict.failures


def test_1000_random_edits_of_one_byte_all_fail(made: Made) -> None:
    coins = random.Random(20)  # noqa: S311 - which bytes are tried
    for _ in range(1000):
        data = bytearray(made.data)
        data[coins.randrange(len(data))] ^= coins.randrange(1, 256)
        assert not verify(bytes(data)).passed


def test_other_spellings_of_the_same_values_fail(made: Made) -> None:
    value = json.loads(made.data)
    for data in (
        json.dumps(value).encode(),
        json.dumps(value, indent=1).encode(),
        made.data + b"\n",
        made.data.replace(b'"rounds":5', b'"rounds":5.0', 1),
        json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(),
    ):
        assert failed(verify(data))[0] in ("encoding", "schema")


def test_another_silos_key_does_not_sign(made: Made) -> None:
    assert failed(verify(made.site.signed(body_of(made.data), "birch"))) == ["signature"]


def test_pins_of_another_plan_or_roster_fail(made: Made) -> None:
    site = made.site
    assert verify(made.data, Expected(site.agreed.pin, site.roster.pin)).passed
    other = "sha256:" + "0" * 64
    assert failed(verify(made.data, Expected(other, other))) == ["plan pin", "roster pin"]


# What a silo can try with its own key


def reserves(entries: list[Body]) -> list[Body]:
    return [entry for entry in entries if entry["kind"] == "reserve"]


def every(name: str, value: object, kinds: tuple[str, ...] = ("begin", "reserve")) -> Callable[[list[Body]], None]:
    def edit(entries: list[Body]) -> None:
        for entry in entries:
            if entry["kind"] in kinds and name in entry:
                entry[name] = value

    return edit


def without_last_round(entries: list[Body]) -> None:
    del entries[-2:]


def without_the_crash(entries: list[Body]) -> None:
    lost = next(entry for entry in reserves(entries) if entry["round"] == 3)
    entries.remove(lost)
    for entry in reserves(entries):
        entry["retrain"] = 0


def swapped(entries: list[Body]) -> None:
    first, second = reserves(entries)[:2]
    first["round"], second["round"] = second["round"], first["round"]


def chain(edit: Callable[[list[Body]], None]) -> Callable[[Body, Site], None]:
    return lambda body, site: rewrite(body, site.keys["oak"], edit)


def put(path: str, value: object) -> Callable[[Body, Site], None]:
    def edit(body: Body, site: Site) -> None:
        place: Any = body
        *way, last = path.split(".")
        for step in way:
            place = place[int(step) if step.isdigit() else step]
        place[int(last) if last.isdigit() else last] = value

    return edit


def cut(path: str, index: int = -1) -> Callable[[Body, Site], None]:
    def edit(body: Body, site: Site) -> None:
        place: Any = body
        for step in path.split("."):
            place = place[step]
        del place[index]

    return edit


def other_plan(body: Body, site: Site) -> None:
    weaker = contract({"noise_multiplier": 2.0})
    body["contract"] = json.loads(
        encode(
            {
                "digest": weaker.digest.hex(),
                "plan": weaker.plan.model_dump(mode="json"),
                "lock": weaker.lock.model_dump(mode="json"),
            }
        )
    )


def receipt_of(silo: str, agreed: object = None) -> Callable[[Body, Site], None]:
    def edit(body: Body, site: Site) -> None:
        from fedclip_secure.privacy.ledger.entries import SignedEntry

        head = SignedEntry(encode(body["ledger"]["entries"][-1]["entry"]), b"").hash
        body["ledger"]["receipts"][-1] = site.receipt(head, 5, silo).hex()

    return edit


def forged_receipt(body: Body, site: Site) -> None:
    from fedclip_secure.privacy.ledger.receipts import Receipt

    made = Receipt(plan=bytes(32), roster=bytes(32), silo="oak", round=5, attempt=5, head=bytes(32))
    body["ledger"]["receipts"][-1] = made.signed(site.keys["oak"].sign).hex()


def other_key_in_roster(body: Body, site: Site) -> None:
    body["roster"]["members"][0]["key"] = site.public("birch").hex()


EDITS: dict[str, tuple[str, Callable[[Body, Site], None]]] = {
    "sigma of the ledger": ("run", chain(every("noise_multiplier", 2.0))),
    "sampling rate of the ledger": ("run", chain(every("sample_rate", 0.01))),
    "steps of the ledger": ("ledger", chain(every("steps", 3, ("reserve",)))),
    "steps of the run": ("run", chain(lambda e: (every("steps_per_round", 3)(e), every("steps", 3)(e))[0])),
    "rounds of the run": ("run", chain(every("rounds", 500))),
    "retrains of the run": ("run", chain(every("max_retrains", 500))),
    "delta of the ledger": ("run", chain(every("delta", 1e-9))),
    "clipping norm of the ledger": ("run", chain(every("max_grad_norm", 9.0))),
    "the last round dropped": ("receipts", chain(without_last_round)),
    "the crash dropped": ("receipts", chain(without_the_crash)),
    "two rounds swapped": ("receipts", chain(swapped)),
    "times of the ledger": ("receipts", chain(every("at", NOW + 9, ("begin", "reserve", "settle")))),
    "another name of the data": ("receipts", chain(every("set", "0" * 32))),
    "an entry left out unsigned": ("ledger", cut("ledger.entries", 3)),
    "two entries exchanged": ("ledger", lambda body, site: body["ledger"]["entries"].reverse()),
    "another plan": ("receipts", other_plan),
    "another plan under the old fingerprint": ("contract", put("contract.plan.privacy.noise_multiplier", 2.0)),
    "another lock": ("contract", put("contract.lock.noise_multiplier", 2.0)),
    "another key in the roster": ("roster", other_key_in_roster),
    "a lower claim": ("arithmetic", put("claim.epsilon", 1.0)),
    "a lower claim in the sentence": ("wording", put("claim.sentence", "ε = 0.1")),
    "a lower replace-one": ("arithmetic", put("claim.replace_one", 5.0)),
    "a lower group": ("arithmetic", put("claim.groups.3.epsilon", 20.0)),
    "a group left out": ("arithmetic", cut("claim.groups")),
    "less spent": ("arithmetic", put("claim.spent.epsilon", 1.0)),
    "fewer charges": ("arithmetic", put("claim.spent.reservations", 5)),
    "a crash kept quiet": ("arithmetic", put("claim.spent.retrains", 0)),
    "a smaller delta": ("arithmetic", put("claim.delta", 1e-9)),
    "another unit": ("arithmetic", put("claim.unit", "patient")),
    "PLD lower": ("arithmetic", put("accounting.pld", 1.0)),
    "RDP lower": ("arithmetic", put("accounting.rdp", 1.0)),
    "agreement with an accountant that was not run": ("arithmetic", put("accounting.agree", False)),
    "a larger budget": ("arithmetic", put("lifetime.budget", 50.0)),
    "a better order": ("arithmetic", put("lifetime.order", 9)),
    "all runs cheaper": ("arithmetic", put("lifetime.every_run", 0.1)),
    "the mechanism": ("mechanism", put("mechanism.noise_multiplier", 2.0)),
    "an unknown mechanism": ("ledger", chain(every("mechanism", "secret_sauce"))),
    "the scope's status": ("wording", put("scope.5.status", "accounted")),
    "the scope's text": ("wording", put("scope.0.because", "It is perfectly safe.")),
    "an unprotected item left out": ("wording", cut("scope")),
    "not covered left out": ("wording", cut("not_covered", 0)),
    "who is trusted": ("wording", put("trust.0.because", "Nobody.")),
    "an assumption's light": ("wording", put("assumptions.4.state", "shown")),
    "a receipt left out": ("receipts", cut("ledger.receipts")),
    "a round more than receipts": ("receipts", put("ledger.uploaded", [1, 2, 3, 4, 5, 6])),
    "a receipt of another silo": ("receipts", receipt_of("birch")),
    "a receipt by the silo itself": ("receipts", forged_receipt),
    "receipts in another order": ("receipts", lambda body, site: body["ledger"]["receipts"].reverse()),
    "another silo's name": ("signature", put("silo", "birch")),
    "an older clock": ("run", put("at", 5)),
    "a claim of its own": ("schema", put("guarantee", "full")),
    "an unknown version": ("schema", put("version", 3)),
    "the version that called it tested": ("ledger", put("version", 1)),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_signed_with_the_silos_key_is_caught_by(made: Made, name: str) -> None:
    check, edit = EDITS[name]
    verdict = made.resigned(lambda body: edit(body, made.site))
    assert check in failed(verdict), verdict.failures
    assert all(item.shows for item in verdict.failures)


def test_a_figure_claimed_upwards_passes_with_its_sentence(made: Made) -> None:
    def higher(body: Body) -> None:
        body["claim"]["groups"][2]["epsilon"] += 1.0

    assert made.resigned(higher).passed


def test_an_attack_that_proves_more_than_the_claim_is_refused_unless_a_test_failed(made: Made) -> None:
    facts = made.site.trained("cedar", rounds=1)
    attack = AUDIT.attack
    assert attack is not None
    proven = epsilon_at_least(4000, 4000, 10_000, 1e-5, 0.05)
    better = attack.model_copy(update={"right": 4000, "epsilon_at_least": round(proven, 4)})
    audit = AUDIT.model_copy(update={"attack": better})
    verdict = verify(made.site.signed(report_body(replace(facts, audit=audit)), "cedar"))
    assert failed(verdict) == ["arithmetic"]
    assert f"{proven:.4f}, above the claim" in verdict.failures[0].shows
    tests = [AUDIT.self_tests[0].model_copy(update={"passed": False}), *AUDIT.self_tests[1:]]
    honest = audit.model_copy(update={"self_tests": tests})
    assert verify(made.site.signed(report_body(replace(facts, audit=honest)), "cedar")).passed


def test_an_attacks_figure_must_follow_from_its_guesses(made: Made) -> None:
    assert AUDIT.attack is not None
    facts = made.site.trained("birch", rounds=1)
    altered: list[tuple[dict[str, Any], str]] = [
        ({"epsilon_at_least": 0.1}, "the attack's guesses prove an ε of at least 0.2588, and 0.1000 is given"),
        ({"right": 2_400}, "the attack's guesses prove an ε of at least 0.3513, and 0.2588 is given"),
        ({"confidence": 1.0}, "what an attack proves is said with another confidence than 0.95"),
        ({"canaries": 2**52}, "an attack has 4503599627370496 canaries, more than any audit"),
    ]
    for changed, fact in altered:
        audit = AUDIT.model_copy(update={"attack": AUDIT.attack.model_copy(update=changed)})
        verdict = verify(made.site.signed(report_body(replace(facts, audit=audit)), "birch"))
        assert [(item.name, item.shows) for item in verdict.failures] == [("arithmetic", fact)]


def test_what_a_shortened_report_hides_is_said(made: Made) -> None:
    assert any("left out together with their receipts" in line for line in verify(made.data).cannot_show)


def test_rounds_dropped_with_their_receipts_are_found_by_the_coordinators_receipt(made: Made) -> None:
    body = body_of(made.data)
    newest = bytes.fromhex(body["ledger"]["receipts"][-1])
    rewrite(body, made.site.keys["oak"], without_last_round)
    body["ledger"]["entries"] = body_of(made.data)["ledger"]["entries"][:-2]
    del body["ledger"]["receipts"][-1], body["ledger"]["uploaded"][-1], body["claim"]["spent"]["trained"][-1]
    body["claim"]["spent"]["reservations"] -= 1
    data = made.site.signed(body)
    assert verify(data).passed
    assert failed(verify(data, Expected(receipts=[newest]))) == ["receipts"]


# Bytes from anywhere


@given(st.binary(max_size=300))
def test_random_bytes_fail_without_an_exception(data: bytes) -> None:
    assert not verify(data).passed


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(leaf for key, inner in items for leaf in _leaves(inner, (*path, key)))]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_any_place_is_judged_without_an_exception(made: Made, data: st.DataObject) -> None:
    value = json.loads(made.data)
    path = data.draw(st.sampled_from(_leaves(value)[1:]))
    place = value
    for step in path[:-1]:
        place = place[step]
    new = data.draw(_JSON)
    if place[path[-1]] == new:
        return
    place[path[-1]] = new
    try:
        body, signature = value["body"], value["signature"]
        again = made.site.signed(body) if path[0] == "body" else encode({"body": body, "signature": signature})
    except (KeyError, ValueError, TypeError):
        return
    for report in (again, json.dumps(value).encode()):
        verdict = verify(report)
        assert verdict.checks
        assert all(isinstance(check.shows, str) for check in verdict.checks)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 100_000,
        b"1e999999",
        b"NaN",
        b'{"body":{"format":"fedclip-privacy-report","version":1,"kind":[]},"signature":{}}',
        b'{"body":{"format":"fedclip-privacy-report","version":1,"kind":"silo"},"signature":{}}',
        b'{"body":{"format":"fedclip-privacy-report","kind":"silo","version":true},"signature":{}}',
        b'"\\ud800"',
        b"\xff\xfe",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_hostile_bytes_fail_with_words(data: bytes) -> None:
    verdict = verify(data)
    assert not verdict.passed
    assert 0 < len(verdict.failures[-1].shows) < 600
    assert verdict.plan_pin is None


@pytest.mark.parametrize(
    "privacy",
    [
        {"noise_multiplier": 0.001},
        {"noise_multiplier": 10_000.0},
        {"sample_rate": 1e-300},
        {"sample_rate": 1.0},
        {"steps_per_round": 100_000, "max_retrains": 10_000},
        {"delta": 1e-300},
    ],
    ids=str,
)
def test_extreme_plans_are_judged_in_bounded_work(made: Made, privacy: Body) -> None:
    extreme = contract(privacy)

    def edit(body: Body) -> None:
        body["contract"] = {
            "digest": extreme.digest.hex(),
            "plan": extreme.plan.model_dump(mode="json"),
            "lock": extreme.lock.model_dump(mode="json"),
        }

    verdict = made.resigned(edit)
    assert not verdict.passed
    assert all("Traceback" not in check.shows for check in verdict.checks)


def test_only_what_has_the_form_of_a_report_is_read_for_showing(made: Made) -> None:
    from fedclip_secure.errors import TrustError

    assert read_report(made.data).body.kind == "silo"
    with pytest.raises(TrustError, match="no privacy report"):
        read_report(b"{}")


def test_the_aggregator_is_no_silo(made: Made) -> None:
    body = body_of(made.data)
    assert "signature" in failed(verify(made.site.signed(body, AGGREGATOR)))


def test_small_file_of_many_faults_is_refused_at_the_first() -> None:
    for part in ("models", "contract"):
        body = {"format": "fedclip-privacy-report", "kind": "silo", part: [{}] * 1_000_000, "version": 2}
        tracemalloc.start()
        verdict = verify(encode({"body": body, "signature": {}}))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert failed(verdict) == ["schema"]
        assert peak < 600e6


def test_version_1_says_that_it_can_still_be_written(made: Made) -> None:
    first = (Path(__file__).parent / "version1/silo.json").read_bytes()
    assert verify(first).passed
    assert any(
        "oak: It is of version 1. Such a report can still be written" in line for line in verify(first).open_points
    )
    assert not any("version 1" in line for line in verify(made.data).open_points)


@pytest.mark.parametrize("noise", [1e-200, 1e-154, 1e-4, 1e7, 1e200])
def test_noise_that_no_accountant_can_charge_is_no_entry(made: Made, noise: float) -> None:
    for part in ("begin", "reserve"):
        edit = chain(every("noise_multiplier", noise, (part,)))
        assert failed(made.resigned(partial(_edited, edit, made.site))) == ["ledger"]


def _edited(edit: Callable[[Body, Site], None], site: Site, body: Body) -> None:
    edit(body, site)
