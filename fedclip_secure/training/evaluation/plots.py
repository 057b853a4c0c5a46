"""Pictures of an evaluation, as SVG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedclip_secure.files import write_atomically
from fedclip_secure.training.evaluation.evaluate import Confusion, Evaluation

_BLUES = mpl.colormaps["Blues"]  # one hue from light to dark: told apart without colour vision, and in print
_WHITE_TEXT_FROM = 0.72  # share from which white on the map's blue has the higher contrast
_EMPTY_ROW = "#eeeeee"  # a class without records
_LONGEST_NAME = 30  # characters
_FEW = 12  # classes, up to which there is room for more text


def save_confusion(path: Path, evaluation: Evaluation, title: str) -> None:
    """Write the adapter's confusion as SVG to `path`, with its accuracy under the `title`.

    Raises:
        DataError: the file cannot be written.
    """
    counts = evaluation.adapter
    headline = f"{title}\n{counts.correct} of {counts.total} right, {counts.correct / counts.total:.1%}"
    write_atomically(path, confusion_svg(evaluation.confusion, evaluation.names, headline))


def confusion_svg(confusion: Confusion, classes: Sequence[str], title: str) -> bytes:
    """Draw `confusion` (C, C), rows the true class, columns the predicted one, for C from 2 to some hundred.

    The colour of a cell is its share of the row, its text the number of records; up to 12 classes it
    says the share too. Cells without records stay blank, rows without records are grey. Long names are cut.
    """
    cell = _cell_inches(len(classes))
    side = cell * len(classes)
    with plot_style(), warnings.catch_warnings():
        # Text is laid out with the font at hand and drawn by the reader's, which may have more signs.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(side, side))
        axes = figure.add_axes((0, 0, 1, 1))
        cells = _draw_cells(axes, confusion)
        _write_counts(axes, confusion, cell)
        _label(axes, confusion, classes, cell)
        axes.set_title(title, loc="left", pad=10)
        height = min(1.0, 3 / side)  # inches, as shares of the axes
        bar = figure.add_axes((1 + 0.2 / side, 1 - height, 0.15 / side, height))
        figure.colorbar(cells, cax=bar, label="share of the true class", format="{x:.0%}")
        out = io.BytesIO()
        # The figure is as large as the axes alone; `tight` makes room for what stands around them.
        figure.savefig(out, format="svg", bbox_inches="tight", pad_inches=0.15, metadata={"Date": None, "Title": title})
    return out.getvalue()


def plot_style() -> AbstractContextManager[None]:
    """Matplotlib's defaults, whatever the person's own matplotlibrc says, and a few of ours."""
    ours: dict[str, object] = {
        "svg.fonttype": "none",  # text stays text: it can be searched, copied and read aloud
        "svg.hashsalt": "fedclip-secure",  # one evaluation, one file
        "text.parse_math": False,  # a $ in a class name is a $
        "font.size": 9,
    }
    return style.context(["default", ours])


def _cell_inches(classes: int) -> float:
    """Few classes get cells for two lines of text, many just enough for a count."""
    return float(np.clip(7 / classes, 0.26, 0.9))


def _shares(confusion: Confusion) -> npt.NDArray[np.float64]:
    shares: npt.NDArray[np.float64] = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    return shares


def _draw_cells(axes: Axes, confusion: Confusion) -> PatchCollection:
    filled = np.argwhere(confusion)
    for row in np.flatnonzero(confusion.sum(axis=1) == 0):
        axes.axhspan(row - 0.5, row + 0.5, color=_EMPTY_ROW, linewidth=0)
    squares = [Rectangle((column - 0.5, row - 0.5), 1, 1) for row, column in filled]
    cells = PatchCollection(squares, cmap=_BLUES, norm=Normalize(0, 1), linewidth=0)
    cells.set_array(_shares(confusion)[tuple(filled.T)])
    axes.add_collection(cells)
    return cells


def _write_counts(axes: Axes, confusion: Confusion, cell: float) -> None:
    shares = _shares(confusion)
    detailed = len(confusion) <= _FEW
    for row, column in np.argwhere(confusion):
        share, count = shares[row, column], confusion[row, column]
        text = f"{count}\n{share:.0%}" if detailed else f"{count}"
        # A sign is about 0.6 of the font's size wide, and an inch has 72 points.
        size = min(9.0, 72 * cell / (0.65 * max(len(line) for line in text.split()) + 0.8))
        colour = "white" if share >= _WHITE_TEXT_FROM else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)


def _label(axes: Axes, confusion: Confusion, classes: Sequence[str], cell: float) -> None:
    ticks, size = np.arange(len(classes)), min(9.0, 50 * cell)  # points
    names = [_shortened(name) for name in classes]
    rows = [f"{name} ({total})" for name, total in zip(names, confusion.sum(axis=1), strict=True)]
    slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(classes) <= _FEW else {"rotation": 90}
    axes.set_xticks(ticks, names, fontsize=size, **slant)
    axes.set_yticks(ticks, rows, fontsize=size)
    axes.set_xticks(ticks[:-1] + 0.5, minor=True)
    axes.set_yticks(ticks[:-1] + 0.5, minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.5)
    axes.tick_params(which="both", length=0)
    axes.set(xlim=(-0.5, len(classes) - 0.5), ylim=(len(classes) - 0.5, -0.5))
    axes.set(xlabel="predicted class", ylabel="true class (records)")


def _shortened(name: str) -> str:
    """Names of one family differ at the end, so the middle is what is left out."""
    return name if len(name) <= _LONGEST_NAME else f"{name[:18]}…{name[-11:]}"
