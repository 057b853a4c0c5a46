"""Which code trained, which was tested, and when: the same lines by the report and by the tool, whatever the facts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedclip_secure.privacy.ledger.entries import HOUR
from fedclip_secure.privacy.report.assumptions import assumptions
from fedclip_secure.privacy.report.document import FIRST_TESTS, Audit, RoundModel
from fedclip_secure.privacy.report.silo_report import History, evidence
from tests.privacy.reports import AUDIT, contract
from tools import verify_report

A, B = "a" * 64, "b" * 64
DAY = 24 * HOUR
CHARGED = 500 * DAY + 1234  # seconds since 1970
RAN: dict[str, tuple[str, ...] | None] = {
    "nothing": None, "by 0.1": (), "one": (A,), "restarted": (A, A), "two": (A, B), "there and back": (A, B, A),
}  # fmt: skip
FIRST = [test for test in AUDIT.self_tests if test.name in FIRST_TESTS]
FAILED = [AUDIT.self_tests[0].model_copy(update={"passed": False}), *AUDIT.self_tests[1:]]
MODELS = [RoundModel(round=1, digest="c" * 64), RoundModel(round=2, digest="d" * 64)]  # of a silo that began with 2
AUDITS: dict[str, Audit | None] = {
    "none": None,
    "of 0.1": AUDIT.model_copy(update={"at": None, "code": None, "self_tests": FIRST}),
    "of a": AUDIT.model_copy(update={"at": 400 * DAY, "code": A}),
    "of b in the hour": AUDIT.model_copy(update={"at": 500 * DAY, "code": B}),
    "of a, with a model of the first round": AUDIT.model_copy(
        update={"at": 400 * DAY, "code": A, "received": MODELS[1].digest}
    ),
    "in the hour, with a model of an earlier round": AUDIT.model_copy(
        update={"at": 500 * DAY, "code": A, "received": MODELS[0].digest}
    ),
    "of a, a test failed": AUDIT.model_copy(update={"at": 400 * DAY, "code": A, "self_tests": FAILED}),
    "of a, in part": AUDIT.model_copy(update={"at": 400 * DAY, "code": A, "self_tests": AUDIT.self_tests[:5]}),
    "of a, later": AUDIT.model_copy(update={"at": 500 * DAY + HOUR, "code": A}),
}
SAID = {
    ("nothing", "of a"): ["code-nothing-trained"],
    ("by 0.1", "of a"): ["code-unrecorded", "audited-unknown", "audit-before"],
    ("one", "none"): ["code-one"],
    ("one", "of 0.1"): ["code-one", "audited-unknown"],
    ("one", "of a"): ["code-one", "audited-same", "audit-before"],
    ("restarted", "of a, later"): ["code-one", "audited-same", "audit-after"],
    ("one", "of b in the hour"): ["code-one", "audited-other", "audit-in-the-hour"],
    ("two", "of a"): ["code-changed", "audited-other", "audit-before"],
    ("there and back", "of b in the hour"): ["code-changed", "audited-other", "audit-in-the-hour"],
    ("one", "of a, with a model of the first round"): ["code-one", "audited-same", "audit-after"],
    ("one", "in the hour, with a model of an earlier round"): ["code-one", "audited-same", "audit-in-the-hour"],
    ("one", "of a, a test failed"): ["code-one"],
    ("one", "of a, in part"): ["code-one"],
}
OPEN = {"code-unrecorded", "audited-other", "audited-unknown", "audit-in-the-hour", "audit-after"} | {
    "features-in-batches",
    "mechanism-failed",
}


def run_of(codes: tuple[str, ...] | None) -> Any:
    if codes is None:
        return None
    begin = SimpleNamespace(code=codes[0] if codes else None, features="computed here")
    return SimpleNamespace(begin=begin, codes=codes, reservations={"1": SimpleNamespace(at=CHARGED, round=2)})


def lines(ran: str, audit: str) -> dict[str, str]:
    """The states of all assumptions, by id."""
    history = History(SimpleNamespace(runs={}, entries=[]), run_of(RAN[ran]))  # type: ignore[arg-type]
    found = evidence(history, None, None, AUDITS[audit], None, silo="oak", models=MODELS, version=2)
    return {item.id: item.state for item in assumptions(contract().plan, found)}


@pytest.mark.parametrize(("ran", "audit"), SAID)
def test_it_is_said_which_code_trained_and_whether_it_was_the_tested_one(ran: str, audit: str) -> None:
    found = lines(ran, audit)
    assert [name for name in found if name.startswith(("code-", "audit"))] == SAID[ran, audit]
    assert {name for name in found if name in OPEN} == {name for name, state in found.items() if state == "open"} & OPEN


@pytest.mark.parametrize("audit", AUDITS)
@pytest.mark.parametrize("ran", RAN)
def test_the_tool_expects_the_same_lines(ran: str, audit: str) -> None:
    codes, given = RAN[ran], AUDITS[audit]
    begin = None if codes is None else {"code": codes[0]} if codes else {}
    ledger: Any = SimpleNamespace(codes=list(codes or ()), begin=begin, reserved={"1": {"at": CHARGED, "round": 2}})
    models = [model.model_dump() for model in MODELS]
    audited = None if given is None else given.model_dump(mode="json", exclude_none=True)
    body = {"version": 2, "models": models, "audit": audited}
    wanted = [name for name in lines(ran, audit) if name.startswith(("code-", "audit", "mechanism"))]
    assert verify_report.tests_and_code_ids(body, ledger) == wanted


def test_a_failed_or_partial_audit_is_never_said_to_have_passed() -> None:
    failed = AUDIT.model_copy(update={"self_tests": [AUDIT.self_tests[0].model_copy(update={"passed": False})]})
    partial = AUDIT.model_copy(update={"self_tests": AUDIT.self_tests[:-1]})
    for audit, wanted in ((failed, "mechanism-failed"), (partial, "mechanism-unaudited"), (AUDIT, "mechanism-said")):
        history = History(SimpleNamespace(runs={}, entries=[]), run_of((A,)))  # type: ignore[arg-type]
        found = evidence(history, None, None, audit, None, silo="oak", models=MODELS, version=2)
        assert wanted in {item.id for item in assumptions(contract().plan, found)}
