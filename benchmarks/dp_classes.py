"""Does the noise hurt small classes more than large ones? Recall by how many training records a class has.

`python benchmarks/dp_classes.py [--json] [--runs 8]`; with `FEDCLIP_CLIP_FEATURES=FILE.npz` also on features of a real
CLIP. The plans are those of dp_utility.py, with the same rates, steps, C and divisor, and nothing was tuned on these
runs. The training records of all silos together are thinned to a long tail, always by records chosen at random; who
evaluates was never thinned. The classes take the sizes in turn: from run to run each moves on, so that over eight runs
each of eight classes has had every size once, and how hard a class is by itself falls out of the means.

- Drawn labs: two drawings together, for one holds too few records of some classes. Four silos train; recall is the mean
  of that at willow, which never trains (all its records), and that on the silos' test splits.
- FILE.npz: arrays `x*` (N, D) and `y*` (N,) of equal endings, all taken together, and the text features `W` (C, D). Of
  each class 36 records evaluate; the others are thinned and dealt to four silos at random.

`no privacy` trains as the demo does. `no noise` is the private plan with next to no noise, and so shows what clipping
and the plan's few steps cost by themselves; from there to an epsilon the noise alone has changed. Epsilon holds for one
record over the whole run, at delta = 1e-5, by PLD.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from dp_utility import METHODS, SHIPPED, Sites, federated, joined, plan_of, sites_of

from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.data.dataset import FeatureSet, Task
from fedclip_secure.data.drawn.labs import CLASSES
from fedclip_secure.data.embeddings import read_text_features
from fedclip_secure.demo.labs import Scene
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.evaluation.evaluate import Evaluation, evaluate
from fedclip_secure.training.inputs import Inputs
from fedclip_secure.training.prepare import prepare

Floats = npt.NDArray[np.float64]
SIZES = (240, 170, 120, 85, 60, 42, 30, 20)  # training records of a class at all silos of the drawn labs
LARGEST, SMALLEST = 84, 8  # the same of FILE.npz: a geometric series over its classes
HELD = 36  # records of each class of FILE.npz that evaluate
SILOS = 4
EPSILONS = (8.0, 4.0, 2.0)
NO_PRIVACY, NO_NOISE = "no privacy", "no noise"
ZERO_SHOT = ("zero-shot", NO_PRIVACY)
# What a column is called, and epsilon of its plan; with NO_NOISE the plan's noise is then replaced.
ARMS = {NO_PRIVACY: float("inf"), NO_NOISE: EPSILONS[0]} | {f"ε = {epsilon:g}": epsilon for epsilon in EPSILONS}
NOISY = tuple(ARMS)[2:]
_NEXT_TO_NONE = 1e-6  # noise multiplier of NO_NOISE
_CPU = torch.device("cpu")
_FILE = os.environ.get("FEDCLIP_CLIP_FEATURES")


@dataclass(frozen=True, slots=True)
class Run:
    """What one run trains and evaluates on. `home` holds the file of text features, where `model` names one."""

    sites: Sites
    model: dict[str, Any]
    home: Path
    seed: int


Kind = Callable[[Path, npt.NDArray[np.int64], int], Run]  # folder, sizes (C,), seed
Rows = dict[tuple[str, str], Floats]  # by method and arm


@dataclass(frozen=True, slots=True)
class Found:
    """Recalls in percent on one kind of data, each (runs, C), the largest class first."""

    name: str
    sizes: tuple[int, ...]
    bands: int  # rows of the table
    recalls: Rows


def in_turn(count: int, run: int, runs: int) -> npt.NDArray[np.int64]:
    """The place among the sizes of each of `count` classes, (count,); each moves on from run to run."""
    first = np.random.default_rng(count).permutation(count)
    return (first + run * count // runs) % count


def thinned(parts: Sequence[FeatureSet], sizes: npt.NDArray[np.int64], seed: int) -> list[FeatureSet]:
    """`parts` with `sizes` (C,) records of each class in all, chosen at random over all parts."""
    labels = np.concatenate([part.labels for part in parts])
    kept = np.zeros(len(labels), dtype=bool)
    random = np.random.default_rng(seed)
    for label, size in enumerate(sizes):
        rows = np.flatnonzero(labels == label)
        if len(rows) < size:
            sys.exit(f"class {label}: has {len(rows)} training records, {size} are needed; use another seed or file")
        kept[random.choice(rows, size, replace=False)] = True
    edges = np.cumsum([len(part) for part in parts])[:-1]
    return [part.select(mask) for part, mask in zip(parts, np.split(kept, edges), strict=True)]


def labs(folder: Path, sizes: npt.NDArray[np.int64], seed: int) -> Run:
    """The drawn labs, of two drawings, with `sizes` (C,) training records of each class."""
    pair = [sites_of(folder / str(half), None, "willow", 2 * seed + half) for half in (0, 1)]
    silos = zip(*(sites.training for sites in pair), strict=True)
    both = [{name: joined([one.splits[name] for one in silo]) for name in silo[0].splits} for silo in silos]
    parts = thinned([splits["train"] for splits in both], sizes, seed)
    training = [Inputs(pair[0].task, splits | {"train": part}) for splits, part in zip(both, parts, strict=True)]
    unseen = joined([sites.unseen for sites in pair])
    return Run(Sites(pair[0].scene, pair[0].task, training, unseen), SHIPPED, folder, seed)


def features(folder: Path, sizes: npt.NDArray[np.int64], seed: int) -> Run:
    """The records of FILE.npz, dealt to the silos, with `sizes` (C,) training records of each class."""
    whole, text = _read(Path(str(_FILE)))
    names = [f"class{number}" for number in range(len(text))]
    np.savez(folder / "text.npz", text_features=text, logit_scale=np.float64(100.0), classes=np.array(names))
    model = {"name": "external", "dim": text.shape[1], "text_features": "text.npz"}
    task = Task(tuple(names), *read_text_features(folder / "text.npz", names, text.shape[1]))
    random = np.random.default_rng(seed)
    held = np.zeros(len(whole), dtype=bool)
    for label in range(len(names)):
        held[random.choice(np.flatnonzero(whole.labels == label), HELD, replace=False)] = True
    (kept,) = thinned([whole.select(~held)], sizes, seed)
    silo = random.integers(SILOS, size=len(kept))
    none = kept.select(np.zeros(len(kept), dtype=bool))
    training = [
        Inputs(task, {"train": kept.select(silo == number), "validation": none, "test": none})
        for number in range(SILOS)
    ]
    scene = Scene((), None, {name: name for name in names}, "{}")
    return Run(Sites(scene, task, training, whole.select(held)), model, folder, seed)


def _read(path: Path) -> tuple[FeatureSet, npt.NDArray[np.float32]]:
    """All records of the file, features of norm 1, and its text features (C, D)."""
    with np.load(path) as file:
        ends = [key[1:] for key in file.files if key.startswith("y")]
        images = np.concatenate([file[f"x{end}"] for end in ends]).astype(np.float64)
        labels = np.concatenate([file[f"y{end}"] for end in ends]).astype(np.int64)
        text = file["W"].astype(np.float64)
    least = int(np.bincount(labels, minlength=len(text)).min())
    if least < LARGEST + HELD:
        sys.exit(f"FEDCLIP_CLIP_FEATURES={path}: a class has {least} records, each needs {LARGEST + HELD}")
    images, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, text))
    ids = np.array([list(hashlib.sha256(str(row).encode()).digest()) for row in range(len(labels))], dtype=np.uint8)
    return FeatureSet(images.astype(np.float32), labels, ids, str(path), ids), text.astype(np.float32)


def recalls(run: Run, plan: FederationPlan, state: AdapterState) -> tuple[Floats, Floats]:
    """Of the model and of zero-shot, each (C,) in percent: the mean over the evaluating records' one or two parts."""
    tests = joined([inputs.splits["test"] for inputs in run.sites.training])
    parts = [part for part in (run.sites.unseen, tests) if len(part)]
    found = [evaluate(plan, run.sites.task, part, state, _CPU) for part in parts]
    return tuple(np.mean([_shares(one, kind) for one in found], axis=0) for kind in ("adapter", "zero_shot"))  # type: ignore[return-value]


def _shares(found: Evaluation, kind: str) -> list[float]:
    return [100 * getattr(one, kind).accuracy for one in found.classes]


@cache
def noise_of(method: str, epsilon: float) -> float:
    """The noise multiplier of a plan, the same for every seed and every model."""
    scene = Scene((), None, dict(CLASSES), "{}")
    found = prepare(plan_of(scene, method, epsilon, 0), Path()).lock.noise_multiplier
    assert found is not None  # noqa: S101 - the plan has privacy
    return found


def trained(run: Run, method: str, arm: str) -> tuple[Floats, Floats]:
    """What `recalls` finds after training by `method` as `arm` says."""
    plan = plan_of(run.sites.scene, method, ARMS[arm], run.seed, run.model)
    if plan.privacy is not None:  # with the noise that is known already, which takes seconds to find
        given = {"target_epsilon": None, "noise_multiplier": noise_of(method, ARMS[arm])}
        plan = plan.model_copy(update={"privacy": plan.privacy.model_copy(update=given)})
    prepared = prepare(plan, run.home)
    if arm == NO_NOISE:
        prepared = replace(prepared, lock=prepared.lock.model_copy(update={"noise_multiplier": _NEXT_TO_NONE}))
    return recalls(run, plan, federated(run.sites, plan, prepared))


def measured(name: str, kind: Kind, sizes: tuple[int, ...], bands: int, runs: int) -> Found:
    """All methods and arms, in `runs` runs on data that `kind` makes."""
    rows = []
    for number in range(runs):
        rows.append(one_run(kind, sizes, number, runs))
        print(f"{name}: run {number} done", file=sys.stderr)
    return Found(name, sizes, bands, {key: np.array([row[key] for row in rows]) for key in rows[0]})


def one_run(kind: Kind, sizes: tuple[int, ...], number: int, runs: int) -> Rows:
    """Recalls of all methods and arms, and of zero-shot, each (C,), the largest class first."""
    places = in_turn(len(sizes), number, runs)
    largest_first = np.argsort(places)
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as folder:
        run = kind(Path(folder), np.array(sizes)[places], number)
        for method in METHODS:
            for arm in ARMS:
                mine, zero = trained(run, method, arm)
                rows[method, arm], rows[ZERO_SHOT] = mine[largest_first], zero[largest_first]
    return rows


def markdown(found: Found) -> str:
    """Recall by class size, and beside each epsilon what it lost against no privacy: means, smallest, largest."""
    plain = found.recalls[ZERO_SHOT]
    lines = [
        f"**{found.name}**, {sum(found.sizes)} training records at {SILOS} silos, {len(plain)} runs", "",
        f"| method | records of a class | zero-shot | {' | '.join(ARMS)} |", "|" + " --- |" * (3 + len(ARMS)),
    ]  # fmt: skip
    for method in METHODS:
        for band in np.array_split(np.arange(len(found.sizes)), found.bands):
            base = found.recalls[method, NO_PRIVACY][:, band].mean(axis=1)
            cells = [f"{plain[:, band].mean():.1f}", f"{base.mean():.1f}"]
            for arm in (NO_NOISE, *NOISY):
                mine = found.recalls[method, arm][:, band].mean(axis=1)
                cells.append(f"{mine.mean():.1f}, lost {_span(base - mine)}")
            lines.append(f"| {method} | {_said([found.sizes[rank] for rank in band])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gaps(found: Sequence[Found]) -> str:
    """What each epsilon took from the smaller half of the classes minus what it took from the larger, in points.

    Mean, smallest and largest over the runs, and in how many of them the smaller half lost more.
    """
    said = [f"{arm} {against}" for against in ("against no noise", "against no privacy") for arm in NOISY]
    lines = [f"| data, method | {' | '.join(said)} |", "|" + " --- |" * (1 + len(said))]
    for one in found:
        for method in METHODS:
            of_runs = [gap(one, method, arm, base) for base in (NO_NOISE, NO_PRIVACY) for arm in NOISY]
            cells = [f"{_span(points)}, {(points > 0).sum()} of {len(points)}" for points in of_runs]
            lines.append(f"| {one.name}, {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gap(found: Found, method: str, arm: str, base: str) -> Floats:
    """Points of recall that the smaller half of the classes lost from `base` to `arm` beyond the larger half, (runs,).

    The middle one of an odd number of classes is of neither half.
    """
    lost, half = found.recalls[method, base] - found.recalls[method, arm], len(found.sizes) // 2
    gaps_of_runs: Floats = lost[:, -half:].mean(axis=1) - lost[:, :half].mean(axis=1)
    return gaps_of_runs


def _said(sizes: Sequence[int]) -> str:
    return " and ".join(map(str, sizes)) if len(sizes) < 3 else f"{sizes[0]} to {sizes[-1]}"


def _span(values: Floats) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """Print the tables; with `--json` end with one object: recalls of each run, the largest class first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    parser.add_argument("--runs", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # steps this small are over before a second thread has woken up
    found = [measured("drawn labs", labs, SIZES, 4, arguments.runs)]
    if _FILE is None:
        print("FEDCLIP_CLIP_FEATURES is not set: the drawn labs alone", file=sys.stderr)
    else:
        with np.load(_FILE) as file:
            count = len(file["W"])
        sizes = tuple(round(size) for size in np.geomspace(LARGEST, SMALLEST, count))
        found.append(measured(Path(_FILE).stem, features, sizes, 2, arguments.runs))
    for one in found:
        print(f"{markdown(one)}\n")
    print(gaps(found))
    if arguments.json:
        rows = [
            {"data": one.name, "sizes": one.sizes, "method": method, "arm": arm, "recalls": runs.tolist()}
            for one in found
            for (method, arm), runs in one.recalls.items()
        ]
        print(json.dumps({"classes": rows}))


if __name__ == "__main__":
    main()
