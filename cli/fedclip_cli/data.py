"""What `fedclip-silo extract` says about a silo's data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Column, Table
from rich.text import Text

from fedclip_cli.console import out, print_table, printable

if TYPE_CHECKING:  # a silo's installation alone has what this needs
    from fedclip_secure.data.report import DataReport


def print_data(report: DataReport, workdir: Path | None) -> None:
    """Classes by split, patients, what was found, and where all of it lies. Features alone have no page."""
    from fedclip_secure.data.report import LEFT_OUT, PAGE

    splits = report.splits
    table = Table("class", *(Column(name, justify="right") for name in (*splits, "all")), box=None)
    for name in next(iter(splits.values())).classes:
        counts = [split.classes[name] for split in splits.values()]
        table.add_row(Text(printable(name)), *map(str, (*counts, sum(counts))))
    if report.patients is not None:
        table.add_row("patients", *(str(split.patients) for split in splits.values()), str(report.patients))
    print_table(table)
    for line in report.lines():
        out.print(printable(line), markup=False)
    if workdir is not None:
        listed = f"; all that was left out: {workdir / LEFT_OUT}" if report.left_out else ""
        out.print(f"the same with thumbnails, to be kept here: {workdir / PAGE}{listed}", markup=False)
    sizes = ", ".join(f"{name} {split.images}" for name, split in splits.items())
    out.print(f"features ready: {sizes}", markup=False)
