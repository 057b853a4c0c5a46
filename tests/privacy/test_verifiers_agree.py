"""The product's verifier and the one that shares no code with it: every alteration gets one judgement from both."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedclip_secure import canonical
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.privacy.canonical_json import decode, encode
from fedclip_secure.privacy.ledger.entries import SignedEntry
from fedclip_secure.privacy.report.document import Estimate, Limit
from fedclip_secure.privacy.report.silo_report import SiloFacts, report_body
from fedclip_secure.privacy.verification.verify import verify
from tests.privacy.reports import AUDIT, KINDS, NOW, Site, body_of, plain_contract, replace, rewrite
from tests.privacy.test_federation_report import EDITS as FEDERATION_EDITS
from tests.privacy.test_verify import EDITS, every
from tools import verify_report

Body = dict[str, Any]
Path_ = tuple[Any, ...]
# Each stands in for values of another type, of another sign, and for none.
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    3,
    2**53 + 1,
    0.5,
    -0.5,
    1e300,
    "",
    "x",
    "\u202e\x1b[2J",
    "A" * 64,
    [],
    {},
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def oak(site: Site) -> SiloFacts:
    facts = site.trained("oak", rounds=3, crash_in=2, limit=Limit(epsilon=8.0, delta=1e-5))
    return replace(facts, audit=AUDIT, prv=Estimate(library="opacus 1.6.0", epsilon=4.863))


@pytest.fixture(scope="module")
def report(site: Site, oak: SiloFacts) -> bytes:
    return site.signed(report_body(oak))


@pytest.fixture(scope="module")
def federation(site: Site, report: bytes) -> bytes:
    return site.federation([report, site.report("birch", rounds=2)])


def tools_judgement(data: bytes) -> bool:
    out = verify_report.Printed()
    value = out.check("bytes", lambda: verify_report.parse(data))
    if value is not None:
        options = argparse.Namespace(plan=None, roster=None)
        out.check("all", lambda: verify_report.check(out, value, options))
    return out.failed == 0


def judgement(data: bytes) -> bool:
    """Of both.

    Raises:
        AssertionError: they differ.
    """
    verdict, mine = verify(data), tools_judgement(data)
    assert verdict.passed == mine, [(check.name, check.shows) for check in verdict.failures]
    return mine


def places(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Of every value inside; of a list, the first and the last item."""
    if isinstance(value, dict):
        inside = list(value.items())
    elif isinstance(value, list):
        inside = [(number, value[number]) for number in sorted({0, len(value) - 1}) if value]
    else:
        return
    for key, item in inside:
        yield (*path, key)
        yield from places(item, (*path, key))


def at(value: Any, path: Path_) -> Any:
    for step in path:
        value = value[step]
    return value


def altered(body: Body, most: int) -> Iterator[tuple[str, Body]]:
    """Every value left out, every object with a key more, and `most` other values in every place."""
    for turn, path in enumerate(list(places(body))):
        left_out = copy.deepcopy(body)
        del at(left_out, path[:-1])[path[-1]]
        yield f"without {path}", left_out
        if isinstance(at(body, path), dict):
            more = copy.deepcopy(body)
            at(more, path)["note"] = "certified"
            yield f"more in {path}", more
        for number in range(most):
            other = copy.deepcopy(body)
            at(other, path[:-1])[path[-1]] = VALUES[(turn + number * 7) % len(VALUES)]
            yield f"{path} = {VALUES[(turn + number * 7) % len(VALUES)]!r:.20}", other


def test_both_take_the_reports_as_they_were_made(report: bytes, federation: bytes) -> None:
    assert judgement(report)
    assert judgement(federation)


@pytest.mark.parametrize("name", EDITS)
def test_both_refuse_an_edit_of_a_silo(site: Site, report: bytes, name: str) -> None:
    body = body_of(report)
    edit: Callable[[Body, Site], None] = EDITS[name][1]
    try:
        edit(body, site)
        data = site.signed(body)
    except (IndexError, StopIteration):
        pytest.skip("is about a later round than this report has")
    assert not judgement(data)


@pytest.mark.parametrize("name", FEDERATION_EDITS)
def test_both_refuse_an_edit_of_the_coordinator(site: Site, federation: bytes, name: str) -> None:
    body = body_of(federation)
    FEDERATION_EDITS[name][1](body)
    assert not judgement(site.signed(body, AGGREGATOR))


def test_both_judge_every_field_that_a_silo_alters_alike(site: Site, report: bytes) -> None:
    judged = {}
    for name, body in altered(body_of(report), most=2):
        try:
            judged[name] = judgement(site.signed(body))
        except ValueError:  # has no canonical form, so nobody can sign it
            continue
        except AssertionError as error:
            raise AssertionError(name) from error
    assert len(judged) > 300
    free = [name for name, passed in judged.items() if passed]
    assert len(free) < len(judged) / 10, free


def test_both_judge_every_field_that_the_coordinator_alters_alike(site: Site, federation: bytes) -> None:
    whole = body_of(federation)
    reports = whole.pop("reports")
    judged = {}
    for name, body in altered(whole, most=2):
        try:
            judged[name] = judgement(site.signed({**body, "reports": reports}, AGGREGATOR))
        except ValueError:
            continue
        except AssertionError as error:
            raise AssertionError(name) from error
    assert len(judged) > 150


@pytest.mark.parametrize("kind", KINDS)
def test_both_judge_a_plan_and_a_lock_that_were_agreed_on_with_odd_values_alike(tmp_path: Path, kind: str) -> None:
    site = Site(tmp_path, plain_contract(*KINDS[kind]))
    plain = report_body(SiloFacts(site.agreed, site.roster, "oak", NOW))
    agreed, judged = plain["contract"], []
    for name, parts in altered({"plan": agreed["plan"], "lock": agreed["lock"]}, most=len(VALUES)):
        body = copy.deepcopy(plain)
        try:
            plan, lock = parts["plan"], parts["lock"]
            if not name.startswith(("('lock', 'plan')", "without ('lock', 'plan')")):
                lock["plan"] = canonical.digest("fedclip/v1/plan", plan).hex()
            digest = canonical.digest("fedclip/v1/contract", plan, lock).hex()
            body["contract"] = {"digest": digest, "plan": plan, "lock": lock}
            judged.append(judgement(site.signed(body)))
        except (KeyError, TypeError, ValueError):
            continue
        except AssertionError as error:
            raise AssertionError(name) from error
    assert len(judged) > 300
    assert 0 < sum(judged) < len(judged) / 4


def raw(report: bytes, edit: Callable[[Any], Any]) -> bytes:
    value = json.loads(report)
    edit(value)
    return verify_report.canonical(value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda value: value["signature"].update(value=value["signature"]["value"].upper()),
        lambda value: value["signature"].update(value=" " + value["signature"]["value"]),
        lambda value: value["signature"].update(value=value["signature"]["value"] + "00"),
        lambda value: value["signature"].update(note="certified by the authority"),
        lambda value: value["signature"].update(key=value["signature"]["key"].upper()),
        lambda value: value.update(note="certified by the authority"),
        lambda value: value["body"].update(version=True),
    ],
)
def test_both_refuse_what_nobody_signed(report: bytes, edit: Callable[[Any], Any]) -> None:
    assert not judgement(raw(report, edit))


def lower(body: Body, by: float) -> None:
    claim = body["claim"]
    for part, name in ((claim, "epsilon"), (body["accounting"], "pld"), (claim["groups"][0], "epsilon")):
        part[name] = round(part[name] - by, 4)
    old, new = f"{claim['epsilon'] + by:.4f}", f"{claim['epsilon']:.4f}"
    claim["sentence"] = claim["sentence"].replace(old, new)


def appended(entry: Body) -> Callable[[list[Body]], None]:
    def edit(entries: list[Body]) -> None:
        entries.append({**entries[-1], "was": "0" * 64, **entry})

    return edit


def more(kind: str, **values: object) -> Callable[[list[Body]], None]:
    """One entry more, about the first run unless it is of a kind that is about none."""

    def edit(entries: list[Body]) -> None:
        common = {name: entries[-1][name] for name in ("version", "at", "silo", "key")}
        about = {} if kind == "clock" else {"run": entries[0]["run"]}
        entries.append({**common, "kind": kind, **about, "was": "0" * 64, **values})

    return edit


def as_of_version_1(entries: list[Body], last: int | None = None) -> None:
    """The first `last` entries, or all, as version 0.1 wrote them."""
    for entry in entries[:last]:
        entry["version"] = 1
        if entry["kind"] == "begin":
            del entry["code"], entry["patients"], entry["limit"]


def one_by_one(*edits: Callable[[list[Body]], Any]) -> Callable[[list[Body]], None]:
    def edit(entries: list[Body]) -> None:
        for each in edits:
            each(entries)

    return edit


def code_before_the_last_round(entries: list[Body]) -> None:
    more("code", code="7" * 64)(entries)
    entries.insert(-2, entries.pop())


def of_patients(*names: str) -> Callable[[list[Body]], Any]:
    return lambda entries: entries[0].update(patients=list(names))


LEDGERS: dict[str, Callable[[list[Body]], Any]] = {
    "an entry of no kind": appended({"kind": "note"}),
    "an entry with a note": lambda entries: entries[-1].update(note="certified"),
    "version true": every("version", True, ("begin",)),
    "a charge of no run": lambda entries: entries[-2].update(run="1" * 32),
    "a settlement twice": appended({}),
    "a settlement of nothing": lambda entries: entries[-1].update(reservation="2" * 64),
    "a set that comes again": lambda entries: entries.append(
        {
            **{name: entries[-1][name] for name in ("version", "at", "silo", "key")},
            "kind": "data",
            "run": entries[0]["run"],
            "set": entries[0]["set"],
            "was": "0" * 64,
        }
    ),
    "new data after the last round": lambda entries: entries.append(
        {
            **{name: entries[-1][name] for name in ("version", "at", "silo", "key")},
            "kind": "data",
            "run": entries[0]["run"],
            "set": "3" * 32,
            "was": "0" * 64,
        }
    ),
    "a second run that charges less than it began with": lambda entries: entries.extend(
        [
            {**entries[0], "run": "4" * 32, "plan": "5" * 64, "set": "6" * 32, "was": "1" * 64, "at": NOW + 9000},
            {**entries[1], "run": "4" * 32, "set": "6" * 32, "steps": 1, "was": "2" * 64, "at": NOW + 9000},
        ]
    ),
    "a second run in order": lambda entries: entries.extend(
        [
            {**entries[0], "run": "4" * 32, "plan": "5" * 64, "set": "6" * 32, "was": "1" * 64, "at": NOW + 9000},
            {**entries[1], "run": "4" * 32, "set": "6" * 32, "was": "2" * 64, "at": NOW + 9000},
        ]
    ),
    "a second run of patients": lambda entries: entries.append(
        {**entries[0], "run": "4" * 32, "plan": "5" * 64, "set": "6" * 32, "unit": "patient", "was": "1" * 64}
    ),
    "the run begun again": lambda entries: entries.append({**entries[0], "run": "4" * 32, "set": "6" * 32}),
    "an integer for a real number": every("noise_multiplier", 1),
    "an upper-case key": lambda entries: [entry.update(key=entry["key"].upper()) for entry in entries],
}


HOUR = 3600
TAKEN: dict[str, Callable[[list[Body]], Any]] = {
    "new data after the last round": LEDGERS.pop("new data after the last round"),
    "a second run in order": LEDGERS.pop("a second run in order"),
    "as version 0.1 wrote it": as_of_version_1,
    "begun by version 0.1 and gone on with": one_by_one(
        lambda entries: as_of_version_1(entries, -2), code_before_the_last_round
    ),
    "begun by version 0.1 and settled by this one": lambda entries: as_of_version_1(entries, -1),
    "another program before the last round": code_before_the_last_round,
    "another limit before the last round": lambda entries: entries.insert(
        -2,
        {"kind": "limit", "run": entries[0]["run"], "limit": None, "was": "0" * 64}
        | {name: entries[-1][name] for name in ("version", "at", "silo", "key")},
    ),
    "a limit that is not recorded": lambda entries: entries[0].pop("limit"),
    "a run that was ended": more("end"),
    "a clock that was wrong": more("clock", at=NOW - HOUR),
    "a clock that was wrong twice": one_by_one(more("clock", at=NOW - HOUR), more("clock", at=NOW - 2 * HOUR)),
}
LEDGERS |= {
    "version 2 and then 1": lambda entries: entries[-1].update(version=1),
    "version 2 without a program": lambda entries: entries[0].pop("code"),
    "version 2 without patients": lambda entries: entries[0].pop("patients"),
    "version 1 with a program": every("version", 1, ("begin", "reserve", "settle")),
    "a program that is null": lambda entries: entries[0].update(code=None),
    "patients that are null": lambda entries: entries[0].update(patients=None),
    "patients of records": of_patients("casefold"),
    "patients that nobody knows": of_patients("lower"),
    "patients twice": one_by_one(every("unit", "patient", ("begin",)), of_patients("casefold", "casefold")),
    "version 3": every("version", 3, ("begin", "reserve", "settle")),
    "begun by version 0.1 and gone on with by nobody knows what": lambda entries: as_of_version_1(entries, -2),
    "the same limit again": more("limit", limit={"epsilon": 8.0, "delta": 1e-5}),
    "a limit of no run": more("limit", limit=None, run="1" * 32),
    "a limit of version 1": more("limit", limit=None, version=1),
    "a limit of nothing": more("limit", limit={"epsilon": 0.0, "delta": 1e-5}),
    "a limit that is whole": more("limit", limit={"epsilon": 8, "delta": 1e-5}),
    "a limit without delta": more("limit", limit={"epsilon": 8.0}),
    "a limit that nobody gives": more("limit"),
    "a limit after the end": one_by_one(more("end"), more("limit", limit=None)),
    "version 1 with a limit": one_by_one(
        as_of_version_1, lambda entries: entries[0].update(limit={"epsilon": 8.0, "delta": 1e-5})
    ),
    "the same program again": more("code", code="0c" * 32),
    "a program of no run": more("code", code="7" * 64, run="1" * 32),
    "a program of version 1": more("code", code="7" * 64, version=1),
    "a round after the end": one_by_one(more("end"), lambda entries: entries.append(
        {**entries[1], "round": 4, "retrain": 1, "was": "1" * 64, "at": entries[-1]["at"]})),
    "new data after the end": one_by_one(more("end"), more("data", set="3" * 32)),
    "an end after the end": one_by_one(more("end"), more("end")),
    "an end of no run": more("end", run="1" * 32),
    "an end by another silo": more("end", silo="birch"),
    "a clock that was right": more("clock"),
    "a clock of the future": more("clock", at=NOW + HOUR),
    "a clock with a note": more("clock", at=NOW - HOUR, note="certified"),
    "older without a word": more("end", at=NOW - HOUR),
    "older after a clock that was wrong": one_by_one(more("clock", at=NOW - HOUR), more("end", at=NOW - 2 * HOUR)),
}  # fmt: skip


@pytest.mark.parametrize("name", [*LEDGERS, *TAKEN])
def test_both_judge_a_ledger_that_was_written_anew_alike(site: Site, oak: SiloFacts, name: str) -> None:
    edited = report_body(replace(oak, receipts=(), limit=None))
    rewrite(edited, site.keys["oak"], {**LEDGERS, **TAKEN}[name])
    if name not in TAKEN:
        assert not judgement(site.signed(edited))
        return
    entries = [
        SignedEntry(encode(item["entry"]), bytes.fromhex(item["signature"])) for item in edited["ledger"]["entries"]
    ]
    assert judgement(site.signed(report_body(replace(oak, entries=entries, receipts=(), limit=None))))
    told = any(what in name for what in ("clock", "version 0.1", "another program", "not recorded"))
    assert judgement(site.signed(edited)) != told, (
        "of a clock that was wrong, of programs and of limits, the report must tell"
    )


@pytest.mark.parametrize("by", [0.01, 0.003])
def test_both_refuse_a_claim_that_is_a_little_too_low(site: Site, report: bytes, by: float) -> None:
    body = body_of(report)
    lower(body, by)
    assert not judgement(site.signed(body))


@pytest.mark.parametrize("group", [0, 1, 2, 3])
def test_both_refuse_a_group_that_is_a_little_too_low(site: Site, report: bytes, group: int) -> None:
    body = body_of(report)
    body["claim"]["groups"][group]["epsilon"] -= 0.02
    assert not judgement(site.signed(body))


def test_both_refuse_what_a_coordinator_could_try(site: Site, oak: SiloFacts, federation: bytes) -> None:
    claims_more = site.signed(report_body(replace(oak, prv=Estimate(library="opacus 1.6.0", epsilon=9.0))))
    other_model = report_body(oak)
    other_model["models"][0]["digest"] = "ab" * 32
    strange = Site(site.folder / "strange")
    edits: dict[str, Callable[[Body], Any]] = {
        "the worst silo understated": lambda body: body["reports"].__setitem__(1, decode(claims_more)),
        "a silo has another model": lambda body: body["reports"].__setitem__(1, decode(site.signed(other_model))),
        "reports in another order": lambda body: body["reports"].reverse(),
        "a receipt forged for a silo that is not here": lambda body: body["receipts"].append(
            strange.receipt(bytes(32), 1, "cedar").hex()
        ),
        "a receipt for a stranger": lambda body: body["receipts"].append(site.receipt(bytes(32), 1, "willow").hex()),
        "a receipt left out": lambda body: body["receipts"].pop(),
        "all silos below the worst": lambda body: body["claim"].update(all_silos=body["claim"]["worst_silo"] - 0.1),
    }
    for name, edit in edits.items():
        body = body_of(federation)
        edit(body)
        assert not judgement(site.signed(body, AGGREGATOR)), name
