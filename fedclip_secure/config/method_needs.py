"""What each method needs of the rest of its plan, as plain data.

`spec.needs` of a method is its row of the table: who prepares or accepts a plan loads no method to ask it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fedclip_secure.config.plan import FederationPlan


@dataclass(frozen=True, slots=True)
class Need:
    """What one key of the plan must be: `equals`, as `same_as` another key, or no less than `at_least`.

    Attributes:
        key: as in federation.yaml, `training.rounds`.
        at_least: a number, or another key; with `per_record` so much for each training record of the largest silo.
        where: the key that must be given for this to be asked; a missing `key` or other key asks nothing either.
        why: the end of a sentence.
    """

    key: str
    why: str
    equals: str | float | None = None
    same_as: str | None = None
    at_least: str | float | None = None
    per_record: bool = False
    where: str | None = None

    def fault(self, plan: FederationPlan, records: int | None) -> str | None:
        """How the plan falls short of it, or None."""
        there = _value(plan, self.key)
        if there is None or (self.where is not None and _value(plan, self.where) is None):
            return None
        if self.equals is not None:
            return None if there == self.equals else self._told(there, f"must be {_shown(self.equals)}")
        if self.same_as is not None:
            other = _value(plan, self.same_as)
            fits = other is None or there == other
            return None if fits else self._told(there, f"must be as {self.same_as}, {_shown(other)}")
        return self._too_small(plan, there, records)

    def _too_small(self, plan: FederationPlan, there: float, records: int | None) -> str | None:
        least = _value(plan, self.at_least) if isinstance(self.at_least, str) else self.at_least
        if least is None or there >= least * (records if self.per_record and records else 1):
            return None
        named = f" ({self.at_least})" if isinstance(self.at_least, str) else ""
        whose = "training record of the largest silo" if records is None else f"of the {records} training records here"
        each = f" for each {whose}" if self.per_record else ""
        return self._told(there, f"must be at least {_shown(least)}{named}{each}")

    def _told(self, there: object, wanted: str) -> str:
        return f"{self.key} is {_shown(there)}, and {wanted}: {self.why}"


_ONCE = "each record is added up once"
_SUM = "what silos add must be the plain sum over their records"
_ONE_SUM = (
    Need("training.rounds", _ONCE, equals=1),
    Need("training.local_epochs", _ONCE, equals=1),
    Need("privacy.sample_rate", _ONCE, equals=1),
    Need("privacy.steps_per_round", _ONCE, equals=1),
    Need("training.optimizer.name", _SUM, equals="sgd"),
    Need("training.optimizer.momentum", _SUM, equals=0),
    Need("training.optimizer.weight_decay", _SUM, equals=0),
)
_APART = (
    Need(
        "method.loss", "`inbatch` couples the records of a batch, and clipping would not bound what one of them moves",
        equals="cross_entropy", where="privacy.unit",
    ),
)  # fmt: skip
NEEDS: Mapping[str, tuple[Need, ...]] = {
    "private_prototypes": (
        *_ONE_SUM,
        Need(
            "secure_aggregation.coordinate_clip", "that is what one step may move, and the update is the sum of all",
            at_least="training.optimizer.lr", where="training.batch_size",
        ),
    ),
    "discriminant": (
        *_ONE_SUM,
        Need("secure_aggregation.weights", "counts of records are added up, and weights would count them twice",
             equals="equal"),
        Need("training.optimizer.lr", "then a record counts for 1", same_as="training.batch_size"),
        Need("training.optimizer.lr", "then a record counts for 1", same_as="privacy.update_divisor"),
        Need(
            "secure_aggregation.coordinate_clip", "it bounds a silo's number of records, as 10000 does",
            at_least=1.0, per_record=True,
        ),
    ),
    "fedclip": _APART,
    "fedtune:full": _APART,
    "fedavg_full": _APART,
    "fedprox_full": _APART,
}  # fmt: skip
_SILOS = {"fedapt": "domains"}  # options that list silos, each silo of the roster once


def unmet(plan: FederationPlan, records: int | None = None) -> list[str]:
    """What the plan's method needs and the plan does not give, a sentence each.

    `records`: training records of a silo, where that is known.
    """
    faults = (need.fault(plan, records) for need in NEEDS.get(plan.method.name, ()))
    return [fault for fault in faults if fault is not None]


def unlisted(plan: FederationPlan, silos: Collection[str]) -> list[str]:
    """What the method's options leave open about the silos of the roster."""
    option = _SILOS.get(plan.method.name)
    if option is None:
        return []
    given = plan.method.options.get(option)
    listed = {name for group in given.values() for name in group} if isinstance(given, dict) else set()
    missing = sorted(set(silos) - listed)
    return [f"method.{option} lists {', '.join(missing)} nowhere, and must list each silo once"] if missing else []


def _value(plan: FederationPlan, key: str) -> Any:
    """What the plan has at a key; None where it has nothing there."""
    found: Any = plan
    for part in key.split("."):
        found = None if found is None else getattr(found, part)
    return found


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value}"
