"""Drawings of what lies under a microscope, class by class: how dense the matter is, before any staining or optics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SIZE = 64  # pixels, height and width
_OVERSAMPLING = 4  # drawn so much larger, then averaged: smooth edges
_CANVAS = SIZE * _OVERSAMPLING
_MARGIN = 0.06  # share of the frame along its edges where nothing is centred: a field of view is never empty

Floats = npt.NDArray[np.float64]
Point = tuple[float, float]
Random = np.random.Generator


class _Slide:
    """Two layers of density, 0..255: `body`, and `detail` (nuclei, walls, debris), which other dyes stain."""

    def __init__(self) -> None:
        self.layers = [Image.new("L", (_CANVAS, _CANVAS)) for _ in range(2)]
        self.body, self.detail = (ImageDraw.Draw(layer) for layer in self.layers)

    def density(self) -> Floats:
        """(2, SIZE, SIZE), 0..1."""
        return np.stack([np.asarray(layer.reduce(_OVERSAMPLING)) for layer in self.layers]) / 255


def draw(name: str, random: Random) -> Floats:
    """One field of view of the class `name`: (2, SIZE, SIZE), body and detail, 0..1."""
    slide = _Slide()
    _debris(slide, random)
    DRAWERS[name](slide, random)
    return slide.density()


def _place(random: Random) -> Point:
    x, y = random.uniform(_MARGIN, 1 - _MARGIN, 2) * _CANVAS
    return float(x), float(y)


def _inwards(random: Random, place: Point) -> float:
    """A heading in radians that mostly leads towards the middle."""
    x, y = place
    return math.atan2(_CANVAS / 2 - y, _CANVAS / 2 - x) + float(random.normal(0, 0.7))


def _tone(random: Random) -> int:
    return int(random.integers(120, 230))


def _disc(pen: ImageDraw.ImageDraw, centre: Point, radius: float, tone: int) -> None:
    x, y = centre
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tone)


def _stroke(pen: ImageDraw.ImageDraw, points: list[Point], width: float, tone: int) -> None:
    """A line of round ends and joints."""
    pen.line(points, fill=tone, width=max(1, round(width)), joint="curve")
    for end in (points[0], points[-1]):
        _disc(pen, end, width / 2, tone)


def _outline(centre: Point, radius: float, angles: Floats, ratio: float, turn: float) -> list[Point]:
    """Points at `angles` of an ellipse with the axes `radius` and `radius * ratio`, turned by `turn` radians."""
    x, y = radius * np.cos(angles), radius * ratio * np.sin(angles)
    cos, sin = math.cos(turn), math.sin(turn)
    return list(zip((centre[0] + x * cos - y * sin).tolist(), (centre[1] + x * sin + y * cos).tolist(), strict=True))


def _debris(slide: _Slide, random: Random) -> None:
    for _ in range(random.integers(0, 7)):
        _disc(slide.detail, _place(random), random.uniform(1.5, 5), int(random.integers(40, 170)))
    for _ in range(random.integers(0, 3)):
        start = _place(random)
        end = (start[0] + random.uniform(-25, 25), start[1] + random.uniform(-25, 25))
        _stroke(slide.detail, [start, end], random.uniform(2, 4), int(random.integers(40, 140)))


def _round_cells(slide: _Slide, random: Random) -> None:
    radius = random.uniform(14, 30)
    for _ in range(random.integers(3, 10)):
        centre, own = _place(random), radius * random.uniform(0.8, 1.2)
        tone, turn, ratio = _tone(random), random.uniform(0, math.pi), random.uniform(0.82, 1.0)
        slide.body.polygon(_outline(centre, own, np.linspace(0, 2 * math.pi, 30), ratio, turn), fill=tone)
        shift = random.uniform(-0.25, 0.25, 2) * own
        nucleus = (centre[0] + float(shift[0]), centre[1] + float(shift[1]))
        _disc(slide.detail, nucleus, own * random.uniform(0.3, 0.55), _tone(random))


def _ring_cells(slide: _Slide, random: Random) -> None:
    radius = random.uniform(14, 30)
    for _ in range(random.integers(3, 10)):
        centre, own, tone = _place(random), radius * random.uniform(0.8, 1.2), _tone(random)
        ratio, turn = random.uniform(0.82, 1.0), random.uniform(0, math.pi)
        slide.body.polygon(_outline(centre, own, np.linspace(0, 2 * math.pi, 30), ratio, turn), fill=tone)
        pale = random.uniform(0.45, 0.65) * own
        slide.body.polygon(
            _outline(centre, pale, np.linspace(0, 2 * math.pi, 24), ratio, turn),
            fill=int(tone * random.uniform(0, 0.35)),
        )


def _rods(slide: _Slide, random: Random) -> None:
    width = random.uniform(8, 16)
    for _ in range(random.integers(5, 16)):
        centre, turn = _place(random), random.uniform(0, math.pi)
        half = width * random.uniform(1.0, 2.4)
        ends = _outline(centre, half, np.array([0.0, math.pi]), 1.0, turn)
        _stroke(slide.body, ends, width, _tone(random))


def _filaments(slide: _Slide, random: Random) -> None:
    width = random.uniform(5, 10)
    for _ in range(random.integers(1, 4)):
        start = _place(random)
        _branch(slide, random, (start, _inwards(random, start)), width, 2)


def _branch(slide: _Slide, random: Random, root: tuple[Point, float], width: float, forks: int) -> None:
    """A winding line from `root`, a point and a heading, that forks `forks` times on the way to its tips."""
    start, heading = root
    points, tone = [start], _tone(random)
    for _ in range(random.integers(5, 9)):
        heading += random.normal(0, 0.22)
        x, y = points[-1]
        points.append((x + 18 * math.cos(heading), y + 18 * math.sin(heading)))
    _stroke(slide.body, points, width, tone)
    if forks:
        for side in (-1, 1):
            at = points[int(random.integers(2, len(points)))]
            _branch(slide, random, (at, heading + side * random.uniform(0.4, 1.1)), width * 0.8, forks - 1)


def _spirals(slide: _Slide, random: Random) -> None:
    width = random.uniform(5, 9)
    for _ in range(random.integers(3, 8)):
        centre, turn = _place(random), random.uniform(0, 2 * math.pi)
        turns, pitch, height = random.uniform(2, 4), random.uniform(18, 28), random.uniform(7, 13)
        along = np.linspace(-turns / 2, turns / 2, 28)
        x, y = along * pitch, height * np.sin(2 * math.pi * along)
        cos, sin = math.cos(turn), math.sin(turn)
        xs, ys = centre[0] + x * cos - y * sin, centre[1] + x * sin + y * cos
        _stroke(slide.body, list(zip(xs.tolist(), ys.tolist(), strict=True)), width, _tone(random))


def _chains(slide: _Slide, random: Random) -> None:
    radius = random.uniform(6, 11)
    for _ in range(random.integers(2, 6)):
        (x, y), tone = _place(random), _tone(random)
        heading = _inwards(random, (x, y))
        for _ in range(random.integers(5, 12)):
            _disc(slide.body, (x, y), radius * random.uniform(0.9, 1.05), tone)
            heading += random.normal(0, 0.3)
            x, y = x + 2.05 * radius * math.cos(heading), y + 2.05 * radius * math.sin(heading)


def _rosettes(slide: _Slide, random: Random) -> None:
    radius = random.uniform(6, 11)
    for _ in range(random.integers(2, 6)):
        centre, tone = _place(random), _tone(random)
        petals = int(random.integers(5, 8))
        angles = np.linspace(0, 2 * math.pi, petals, endpoint=False) + random.uniform(0, 2 * math.pi)
        for petal in _outline(centre, radius / math.sin(math.pi / petals), angles, 1.0, 0.0):
            _disc(slide.body, petal, radius * random.uniform(0.88, 1.02), tone)
        if random.random() < 0.5:
            _disc(slide.detail, centre, radius * 0.7, _tone(random))


def _crystals(slide: _Slide, random: Random) -> None:
    radius = random.uniform(16, 34)
    for _ in range(random.integers(3, 9)):
        centre, tone, own = _place(random), _tone(random), radius * random.uniform(0.7, 1.2)
        corners = int(random.integers(3, 7))
        angles = (np.arange(corners) + random.uniform(-0.25, 0.25, corners)) * (2 * math.pi / corners)
        points = _outline(centre, own, angles, random.uniform(0.5, 1.0), random.uniform(0, 2 * math.pi))
        slide.body.polygon(points, fill=int(tone * 0.75))
        _stroke(slide.detail, [*points, points[0]], 3, tone)
        _stroke(slide.detail, [points[0], points[corners // 2]], 3, tone)


DRAWERS: Mapping[str, Callable[[_Slide, Random], None]] = MappingProxyType(
    {
        "round_cells": _round_cells,
        "ring_cells": _ring_cells,
        "rods": _rods,
        "filaments": _filaments,
        "spirals": _spirals,
        "chains": _chains,
        "rosettes": _rosettes,
        "crystals": _crystals,
    }
)
