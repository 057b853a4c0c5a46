"""The cells of an experiment: what each is, the plan that it runs, and the digest of all that decides it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import fedclip_secure
from fedclip_secure import canonical
from fedclip_secure.config.fields import check
from fedclip_secure.config.plan import FederationPlan, MethodPlan, PrivacyPlan
from fedclip_secure.errors import ConfigError
from fedclip_secure.simulate.experiment import Arm, BySites, DemoSites, Experiment

# Of this package, what decides a figure. Rows of one table must not come from two versions of it.
_DECIDING = (
    "data",
    "features",
    "methods",
    "model",
    "secagg",
    "training",
    "simulate/federation.py",
    "simulate/measure.py",
)
Kind = Literal["federated", "zero_shot", "local_only", "centralised"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: a method (by its place in the file), the site that is left out, privacy, and a seed."""

    kind: Kind
    arm: int
    left_out: str | None
    privacy: PrivacyPlan | None
    seed: int


def cells_of(experiment: Experiment, sites: Sequence[str]) -> list[Cell]:
    """Every cell, method by method; the baselines come first, and none of them has privacy.

    Raises:
        ConfigError: the site to leave out is not there.
    """
    found = []
    for left_out in _left_out(experiment, sites):
        for seed in experiment.seeds:
            found += [Cell(kind, arm, left_out, privacy, seed) for kind, arm, privacy in _rows(experiment)]
    order = list(_rows(experiment))
    return sorted(found, key=lambda cell: order.index((cell.kind, cell.arm, cell.privacy)))


def _left_out(experiment: Experiment, sites: Sequence[str]) -> list[str | None]:
    choice = experiment.split.leave_out if isinstance(experiment.split, BySites) else "none"
    if choice == "each":
        return list(sites)
    if choice != "none" and choice not in sites:
        raise ConfigError(f"split.leave_out: there is no site {choice!r}; the data have {', '.join(sites)}")
    return [None if choice == "none" else choice]


def _rows(experiment: Experiment) -> Iterator[tuple[Kind, int, PrivacyPlan | None]]:
    """The rows of the table. Zero-shot is of no method: the first one's plan says what the prompts are."""
    if "zero_shot" in experiment.baselines:
        yield "zero_shot", 0, None
    for arm in range(len(experiment.methods)):
        for kind in ("local_only", "centralised"):
            if kind in experiment.baselines:
                yield kind, arm, None
        for privacy in experiment.privacy:
            yield "federated", arm, privacy


def label_of(experiment: Experiment, cell: Cell) -> str:
    """What the cell's row is called in tables."""
    label = experiment.methods[cell.arm].label
    return {
        "federated": label,
        "zero_shot": "zero-shot",
        "local_only": f"{label}, local only",
        "centralised": f"{label}, centralised",
    }[cell.kind]


def plan_of(experiment: Experiment, cell: Cell, classes: dict[str, str]) -> FederationPlan:
    """The federation.yaml of a cell. The federation's name holds the seed, which so decides the splits.

    Raises:
        ConfigError: the values do not go together.
    """
    arm = experiment.methods[cell.arm]
    settings = experiment.settings(arm)
    plan: dict[str, Any] = {
        "federation": f"{experiment.name}-{cell.seed}",
        "server": "https://localhost",
        "model": experiment.model.model_dump(mode="json"),
        "classes": classes,
        "templates": templates_of(experiment),
        "splits": experiment.splits.model_dump(mode="json"),
        "method": arm.method.model_dump(mode="json"),
        "training": {**settings.training.model_dump(mode="json"), "seed": cell.seed},
        "secure_aggregation": {"coordinate_clip": settings.coordinate_clip, "weights": settings.weights},
    }
    if cell.privacy is not None:
        _make_private(plan, experiment, arm, cell.privacy)
    return check(plan, FederationPlan, f"plan of {label_of(experiment, cell)!r}")


def loading_plan(experiment: Experiment, classes: dict[str, str], method: MethodPlan) -> FederationPlan:
    """A plan by which whole sites are loaded as `method` takes them. Nothing else of it matters."""
    plan = {
        "federation": "simulation",
        "server": "https://localhost",
        "model": experiment.model.model_dump(mode="json"),
        "classes": classes,
        "templates": templates_of(experiment),
        "splits": {"train": 0.6, "validation": 0.2, "test": 0.2},
        "method": method.model_dump(mode="json"),
        "training": {"rounds": 1, "batch_size": 2, "optimizer": {"name": "sgd", "lr": 1.0}},
    }
    return check(plan, FederationPlan, "plan of the data")


def _make_private(plan: dict[str, Any], experiment: Experiment, arm: Arm, privacy: PrivacyPlan) -> None:
    private = experiment.settings(arm).private
    del plan["training"]["local_epochs"], plan["training"]["batch_size"]
    if private.optimizer is not None:
        plan["training"]["optimizer"] = private.optimizer.model_dump(mode="json")
    if private.coordinate_clip is not None:
        plan["secure_aggregation"]["coordinate_clip"] = private.coordinate_clip
    plan["secure_aggregation"]["weights"] = "equal"
    plan["privacy"] = privacy.model_dump(mode="json")


def templates_of(experiment: Experiment) -> list[str]:
    """The experiment's own, or what goes with its data."""
    if experiment.templates is not None:
        return list(experiment.templates)
    return ["a micrograph of {}" if isinstance(experiment.data, DemoSites) else "a picture of a {}"]


def digest_of(experiment: Experiment, cell: Cell, plan: FederationPlan, data: bytes) -> str:
    """32 bytes as hexadecimal digits, over everything that decides the cell's figures; `data` is their fingerprint."""
    deciding = [
        _code(), cell.kind, cell.left_out, plan.model_dump(mode="json"),
        experiment.split.model_dump(mode="json", exclude={"leave_out"}), experiment.every, data,
    ]  # fmt: skip
    return canonical.digest("fedclip/v1/cell", *deciding).hex()


@cache
def _code() -> bytes:
    """32 bytes over the code that runs a cell."""
    home = Path(fedclip_secure.__file__).parent
    files = [home / part if part.endswith(".py") else home / part / "**/*.py" for part in _DECIDING]
    found = sorted(path for file in files for path in home.glob(str(file.relative_to(home))))
    return canonical.digest("fedclip/v1/code", *(hashlib.sha256(path.read_bytes()).digest() for path in found))
