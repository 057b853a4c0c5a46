"""An experiment's pictures, as SVG: accuracy over rounds, over bytes sent, and over epsilon."""

from __future__ import annotations

import io
import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, Locator, LogLocator, MaxNLocator, NullLocator

from fedclip_secure.files import write_atomically
from fedclip_secure.simulate.experiment import encoder_name
from fedclip_secure.simulate.figures import Figures, Point
from fedclip_secure.simulate.run import Results
from fedclip_secure.simulate.tables import Group, groups_of, left_out_sites
from fedclip_secure.training.evaluation.plots import plot_style

# Okabe and Ito 2008: told apart without colour vision; what comes after the last has another line.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#666666"
_LINES = ("-", "--", "-.", ":")
_SIZE = (6.4, 4.0)  # inches


@dataclass(frozen=True, slots=True)
class Curve:
    """Mean and standard deviation over seeds, both in percent, at each x."""

    x: list[float]
    mean: list[float]
    deviation: list[float]


@dataclass(frozen=True, slots=True)
class _About:
    """What every picture says: where accuracy was measured, and what made the features."""

    where: str
    encoder: str


def write_plots(results: Results, out: Path) -> list[Path]:
    """Write rounds.svg, bytes.svg and epsilon.svg into `out`, as far as there is something to show; their paths.

    Raises:
        DataError: the disk refuses.
    """
    groups = [group for group in groups_of(results) if group.figures]
    where = "left-out site" if left_out_sites(results) else "the silos' test records"
    about = _About(where, encoder_name(results.experiment))
    wanted = {
        "rounds.svg": (_over_rounds, bool(groups)),
        "bytes.svg": (_over_bytes, any(row.cell.kind == "federated" for group in groups for row in group.rows)),
        "epsilon.svg": (_over_epsilon, any(group.privacy for group in groups)),
    }
    names = [name for name, (_, shown) in wanted.items() if shown]
    for name in names:
        write_atomically(out / name, wanted[name][0](groups, about))
    return [out / name for name in names]


def _over_rounds(groups: Sequence[Group], about: _About) -> bytes:
    with _drawing("Accuracy over rounds", about) as (axes, out):
        for number, group in enumerate(groups):
            curve = curve_of(group)
            if len(curve.x) == 1:  # zero-shot takes no rounds
                axes.axhline(curve.mean[0], color=_GREY, linestyle=":", label=group.label)
            else:
                _draw(axes, number, curve, _name(group))
        axes.set_xlabel("rounds")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return out.getvalue()


def _over_bytes(groups: Sequence[Group], about: _About) -> bytes:
    """From the first upload on: the axis is logarithmic, as methods differ by powers of ten."""
    with _drawing("Accuracy over bytes sent", about) as (axes, out):
        for number, group in enumerate(groups):
            sizes = [figures.upload_bytes for _, figures in group.figures if figures.upload_bytes is not None]
            if sizes:
                curve = curve_of(group)
                sent = [statistics.mean(sizes) * x / 1e6 for x in curve.x]
                _draw(axes, number, Curve(sent[1:], curve.mean[1:], curve.deviation[1:]), _name(group))
        axes.set_xlabel("megabytes that one silo has sent")
        _logarithmic(axes, LogLocator(subs=(1, 2, 5)))
    return out.getvalue()


def _over_epsilon(groups: Sequence[Group], about: _About) -> bytes:
    spent = sorted({_epsilon(group) for group in groups if group.privacy})
    with _drawing("Accuracy at the end over epsilon", about) as (axes, out):
        for number, label in enumerate(dict.fromkeys(group.label for group in groups)):
            mine = [group for group in groups if group.label == label]
            colour = _COLOURS[number % len(_COLOURS)]
            ends = sorted((_epsilon(group), *_end(group)) for group in mine if group.privacy)
            if ends:
                x, mean, deviation = zip(*ends, strict=True)
                axes.errorbar(x, mean, yerr=deviation, marker="o", capsize=3, label=label, color=colour)
            for group in mine:
                if group.privacy is None:
                    name = f"{label}, no privacy" if ends else label
                    axes.axhline(_end(group)[0], linestyle="--", linewidth=1, label=name, color=colour)
        axes.set_xlabel("ε of one run")
        _logarithmic(axes, FixedLocator(spent))
    return out.getvalue()


def _logarithmic(axes: Axes, ticks: Locator) -> None:
    """Powers of ten as plain numbers: a formula would need what the style has turned off."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticks)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.xaxis.set_minor_locator(NullLocator())


def curve_of(group: Group) -> Curve:
    """Accuracy over the rounds that every cell of the row was measured after."""
    rounds = [{point.round for point in figures.points} for _, figures in group.figures]
    common = sorted(set.intersection(*rounds))
    spreads = [_spread(group, number) for number in common]
    return Curve([float(number) for number in common], [mean for mean, _ in spreads], [width for _, width in spreads])


def _spread(group: Group, number: int) -> tuple[float, float]:
    def share(figures: Figures) -> float | None:
        return _shown(next(point for point in figures.points if point.round == number))

    shares = group.by_seed(share) or [share(figures) or 0.0 for _, figures in group.figures]
    return 100 * statistics.mean(shares), 100 * statistics.stdev(shares) if len(shares) > 1 else 0.0


def _shown(point: Point) -> float | None:
    """The left-out site's accuracy; where none is left out, that over the silos' test records."""
    return point.weighted if point.left_out is None else point.away


def _end(group: Group) -> tuple[float, float]:
    curve = curve_of(group)
    return curve.mean[-1], curve.deviation[-1]


def _epsilon(group: Group) -> float:
    return max(figures.privacy.epsilon for _, figures in group.figures if figures.privacy)


def _name(group: Group) -> str:
    return f"{group.label}, ε = {_epsilon(group):.3g}" if group.privacy else group.label


def _draw(axes: Axes, number: int, curve: Curve, label: str) -> None:
    colour, line = _COLOURS[number % len(_COLOURS)], _LINES[number // len(_COLOURS) % len(_LINES)]
    axes.plot(curve.x, curve.mean, line, color=colour, label=label, marker="." if len(curve.x) < 40 else "")
    if any(curve.deviation):
        low = [mean - width for mean, width in zip(curve.mean, curve.deviation, strict=True)]
        high = [mean + width for mean, width in zip(curve.mean, curve.deviation, strict=True)]
        axes.fill_between(curve.x, low, high, color=colour, alpha=0.15, linewidth=0)


@contextmanager
def _drawing(title: str, about: _About) -> Iterator[tuple[Axes, io.BytesIO]]:
    """Axes to draw on, and where the SVG stands afterwards."""
    out = io.BytesIO()
    with plot_style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        yield axes, out
        axes.set_title(f"{title}\nencoder: {about.encoder}", loc="left")
        axes.set_ylabel(f"accuracy, {about.where} (%)")
        axes.grid(color="#dddddd", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(out, format="svg", metadata={"Date": None, "Title": title})
