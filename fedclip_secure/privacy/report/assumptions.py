"""What the claim rests on, and for each how far a reader can know it. Never a grade for epsilon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.privacy.report.document import Assumption, State
from fedclip_secure.privacy.report.limit_bound import Bound

Verdict = Literal["passed", "failed"] | None
Ran = Literal["nothing", "unrecorded", "one", "several"]  # codes that the ledger names for a run
Audited = Literal["same", "other", "unknown"]  # the audit's code beside these
AuditTime = Literal["before", "same hour", "after"]  # the audit's hour beside that of the first charge


@dataclass(frozen=True, slots=True)
class Evidence:
    """The facts that the states follow from."""

    version: int  # of the report
    agree: bool | None  # does a second accountant, as the silo says; None: there is none
    receipts: bool  # the coordinator signed for at least one upload
    self_tests: Verdict  # None: not all of them are given
    ran: Ran
    audited: Audited | None  # None: there is nothing to compare
    audit_time: AuditTime | None  # as above
    features: str | None  # as the ledger has it; None: nothing was begun
    bound: Bound  # what holds over all runs of the ledger
    clock_was_wrong: bool = False  # as the ledger has it


def assumptions(plan: FederationPlan, evidence: Evidence) -> list[Assumption]:
    """In the order in which a reader would ask."""
    if plan.privacy is None:
        return [_PLAIN_MASKS, _PLAIN_SUMS, _CODE_OF_REPORT if evidence.version > 1 else _FIRST_CODE]
    return [
        _ALONE,
        _ARITHMETIC,
        _SECOND_ACCOUNTANT[evidence.agree],
        _LEDGER[evidence.receipts],
        _SECOND,
        *([_CLOCK] if evidence.clock_was_wrong else []),
        *_tests_and_code(evidence),
        _FLOATING_POINT,
        _features(evidence),
        _UNITS[plan.privacy.unit],
        _DELTA,
        _lifetime(evidence),
    ]


def _tests_and_code(evidence: Evidence) -> list[Assumption]:
    if evidence.version == 1:
        return [_FIRST_CODE, _FIRST_TESTED if evidence.self_tests == "passed" else _MECHANISM[evidence.self_tests]]
    found = [_RAN[evidence.ran], _MECHANISM[evidence.self_tests] if evidence.self_tests else _UNAUDITED]
    if evidence.self_tests != "passed":  # on which code, and when, would only make more of it
        return found
    if evidence.audited is not None:
        found.append(_AUDITED[evidence.audited])
    if evidence.audit_time is not None:
        found.append(_AUDIT_TIME[evidence.audit_time])
    return found


def _features(evidence: Evidence) -> Assumption:
    if evidence.features == "computed here" and evidence.ran == "unrecorded":  # begun by version 0.1
        return _FIRST_FEATURES if evidence.version == 1 else _FEATURES_IN_BATCHES
    return _FEATURES.get(evidence.features or "", _NOTHING_BEGUN)


def _lifetime(evidence: Evidence) -> Assumption:
    if evidence.version == 1 and evidence.bound == "fits":
        return _FIRST_ALL_RUNS_FIT
    return _BOUND[evidence.bound]


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
_CODE_OF_REPORT = _of(
    "code-of-report",
    "The published program ran",
    "stated",
    "The hash in this report is of the program that wrote it; none is kept of the one that trained. Whoever runs the "
    "machine could have run another.",
)
_RAN: dict[Ran, Assumption] = {
    "nothing": _of(
        "code-nothing-trained",
        "The published program ran",
        "stated",
        "The silo has not trained in this run.",
    ),
    "unrecorded": _of(
        "code-unrecorded",
        "The published program ran",
        "open",
        "The ledger does not say, or not for all of the run, which code trained. The hash among the versions is of the "
        "program that wrote this report.",
    ),
    "one": _of(
        "code-one",
        "The published program ran",
        "stated",
        "The ledger names one code for the whole run: compare its hash with that of the published program. Whoever "
        "runs the machine could have run another.",
    ),
    "several": _of(
        "code-changed",
        "The published program ran",
        "stated",
        "The code changed during the run: the ledger names the hash of each. Compare all of them with those of "
        "published programs. Whoever runs the machine could have run others.",
    ),
}
_AUDITED: dict[Audited, Assumption] = {
    "same": _of(
        "audited-same",
        "The code that was tested is the code that trained",
        "said",
        "The silo says that it tested the code that its ledger names for the whole run.",
    ),
    "other": _of(
        "audited-other",
        "The code that was tested is the code that trained",
        "open",
        "It tested other code than all or a part of the run was trained with, and its tests say nothing of that.",
    ),
    "unknown": _of(
        "audited-unknown",
        "The code that was tested is the code that trained",
        "open",
        "Which code was tested, or which trained, is not said for all of it.",
    ),
}
_AUDIT_TIME: dict[AuditTime, Assumption] = {
    "before": _of(
        "audit-before",
        "It was tested before it trained",
        "said",
        "The silo says that it ran the tests before the hour in which the first round was charged.",
    ),
    "same hour": _of(
        "audit-in-the-hour",
        "It was tested before it trained",
        "open",
        "The tests ended in the hour in which the first round was charged. Reports hold whole hours, so which of the "
        "two came first is not known.",
    ),
    "after": _of(
        "audit-after",
        "It was tested before it trained",
        "open",
        "The audit is younger than the first charge of this run: at least one round was trained without it.",
    ),
}
_MECHANISM: dict[Verdict, Assumption] = {
    "passed": _of(
        "mechanism-said",
        "Clipping, noise and sampling are as described",
        "said",
        "The silo says that it tested them on synthetic records, and that every test passed. No file can show that.",
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
_UNAUDITED = _of(
    "mechanism-unaudited",
    "Clipping, noise and sampling are as described",
    "open",
    "No tests of the silo's machine are part of this report, or not all of them.",
)
_FLOATING_POINT = _of(
    "floating-point",
    "Computers round like real numbers",
    "stated",
    "They do not quite. Double precision and a fixed grid keep what that discloses small; it is not in ε.",
)
_FEATURES_IN_BATCHES = _of(
    "features-in-batches",
    "Each feature depends on its own record alone",
    "open",
    "But for rounding: the program computed them with the encoder of the plan, several images in a batch. Measured "
    "in single precision, a neighbour in the batch moved a feature by 1e-7 to 5e-7 of its size. It is not in ε.",
)
_FEATURES = {
    "computed here": _of(
        "features-apart",
        "Each feature depends on its own record alone",
        "stated",
        "The program computed them with the encoder of the plan, in batches of one size, each image at a row that "
        "follows from its own file. So no bit of a feature depends on other images.",
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
_BOUND: dict[Bound, Assumption] = {
    "none": _of(
        "no-limit",
        "Runs on the same data do not add up without end",
        "open",
        "The silo has set no limit over its runs. Nothing is claimed beyond this one.",
    ),
    "removed": _of(
        "limit-removed",
        "Runs on the same data do not add up without end",
        "open",
        "The silo had set a limit for a run of this ledger, and has none now. Nothing is claimed beyond this run.",
    ),
    "unspent": _of(
        "nothing-spent",
        "Runs on the same data do not add up without end",
        "stated",
        "Nothing was trained under this ledger yet.",
    ),
    "raised": _of(
        "limit-raised",
        "Runs on the same data do not add up without end",
        "open",
        "The silo's limit was raised after a run of this ledger, or it was taken away for a time. What held for the "
        "old limit does not hold for the new one: over all runs together no figure is promised.",
    ),
    "above": _of(
        "limit-below-run",
        "Runs on the same data do not add up without end",
        "open",
        "This run as a whole is above the limit that the silo has today: the limit was lowered, or set, since the run "
        "began, or the silo will not train it to its end.",
    ),
    "lowered": _of(
        "limit-lowered",
        "Runs on the same data do not add up without end",
        "open",
        "The silo's limit is lower than it was at an earlier run of this ledger, or there was none then. What was "
        "spent before may be above the limit of today.",
    ),
    "unrecorded": _of(
        "limit-unrecorded",
        "Runs on the same data do not add up without end",
        "stated",
        "The silo leaves out whatever reached its limit. That this limit stood from the first run on is its word: the "
        "ledger does not record it for every run.",
    ),
    "fits": _of(
        "runs-fit",
        "Runs on the same data do not add up without end",
        "shown",
        "Even a unit that was in every run of this ledger is within the silo's limit, and the ledger records this "
        "limit for each of the runs.",
    ),
    "kept": _of(
        "limit-kept",
        "Runs on the same data do not add up without end",
        "stated",
        "The silo leaves out whatever reached its limit; which units these are is not given out.",
    ),
}
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

# What version 1 said in place of the above, and reports of it still say.
_FIRST_CODE = _of(
    "code",
    "The published program ran",
    "stated",
    "The hashes of the program are given. Whoever runs the machine could have run another.",
)
_FIRST_TESTED = _of(
    "mechanism",
    "Clipping, noise and sampling are as described",
    "tested",
    "The silo's machine tested them on synthetic records through the code that trains.",
)
_FIRST_FEATURES = _of(
    "features",
    "Each feature depends on its own record alone",
    "stated",
    "The program computed them with the encoder of the plan, one image at a time.",
)
_FIRST_ALL_RUNS_FIT = _of(
    "all-runs-fit",
    "Runs on the same data do not add up without end",
    "shown",
    "Even a unit that was in every run of this ledger is within the silo's limit.",
)
