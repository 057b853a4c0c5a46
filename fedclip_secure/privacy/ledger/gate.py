"""Whether a run may begin, go on with its data, and be paid a round, by all that the ledger knows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedclip_secure.errors import DataError, PolicyError, TrustError
from fedclip_secure.privacy.accounting.privacy_filter import Cap
from fedclip_secure.privacy.ledger.admission import Need, fitting, nobody_fits
from fedclip_secure.privacy.ledger.book import Book
from fedclip_secure.privacy.ledger.entries import Run
from fedclip_secure.privacy.ledger.run_terms import RunTerms
from fedclip_secure.privacy.ledger.spending import holders
from fedclip_secure.privacy.ledger.unit_sets import Numbers


def found(book: Book, terms: RunTerms) -> Run | None:
    """This silo's run of these terms, if it has begun.

    Raises:
        TrustError: it began with other ones.
    """
    fields = terms.fields()
    run = book.chain.found(book.silo, fields["plan"], fields["roster"])
    if run is None:
        return None
    fields |= {
        "key": book.key,
        "code": run.begin.code,
        "patients": run.begin.patients,
    }  # may differ, or is compared elsewhere
    other = [name for name, value in fields.items() if getattr(run.begin, name) != value]
    if other:
        raise TrustError(
            f"'{book.path}': the run of federation {terms.federation} with this plan and roster began with "
            f"another {', '.join(other)} (entry {run.begin.number}); set it back to what it was"
        )
    return run


def check_units(book: Book, terms: RunTerms) -> None:
    """Refuse units that cannot be added up with those that the ledger charges.

    Raises:
        PolicyError: which, why, and what to do.
    """
    first = next(iter(book.chain.runs.values()), None)
    if first is None:
        return
    charged, unit, known = first.begin.unit, terms.unit, first.begin.normalised
    if charged != unit:
        raise PolicyError(
            f"'{book.path}': charges each {charged}, and the plan protects each {unit}: its earlier runs did "
            f"not note which records were whose, so what a {unit} has spent in them cannot be bounded; ask the "
            f"coordinator for a plan with privacy.unit {charged}, or name another folder as `ledger` in silo.yaml "
            f"for plans of {unit}s: what was spent here does not count there, and must be added by hand"
        )
    if known != list(terms.patients):
        raise PolicyError(
            f"'{book.path}': since its first run patients' ids are normalised by {known}, and by "
            f"{list(terms.patients)} in silo.yaml: patients would get new accounts with nothing spent; set "
            f"data.patients.normalise back to {known}, or where ids come in a feature file, make them so"
        )


def takes_part(
    book: Book, mine: Numbers, need: Need, run: Run | None, cap: Cap | None, *, new: int
) -> npt.NDArray[np.bool_]:
    """Which of `mine` (units,) can pay for what a run needs; `new` of them are not in the book yet.

    Raises:
        PolicyError: none can.
    """
    committed = book.committed(new, besides=run)
    can_pay = fits = fitting(mine, committed, need, cap)
    for earlier in book.sets(run) if run else ():
        fits = fits & ~np.isin(mine, earlier.left_out)
    if not fits.any():
        charges = book.charges(new)
        held_by, could_pay = holders(_holding(book, mine, run)), bool(can_pay.any())
        raise nobody_fits(mine, charges, committed, need, cap, held_by=held_by, could_pay=could_pay)
    return fits


def differs(book: Book, run: Run, admitted: Numbers, left_out: Numbers, changed_data: bool) -> bool:
    """Whether the run is to go on with other units than it had.

    Raises:
        DataError: it would, and `changed_data` is not set.
    """
    before = book.sets(run)[-1]
    now = np.union1d(admitted, left_out)
    came, went = len(np.setdiff1d(now, before.everyone)), len(np.setdiff1d(before.everyone, now))
    exhausted = len(np.intersect1d(before.admitted, left_out))
    if came == went == exhausted == 0:
        return False
    if not changed_data:
        raise DataError(
            f"the data of federation {run.begin.federation} are not those that its run goes on with: {came} units "
            f"came, {went} went, and {exhausted} can no longer pay for what is left of it; restore them, or run "
            "with --changed-data to go on with the data as they are"
        )
    return True


def check_round(run: Run, round_number: int) -> None:
    """Refuse a round that the run's terms do not allow.

    Raises:
        PolicyError: why.
    """
    begin = run.begin
    if not 1 <= round_number <= begin.rounds:
        raise PolicyError(f"round {round_number} is none of the plan's {begin.rounds} rounds; tell the coordinator")
    if run.ended:
        raise PolicyError(
            f"the run of federation {begin.federation} was ended with `fedclip-silo budget --end`: nothing more is "
            "paid for in it; to train there again, this silo needs a new plan from the coordinator"
        )
    if not run.may_train(round_number):
        raise PolicyError(
            f"round {round_number} was paid for before, and the plan's {begin.max_retrains} retrains are used up; "
            "sit this round out: rounds that were not begun yet stay possible"
        )


def check_data(book: Book, run: Run, name: str) -> None:
    """Refuse to charge other units than those that are trained on.

    Raises:
        DataError: another process went on with the run over other data since it was opened.
    """
    if run.sets[-1] != name:
        raise DataError(
            f"'{book.path}': another process goes on with the run of federation {run.begin.federation} over other "
            "data; stop one of the two, and start `train` again"
        )


def check_room(book: Book, run: Run, cap: Cap | None, round_number: int) -> None:
    """Refuse a round that takes a unit above the cap. What was kept for the run is there, unless the limit was
    lowered, another silo of the house has a higher one, or all rounds were trained and this is one more.

    Raises:
        PolicyError: what is in the way.
    """
    if cap is None:
        return
    mine = book.sets(run)[-1].admitted
    if (book.committed(besides=run).spent(cap, run.begin.per_round)[mine] > cap.budget).any():
        held = holders(_holding(book, mine, run))
        kept = f" and what unfinished runs hold ({held})" if held else ""
        free = "; or free what nobody goes on with: `fedclip-silo budget --end FEDERATION`" if held else ""
        raise PolicyError(
            f"round {round_number} does not fit policy.max_epsilon {cap.epsilon:g} any more beside what was spent"
            f"{kept}; sit this round out{free}"
        )


def _holding(book: Book, units: Numbers, besides: Run | None) -> list[Run]:
    """Runs that have room kept for them in the budget of some of `units`."""
    runs = book.holding(besides)
    return [run for run in runs if len(np.intersect1d(book.sets(run)[-1].admitted, units))]
