"""What a simulation shows while it runs, and at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from fedclip_cli.console import out, print_table, say

if TYPE_CHECKING:  # these load torch
    from fedclip_secure.simulate.run import Results, Row


@dataclass(frozen=True, slots=True)
class Show:
    """What is called as cells get done."""

    say: Callable[[str], None]
    begin: Callable[[int, int], None]
    done: Callable[[Row], None]


@contextlib.contextmanager
def cell_progress(*, quiet: bool) -> Iterator[Show]:
    """A line for each cell, and on a terminal a bar below them; `quiet`: nothing."""
    if quiet:
        yield Show(lambda _: None, lambda *_: None, lambda _: None)
        return
    columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        task = progress.add_task("cells", total=None)

        def begin(cells: int, before: int) -> None:
            progress.update(task, total=cells, completed=before)
            say(f"{cells} cells" + (f", {before} of them done before" if before else ""))

        def done(row: Row) -> None:
            progress.advance(task)
            say(f"{_named(row)}: {_result(row)}")

        yield Show(say, begin, done)


def _named(row: Row) -> str:
    cell = row.cell
    away = f", {cell.left_out} left out" if cell.left_out is not None else ""
    private = ", private" if cell.privacy is not None else ""
    return f"{row.label}{private}{away}, seed {cell.seed}"


def _result(row: Row) -> str:
    figures = row.answer.figures
    if figures is None:
        return f"did not run: {row.answer.reason}"
    last = figures.last
    shares = {"": last.away if last.left_out else None, " at the silos": last.weighted}
    return ", ".join(f"{100 * share:.1f} %{where}" for where, share in shares.items() if share is not None)


def print_simulation(results: Results, files: list[Path]) -> None:
    """The table of table.md, what did not run, and where everything lies."""
    from fedclip_secure.simulate.experiment import encoder_of
    from fedclip_secure.simulate.tables import NOT_COVERED, cells, failures

    out.print(f"encoder: {encoder_of(results.experiment)}", markup=False)
    heads, *rows = cells(results)
    table = Table(heads[0], *(Column(head, justify="right") for head in heads[1:]), box=None)
    for row in rows:
        table.add_row(*map(Text, row))
    print_table(table)
    if any(row.cell.privacy for row in results.rows):
        out.print(NOT_COVERED)
    for reason in failures(results):
        out.print(f"did not run: {reason}", markup=False)
    out.print(f"written: {', '.join(map(str, files))}", markup=False)


def simulation_json(results: Results, files: list[Path]) -> dict[str, Any]:
    """The object of `--json`: `rows` as in results.csv, accuracies as shares 0..1."""
    from fedclip_secure.simulate.tables import summary

    rows = [summary(row) for row in results.rows]
    return {
        "name": results.experiment.name,
        "encoder": results.experiment.model.model_dump(mode="json"),
        "cells": len(rows),
        "failed": sum(row["status"] == "failed" for row in rows),
        "rows": rows,
        "files": [str(path) for path in files],
    }
