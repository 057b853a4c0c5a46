"""What the demo shows while it runs, and at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fedclip_cli.console import out, print_table, say
from fedclip_secure.aggregator.status import RunStatus

if TYPE_CHECKING:  # loads torch
    from fedclip_secure.demo.reports import Reports
    from fedclip_secure.demo.steps import Outcome

Show = Callable[[RunStatus], None]


@contextlib.contextmanager
def run_progress(*, quiet: bool) -> Iterator[Show]:
    """A bar of rounds on a terminal; elsewhere a line for each round; `quiet`: nothing."""
    if quiet:
        yield lambda _status: None
    elif out.is_terminal:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[stage]}"),
            TimeElapsedColumn(),
            console=out,
        ) as progress:
            yield _bar(progress)
    else:
        yield _lines()


def _bar(progress: Progress) -> Show:
    task = progress.add_task("waiting for silos", total=None, stage="", visible=False)

    def show(status: RunStatus) -> None:
        done = len(status.finished_rounds)
        doing = f"round {min(status.round, status.rounds)} of {status.rounds}" if done else "silos load and extract"
        progress.update(
            task, description=doing, completed=done, total=status.rounds + 1, stage=status.stage or "", visible=True
        )

    return show


def _lines() -> Show:
    told = 0

    def show(status: RunStatus) -> None:
        nonlocal told
        for row in status.finished_rounds[told:]:
            told += 1
            name = f"round {row['round']} of {status.rounds}" if row["round"] <= status.rounds else "closing round"
            say(f"{name}: averaged {', '.join(row['survivors'])}")

    return show


def print_demo(outcome: Outcome, folder: Path) -> None:
    """The table of accuracies, what travelled, and where everything lies."""
    found, scene = outcome.accuracies, outcome.scene
    table = Table("lab", "zero-shot", "trained alone", "federated", box=None)
    for site in scene.training:
        name = site.name
        table.add_row(Text(name), *(_percent(x[name]) for x in (found.zero_shot, found.local_only, found.federated)))
    if scene.unseen is not None:
        name, alone = scene.unseen.name, [share for share in found.local_only_at_unseen.values() if share is not None]
        mean = f"{_percent(sum(alone) / len(alone))} (mean)" if alone else "-"
        table.add_row(Text(f"{name}, unseen"), _percent(found.zero_shot[name]), mean, _percent(found.federated[name]))
    print_table(table)
    out.print(
        f"{outcome.parameters:,} parameters; each upload {outcome.update_bytes:,} bytes, masked and sealed, "
        "over TLS 1.3 with client certificates",
        markup=False,
    )
    if outcome.reports is not None:
        _print_reports(outcome.reports)
    for drop in outcome.dropped:
        out.print(
            f"{drop['silo']} dropped out of round {drop['round']} at {drop['stage']}: {drop['reason']}", markup=False
        )
    out.print(f"{outcome.seconds:.0f} s; adapters, logs and certificates lie in {folder}", markup=False)


def _print_reports(reports: Reports) -> None:
    for name, epsilon in reports.epsilon.items():
        out.print(f"{name}: epsilon {epsilon:g} (delta {reports.delta:g}) for each {reports.unit}", markup=False)
    for path in reports.paths:
        out.print(f"verified: {path} (and report.html beside it)", markup=False)
    out.print("trained alone: without privacy, for a model that stays in its lab needs none", markup=False)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
