"""An experiment's rows as tables: CSV for programs, Markdown for people."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedclip_secure.config.plan import PrivacyPlan
from fedclip_secure.files import write_atomically
from fedclip_secure.simulate.experiment import encoder_of
from fedclip_secure.simulate.figures import Figures
from fedclip_secure.simulate.run import Results, Row

Value = str | int | float | None
NOT_COVERED = (
    "ε is what one run of the plan promises each unit. Runs that were made to choose methods or settings on the same "
    "records spend as well, and are not covered by it."
)


@dataclass(frozen=True, slots=True)
class Group:
    """A row of the table: all cells of one method under one privacy block."""

    label: str
    privacy: PrivacyPlan | None
    rows: list[Row]

    @property
    def figures(self) -> list[tuple[Row, Figures]]:
        """Of the cells that are done."""
        return [(row, row.answer.figures) for row in self.rows if row.answer.figures is not None]

    def by_seed(self, value: Callable[[Figures], float | None], left_out: str | None = None) -> list[float]:
        """For each seed the mean of `value` over the left-out sites, or at the one named; without seeds with gaps."""
        seeds: dict[int, list[float | None]] = {}
        for row in self.rows:
            if left_out is None or row.cell.left_out == left_out:
                figures = row.answer.figures
                seeds.setdefault(row.cell.seed, []).append(None if figures is None else value(figures))
        found = [[share for share in shares if share is not None] for shares in seeds.values()]
        return [
            statistics.mean(some) for some, all_ in zip(found, seeds.values(), strict=True) if len(some) == len(all_)
        ]


def groups_of(results: Results) -> list[Group]:
    """The rows of the table, in the order of the experiment's file."""
    groups: list[Group] = []
    for row in results.rows:
        if not groups or (groups[-1].label, groups[-1].privacy) != (row.label, row.cell.privacy):
            groups.append(Group(row.label, row.cell.privacy, []))
        groups[-1].rows.append(row)
    return groups


def left_out_sites(results: Results) -> list[str]:
    """The sites that are left out, each once, in order."""
    return list(dict.fromkeys(row.cell.left_out for row in results.rows if row.cell.left_out is not None))


def write_tables(results: Results, out: Path) -> list[Path]:
    """Write results.csv, silos.csv, rounds.csv and table.md into `out`; their paths.

    Raises:
        DataError: the disk refuses.
    """
    texts = {
        "results.csv": _csv(map(summary, results.rows)),
        "silos.csv": _csv(entry for row in results.rows for entry in _silos(row)),
        "rounds.csv": _csv(entry for row in results.rows for entry in _rounds(row)),
        "table.md": markdown(results),
    }
    for name, text in texts.items():
        write_atomically(out / name, text.encode())
    return [out / name for name in texts]


def summary(row: Row) -> dict[str, Value]:
    """A cell as one record. Accuracies are shares 0..1."""
    figures = row.answer.figures
    found: dict[str, Value] = {**_key(row), "status": "failed" if figures is None else "done"}
    for name, point in (("accuracy", figures and figures.last), ("zero_shot", figures and figures.zero_shot)):
        found[f"{name}_left_out"] = point.away if point else None
        found[f"{name}_weighted"] = point.weighted if point else None
        found[f"{name}_mean"] = point.mean if point else None
    spent = figures.privacy if figures else None
    return {
        **found,
        "rounds": figures.last.round if figures else None,
        "silos": len(figures.records) if figures else None,
        "training_records": sum(figures.records.values()) if figures else None,
        "parameters": figures.parameters if figures else None,
        "upload_bytes": figures.upload_bytes if figures else None,
        "seconds_per_round": figures.seconds_per_round if figures else None,
        "epsilon": spent.epsilon if spent else None,
        "delta": spent.delta if spent else None,
        "noise_multiplier": spent.noise_multiplier if spent else None,
        "reason": row.answer.reason,
        "cell": row.path.stem if row.path else None,
    }


def _key(row: Row) -> dict[str, Value]:
    """What tells a cell from the others. Two blocks of privacy differ by what they ask for."""
    privacy = row.cell.privacy
    asked = "" if privacy is None else _asked(privacy)
    return {"method": row.label, "left_out": row.cell.left_out, "privacy": asked, "seed": row.cell.seed}


def _asked(privacy: PrivacyPlan) -> str:
    if privacy.target_epsilon is not None:
        return f"epsilon {privacy.target_epsilon:g}"
    return f"sigma {privacy.noise_multiplier:g}"


def _silos(row: Row) -> Iterable[dict[str, Value]]:
    figures = row.answer.figures
    for name, right in figures.last.silos.items() if figures else ():
        zero = figures.zero_shot.silos[name].accuracy if figures and figures.zero_shot else None
        records = figures.records[name] if figures else None
        about: dict[str, Value] = {"silo": name, "training_records": records, "test_records": right.total}
        yield {**_key(row), **about, "accuracy": right.accuracy, "zero_shot": zero}


def _rounds(row: Row) -> Iterable[dict[str, Value]]:
    figures = row.answer.figures
    for point in figures.points if figures else ():
        sent = None if figures is None or figures.upload_bytes is None else point.round * figures.upload_bytes
        shares = {"left_out_accuracy": point.away, "weighted_accuracy": point.weighted, "mean_accuracy": point.mean}
        yield {**_key(row), "round": point.round, "bytes_sent_by_a_silo": sent, **shares}


def _csv(records: Iterable[dict[str, Value]]) -> str:
    """RFC 4180, with a line of names."""
    listed, text = list(records), io.StringIO(newline="")
    writer = csv.DictWriter(text, list(listed[0]) if listed else ["method"])
    writer.writeheader()
    writer.writerows(listed)
    return text.getvalue()


def markdown(results: Results) -> str:
    """The table that people read, and below it what did not run."""
    lines = [f"# {results.experiment.name}", "", _caption(results), "", *table(results)]
    if any(row.cell.privacy for row in results.rows):
        lines += ["", NOT_COVERED]
    reasons = failures(results)
    if reasons:
        lines += ["", "Cells that did not run:", "", *(f"- {' '.join(reason.split())}" for reason in reasons)]
    return "\n".join(lines) + "\n"


def failures(results: Results) -> list[str]:
    """Each reason once, with the method it is about and how many cells it stopped."""
    found: dict[tuple[str, str], int] = {}
    for row in results.rows:
        if row.answer.reason is not None:
            name = ", ".join(filter(None, (row.label, str(_key(row)["privacy"]))))
            found[name, row.answer.reason] = found.get((name, row.answer.reason), 0) + 1
    return [f"{name}: {reason} ({count} cell{'s' * (count > 1)})" for (name, reason), count in found.items()]


def cells(results: Results) -> list[list[str]]:
    """The table's heads, and its rows: a name, and numbers as people read them."""
    columns, groups = _columns(results), groups_of(results)
    return [[head for head, _ in columns], *([text(group) for _, text in columns] for group in groups)]


def table(results: Results) -> list[str]:
    """The lines of the table in Markdown, its columns as wide as they need: as it stands, people can read it too."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in cells(results)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [_line(row, widths) for row in (rows[0], rule, *rows[1:])]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    return f"| {' | '.join([name.lstrip().ljust(widths[0]), *numbers])} |"


def _columns(results: Results) -> list[tuple[str, Callable[[Group], str]]]:
    """A heading, and what stands below it for a row."""
    sites = left_out_sites(results)
    columns: list[tuple[str, Callable[[Group], str]]] = [("method", lambda group: group.label)]
    if any(row.cell.privacy for row in results.rows):
        columns.append(("ε", _epsilon))
    for site in sites:
        columns.append((site, lambda group, at=site: _spread(group.by_seed(lambda one: one.last.away, at))))  # type: ignore[misc]
    if len(sites) > 1:
        columns.append(("mean", lambda group: _spread(group.by_seed(lambda one: one.last.away))))
    return [
        *columns,
        ("silos, all records", lambda group: _spread(group.by_seed(lambda one: one.last.weighted))),
        ("silos, mean", lambda group: _spread(group.by_seed(lambda one: one.last.mean))),
        ("parameters", lambda group: _same(group, lambda one: one.parameters)),
        ("bytes of an upload", lambda group: _same(group, lambda one: one.upload_bytes)),
        ("s per round", _seconds),
    ]


def _caption(results: Results) -> str:
    seeds = len(results.experiment.seeds)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "of one seed"
    away = (
        "A site's column is its accuracy where it was left out and never trained. " if left_out_sites(results) else ""
    )
    return (
        f"Encoder: {encoder_of(results.experiment)}. "
        f"Accuracy in percent, {spread}. {away}`silos` are the test splits of the silos that trained, over all "
        "records together and as the mean over silos. Seconds are the slowest silo's, on this machine."
    )


def _spread(shares: Sequence[float]) -> str:
    if not shares:
        return "-"
    mean = f"{100 * statistics.mean(shares):.1f}"
    return f"{mean} ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else mean


def _epsilon(group: Group) -> str:
    if group.privacy is None:
        return "-"
    spent = [figures.privacy.epsilon for _, figures in group.figures if figures.privacy]
    return f"{max(spent):g}" if spent else f"({_asked(group.privacy)})"


def _same(group: Group, value: Callable[[Figures], int | None]) -> str:
    """What is the same in all cells of a row, but for federations of other sizes."""
    found = sorted({number for _, figures in group.figures if (number := value(figures)) is not None})
    return " - ".join(f"{number:,}" for number in dict.fromkeys((found[0], found[-1]))) if found else "-"


def _seconds(group: Group) -> str:
    found = [figures.seconds_per_round for _, figures in group.figures if figures.seconds_per_round is not None]
    return f"{statistics.mean(found):.3g}" if found else "-"
