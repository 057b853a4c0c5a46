"""What the claim rests on, and for each how far a reader can know it. Never a grade for epsilon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.privacy.document import Assumption, State

Verdict = Literal["passed", "failed"] | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """The facts that the states follow from."""

    agree: bool | None  # does a second accountant, as the silo says; None: there is none
    receipts: bool  # the coordinator signed for at least one upload
    self_tests: Verdict  # None: not all of them are given
    features: str | None  # as the ledger has it; None: nothing was begun
    limit: bool
    every_run_fits: bool  # even a unit in every run of the ledger is within the limit
    clock_was_wrong: bool = False  # as the ledger has it


def assumptions(plan: FederationPlan, evidence: Evidence) -> list[Assumption]:
    """In the order in which a reader would ask."""
    if plan.privacy is None:
        return [_PLAIN_MASKS, _PLAIN_SUMS, _CODE]
    return [
        _ALONE,
        _ARITHMETIC,
        _SECOND_ACCOUNTANT[evidence.agree],
        _LEDGER[evidence.receipts],
        _SECOND,
        *([_CLOCK] if evidence.clock_was_wrong else []),
        _CODE,
        _MECHANISM[evidence.self_tests],
        _FLOATING_POINT,
        _FEATURES.get(evidence.features or "", _NOTHING_BEGUN),
        _UNITS[plan.privacy.unit],
        _DELTA,
        _lifetime(evidence),
    ]


def _lifetime(evidence: Evidence) -> Assumption:
    if not evidence.limit:
        return _NO_LIMIT
    return _ALL_RUNS_FIT if evidence.every_run_fits else _LIMIT_KEPT


def _of(name: str, text: str, state: State, because: str) -> Assumption:
    return Assumption(id=name, text=text, state=state, because=because)


_ALONE = _of(
    "alone",
    "The claim leans on no other party",
    "shown",
    "Each silo's noise is enough by itself. The masks, the coordinator and the other silos may all fail.",
)
_ARITHMETIC = _of(
    "arithmetic",
    "ε is right for this noise, sampling and length",
    "shown",
    "Whoever verifies this report computes it again, by one accountant (PLD), and takes no lower figure.",
)
_SECOND_ACCOUNTANT = {
    True: _of(
        "second-accountant",
        "Another accountant comes to the same ε",
        "stated",
        "The silo ran it and says so. Whoever verifies this report does not run it again.",
    ),
    False: _of(
        "second-accountant-differs",
        "Another accountant comes to the same ε",
        "open",
        "The silo ran it, and the two differ by more than they should. The larger figure is claimed; ask why.",
    ),
    None: _of(
        "second-accountant-none",
        "Another accountant comes to the same ε",
        "open",
        "None was run for this report.",
    ),
}
_LEDGER = {
    True: _of(
        "ledger",
        "The ledger was not changed before the last receipt in it",
        "shown",
        "The coordinator signed for the states of the ledger at its uploads, and they are in this chain. What came "
        "after the last of them, or was left out together with its receipt, rests on the silo's word.",
    ),
    False: _of(
        "ledger-unreceipted",
        "The ledger was not changed afterwards",
        "stated",
        "The chain is whole, but no receipt of the coordinator holds it: the silo could have written it anew.",
    ),
}
_SECOND = _of(
    "second-ledger",
    "Nothing was trained beside this ledger",
    "stated",
    "No file can show it. The silo says so with its signature.",
)
_CLOCK = _of(
    "clock",
    "The times in the ledger are those of the entries",
    "open",
    "The silo declared that its clock had been wrong. Times before that say nothing, nor do ages made of them.",
)
_CODE = _of(
    "code",
    "The published program ran",
    "stated",
    "The hashes of the program are given. Whoever runs the machine could have run another.",
)
_MECHANISM: dict[Verdict, Assumption] = {
    "passed": _of(
        "mechanism",
        "Clipping, noise and sampling are as described",
        "tested",
        "The silo's machine tested them on synthetic records through the code that trains.",
    ),
    "failed": _of(
        "mechanism-failed",
        "Clipping, noise and sampling are as described",
        "open",
        "A test on the silo's machine failed. Do not rely on the claim until it is known why.",
    ),
    None: _of(
        "mechanism-untested",
        "Clipping, noise and sampling are as described",
        "stated",
        "The tests of the silo's machine are not part of this report, or not all of them.",
    ),
}
_FLOATING_POINT = _of(
    "floating-point",
    "Computers round like real numbers",
    "stated",
    "They do not quite. Double precision and a fixed grid keep what that discloses small; it is not in ε.",
)
_FEATURES = {
    "computed here": _of(
        "features",
        "Each feature depends on its own record alone",
        "stated",
        "The program computed them with the encoder of the plan, one image at a time.",
    ),
    "stated to be per record": _of(
        "features-external",
        "Each feature depends on its own record alone",
        "stated",
        "The silo brought features made elsewhere, and says so. If an encoder was tuned on the records, nothing holds.",
    ),
}
_NOTHING_BEGUN = _of(
    "features-none",
    "Each feature depends on its own record alone",
    "stated",
    "The silo has not trained in this run.",
)
_UNITS = {
    "record": _of(
        "units-record",
        "A person has one record",
        "open",
        "The unit is a record. For persons with several, the larger figures of the table of groups hold.",
    ),
    "patient": _of(
        "units-patient",
        "All records of a person carry one patient id",
        "stated",
        "The silo's own lists say which records belong to whom.",
    ),
}
_DELTA = _of(
    "delta",
    "δ is small beside the number of units",
    "stated",
    "The silo checks it at home, since the number itself is not given out.",
)
_NO_LIMIT = _of(
    "no-limit",
    "Runs on the same data do not add up without end",
    "open",
    "The silo has set no limit over its runs. Nothing is claimed beyond this one.",
)
_ALL_RUNS_FIT = _of(
    "all-runs-fit",
    "Runs on the same data do not add up without end",
    "shown",
    "Even a unit that was in every run of this ledger is within the silo's limit.",
)
_LIMIT_KEPT = _of(
    "limit-kept",
    "Runs on the same data do not add up without end",
    "stated",
    "The silo leaves out whatever reached its limit; which units these are is not given out.",
)
_PLAIN_MASKS = _of(
    "masks",
    "The masks of secure aggregation hold",
    "stated",
    "At most as many silos collude with the coordinator as the plan provides for.",
)
_PLAIN_SUMS = _of(
    "sums",
    "Sums and models disclose no record",
    "open",
    "Nothing limits what they disclose: this plan has no differential privacy.",
)
