"""What is said of a silo's limit that was lowered, raised, taken away, or that nobody recorded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedclip_secure.privacy.accounting.privacy_filter import Cap
from fedclip_secure.privacy.ledger.entries import Limited, chain_of
from fedclip_secure.privacy.ledger.ledger import Ledger
from fedclip_secure.privacy.page.page import render_page
from fedclip_secure.privacy.report.document import Limit
from fedclip_secure.privacy.report.silo_report import report_body
from tests.privacy.books import TERMS, Books, terms, units
from tests.privacy.reports import Site, contract, rewrite
from tests.privacy.test_verifiers_agree import judgement

DELTA = 1e-5
SOME = units(range(5))
OVER_ALL = "Runs on the same data do not add up without end"


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    with Books(tmp_path / "ledger") as books:
        yield books


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


def limit(epsilon: float | None, delta: float = DELTA) -> Limit | None:
    return None if epsilon is None else Limit(epsilon=epsilon, delta=delta)


def light(body: dict[str, Any]) -> tuple[str, str]:
    (item,) = [item for item in body["assumptions"] if item["text"] == OVER_ALL]
    return item["id"], item["state"]


@pytest.mark.parametrize(
    ("then", "today", "wanted"),
    [
        (8.0, 8.0, ("runs-fit", "shown")),
        (8.0, 1.0, ("limit-below-run", "open")),
        (None, 1.0, ("limit-below-run", "open")),
        (20.0, 8.0, ("limit-lowered", "open")),
        (None, 8.0, ("limit-lowered", "open")),
        (8.0, 20.0, ("limit-raised", "open")),
        (8.0, None, ("limit-removed", "open")),
        (None, None, ("no-limit", "open")),
    ],
)
def test_report_says_what_became_of_the_limit_that_its_run_was_admitted_under(
    tmp_path: Path, then: float | None, today: float | None, wanted: tuple[str, str]
) -> None:
    site = Site(tmp_path)
    body = report_body(replace(site.trained(rounds=2, limit=limit(then)), limit=limit(today)))
    assert light(body) == wanted
    assert judgement(site.signed(body))


def test_larger_delta_is_a_larger_limit(tmp_path: Path) -> None:
    site = Site(tmp_path)
    facts = site.trained(rounds=1, limit=limit(8.0))
    assert light(report_body(replace(facts, limit=limit(8.0, 1e-4))))[0] == "limit-raised"
    assert light(report_body(replace(facts, limit=limit(8.0, 1e-6))))[0] == "limit-lowered"


def test_page_of_a_run_above_the_limit_of_today_says_so(tmp_path: Path) -> None:
    site = Site(tmp_path)
    facts = replace(site.trained(rounds=5, limit=limit(8.0)), limit=limit(1.0))
    page = " ".join(render_page(site.signed(report_body(facts))).split())
    assert "the limit was lowered, or set, since the run began, or the silo will not train it to its end" in page
    assert "limit&#39;s budget this run as a whole takes 1" in page.replace("limit's", "limit&#39;s")


def test_limit_that_was_raised_within_a_run_is_noted_before_its_next_round(books: Books) -> None:
    ledger = books.open()
    run = ledger.open_run(TERMS, SOME, Cap(8.0, DELTA))
    run.settle(run.reserve(1))
    ledger = books.open()
    ledger.open_run(TERMS, SOME, Cap(9.0, DELTA))
    assert not any(isinstance(entry, Limited) for entry in chain_of(ledger.entries()).entries), "nothing is trained yet"
    run = ledger.open_run(TERMS, SOME, Cap(9.0, DELTA))
    run.settle(run.reserve(2))
    run.reserve(3)
    kinds = [entry.kind for entry in chain_of(ledger.entries()).entries]
    assert kinds == ["begin", "reserve", "settle", "limit", "reserve", "settle", "reserve"]
    assert [found and found.epsilon for found in run.state.limits] == [8.0, 9.0]


def test_limit_raised_between_two_runs_of_one_ledger_is_not_called_shown(tmp_path: Path) -> None:
    site = Site(tmp_path)
    first = site.trained(rounds=2, limit=limit(8.0))
    assert light(report_body(first)) == ("runs-fit", "shown")
    site.agreed = contract({"max_retrains": 0})
    second = site.trained(rounds=2, limit=limit(20.0))
    for facts in (second, replace(first, entries=second.entries, limit=limit(20.0))):
        body = report_body(facts)
        assert light(body) == ("limit-raised", "open")
        assert judgement(site.signed(body))
        body["assumptions"][-1] = report_body(first)["assumptions"][-1]
        assert not judgement(site.signed(body))


def test_ledger_that_does_not_record_limits_leaves_the_limit_a_word(site: Site) -> None:
    facts = site.trained("birch", rounds=2, limit=limit(8.0))
    body = report_body(facts)
    rewrite(body, site.keys["birch"], lambda entries: entries[0].pop("limit"))
    assert not judgement(site.signed(body, "birch")), "its light must change with it"
    body["assumptions"][-1] = {
        "id": "limit-unrecorded",
        "text": OVER_ALL,
        "state": "stated",
        "because": "The silo leaves out whatever reached its limit. That this limit stood from the first run on is its "
        "word: the ledger does not record it for every run.",
    }
    body["ledger"] |= {"receipts": [], "uploaded": []}
    body["assumptions"][3] = report_body(replace(facts, receipts=()))["assumptions"][3]
    assert judgement(site.signed(body, "birch"))


def test_another_limit_of_another_silo_of_the_house_leaves_the_limit_a_word(tmp_path: Path) -> None:
    """The order of a limit must have been fixed before the first run: the other silo's runs are charged at it, too."""
    site = Site(tmp_path)
    (tmp_path / "birch").symlink_to(tmp_path / "oak")
    site.trained("oak", rounds=1, limit=limit(9.0))
    body = report_body(site.trained("birch", rounds=1, limit=limit(8.0)))
    assert light(body) == ("limit-kept", "stated")
    assert judgement(site.signed(body, "birch"))


def told(ledger: Ledger, epsilon: float | None) -> list[str]:
    return ledger.warnings(None if epsilon is None else Cap(epsilon, DELTA))


def test_person_is_told_that_the_limit_is_another_than_at_the_newest_run(books: Books) -> None:
    ledger = books.open()
    assert told(ledger, 8.0) == []
    ledger.open_run(TERMS, SOME, Cap(4.0, DELTA))
    assert told(ledger, 4.0) == []
    was = "policy.max_epsilon was 4 (delta 1e-05) for the run of federation pets (entry of 2027-01-15 08 h UTC), "
    (raised,) = told(ledger, 8.0)
    assert raised == (
        f"{was}and is now 8 (delta 1e-05): what held for the old limit does not hold for the new one, and reports "
        "say that it was raised; set it back unless that was decided"
    )
    assert told(ledger, None)[0].startswith(f"{was}and is now not set: what held")
    assert told(ledger, 3.0) == [
        f"{was}and is now 3 (delta 1e-05): units that have spent more take part in no further run, and reports say "
        "that it was lowered"
    ]
    assert told(books.open("lab-b"), 8.0) == [], "each limit is of whoever has set it"


def test_person_is_told_that_the_ledger_does_not_know_the_limit_of_before(books: Books) -> None:
    from tests.privacy.test_ledger import as_of_version_1

    books.open().open_run(terms(), SOME, None)
    as_of_version_1(books)
    ledger = books.open()
    assert told(ledger, None) == []
    assert told(ledger, 8.0) == [
        "the ledger does not record the max_epsilon of this silo's run of 2027-01-15 08 h UTC: if it was raised "
        "since, what held for the old limit does not hold for the new one"
    ]
