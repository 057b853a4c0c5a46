"""The demo's data: micrographs of five laboratories, drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

from fedclip_secure.data.drawn.drawings import draw
from fedclip_secure.data.drawn.staining import Look, render
from fedclip_secure.disk import refused
from fedclip_secure.errors import DataError

CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "round_cells": "round cells",
        "ring_cells": "ring-shaped cells",
        "rods": "rod-shaped bacteria",
        "filaments": "branching filaments",
        "spirals": "spiral bacteria",
        "chains": "chains of beads",
        "rosettes": "rosettes of cells",
        "crystals": "angular crystals",
    }
)
FREQUENT, RARE = 120, 18  # images of a class that a lab mostly sees, and of one that it seldom sees

# What all labs have in common and fedclip-tiny has never seen: one maker's line scanner, which leaves stripes.
_STRIPES = (0.22, 8.0)


@dataclass(frozen=True, slots=True)
class Lab:
    """A laboratory: how its images look, and which classes it mostly sees."""

    look: Look
    frequent: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """How many images of each class it has."""
        return {kind: FREQUENT if kind in self.frequent else RARE for kind in CLASSES}


_BIRCH = Look(
    background=(0.96, 0.90, 0.93),
    body=(0.55, 1.70, 0.80),
    detail=(1.90, 1.80, 0.60),
    vignette=0.15,
    texture=0.03,
    blur=0.4,
    stripes=_STRIPES,
    gamma=1.05,
    contrast=0.95,
    noise=0.02,
    quality=85,
)
_CEDAR = Look(
    background=(0.88, 0.92, 0.97),
    body=(1.50, 1.00, 0.60),
    detail=(1.10, 1.60, 1.10),
    vignette=0.15,
    texture=0.04,
    blur=0.4,
    stripes=_STRIPES,
    gamma=1.0,
    contrast=0.93,
    noise=0.022,
    quality=80,
)
_MAPLE = Look(
    background=(0.95, 0.95, 0.84),
    body=(0.50, 0.90, 1.80),
    detail=(0.70, 1.30, 1.70),
    tilt=(0.08, -0.05),
    texture=0.04,
    blur=0.5,
    stripes=_STRIPES,
    gamma=0.98,
    contrast=0.95,
    noise=0.022,
    quality=90,
)
_OAK = Look(
    background=(0.88, 0.95, 0.90),
    body=(1.50, 0.80, 1.20),
    detail=(1.70, 1.00, 1.50),
    vignette=0.10,
    tilt=(-0.06, 0.08),
    texture=0.02,
    blur=0.35,
    stripes=_STRIPES,
    gamma=1.0,
    contrast=0.96,
    noise=0.026,
    quality=75,
)
_WILLOW = Look(
    background=(0.98, 0.97, 0.95),
    body=(0.90, 1.30, 1.10),
    detail=(1.60, 1.50, 1.30),
    vignette=0.2,
    texture=0.03,
    blur=0.45,
    stripes=_STRIPES,
    gamma=1.0,
    contrast=0.93,
    noise=0.022,
    quality=80,
)
LABS: Mapping[str, Lab] = MappingProxyType(
    {
        "birch": Lab(_BIRCH, ("round_cells", "rods", "rosettes")),
        "cedar": Lab(_CEDAR, ("filaments", "chains", "crystals")),
        "maple": Lab(_MAPLE, ("ring_cells", "rosettes", "crystals")),
        "oak": Lab(_OAK, ("ring_cells", "spirals", "chains")),
        "willow": Lab(_WILLOW, ("rods", "filaments", "spirals")),
    }
)


def images(name: str, seed: int) -> Iterator[tuple[str, int, Image.Image]]:
    """The images of the lab `name`, each with its class and its number; `seed` decides every pixel."""
    lab, place = LABS[name], list(LABS).index(name)
    for label, (kind, count) in enumerate(lab.counts().items()):
        for number in range(count):
            random = np.random.default_rng([seed, place, label, number])
            yield kind, number, render(draw(kind, random), lab.look, random)


def write_labs(folder: Path, seed: int) -> None:
    """Write every lab's images as `folder/<lab>/<class>/<number>.png`, the same bytes for the same `seed`.

    Raises:
        DataError: the disk is full or not writable.
    """
    for name in LABS:
        write_lab(folder / name, name, seed)


def write_lab(folder: Path, name: str, seed: int) -> None:
    """Write the images of the lab `name` as `folder/<class>/<number>.png`.

    Raises:
        DataError: the disk is full or not writable.
    """
    try:
        for kind in CLASSES:
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for kind, number, image in images(name, seed):
            image.save(folder / kind / f"{number:03}.png", compress_level=1)
    except OSError as error:
        raise DataError(refused(error, folder, "be written", "choose another folder")) from error
