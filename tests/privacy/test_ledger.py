from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedclip_secure.errors import ConfigError, DataError, FedClipError, PolicyError, TrustError
from fedclip_secure.privacy.accounting.accountant import epsilon
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.privacy.accounting.privacy_filter import Cap
from fedclip_secure.privacy.ledger.entries import FIRST, Begin, Data, Reserve, Settle, SignedEntry, chain_of
from fedclip_secure.privacy.ledger.ledger import Ledger
from tests.privacy.books import KEYS, START, TERMS, Books, terms, units
from tests.waiting import BOUND

ROOT = Path(__file__).parents[2]
ONE = TERMS.per_round()
DELTA = 1e-5
SOME = units(range(10))


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    with Books(tmp_path / "ledger") as books:
        yield books


def cap_for(rounds: float) -> Cap:
    """A cap that so many rounds as those of TERMS just fit into."""
    low, high = 0.1, 1000.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        cap = Cap(middle, DELTA)
        low, high = (middle, high) if cap.budget < rounds * cap.cost((ONE,)) else (low, middle)
    return Cap(high, DELTA)


def train(ledger: Ledger, plan: int, numbers: range, rounds: int, cap: Cap | None = None) -> None:
    """A run over these units, to its end: one round that costs as much as so many of TERMS."""
    steps = TERMS.steps_per_round * rounds
    run = ledger.open_run(terms(plan=plan, rounds=1, max_retrains=0, steps_per_round=steps), units(numbers), cap)
    assert run.left_out == 0
    run.settle(run.reserve(1))


def kinds(ledger: Ledger) -> list[str]:
    return [entry.kind for entry in chain_of(ledger.entries()).entries]


# What is written


def test_entries_tell_the_hour_alone_for_between_two_of_them_a_silo_trains(books: Books) -> None:
    ledger = books.open()
    run = ledger.open_run(TERMS, SOME, None)
    books.now += 1234
    first = run.reserve(1)
    books.now += 3599 - 1234
    run.settle(first)
    books.now += 1
    run.reserve(2)
    assert [entry.at - START for entry in chain_of(ledger.entries()).entries] == [0, 0, 0, 3600]


def test_run_is_begun_reserved_and_settled_in_signed_entries(books: Books) -> None:
    ledger = books.open()
    assert ledger.head == bytes(32)
    run = ledger.open_run(TERMS, SOME, None)
    first = run.reserve(1)
    assert first.entry == ledger.head
    books.now += 5
    run.settle(first)
    begin, reserve, settle = chain_of(ledger.entries()).entries
    assert isinstance(begin, Begin)
    assert isinstance(reserve, Reserve)
    assert isinstance(settle, Settle)
    assert begin.run == run.run.hex() == reserve.run
    assert (begin.at, reserve.at, settle.at) == (START, START, START)
    assert (begin.federation, begin.plan, begin.silo) == ("pets", (b"p" * 32).hex(), "lab-a")
    assert begin.key == KEYS["lab-a"].public_bytes.hex()
    assert (reserve.event, reserve.round, reserve.retrain) == (ONE, 1, 0)
    assert settle.reservation == first.entry.hex()
    assert ledger.head == ledger.entries()[-1].hash


def test_ledger_that_is_opened_again_goes_on_where_it_stopped(books: Books) -> None:
    ledger = books.open()
    run = ledger.open_run(TERMS, SOME, None)
    run.settle(run.reserve(1))
    before, head = ledger.entries(), ledger.head
    ledger = books.open()
    assert (ledger.entries(), ledger.head) == (before, head)
    again = ledger.open_run(TERMS, SOME[::-1], None)  # in any order
    assert (again.run, ledger.entries()) == (run.run, before)
    again.reserve(2)
    assert kinds(ledger) == ["begin", "reserve", "settle", "reserve"]


def test_ledger_and_key_are_readable_by_their_owner_alone(books: Books) -> None:
    books.open().open_run(TERMS, SOME, None)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (books.folder, books.database, books.key)}
    assert modes == {"ledger": 0o700, "ledger.sqlite": 0o600, "units.key": 0o600}
    assert len(books.key.read_bytes()) == 32


def test_nothing_in_an_entry_depends_on_the_units(books: Books, tmp_path: Path) -> None:
    """Everything but random names, hashes and signatures is equal for 10 units and for 3 others."""
    with Books(tmp_path / "other") as others:
        seen = []
        for place, numbers in ((books, range(10)), (others, range(20, 23))):
            ledger = place.open()
            run = ledger.open_run(TERMS, units(numbers), None)
            run.settle(run.reserve(1))
            entries = [entry.model_dump() for entry in chain_of(ledger.entries()).entries]
            hidden = ("run", "set", "previous", "reservation")
            seen.append([{key: value for key, value in entry.items() if key not in hidden} for entry in entries])
            stored = b"".join(place.files().values())
            assert not any(unit in stored for unit in units(numbers)), "an id stands in the files as it is"
    assert seen[0] == seen[1]


def test_equal_data_have_another_name_in_each_run(books: Books) -> None:
    ledger = books.open()
    train(ledger, 1, range(5), 1)
    train(ledger, 2, range(5), 1)
    begins = [entry for entry in chain_of(ledger.entries()).entries if isinstance(entry, Begin)]
    assert len({begin.set for begin in begins}) == len({begin.run for begin in begins}) == 2


def test_round_that_is_reserved_again_is_a_retrain(books: Books) -> None:
    run = books.open().open_run(terms(max_retrains=3), SOME, None)
    made = [run.reserve(number) for number in (1, 1, 2, 1)]
    assert [(reservation.round, reservation.retrain) for reservation in made] == [(1, 0), (1, 1), (2, 1), (1, 2)]
    assert run.retrains_left == 1
    run = books.open().open_run(terms(max_retrains=3), SOME, None)  # after a crash
    assert (run.reserve(2).retrain, run.retrains_left) == (3, 0)


def test_no_retrain_left_is_refused_and_other_rounds_stay_possible(books: Books) -> None:
    ledger = books.open()
    run = ledger.open_run(TERMS, SOME, None)
    run.reserve(1)
    run.reserve(1)
    before = ledger.entries()
    assert [run.may_train(number) for number in range(5)] == [False, False, True, True, False]
    with pytest.raises(PolicyError, match=r"round 1 was paid for before.*1 retrains are used up; sit this round out"):
        run.reserve(1)
    assert ledger.entries() == before
    assert [run.reserve(number).round for number in (2, 3)] == [2, 3]
    with pytest.raises(PolicyError, match="round 3 was paid for before"):
        run.reserve(3)


@pytest.mark.parametrize("number", [-1, 0, 4, 2**60])
def test_round_that_the_plan_does_not_have_is_refused(books: Books, number: int) -> None:
    run = books.open().open_run(TERMS, SOME, None)
    with pytest.raises(PolicyError, match=rf"round {number} is none of the plan's 3 rounds"):
        run.reserve(number)


def test_another_thread_may_pay(books: Books) -> None:
    """Training has one of its own."""
    ledger = books.open()
    run = ledger.open_run(TERMS, SOME, None)
    with ThreadPoolExecutor(1) as pool:
        run.settle(pool.submit(run.reserve, 1).result())
    assert kinds(ledger) == ["begin", "reserve", "settle"]


def test_reservation_is_settled_once_and_by_its_own_run(books: Books) -> None:
    ledger = books.open()
    first = ledger.open_run(TERMS, SOME, None)
    old = first.reserve(1)
    second = ledger.open_run(terms(plan=2), SOME, None)
    with pytest.raises(ValueError, match="another run was opened"):
        first.reserve(2)
    with pytest.raises(ValueError, match="no open reservation"):
        second.settle(old)
    mine = second.reserve(1)
    second.settle(mine)
    with pytest.raises(ValueError, match="no open reservation"):
        second.settle(mine)
    ledger.close()
    with pytest.raises(ValueError, match="the ledger was closed"):
        second.reserve(2)


def as_of_version_1(books: Books) -> None:
    """Write the ledger's entries anew, as version 0.1 had them; the tables beside them were the same."""
    books.close()
    previous, now = FIRST, dict[str, str]()
    with contextlib.closing(sqlite3.connect(books.database)) as sql, sql:
        rows = sql.execute("SELECT number, entry, signature FROM entries ORDER BY number").fetchall()
        for number, data, signature in rows:
            entry = json.loads(data)
            kept = {name: value for name, value in entry.items() if name not in ("code", "patients", "limit")}
            if "reservation" in kept:
                kept["reservation"] = now[kept["reservation"]]
            key = KEYS[entry["silo"]]
            signed = SignedEntry.signed({**kept, "version": 1, "previous": previous}, key.sign)
            now[SignedEntry(data, signature).hash.hex()] = previous = signed.hash.hex()
            sql.execute("UPDATE entries SET entry = ?, signature = ? WHERE number = ?", (*_blobs(signed), number))


def _blobs(signed: SignedEntry) -> tuple[bytes, bytes]:
    return signed.entry, signed.signature


def test_ledger_of_version_1_is_gone_on_with_and_its_units_stay_charged(books: Books) -> None:
    ledger, cap = books.open(), cap_for(6.5)
    run = ledger.open_run(TERMS, units(range(4)), cap)
    run.settle(run.reserve(1))
    as_of_version_1(books)
    ledger = books.open()
    run = ledger.open_run(TERMS, units(range(4)), cap)
    assert (run.left_out, run.state.codes) == (0, [])
    run.settle(run.reserve(2))
    assert kinds(ledger) == ["begin", "reserve", "settle", "code", "limit", "reserve", "settle"]
    assert run.state.codes == ["0c" * 32]
    ledger.end_runs("pets")
    assert ledger.open_run(terms(plan=2, rounds=5, max_retrains=0), units(range(6)), cap).admitted == {*units([4, 5])}


# Who takes part


def test_admitted_units_are_told_by_their_ids(books: Books) -> None:
    ledger = books.open()
    train(ledger, 1, range(3), 4)
    cap = cap_for(5)
    run = ledger.open_run(TERMS, units([4, 0, 3, 1, 4, 2, 0]), cap)
    assert run.admitted == {*units([4, 3])}
    assert run.left_out == 3  # each counted once


def test_each_unit_is_judged_by_its_own_history_alone(books: Books) -> None:
    """Yesterday's units have 3 rounds behind them, those of the day before 5; a run of 3 and a retrain needs 4."""
    ledger, cap = books.open(), cap_for(8)
    train(ledger, 1, range(10), 2)
    train(ledger, 2, range(4, 10), 3)
    run = ledger.open_run(TERMS, units(range(14)), cap)
    assert run.admitted == {*units([*range(4), *range(10, 14)])}


def test_what_an_unfinished_run_may_still_cost_is_kept_for_it(books: Books) -> None:
    """Else two runs that were admitted on the same remaining budget would overspend it together."""
    ledger, cap, wanted = books.open(), cap_for(7.5), terms(plan=2, max_retrains=0)
    ledger.open_run(TERMS, units(range(5)), cap)
    run = ledger.open_run(terms(plan=1, max_retrains=0), units(range(3, 9)), cap)
    assert run.left_out == 0
    assert ledger.open_run(wanted, units(range(9)), cap).admitted == {*units([0, 1, 2, 5, 6, 7, 8])}
    said = refused(ledger, PolicyError, "for a unit that has spent nothing", terms(plan=4), units([3, 4]), cap)
    held = cap.epsilon_of(7 * cap.cost((ONE,)))
    assert (
        f"unfinished runs hold what may bring it to ε {held:.4g} "
        "(pets at lab-a (plan 70707070, begun 2027-01-15): 4 round(s), pets at lab-a (plan 00000000, begun 2027-01-15)"
        in said
    )
    assert "; 0 such rounds would fit" in said
    assert "`fedclip-silo budget --end FEDERATION`" in said


def test_run_that_is_ended_frees_what_was_kept_for_it_and_reserves_nothing_more(books: Books) -> None:
    ledger, cap = books.open(), cap_for(5.5)
    first = ledger.open_run(terms(federation="cats"), SOME, cap)
    first.settle(first.reserve(1))
    refused(
        ledger,
        PolicyError,
        r"cats at lab-a \(plan 70707070, begun 2027-01-15\): 3 round\(s\)",
        terms(plan=2),
        SOME,
        cap,
    )
    assert books.open().end_runs("cats") == 3
    ledger = books.open()
    assert kinds(ledger) == ["begin", "reserve", "settle", "end"]
    run = ledger.open_run(terms(plan=2), SOME, cap)
    assert run.left_out == 0
    again = ledger.open_run(terms(federation="cats"), SOME, cap)
    assert again.admitted == {*SOME}
    assert not any(again.may_train(number) for number in range(1, 4))
    with pytest.raises(PolicyError, match=r"run of federation cats was ended with `fedclip-silo budget --end`"):
        again.reserve(2)
    assert kinds(ledger) == ["begin", "reserve", "settle", "end", "begin"]


def test_run_that_was_ended_elsewhere_meanwhile_reserves_nothing_more_and_settles_what_it_had(books: Books) -> None:
    ledger = books.open()
    run = ledger.open_run(TERMS, SOME, None)
    reservation = run.reserve(1)
    with Books(books.folder) as others:
        assert others.open().end_runs("pets") == 3
    run.settle(reservation)
    with pytest.raises(PolicyError, match="was ended"):
        run.reserve(2)
    assert kinds(ledger) == ["begin", "reserve", "end", "settle"]


def test_only_a_run_of_ones_own_that_is_unfinished_can_be_ended(books: Books) -> None:
    ledger = books.open("lab-b")
    ledger.open_run(TERMS, SOME, None)
    ledger = books.open("lab-a")
    train(ledger, 9, range(3), 1)
    for federation in ("pets", "lungs"):
        with pytest.raises(ConfigError, match=rf"lab-a has no unfinished run of a federation {federation} here; "
                           r"unfinished are: pets at lab-b \(plan 70707070, begun 2027-01-15\): 4 r"):  # fmt: skip
            ledger.end_runs(federation)
    assert kinds(ledger) == ["begin", "begin", "reserve", "settle"]


def test_federation_that_came_to_its_end_frees_rounds_that_this_silo_was_not_in(books: Books) -> None:
    ledger = books.open()
    run = ledger.open_run(TERMS, SOME, None)
    run.settle(run.reserve(2))
    run.finish()
    run.finish()
    assert kinds(ledger) == ["begin", "reserve", "settle", "end"]
    run = ledger.open_run(terms(plan=2), SOME, None)
    for number in (1, 2, 3):
        run.settle(run.reserve(number))
    run.finish()
    assert kinds(ledger)[-1] == "settle", "nothing was kept for it"


def test_round_of_a_run_that_is_trained_may_be_trained_again_if_others_leave_room(books: Books) -> None:
    ledger, cap, wanted = books.open(), cap_for(6.5), terms(rounds=2)
    run = ledger.open_run(wanted, SOME, cap)
    for number in (1, 2):
        run.settle(run.reserve(number))
    ledger.open_run(terms(plan=2, rounds=4, max_retrains=0), SOME, cap)  # 2 + 4 of 6
    run = ledger.open_run(wanted, SOME, cap)
    assert run.admitted == {*SOME}
    assert run.may_train(2)
    before = ledger.entries()
    with pytest.raises(PolicyError, match=r"round 2 does not fit policy.max_epsilon .* hold .pets at lab-a .* 4 round"):
        run.reserve(2)
    assert ledger.entries() == before
    books.open().end_runs("pets")
    run = books.open().open_run(wanted, SOME, cap)
    assert run.reserve(2).retrain == 1


def test_limit_that_was_lowered_within_a_run_holds_from_then_on(books: Books) -> None:
    ledger = books.open()
    run = ledger.open_run(TERMS, SOME, cap_for(9))
    run.settle(run.reserve(1))
    low = Cap(cap_for(1.5).epsilon, DELTA)
    refused(ledger, PolicyError, "no unit can take part", TERMS, SOME, low)


def test_program_that_trains_is_noted_and_again_before_the_next_round_of_another_one(books: Books) -> None:
    ledger = books.open()
    run = ledger.open_run(TERMS, SOME, None)
    run.settle(run.reserve(1))
    ledger = books.open()
    ledger.open_run(terms(code="0d" * 32), SOME, None)
    assert kinds(ledger) == ["begin", "reserve", "settle"], "nothing is trained by it yet"
    run = ledger.open_run(terms(code="0d" * 32), SOME, None)
    for _ in range(2):
        run.reserve(2)
    assert kinds(ledger) == ["begin", "reserve", "settle", "code", "reserve", "reserve"]
    assert run.state.codes == ["0c" * 32, "0d" * 32]


def test_unit_is_charged_each_reservation_of_each_set_that_held_it(books: Books) -> None:
    ledger, cap = books.open(), cap_for(20)
    train(ledger, 1, range(4), 2)
    run = ledger.open_run(terms(plan=2, noise_multiplier=2.0, sample_rate=0.05), units(range(2, 6)), cap)
    run.settle(run.reserve(1))
    run.reserve(1)
    cost = cap.cost((ONE, ONE, Event(2.0, 0.05, 40)))
    account = ledger.account(cap)
    assert account.lifetime is not None
    assert account.lifetime.epsilon == pytest.approx(cap.epsilon_of(cost))
    assert account.lifetime.share == pytest.approx(cost / cap.budget)
    assert account.lifetime.units == 6


def test_units_are_charged_without_a_cap_and_refused_once_there_is_one(books: Books) -> None:
    train(books.open(), 1, range(5), 30)
    with pytest.raises(PolicyError, match="no unit can take part"):
        books.open().open_run(TERMS, units(range(5)), cap_for(20))


def test_units_of_all_identities_of_a_house_are_charged_together(books: Books) -> None:
    train(books.open("lab-a"), 1, range(5), 3)
    train(books.open("lab-b"), 1, range(5), 3)  # the same plan and roster: another silo, another run
    assert books.open("lab-b").open_run(terms(plan=2), units(range(6)), cap_for(9)).left_out == 5


def test_admitted_unit_stays_admitted_through_all_rounds_and_retrains(books: Books) -> None:
    """Found again, a run is judged by what is left of it: its own rounds do not count twice."""
    cap, wanted = cap_for(4), terms(rounds=3, max_retrains=1)
    for number in (1, 2, 2, 3):
        run = books.open().open_run(wanted, SOME, cap)
        assert run.left_out == 0
        run.reserve(number)
    assert books.open().open_run(wanted, SOME, cap).admitted == {*SOME}
    with pytest.raises(PolicyError, match="no unit can take part"):
        books.open().open_run(terms(plan=2, rounds=1, max_retrains=0), SOME, cap)


def test_unit_that_was_left_out_stays_so_for_the_run(books: Books) -> None:
    """With two rounds of four behind it, the run would fit the unit that it was too long for."""
    ledger, cap, wanted = books.open(), cap_for(5), terms(rounds=4, max_retrains=0)
    train(ledger, 1, range(2), 2)
    run = ledger.open_run(wanted, units(range(4)), cap)
    run.reserve(1)
    run.reserve(2)
    ledger = books.open()
    assert ledger.open_run(wanted, units(range(4)), cap).admitted == {*units([2, 3])}
    # Also if it went meanwhile, and came back; one that is new is judged by what is left.
    ledger.open_run(wanted, units(range(1, 4)), cap, changed_data=True)
    run = ledger.open_run(wanted, units(range(5)), cap, changed_data=True)
    assert run.admitted == {*units([2, 3, 4])}


def test_units_that_a_run_left_out_are_told_so_also_where_they_could_pay_for_what_is_left(books: Books) -> None:
    ledger, cap, wanted = books.open(), cap_for(5), terms(rounds=4, max_retrains=0)
    train(ledger, 1, range(2), 2)
    ledger.open_run(wanted, units(range(4)), cap)
    ledger.end_runs("pets")
    said = "every unit of the data was left out when the run began, or cannot pay for it; restore the data of the run"
    refused(ledger, PolicyError, said, wanted, units(range(2)), cap, changed_data=True)


def test_rounds_of_another_run_meanwhile_never_bring_a_unit_above_the_cap(books: Books) -> None:
    """The other one was of a silo without a limit; each limit holds for whoever has set it."""
    ledger, cap = books.open(), cap_for(6)
    run = ledger.open_run(terms(plan=1, rounds=4, max_retrains=0), units(range(4)), cap)
    run.reserve(1)
    with Books(books.folder) as others:
        train(others.open("lab-b"), 2, range(2), 3)  # 4 of 6 spent
    run.reserve(2)
    run.reserve(3)
    with pytest.raises(
        PolicyError, match=r"round 4 does not fit policy.max_epsilon .* what was spent; sit this round out$"
    ):
        run.reserve(4)
    before = ledger.entries()
    with pytest.raises(DataError, match=r"0 units came, 0 went, and 2 can no longer pay .*--changed-data"):
        ledger.open_run(terms(plan=1, rounds=4, max_retrains=0), units(range(4)), cap)
    assert ledger.entries() == before
    run = ledger.open_run(terms(plan=1, rounds=4, max_retrains=0), units(range(4)), cap, changed_data=True)
    assert run.admitted == {*units([2, 3])}


# Refusals: nothing is written


def refused(ledger: Ledger, kind: type[FedClipError], said: str, *arguments: object, **options: object) -> str:
    before = ledger.entries()
    with pytest.raises(kind, match=said) as caught:
        ledger.open_run(*arguments, **options)  # type: ignore[arg-type]
    assert ledger.entries() == before
    return str(caught.value)


def test_plan_that_does_not_fit_a_fresh_unit_is_refused_with_what_would(books: Books) -> None:
    ledger, cap = books.open(), cap_for(3.5)
    said = refused(ledger, PolicyError, "for a unit that has spent nothing", TERMS, SOME, cap)
    assert "plan's 4 rounds (retrains included)" in said
    assert "3 such rounds would fit" in said
    sigma = cap.sigma_that_fits(0.0, TERMS.total())
    assert sigma is not None
    assert f"all with noise_multiplier {sigma:g}" in said
    assert ledger.open_run(terms(noise_multiplier=sigma), SOME, cap).left_out == 0
    assert PolicyError.exit_code == 3


def test_run_without_a_unit_that_fits_is_refused_with_what_was_spent(books: Books) -> None:
    ledger, cap = books.open(), cap_for(6.5)
    train(ledger, 1, range(3), 3)
    train(ledger, 2, range(1), 1)
    said = refused(ledger, PolicyError, "the unit charged least has spent", TERMS, units(range(3)), cap)
    cost = cap.cost((ONE,))
    assert f"has spent ε {cap.epsilon_of(3 * cost):.4g}" in said
    assert f"would bring it to ε {cap.epsilon_of(7 * cost):.4g}, counted over all plans" in said
    assert "; 3 such rounds would fit" in said
    assert ledger.open_run(terms(max_retrains=0), units(range(3)), cap).left_out == 1


def test_plan_with_a_larger_delta_than_the_silos_own_is_refused(books: Books) -> None:
    refused(books.open(), PolicyError, "delta 0.001, more than policy.delta 1e-05", terms(delta=1e-3), SOME, cap_for(9))


def test_delta_that_would_let_one_whole_unit_out_is_refused(books: Books) -> None:
    ledger, wanted = books.open(), terms(delta=1e-2)
    said = refused(ledger, PolicyError, "too large for the 11 units here", wanted, units(range(11)), None)
    assert "such as 5e-03" in said
    assert ledger.open_run(wanted, units(range(10)), None).left_out == 0


def test_other_kind_of_unit_than_the_ledger_has_is_refused(books: Books) -> None:
    ledger = books.open()
    train(ledger, 1, range(3), 1)
    refused(ledger, PolicyError, "charges each record, and the plan protects each patient: its earlier runs did not "
            "note which records were whose.*plan with privacy.unit record, or name another folder as `ledger`.*must be "
            "added by hand", terms(unit="patient"), SOME, None)  # fmt: skip


def test_patients_whose_ids_are_normalised_in_another_way_than_before_are_refused(books: Books) -> None:
    ledger, first = books.open(), terms(unit="patient", patients=("casefold",))
    ledger.open_run(first, SOME, None)
    for patients in ((), ("casefold", "strip_zeros")):
        said = r"normalised by \['casefold'\].*new accounts .*; set data.patients.normalise back to"
        refused(ledger, PolicyError, said, terms(plan=2, unit="patient", patients=patients), SOME, None)
        refused(ledger, PolicyError, said, terms(unit="patient", patients=patients), SOME, None)
    ledger.open_run(terms(plan=2, unit="patient", patients=("casefold",)), SOME, None)


def test_no_unit_at_all_is_refused(books: Books) -> None:
    refused(books.open(), DataError, "no unit to train on", TERMS, [], None)


def test_id_of_another_length_is_a_mistake_of_the_caller(books: Books) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        books.open().open_run(TERMS, [b"patient 7"], None)


def test_run_with_other_terms_than_it_began_with_is_refused(books: Books) -> None:
    ledger = books.open()
    ledger.open_run(TERMS, SOME, None)
    other = terms(max_retrains=9, features="stated to be per record")
    said = "began with another max_retrains, features .entry 1.; set it back"
    refused(ledger, TrustError, said, other, SOME, None)


def test_data_that_changed_in_a_run_are_refused_unless_they_are_meant_to(books: Books) -> None:
    ledger = books.open()
    run = ledger.open_run(TERMS, units(range(10)), None)
    run.reserve(1)
    ledger = books.open()
    said = r"data of federation pets .* 2 units came, 3 went, and 0 .*; restore them, or run with --changed-data"
    refused(ledger, DataError, said, TERMS, units(range(3, 12)), None)
    run = ledger.open_run(TERMS, units(range(3, 12)), None, changed_data=True)
    run.reserve(2)
    *_, reserve, data, again = chain_of(ledger.entries()).entries
    assert isinstance(reserve, Reserve)
    assert isinstance(data, Data)
    assert isinstance(again, Reserve)
    assert (data.run, again.set) == (run.run.hex(), data.set)
    assert reserve.set != data.set
    # Said again it is no change.
    books.open().open_run(TERMS, units(range(3, 12)), None, changed_data=True)
    assert books.open().entries() == ledger.entries()
    # Units 0 to 2 and 10, 11 have one round behind them, 3 to 9 have two.
    books.open().end_runs("pets")
    one_more = terms(plan=9, rounds=1, max_retrains=0)
    run = books.open().open_run(one_more, units(range(13)), cap_for(2))
    assert run.admitted == {*units([0, 1, 2, 10, 11, 12])}


def test_clock_that_is_behind_the_newest_entry_is_refused(books: Books) -> None:
    ledger = books.open()
    run = ledger.open_run(TERMS, SOME, None)
    first = run.reserve(1)
    books.now -= 1  # which is another hour
    for attempt in (lambda: run.reserve(2), lambda: run.settle(first), lambda: ledger.open_run(TERMS, SOME, None)):
        with pytest.raises(DataError, match=r"ledger\.sqlite': .* 2027-01-15 08 h UTC.*clock is behind.*set the cl.*"
                           "run `fedclip-silo budget --clock-was-wrong`"):  # fmt: skip
            attempt()
    assert kinds(ledger) == ["begin", "reserve"]
    books.now += 1
    run.settle(first)


def test_clock_that_was_ten_years_ahead_is_mended_by_a_signed_word(books: Books) -> None:
    ledger = books.open()
    with pytest.raises(ConfigError, match="has no entry, not ahead of the clock; there is nothing to mend"):
        ledger.mend_clock()
    books.now += 9.2 * 365.25 * 86400
    run = ledger.open_run(TERMS, SOME, None)
    first = run.reserve(1)
    books.now = float(START)
    with pytest.raises(DataError, match=r"newest entry is of 2036-.* UTC, and the clock is behind"):
        run.settle(first)
    ledger.mend_clock()
    run.settle(first)
    with pytest.raises(
        ConfigError, match=r"newest entry is of 2027-01-15 .* not ahead of the clock; .* nothing to mend"
    ):
        ledger.mend_clock()
    books.now += 3600
    ledger = books.open()
    ledger.open_run(TERMS, SOME, None).reserve(2)
    assert kinds(ledger) == ["begin", "reserve", "clock", "settle", "reserve"]
    assert [entry.at - START for entry in chain_of(ledger.entries()).entries[2:]] == [0, 0, 3600]


# The account


def test_account_tells_each_run_and_the_unit_charged_most(books: Books) -> None:
    ledger, cap = books.open(), cap_for(10.5)
    train(ledger, 1, range(3), 4)
    run = ledger.open_run(terms(plan=2, rounds=5), units(range(2, 5)), cap)
    run.settle(run.reserve(1))
    run.reserve(2)
    run.settle(run.reserve(2))
    account = ledger.account(cap)
    first, second = account.runs
    assert (first.rounds, first.trained, first.without_result, first.retrains) == (1, (1,), 0, 0)
    assert (second.rounds, second.trained, second.without_result, second.retrains) == (5, (1, 2), 1, 1)
    assert (second.steps, second.steps_at_most) == (3 * 20, 6 * 20)
    assert (second.federation, second.silo, second.unit, second.began_at) == ("pets", "lab-a", "record", START)
    assert second.epsilon == epsilon([Event(20.0, 1.0, 60)], DELTA)
    assert second.epsilon_at_most == epsilon([Event(20.0, 1.0, 120)], DELTA)
    assert account.lifetime is not None
    assert account.lifetime.epsilon == pytest.approx(cap.epsilon_of(7 * cap.cost((ONE,))))
    assert (second.held, second.ended, first.held) == (3, False, 0)
    assert account.lifetime.epsilon_held == pytest.approx(cap.epsilon_of(10 * cap.cost((ONE,))))
    assert (account.lifetime.rounds_left, account.lifetime.units, account.lifetime.exhausted) == (0, 5, 1)
    assert ledger.end_runs("pets") == 3
    account = ledger.account(cap)
    assert account.lifetime is not None
    assert (account.lifetime.rounds_left, account.lifetime.units, account.lifetime.exhausted) == (3, 5, 0)
    assert account.runs[1].ended
    assert account.runs[1].epsilon_at_most == account.runs[1].epsilon
    run = ledger.open_run(terms(plan=3, rounds=7, max_retrains=0), units(range(3, 5)), cap)
    for number in range(1, 8):
        run.reserve(number)
    after = ledger.account(cap).lifetime
    assert after is not None
    assert (after.rounds_left, after.units, after.exhausted) == (0, 5, 2)
    assert math.isclose(after.epsilon, cap.epsilon_of(10 * cap.cost((ONE,))))
    assert after.share == after.share_held == pytest.approx(10 * cap.cost((ONE,)) / cap.budget)
    assert after.epsilon_held == after.epsilon


def test_account_is_plain_data(books: Books) -> None:
    ledger = books.open()
    assert ledger.account(None).as_json() == {"runs": (), "lifetime": None}
    train(ledger, 1, range(3), 1)
    plain = json.loads(json.dumps(ledger.account(cap_for(3)).as_json()))
    assert plain["runs"][0]["trained"] == [1]
    assert plain["lifetime"]["units"] == 3


def test_paying_loads_no_accountant(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.privacy.books import *\n"
        "with Books(Path(sys.argv[1])) as books: books.open().open_run(TERMS, units(range(3)), None).reserve(1)\n"
        "print({'scipy', 'dp_accounting', 'torch'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path / "ledger")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=BOUND, env=environment)
    assert done.stdout.strip() == "set()"


# Receipts


def test_ledger_that_was_rolled_back_is_found_by_its_receipts(books: Books) -> None:
    ledger = books.open()
    run = ledger.open_run(TERMS, SOME, None)
    run.settle(run.reserve(1))
    heads, old = [ledger.head], books.database.read_bytes()
    run.settle(run.reserve(2))
    heads.append(ledger.head)
    ledger.check_receipts(heads)
    books.close()
    books.database.write_bytes(old)
    ledger = books.open()
    ledger.check_receipts(heads[:1])
    with pytest.raises(
        TrustError, match=r"ledger\.sqlite': lacks 1 of the entries.*receipts.*restore the newest backup"
    ):
        ledger.check_receipts(heads)
