"""Every fixed text of a report by its hash, as `tools/verify_report.py` has them."""

from __future__ import annotations

from typing import Any

from fedclip_secure.privacy.report import assumptions, wording
from fedclip_secure.privacy.report.document import Assumption, Note, Scope, as_data
from tools.verify_report import text_hash


def texts() -> dict[str, str]:
    """By part and id, in order."""
    found = {f"{part}/{item.id}": text_hash(as_data(item)) for part, item in [*_of_wording(), *_of_assumptions()]}
    for part, name in (("steps", wording.MECHANISM), ("one-sum", wording.MECHANISM_OF_ONE_SUM)):
        found[f"mechanism/{part}"] = text_hash({"name": name, "notes": wording.MECHANISM_NOTES})
    return dict(sorted(found.items()))


def _of_wording() -> list[tuple[str, Any]]:
    parts: dict[type, str] = {Scope: "scope"}
    trust = {"single", "threshold", "threshold-weak", "sum", "local-machine", "fallback", "no-fallback"}
    items = [item for item in _flat(vars(wording)) if isinstance(item, Scope | Note)]
    items += [
        *wording._private_scope(),
        *wording._plain_scope(_plain(masked=True)),
        *wording._plain_scope(_plain(False)),
    ]
    return [(parts.get(type(item), "trust" if item.id in trust else "not_covered"), item) for item in items]


def _of_assumptions() -> list[tuple[str, Any]]:
    return [("assumptions", item) for item in _flat(vars(assumptions)) if isinstance(item, Assumption)]


def _plain(masked: bool) -> Any:
    from tests.privacy.reports import plain_contract

    plan = plain_contract().plan
    weights = plan.secure_aggregation.model_copy(update={"weights": "masked" if masked else "equal"})
    return plan.model_copy(update={"secure_aggregation": weights})


def _flat(values: dict[str, Any]) -> list[Any]:
    found: list[Any] = []
    for value in values.values():
        found += value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
    return found
