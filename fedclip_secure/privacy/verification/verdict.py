"""What came of checking a report: every check by name, and what no check can show."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import ValidationError

from fedclip_secure.errors import FedClipError, TrustError
from fedclip_secure.privacy.report.wording import CANNOT_SHOW

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Check:
    """`shows` says what a passed check proves, or the fact that failed it."""

    name: str
    passed: bool
    shows: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """`passed` holds if every check did. The pins are for comparing with those that people agreed on."""

    checks: tuple[Check, ...]
    plan_pin: str | None  # None: the report could not be read so far
    roster_pin: str | None
    open_points: tuple[str, ...] = ()  # what a report says itself that it leaves open, and of which silo
    failed_tests: tuple[str, ...] = ()  # of the mechanism, as a silo says of its own machine
    cannot_show: tuple[str, ...] = tuple(CANNOT_SHOW)

    @property
    def passed(self) -> bool:
        """Whether nothing was found wrong."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)


class StoppedError(Exception):
    """A check failed without which the following ones mean nothing. It stands among the checks already."""


@dataclass(slots=True)
class Checks:
    """Runs checks one after another and keeps what each found."""

    prefix: str = ""
    done: list[Check] = field(default_factory=list)

    def run(self, name: str, check: Callable[[], object], shows: str) -> None:
        """Note that `check` raised nothing, and so what it `shows`; or the fact that it raised."""
        with suppress(StoppedError):
            self.need(name, check, shows)

    def need(self, name: str, check: Callable[[], T], shows: str) -> T:
        """As `run`, for a check whose value the following ones are about.

        Raises:
            StoppedError: it failed.
        """
        try:
            value = check()
        except Exception as error:  # whatever a stranger's file makes fail did not pass
            self.done.append(Check(self.prefix + name, False, _in_words(error)))
            raise StoppedError from error
        self.done.append(Check(self.prefix + name, True, shows))
        return value


def expect(condition: bool, otherwise: str) -> None:
    """Fail a check with a fact.

    Raises:
        TrustError: the condition does not hold.
    """
    if not condition:
        raise TrustError(otherwise)


def _in_words(error: Exception) -> str:
    if isinstance(error, FedClipError):
        return str(error)
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        return f"{place}: {first['msg']} ({error.error_count()} fault(s) in all)"[:500]
    return f"it cannot be checked ({type(error).__name__}: {error})"[:500]
