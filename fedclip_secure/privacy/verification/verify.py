"""Check a privacy report offline: everything that a stranger can know from its bytes alone.

A report that passes shows that the silo (or the coordinator) signed exactly this; that plan, lock and roster are those
of the two fingerprints; that the silo's ledger is one unbroken, signed chain whose entries of this run keep to the
plan; that every receipt in it is the coordinator's and of a state of this chain; and that no figure is lower than what
a new computation gives. It cannot show what `Verdict.cannot_show` lists.

Without the silo's key no byte can be changed. With it, a silo can change what nothing else holds:
- its clock, the versions and hashes that it states, its limit, `units_at_least`, its audit (that there was one, when,
  on which code, and what came of it; but the tests are those that there are, it is not younger than the report, and no
  attack proves more than is claimed), the figure of the accountant that is not run here (unless that differs),
  digests of models (unless the coordinator's are others);
- figures of the claim upwards, and by less than 0.00015 downwards;
- entries after the last receipt, and before any receipt the whole ledger; and it can leave out receipts with the
  rounds that they are of. The coordinator's own receipts (`Expected.receipts`, or the federation's report, which must
  hold one for each silo that shows uploads) find the last two wherever something was uploaded.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from pydantic import TypeAdapter

from fedclip_secure.errors import TrustError
from fedclip_secure.privacy.canonical_json import decode, encode
from fedclip_secure.privacy.report.document import FORMAT, VERSION, FederationReport, SiloBody, SiloReport, as_data
from fedclip_secure.privacy.verification.federation_report import check_federation
from fedclip_secure.privacy.verification.silo_checks import Expected, check_silo
from fedclip_secure.privacy.verification.verdict import Checks, StoppedError, Verdict, expect

_MAX_CONTRACT = 1 << 21
_MAX_BYTES = 1 << 28  # a federation of 255 silos with long ledgers has some 10 MB
_FIRST = (
    "It is of version 1. Such a report can still be written: it does not hold which code trained, when it was tested, "
    "and whether the limit was changed, and what it calls tested is the silo's word."
)
_KINDS: dict[str, TypeAdapter[Any]] = {
    "silo": TypeAdapter(SiloReport),
    "federation": TypeAdapter(FederationReport),
}


def verify(data: bytes, expected: Expected | None = None) -> Verdict:
    """Every check of a report's bytes. It never raises, whatever the bytes are."""
    checks = Checks()
    with suppress(StoppedError):
        value = checks.need("encoding", lambda: _decode(data), "the bytes are the one form that can be signed")
        report = checks.need("schema", lambda: _model(value), "every field is known and of its type")
        if isinstance(report, SiloReport):
            check_silo(checks, report, expected or Expected())
        else:
            check_federation(checks, report, expected or Expected())
        plan, roster = report.body.contract.digest, report.body.roster.digest
        pins = f"sha256:{plan}", f"sha256:{roster}"
        return Verdict(tuple(checks.done), *pins, _open_points(report), failed_tests(report))
    return Verdict(tuple(checks.done), None, None)


def failed_tests(report: SiloReport | FederationReport) -> tuple[str, ...]:
    """The tests of the mechanism that failed, as the silos say themselves."""
    return tuple(
        f"{test.name} at {body.silo}"
        for body in _of_silos(report)
        for test in (body.audit.self_tests if body.audit else [])
        if not test.passed
    )


def _of_silos(report: SiloReport | FederationReport) -> list[SiloBody]:
    return [report.body] if isinstance(report, SiloReport) else [inner.body for inner in report.body.reports]


def _open_points(report: SiloReport | FederationReport) -> tuple[str, ...]:
    """Each with the silos that it is said of."""
    silos: dict[str, list[str]] = {}
    for body in _of_silos(report):
        if body.version == 1:
            silos.setdefault(_FIRST, []).append(body.silo)
        for item in body.assumptions:
            if item.state == "open":
                silos.setdefault(f"{item.text}? {item.because}", []).append(body.silo)
    return tuple(f"{', '.join(names)}: {text}" for text, names in silos.items())


def read_report(data: bytes) -> SiloReport | FederationReport:
    """The typed report, for showing it; nothing of it is checked but its form.

    Raises:
        TrustError: the bytes are no report of this version.
    """
    checks = Checks()
    try:
        return checks.need("schema", lambda: _model(_decode(data)), "")
    except StoppedError as error:
        raise TrustError(f"this is no privacy report: {checks.done[-1].shows}") from error


def _decode(data: bytes) -> Any:
    expect(len(data) <= _MAX_BYTES, f"{len(data)} bytes are more than any report has")
    return decode(data)


def _model(value: Any) -> SiloReport | FederationReport:
    body = value.get("body") if isinstance(value, dict) else None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise TrustError("it is no privacy report")
    version = body.get("version")
    known = type(version) is int and 1 <= version <= VERSION
    expect(known, "its version is unknown to this program; use a newer one")
    kind = body.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise TrustError("its kind is neither silo nor federation")
    # The plan's lists are many kinds; of each fault in them a record would be made.
    expect(len(encode(body.get("contract"))) <= _MAX_CONTRACT, "its plan and lock are larger than any")
    report: SiloReport | FederationReport = _KINDS[kind].validate_python(value)
    expect(encode(as_data(report)) == encode(value), "a number or a list is not in the form that this program writes")
    return report
