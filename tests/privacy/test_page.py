from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import pytest

from fedclip_secure.errors import TrustError
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.privacy.accounting.plan_cost import PlannedRun
from fedclip_secure.privacy.ledger.entries import HOUR
from fedclip_secure.privacy.ledger.receipts import open_receipt
from fedclip_secure.privacy.page.curves import Curve, most_true_positives, over_rounds, profile, surely_reached
from fedclip_secure.privacy.page.output import write_report
from fedclip_secure.privacy.page.page import render_page
from fedclip_secure.privacy.report.document import TESTS, Attack, Estimate, Limit, Rates
from fedclip_secure.privacy.report.parties import Cost, most_hurt, parties
from fedclip_secure.privacy.report.silo_report import SiloFacts, report_body
from fedclip_secure.privacy.verification.verify import verify
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.accepted import Accepted
from fedclip_secure.silo.report import load_audit
from tests.privacy.reports import AUDIT, CODE, NOW, Site, body_of, contract, plain_contract, replace


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def report(site: Site) -> bytes:
    facts = site.trained(rounds=5, crash_in=3, limit=Limit(epsilon=8.0, delta=1e-5))
    return site.signed(report_body(replace(facts, audit=AUDIT, prv=Estimate(library="opacus 1.6.0", epsilon=4.863))))


@pytest.fixture(scope="module")
def page(report: bytes) -> str:
    return render_page(report)


class Reader(HTMLParser):
    """Tags with their attributes, and the text."""

    VOID = frozenset({"meta", "br", "link", "img", "path", "use"})

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open[-1] in ("li", "dt", "dd", "tr", "td", "th", "p") and self.open[-1] != tag:
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def spaced(page: str) -> str:
    """The text with single spaces, also between the cells of a table and what stands below another in one."""
    return re.sub(r"\s+", " ", read(re.sub(r"<(td|small|h2|h3|th)\b", r" <\1", page)).text)


def test_the_claim_stands_on_the_page_word_for_word(page: str, report: bytes) -> None:
    text = read(page).text
    body = body_of(report)
    assert body["claim"]["sentence"] in text
    for part in ("scope", "not_covered", "trust", "assumptions"):
        for item in body[part]:
            assert all(item[key] in text for key in ("text", "what", "because") if key in item)
    for digits in (body["contract"]["digest"], body["roster"]["digest"]):
        assert digits in text.replace(" ", "")


def test_nothing_runs_on_the_page_and_nothing_comes_from_elsewhere(page: str) -> None:
    reader = read(page)
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    for _, attributes in reader.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"https?:|@import|url\((?!#)", page)


def test_pictures_take_the_colours_of_the_page_in_light_and_dark(page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 3
    for picture in pictures:
        assert "var(--ink)" in picture
        assert not re.search(r"#[0-9a-f]{6}\b", picture)
        assert "font-family" not in picture
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_ids_of_several_pictures_do_not_meet(page: str) -> None:
    ids = [attributes["id"] for _, attributes in read(page).tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_light_has_a_word_and_a_mark_beside_its_colour(page: str, report: bytes) -> None:
    for item in body_of(report)["assumptions"]:
        assert re.search(rf'class="chip {item["state"]}"><span class="mark"[^>]*>.</span>{item["state"]}<', page)


def test_one_report_gives_one_page_whatever_the_persons_matplotlib(report: bytes, page: str) -> None:
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert render_page(report) == page


def test_what_a_stranger_wrote_is_shown_as_text(site: Site) -> None:
    nasty = "<script>alert(1)</script>\"'&{{7*7}}"
    facts = site.trained("birch", rounds=1)
    audit = AUDIT.model_copy(update={"self_tests": [AUDIT.self_tests[0].model_copy(update={"shows": nasty})]})
    data = site.signed(
        report_body(replace(facts, versions={nasty: nasty}, audit=audit, prv=Estimate(library=nasty, epsilon=9.0))),
        "birch",
    )
    page = render_page(data)
    assert "<script" not in page
    assert "49" not in read(page).text.split("Versions")[1][:80]
    assert nasty in read(page).text


def test_the_page_of_a_plan_without_privacy_claims_nothing_and_says_so(tmp_path: Path) -> None:
    site = Site(tmp_path, plain_contract())
    page = render_page(site.signed(report_body(SiloFacts(site.agreed, site.roster, "oak", NOW))))
    assert "No privacy is claimed" in page
    assert "<svg" not in page
    assert "Not protected" in page


def test_the_page_of_a_federation_names_who_is_missing(site: Site, report: bytes) -> None:
    data = site.federation([report])
    text = read(render_page(data)).text
    assert body_of(data)["claim"]["sentence"] in text
    assert "2 of 3 silos have not reported: birch, cedar" in text


def test_the_page_of_a_federation_shows_what_is_unprotected_and_what_the_coordinator_holds(
    site: Site, report: bytes
) -> None:
    data = site.federation([report])
    text, body = read(render_page(data)).text, body_of(data)
    for item in body["reports"][0]["body"]["scope"]:
        assert (item["what"] in text) == (item["status"] == "unprotected")
    assert all(model["digest"][:16] in text for model in body["models"])
    head = open_receipt(bytes.fromhex(body["receipts"][0]), site.public(AGGREGATOR)).head.hex()
    assert head[:16] in text
    assert head not in text


def test_both_pages_name_method_encoder_and_classes(site: Site, report: bytes, page: str) -> None:
    for made in (page, render_page(site.federation([report]))):
        text = spaced(made)
        assert "method fedclip encoder none here: 8 features from files of the silos classes a, b" in text


OFFICER: dict[str, Any] = {
    "purpose": "triage, under evaluation",
    "contact": "privacy at the hospital",
    "retention": "deleted after two years",
}
ACCURACY = {"data": "public X-rays", "without_noise": {"a": 0.9, "b": 0.8}, "with_noise": {"a": 0.89, "b": 0.61}}


def test_both_pages_say_with_whom_in_numbers(site: Site, report: bytes, page: str) -> None:
    for made in (page, render_page(site.federation([report]))):
        text = spaced(made)
        for fact in (
            "silos 3: birch, cedar, oak",
            "coordinator's server localhost",
            "silos that may collude (c) 1 So many, together with a coordinator that lies cannot open the update",
            "shares needed (t) 3 of 3 So many silos must answer before a sum is opened.",
            "smallest sum 3 silos No sum that is opened has fewer in it: 2 beside those that may collude.",
        ):
            assert fact in text


def test_the_numbers_of_the_parties_are_those_that_rounds_are_held_to() -> None:
    for silos, agreed in ((5, {"colluding": 2}), (9, {"min_silos": 8}), (7, {"threshold": "honest_but_curious"})):
        names = [f"silo-{number}" for number in range(silos)]
        plan = contract(secure_aggregation={"weights": "equal", **agreed})
        roster = Site(Path(), plan, names).roster
        terms = Terms.of(plan, roster)
        found = {fact.name: fact.value for fact in parties(plan.plan, roster)}
        assert found["shares needed (t)"] == f"{terms.threshold} of {silos}"
        assert found["smallest sum"] == f"{terms.floor} silos"
        assert found["silos that may collude (c)"] == str(terms.colluding)


def test_a_page_says_for_what_whom_to_ask_and_what_becomes_of_the_model_or_that_nobody_said(
    tmp_path: Path, page: str
) -> None:
    assert (
        "purpose not stated in the plan whom to ask not stated in the plan what becomes of the model not stated "
        in spaced(page)
    )
    site = Site(tmp_path, contract(**OFFICER))
    text = spaced(render_page(site.report(rounds=1)))
    for name, said in zip(("purpose", "whom to ask", "what becomes of the model"), OFFICER.values(), strict=True):
        assert f"{name} {said}" in text


def test_what_noise_costs_each_class_is_the_coordinators_word_or_is_not_given(tmp_path: Path, page: str) -> None:
    assert "The plan gives no figure." in spaced(page)
    site = Site(tmp_path, contract({"accuracy": ACCURACY}))
    data = site.report(rounds=1)
    for made in (render_page(data), render_page(site.federation([data]))):
        text = spaced(made)
        assert "The coordinator's word, in the plan: measured on public X-rays. Nobody has checked it" in text
        assert "a 90.0 % 89.0 % -1.0 b 80.0 % 61.0 % -19.0" in text
        assert "the noise costs b most (19.0 points), and a least (1.0)" in text
        assert "gives no figure" not in text


def test_who_computed_each_figure_is_named(page: str) -> None:
    text = spaced(page)
    assert re.search(r"PLD, claimed [\d.]+ dp-accounting [\d.]+; the losses of one step by this program", text)
    assert re.search(r"RDP, never smaller [\d.]+ this program, after Mironov, Talwar & Zhang 2019", text)


def test_tests_are_what_the_silo_says_with_their_hour_and_the_code(page: str) -> None:
    text = spaced(page)
    assert "3 days before the first charge of this run and 14 days before this report. No file can show" in text
    assert f"code tested, says the silo {CODE} code that trained, by the ledger {CODE}" in text
    assert "Versions when this report was written, as the silo states them" in text
    assert page.count('<span class="chip said">') == 3 + 1 + len(TESTS)  # three assumptions, the legend, the tests
    assert ">tested<" not in page


def test_tests_of_the_hour_in_which_training_began_are_not_said_to_have_come_first(tmp_path: Path) -> None:
    site = Site(tmp_path)
    facts = site.trained(rounds=1)
    entries = [item["entry"] for item in body_of(site.signed(report_body(facts)))["ledger"]["entries"]]
    (charged,) = {entry["at"] for entry in entries if entry["kind"] == "reserve"}
    for hours, said in (
        (0, "in the hour of the first charge of this run and"),
        (-5, "5 hours before the first charge of this run and"),
        (1, "1 hour after the first charge of this run and"),
    ):
        at = charged // HOUR * HOUR + hours * HOUR
        data = site.signed(report_body(replace(facts, audit=AUDIT.model_copy(update={"at": at}))))
        text = spaced(render_page(data))
        assert said in text
        assert ("which of the two came first is not known" in text) == (hours == 0)


def test_audit_that_was_typed_by_hand_is_the_silos_word_and_of_other_code(tmp_path: Path) -> None:
    site = Site(tmp_path / "site")
    passed = [{"name": name, "passed": True, "shows": "all is well"} for name in TESTS]
    typed = {"at": AUDIT.at, "code": "7" * 64, "attack": None, "self_tests": passed}
    (tmp_path / "audit.json").write_text(json.dumps({"plan": site.agreed.pin, "audit": typed}))
    audit = load_audit(tmp_path, cast(Accepted, SimpleNamespace(contract=site.agreed)))
    assert audit is not None
    data = site.signed(report_body(replace(site.trained(rounds=1), audit=audit)))
    assert verify(data).passed, "no file can show who typed it"
    text = spaced(render_page(data))
    assert (
        "The silo says that it tested them on synthetic records, and that every test passed. No file can show" in text
    )
    assert (
        "It tested other code than all or a part of the run was trained with, and its tests say nothing of that" in text
    )


def test_the_ledgers_times_are_shown_as_whole_hours(page: str) -> None:
    assert re.search(r'class="when">\d{4}-\d\d-\d\d \d\d h<', page)
    assert not re.search(r'class="when">[^<]*:', page)


def test_rounds_are_counted_in_whole_numbers_below_the_picture(page: str) -> None:
    (picture,) = re.findall(r'<svg[^>]*aria-label="Epsilon over rounds".*?</svg>', page, re.DOTALL)
    before = picture.split("rounds trained")[0]
    assert re.findall(r">([\d.]+)</text>", before)
    assert not re.search(r">\d+\.\d+</text>", before)


def test_a_report_that_does_not_pass_leaves_no_file(tmp_path: Path, report: bytes) -> None:
    with pytest.raises(TrustError):
        write_report(tmp_path / "out", report.replace(b'"lungs"', b'"lunge"', 1))
    assert not (tmp_path / "out").exists()
    assert all(path.is_file() for path in write_report(tmp_path / "out", report))


def test_a_long_ledger_shows_its_newest_charges_and_counts_the_rest(tmp_path: Path) -> None:
    long = contract({"steps_per_round": 2}, training={"rounds": 70, "optimizer": {"name": "adam", "lr": 1e-3}})
    site = Site(tmp_path, long)
    page = render_page(site.report(rounds=70))
    assert page.count('class="when"') == 60
    assert "10 further charge(s)" in page


def test_neither_page_speaks_of_compliance_or_anonymity(page: str) -> None:
    assert not re.search("complian|anonym", page.lower())


def test_what_does_not_pass_gets_no_page(site: Site, report: bytes) -> None:
    body = body_of(report)
    body["claim"]["sentence"] = "Everything is safe."
    for data, check in ((b"{}", "schema"), (report[:-1], "encoding"), (site.signed(body), "wording")):
        with pytest.raises(TrustError, match=f"does not pass: {check}"):
            render_page(data)


# Curves


@pytest.fixture(scope="module")
def planned() -> Any:
    return PlannedRun.of(contract())


def test_epsilon_rises_over_rounds_to_the_claim(planned: PlannedRun) -> None:
    curve = over_rounds(planned)
    assert (curve.x[0], curve.y[0], curve.x[-1]) == (0, 0, 6)
    assert np.all(np.diff(curve.y) > 0)


def test_the_profile_falls_through_the_claim(planned: PlannedRun) -> None:
    epsilon = float(over_rounds(planned).y[-1])
    pairs = profile(planned, epsilon)
    assert np.all(np.diff(pairs.y) <= 0)
    assert np.interp(epsilon, pairs.x, pairs.y) == pytest.approx(1e-5, rel=0.5)


def test_no_attack_on_a_plain_gaussian_gets_above_the_bound() -> None:
    from scipy.stats import norm

    run = PlannedRun.of(
        contract({"noise_multiplier": 1.0, "sample_rate": 1.0, "steps_per_round": 1, "max_retrains": 0})
    )
    assert run is not None
    shift = np.sqrt(run.total.steps)
    rates = np.linspace(0.001, 0.999, 101)
    best = norm.cdf(norm.ppf(rates) + shift)  # the likelihood-ratio test's
    bound = most_true_positives(profile(run, float(over_rounds(run).y[-1])), rates)
    assert np.all(bound >= best - 1e-9)
    assert np.all(bound <= best + 0.02)


def test_what_an_attack_at_the_bound_surely_reached_stays_below_it() -> None:
    from scipy.stats import norm

    coins = np.random.default_rng(5)
    cuts = np.linspace(-3, 4, 40)
    above = 0
    for _ in range(200):
        absent, present = coins.normal(0, 1, 5000), coins.normal(1, 1, 5000)
        curve = [
            Rates(false_positives=float((absent > cut).mean()), true_positives=float((present > cut).mean()))
            for cut in cuts
        ]
        attack = Attack(canaries=10_000, guesses=4000, right=2000, confidence=0.95, epsilon_at_least=0.0, curve=curve)
        reached = surely_reached(attack)
        best = norm.cdf(norm.ppf(reached.x) + 1)
        above += bool(np.any(reached.y > best))
        assert len(reached.x) > 10
        assert np.all(reached.y > reached.x)
    assert above <= 10  # 5 % of 200; the bound holds for all points together and is seldom tight


def test_an_attack_no_better_than_guessing_has_no_dots() -> None:
    curve = [Rates(false_positives=x / 10, true_positives=x / 10) for x in range(11)]
    attack = Attack(canaries=10_000, guesses=4000, right=2000, confidence=0.95, epsilon_at_least=0.0, curve=curve)
    assert len(surely_reached(attack).x) == 0
    assert len(surely_reached(attack.model_copy(update={"confidence": 1.0})).x) == 0


def test_the_bound_of_no_information_is_guessing() -> None:
    rates = np.linspace(0, 1, 11)
    nothing = Curve(np.array([0.0]), np.array([0.0]))
    np.testing.assert_allclose(most_true_positives(nothing, rates), rates)


def test_no_negative_zero_is_told_of_a_class_that_loses_next_to_nothing() -> None:
    found = [Cost("person", 0.9, 0.5), Cost("guitar", 0.6, 0.5999)]
    assert f"{found[1].points:+.1f}" == "+0.0"
    assert most_hurt(found).endswith("costs person most (40.0 points), and guitar least (0.0).")
