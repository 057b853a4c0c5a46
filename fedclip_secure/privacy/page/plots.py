"""The report's pictures, as SVG to stand inside the page: its colours are the page's own, light or dark.

Matplotlib writes a fixed colour for each role, and each is replaced by a CSS variable of that name.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedclip_secure.privacy.page.curves import Curve, most_true_positives
from fedclip_secure.privacy.report.document import Claim
from fedclip_secure.privacy.report.wording import small

_ROLES = {"ink": "#010101", "faint": "#020202", "grid": "#030303", "line": "#040404", "warn": "#050505"}
_SIZE = (5.0, 3.3)  # inches; a phone shows it at its own size
_STYLE: dict[str, object] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, copied and read aloud
    "text.parse_math": False,
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _ROLES["faint"],
    "axes.labelcolor": _ROLES["ink"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _ROLES["grid"],
    "grid.linewidth": 0.7,
    "text.color": _ROLES["ink"],
    "xtick.color": _ROLES["faint"],
    "ytick.color": _ROLES["faint"],
    "xtick.labelcolor": _ROLES["ink"],
    "ytick.labelcolor": _ROLES["ink"],
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 10,
}


def rounds_svg(curve: Curve, claim: Claim) -> str:
    """Epsilon over rounds: what is reserved, and what the plan may still take. The silo's limit counts otherwise."""
    rounds, epsilons = curve.x, curve.y
    spent = claim.spent.reservations
    with _drawing("rounds") as (axes, out):
        axes.plot(rounds, epsilons, "--", color=_ROLES["line"], label="still allowed by the plan")
        if spent:
            upto = np.append(rounds[rounds < spent], spent)
            axes.plot(upto, np.append(epsilons[rounds < spent], claim.spent.epsilon), color=_ROLES["line"])
            axes.plot(spent, claim.spent.epsilon, "o", color=_ROLES["line"], label=f"spent: {claim.spent.epsilon:.2f}")
        whole = f"whole plan: {epsilons[-1]:.2f}"
        axes.plot(rounds[-1], epsilons[-1], "o", mfc="none", color=_ROLES["line"], label=whole)
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
        axes.set(xlabel="rounds trained, retrains included", ylabel="ε", xlim=(0, None), ylim=(0, None))
        axes.legend(loc="lower right")
    return _inline(out, "Epsilon over rounds")


def profile_svg(profile: Curve, claim: Claim) -> str:
    """The pairs (epsilon, delta) that hold all at once, and the one that the claim names."""
    shown = profile.y > 0
    with _drawing("profile") as (axes, out):
        axes.semilogy(profile.x[shown], profile.y[shown], color=_ROLES["line"])
        axes.plot(claim.epsilon, claim.delta, "o", color=_ROLES["line"], label=f"the claim: ε = {claim.epsilon:.2f}")
        axes.yaxis.set_major_formatter(lambda value, _: small(value))
        axes.minorticks_off()
        axes.set(xlabel="ε", ylabel="δ", xlim=(0, None), ylim=(min(claim.delta, profile.y[shown][-1]) / 3, 1.5))
        axes.legend(loc="upper right")
    return _inline(out, "Delta for every epsilon")


def roc_svg(profile: Curve, reached: Curve | None) -> str:
    """What the best attack could reach at most, guessing, and what a measured attack surely `reached`."""
    false_positives = np.unique(np.concatenate([np.linspace(0, 1, 201), np.geomspace(1e-5, 0.1, 60)]))
    with _drawing("roc") as (axes, out):
        bound = most_true_positives(profile, false_positives)
        axes.fill_between(false_positives, bound, 1, color=_ROLES["line"], alpha=0.13, linewidth=0)
        axes.plot(false_positives, bound, color=_ROLES["line"], label="no attack gets above")
        axes.plot([0, 1], [0, 1], ":", color=_ROLES["faint"], label="guessing")
        if reached is not None and len(reached.x):
            label = "measured attack, at least"
            axes.plot(reached.x, reached.y, "o", markersize=3.5, color=_ROLES["warn"], label=label)
        axes.set(xlabel="absent, but called present", ylabel="present, and called so", xlim=(0, 1), ylim=(0, 1.02))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:.0%}")
        axes.legend(loc="lower right")
    return _inline(out, "The best attack's true against its false positives")


@contextmanager
def _drawing(name: str) -> Iterator[tuple[Axes, io.BytesIO]]:
    """Axes to draw on, and where the SVG stands afterwards; one report gives one picture."""
    out = io.BytesIO()
    with style.context(["default", {**_STYLE, "svg.hashsalt": f"fedclip-secure {name}"}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.tick_params(length=0)
        yield axes, out
        nothing = dict.fromkeys(["Date", "Creator", "Format", "Type"])
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)


def _inline(out: io.BytesIO, title: str) -> str:
    """The SVG element alone, without names of its parts (several stand in one page) and with the page's colours."""
    text = out.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*"/>|<style.*?</style>|font-family:[^;]*;', "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r' (width|height)="[0-9.]+pt"', "", text, count=2)
    for role, colour in _ROLES.items():
        text = text.replace(colour, f"var(--{role})")
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
