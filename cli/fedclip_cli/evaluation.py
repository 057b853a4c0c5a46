"""What `fedclip-silo evaluate` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from fedclip_cli.console import out, print_table

if TYPE_CHECKING:  # these load torch
    from fedclip_secure.data.dataset import Counts
    from fedclip_secure.training.evaluation.evaluate import Evaluation


@dataclass(frozen=True, slots=True)
class Measured:
    """One adapter on one split, and where its confusion matrix was drawn."""

    kind: str
    after_round: int | None  # None: nobody said
    result: Evaluation
    plot: Path


def print_evaluation(split: str, measured: Sequence[Measured]) -> None:
    """A table with a row for each class, and a column for zero-shot and for each adapter."""
    heads = [one.kind if one.after_round is None else f"{one.kind} (round {one.after_round})" for one in measured]
    table = Table("class", "records", "zero-shot", *heads, box=None)
    plain = measured[0].result
    for row, each in enumerate(plain.classes):
        adapters = [percent(one.result.classes[row].adapter) for one in measured]
        table.add_row(Text(each.name), str(each.adapter.total), percent(each.zero_shot), *adapters)
    adapters = [percent(one.result.adapter) for one in measured]
    table.add_row("all", str(plain.adapter.total), percent(plain.zero_shot), *adapters)
    out.print(f"accuracy on the {split} split")
    print_table(table)
    for one in measured:
        out.print(f"confusion matrix of {one.kind}: {one.plot}", markup=False)


def evaluation_json(split: str, measured: Sequence[Measured]) -> dict[str, object]:
    """The object of `--json`; accuracies are shares 0..1, null for a class without records.

    `adapter`, `accuracy` and `classes` are about the first adapter: best, unless `--adapter` says another.
    `adapters` holds, by kind: `after_round`, `accuracy`, `classes` (name: accuracy), `confusion` (C lists
    of C counts: a row for each true class, a column for each predicted one) and `plot`, the path of the SVG.
    """
    first = measured[0].result
    return {
        "adapter": measured[0].kind,
        "split": split,
        "records": first.adapter.total,
        "accuracy": {"zero_shot": first.zero_shot.accuracy, "federated": first.adapter.accuracy},
        "classes": {
            row.name: {
                "records": row.adapter.total,
                "zero_shot": row.zero_shot.accuracy,
                "federated": row.adapter.accuracy,
            }
            for row in first.classes
        },
        "adapters": {one.kind: _adapter_json(one) for one in measured},
    }


def _adapter_json(measured: Measured) -> dict[str, object]:
    result = measured.result
    return {
        "after_round": measured.after_round,
        "accuracy": result.adapter.accuracy,
        "classes": {row.name: row.adapter.accuracy for row in result.classes},
        "confusion": result.confusion.tolist(),
        "plot": str(measured.plot),
    }


def percent(counts: Counts) -> str:
    """As people read it; "-" where there is nothing to count."""
    return "-" if counts.accuracy is None else f"{100 * counts.accuracy:.1f} %"
