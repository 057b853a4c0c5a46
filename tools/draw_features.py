"""Draw image features as a strong CLIP might give them: `python tools/draw_features.py OUT_DIR [--seed 0]`.

NOT real: no image and no encoder is behind them. They imitate what is known of ViT-B/32's features (512 numbers,
temperature 100, zero-shot at some 93 to 95 %) where the weights of a real one are not at hand, and show how
methods compare under these assumptions, not what accuracy a federation will have. Each regime is a folder of
OUT_DIR with one file for each site and `text.safetensors`. Four sites have classes in unequal shares, as silos do;
`island` has all alike, and is there to be left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

SITES = ("north", "east", "south", "west", "island")
SILOS = len(SITES) - 1
DIM, MEANING = 512, 128  # numbers of a feature; dimensions of the subspace that text and images have in common
FACTORS, CLASS_FACTORS, MODES = 300, 6, 3  # directions of noise: of all images, of one class; clusters of a class
ISLAND = 2000  # records there, of all classes together
GAP = 1.3  # length of the cone's axis beside a class's own direction, which has length 1


@dataclass(frozen=True, slots=True)
class Regime:
    """What makes a task easy or hard. Directions have length 1; the lengths here are relative to that."""

    classes: int
    records: int  # of a class, at the four silos together
    alpha: float  # of the Dirichlet that deals a class out to the silos: small is skewed
    shift: float  # by how much sites differ
    offset: float  # how far images of a class are from its text: what there is to be learned
    noise: float  # within a class


REGIMES = {
    "c1": Regime(classes=49, records=100, alpha=0.3, shift=0.45, offset=0.36, noise=0.9),
    "c2": Regime(classes=49, records=60, alpha=0.1, shift=0.8, offset=0.36, noise=0.9),
    "c3": Regime(classes=10, records=150, alpha=0.2, shift=0.8, offset=0.55, noise=1.35),
}


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """All that is drawn once for a regime; C classes, S sites."""

    text: Floats  # (C, DIM) of length 1
    means: Floats  # (C, DIM) of images, without what follows
    near: Numbers  # (C, 3) the classes most like each
    modes: Floats  # (C, MODES, DIM)
    factors: Floats  # (FACTORS, DIM)
    class_factors: Floats  # (C, CLASS_FACTORS, DIM)
    axis: Floats  # (DIM,) of the images' cone
    sites: Floats  # (S, DIM) what a site does to all its images
    sites_classes: Floats  # (S, C, DIM) and to those of one class
    gains: Floats  # (S, FACTORS) and to the noise


def _norm(rows: Floats) -> Floats:
    scaled: Floats = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return scaled


def _world(regime: Regime, random: np.random.Generator) -> World:
    classes, sites = regime.classes, len(SITES)
    basis = np.linalg.qr(random.normal(size=(DIM, MEANING)))[0].T

    def anywhere(*shape: int) -> Floats:
        return _norm(random.normal(size=(*shape, DIM)))

    def meaning(*shape: int) -> Floats:
        return np.asarray(_norm(random.normal(size=(*shape, MEANING))) @ basis)

    # Classes come in families, so that some are easily taken for each other.
    classes_at = _norm(meaning(8)[random.integers(8, size=classes)] + 0.9 * meaning(classes))
    # The modality gap: texts and images lie in narrow cones around two axes (Liang et al. 2022, arXiv:2203.02053).
    text = _norm(GAP * anywhere() + classes_at)
    means = classes_at + regime.offset * _norm(0.6 * anywhere(classes) + 0.8 * meaning(classes))
    # Spectra of features fall off as a power, and part of the noise looks like meaning.
    spread = random.permutation(np.concatenate([meaning(100), anywhere(FACTORS - 100)]))
    factors = 0.37 * spread * np.arange(1, FACTORS + 1)[:, None] ** -0.3
    usual = _norm(random.normal(size=(sites, 30)) @ factors[:30])  # a site's style is also what images differ in anyway
    return World(
        text=text,
        means=means,
        near=np.argsort(-(classes_at @ classes_at.T), axis=1)[:, 1:4],
        modes=0.4 * _norm(0.5 * anywhere(classes, MODES) + 0.8 * meaning(classes, MODES)),
        factors=factors,
        class_factors=0.3 * meaning(classes, CLASS_FACTORS),  # no class has another's covariance
        axis=anywhere(),
        sites=regime.shift * _norm(0.6 * anywhere(sites) + 0.8 * usual),
        sites_classes=regime.shift * 0.56 * anywhere(sites, classes),
        gains=1 + 0.15 * random.normal(size=(sites, FACTORS)),
    )


def _features(world: World, noise: float, site: int, labels: Numbers, random: np.random.Generator) -> Floats:
    """Features (N, DIM) of length about 10, as an encoder gives them raw."""
    count = len(labels)
    common = (random.normal(size=(count, FACTORS)) * world.gains[site]) @ world.factors
    own = np.einsum("nr,nrd->nd", random.normal(size=(count, CLASS_FACTORS)), world.class_factors[labels])
    tail = np.sqrt(5 / random.chisquare(5, size=(count, 1)))  # of Student's t: some images are far from all others
    scatter = noise * tail * (common + own + 0.022 * random.normal(size=(count, DIM)))
    # One image in 25 shows something of another class too; no method gets all of these right.
    other = (random.random(count) < 0.04)[:, None] * random.uniform(0.2, 0.75, size=(count, 1))
    seen = world.near[labels, random.integers(3, size=count)]
    content = (1 - other) * world.means[labels] + other * world.means[seen]
    content += world.modes[labels, random.integers(MODES, size=count)]
    style = world.sites[site] + world.sites_classes[site, labels]
    length = 10 * np.exp(0.08 * random.normal(size=(count, 1)))
    return np.asarray(length * _norm(GAP * world.axis + content + style + scatter))


def _counts(regime: Regime, random: np.random.Generator) -> Numbers:
    """Records (S, C) of each site and class."""
    shares = random.dirichlet([regime.alpha] * SILOS, size=regime.classes).T
    island = np.full((1, regime.classes), ISLAND // regime.classes)
    return np.concatenate([np.rint(shares * regime.records).astype(np.int64), island])


def _ids(name: str, count: int) -> npt.NDArray[np.uint8]:
    """(N, 32): they decide who is tested on, and so must not hang on a feature's last bits."""
    digests = b"".join(hashlib.sha256(f"{name} {number}".encode()).digest() for number in range(count))
    return np.frombuffer(digests, dtype=np.uint8).reshape(count, 32)


def write_regime(folder: Path, name: str, seed: int) -> None:
    """Write `folder`/<site>.safetensors and text.safetensors of the regime `name`, the same bytes for the same seed."""
    regime, root = REGIMES[name], [seed, list(REGIMES).index(name)]
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(root)
    world, counts = _world(regime, random), _counts(regime, random)
    named = {"classes": json.dumps([f"k{number:02}" for number in range(regime.classes)])}
    text, scale = world.text.astype(np.float32), np.array(100, dtype=np.float32)
    save_file({"text_features": text, "logit_scale": scale}, folder / "text.safetensors", named)
    for place, site in enumerate(SITES):
        labels = np.repeat(np.arange(regime.classes), counts[place])
        features = _features(world, regime.noise, place, labels, np.random.default_rng([*root, place]))
        ids = _ids(f"{name} {site}", len(labels))
        arrays: dict[str, npt.NDArray[np.generic]] = {"features": features.astype(np.float32), "labels": labels}
        save_file({**arrays, "ids": ids}, folder / f"{site}.safetensors", named)


def main() -> None:
    """Read the command line and write all regimes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in REGIMES:
        write_regime(options.folder / name, name, options.seed)
    print(f"wrote {', '.join(REGIMES)} to {options.folder}")


if __name__ == "__main__":
    main()
