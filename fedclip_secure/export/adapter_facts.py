"""What is known of one adapter, and the JSON card that lies beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedclip_secure.config.lock import Contract
from fedclip_secure.disk import refused
from fedclip_secure.errors import ConfigError, DataError
from fedclip_secure.files import write_atomically
from fedclip_secure.model.state import AdapterState
from fedclip_secure.pki.roster import Roster
from fedclip_secure.privacy.accounting.plan_cost import PlannedRun

ALL_SILOS = "all silos of the round after it"  # whose validation records were counted
KEPT_HOME = (
    "trained or chosen without privacy by this silo's own records: it was sent nowhere, and must not leave the house; "
    "no epsilon bounds what it tells about them"
)


@dataclass(frozen=True, slots=True)
class Bound:
    """What a plan with privacy promises of each global adapter: all its rounds and retrains, whatever was trained."""

    unit: str
    epsilon: float  # add/remove one unit, by PLD
    delta: float
    rounds: int  # retrains included

    @classmethod
    def of(cls, contract: Contract) -> Bound | None:
        """None where nothing can be claimed: a plan without privacy, or with too little noise.

        This loads scipy, and takes seconds for long plans.
        """
        try:
            planned = PlannedRun.of(contract)
            epsilon = planned.epsilon() if planned else math.inf
        except ConfigError:
            return None
        if planned is None or not math.isfinite(epsilon):
            return None
        return cls(planned.privacy.unit, epsilon, planned.delta, planned.rounds)

    def as_json(self) -> dict[str, Any]:
        """For adapter.json."""
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "unit": self.unit,
            "adjacency": "add or remove one",
            "rounds": self.rounds,
            "computed_by": _accountant(),
        }


def _accountant() -> str:
    return f"fedclip-secure {version('fedclip-secure')} from plan and lock, by PLD"


@dataclass(frozen=True, slots=True)
class Facts:
    """One adapter beside its plan and lock.

    Attributes:
        kind: best, last or personal.
        after_round: of the plan's training rounds; None: nobody said.
        model: digest.
        correct, total: validation records, 0 of 0 where nobody counted; `scope` says whose.
        personal: how a personal adapter was made, its `share` among it; None: it is a global one.
    """

    kind: str
    after_round: int | None
    model: bytes
    correct: int = 0
    total: int = 0
    scope: str = ALL_SILOS
    personal: Mapping[str, Any] | None = None

    @property
    def kept_home(self) -> bool:
        """Whether one silo's records made it, or chose it and were counted for it, without noise."""
        return self.personal is not None

    def warning(self) -> dict[str, str]:
        """What stands in the metadata of its file, should it ever be found without its card."""
        return {"personal": KEPT_HOME} if self.kept_home else {}


def make_card(facts: Facts, contract: Contract, roster: Roster) -> dict[str, Any]:
    """All of it as plain data: what `write_card` writes."""
    plan, lock = contract.plan.model_dump(mode="json"), contract.lock.model_dump(mode="json")
    bound = Bound.of(contract)
    card = {
        "federation": contract.plan.federation,
        "adapter": facts.kind,
        "after_round": facts.after_round,
        "model_digest": facts.model.hex(),
        "validation": {"correct": facts.correct, "total": facts.total, "scope": facts.scope},
        "plan": contract.pin,
        "roster": roster.pin,
        "method": plan["method"],
        "model": plan["model"],
        "encoder": {key: value for key, value in lock["encoder"].items() if key != "config"},
        "classes": dict(plan["classes"]),
        "templates": plan["templates"],
        "privacy": KEPT_HOME if facts.kept_home else privacy_statement(contract, bound),
        "claim": None if facts.kept_home or bound is None else bound.as_json(),
    }
    return card if facts.personal is None else {**card, "personal": dict(facts.personal)}


def write_card(path: Path, facts: Facts, contract: Contract, roster: Roster) -> dict[str, Any]:
    """Write the card as JSON; returns it.

    Raises:
        DataError: the disk refuses.
    """
    card = make_card(facts, contract, roster)
    write_atomically(path, f"{json.dumps(card, indent=2, ensure_ascii=False)}\n".encode())
    return card


def read_facts(path: Path, state: AdapterState) -> Facts:
    """What the card beside the adapter `state`, read from `path`, says of it.

    Raises:
        DataError: the card is missing, damaged, or another adapter's.
    """
    card, writer = path.with_suffix(".json"), "personalize" if path.stem == "personal" else "train"
    try:
        read = json.loads(card.read_text("utf-8"))
        if read["model_digest"] != state.digest.hex():
            raise DataError(f"'{card}': is the card of another adapter than {path}; restore the two together")
        counted = read.get("validation", {})
        return Facts(
            kind=str(read.get("adapter", path.stem)),
            after_round=int(read["after_round"]),
            model=state.digest,
            correct=int(counted.get("correct", 0)),
            total=int(counted.get("total", 0)),
            scope=str(counted.get("scope", ALL_SILOS)),
            personal=_personal(read.get("personal")),
        )
    except OSError as error:
        raise DataError(refused(error, card, otherwise=f"`fedclip-silo {writer}` writes this card")) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"'{card}': cannot be read as an adapter's card; `fedclip-silo {writer}` writes it anew"
        ) from error


def _personal(read: Any) -> Mapping[str, Any] | None:
    """Raises KeyError, TypeError or ValueError where it is not what `personalize` writes."""
    return None if read is None else {**read, "share": float(read["share"])}


def privacy_statement(contract: Contract, bound: Bound | None) -> str:
    """What a global adapter may tell about the records that it was trained on."""
    privacy = contract.plan.privacy
    if privacy is None:
        return "none: no epsilon bounds it, and whoever has this adapter may learn about the training records from it"
    if bound is None:
        return (
            "no epsilon can be claimed: the plan has privacy, but its noise or its lock allow no claim; whoever has "
            "this adapter may learn about the training records from it"
        )
    return (
        f"epsilon = {bound.epsilon:.4f} at delta = {bound.delta:g} for adding or removing any one {bound.unit} of one "
        f"silo's training records, for all {bound.rounds} round(s) that the plan allows, retrains included; more for a "
        f"person at several silos. This is the claim of the plan, computed by {_accountant()}, and it rests on every "
        "silo having trained as planned: what was spent, and how far that is known, stands in the silos' reports"
    )
