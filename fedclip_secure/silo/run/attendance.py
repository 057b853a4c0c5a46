"""In how many of a run's rounds this silo's update was, by its own journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedclip_secure.secagg.silo_session import Stage
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.run.final_models import Course
from fedclip_secure.silo.run.journal import Drawn

_AWAY = "it was not there, or has been started again since"


@dataclass(frozen=True, slots=True)
class Attendance:
    """Training rounds of a run that has ended."""

    rounds: int
    taken: int
    missed: Mapping[str, int]  # reason: in how many rounds

    @classmethod
    def of(cls, course: Course, drawn: Iterable[Drawn], terms: Terms, reasons: Mapping[int, str]) -> Attendance:
        """`drawn` is all that the journal knows; `reasons`, by round, why this program was left out, since it started.

        A silo that has agreed to a list of survivors was on it.
        """
        numbers = {point.model: number for number, point in enumerate(course.points[: course.rounds], start=1)}
        taken = {
            numbers.get(each.model)
            for each in drawn
            if (each.plan, each.roster, each.trains) == (terms.plan, terms.roster.digest, True)
            and each.stage >= Stage.AGREED
        } - {None}
        absent = set(numbers.values()) - taken
        missed = Counter(reasons.get(number, _AWAY) for number in sorted(absent))
        return cls(course.rounds, len(taken), missed)

    @property
    def poor(self) -> bool:
        """Whether the adapters owe this silo's records little or nothing."""
        return 2 * self.taken < self.rounds

    def told(self) -> str:
        """For a person."""
        said = f"took part in {self.taken} of {self.rounds} round(s)"
        if not self.missed:
            return said
        reasons = "; ".join(f"{count}: {reason}" for reason, count in self.missed.items())
        return f"{said}; missed {self.rounds - self.taken} ({reasons})"
