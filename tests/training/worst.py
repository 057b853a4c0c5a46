"""A search for the plan, model and records in which one record moves the clipped sum the furthest.

Whoever makes a plan chooses all of it but the records, and a claim of privacy holds for any records. So everything is
chosen here: first at random, then the best are changed one property at a time, as long as that moves the sum further.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedclip_secure.config.plan import MethodPlan
from fedclip_secure.data.dataset import Task
from fedclip_secure.methods.base import Batch
from fedclip_secure.methods.registry import find_method
from fedclip_secure.training.private.clipping import clipped_sum

ON_FEATURES = ("fedclip", "linear_probe", "feddat", "discriminant", "private_prototypes")
WEIGHTS = ("constant", "signs", "normal", "rows alike", "as built")
RECORDS = ("normal", "positive", "two kinds", "nearly alike", "of all sizes", "sparse")
_HUGE = 2**31 - 1


@dataclass(frozen=True)
class Case:
    """One federation with privacy, and one silo's batch."""

    method: str
    phase: int  # modulo how many there are
    width: int
    classes: int
    records: int
    max_grad_norm: float
    logit_scale: float
    weights: str
    weight_size: float  # at most 100
    bias: float  # added to the first bias: it moves losses over the edges of rounding
    kind: str  # of records
    feature_size: float
    one_label: bool
    removed: int  # modulo how many there are
    seed: int


def drawn(random: np.random.Generator, method: str, most_records: int) -> Case:
    """Anything at all."""
    return Case(
        method=method,
        phase=int(random.integers(2)),
        width=int(random.choice([int(random.integers(1, 1101)), int(random.integers(1, 40)), 129, 333, 1001])),
        classes=int(random.integers(2, 10)),
        records=int(np.exp(random.uniform(0, math.log(most_records)))),
        max_grad_norm=float(10 ** random.uniform(-6, 2)),
        logit_scale=float(random.choice([1.0, 10.0, 100.0, 1000.0])),
        weights=str(random.choice(WEIGHTS)),
        weight_size=float(random.choice([0.01, 1.0, 100.0, 10 ** random.uniform(-3, 2)])),
        bias=float(random.normal() * 10 ** random.uniform(-4, 1)),
        kind=str(random.choice(RECORDS)),
        feature_size=float(10 ** random.uniform(-6, 6)),
        one_label=bool(random.random() < 0.7),
        removed=int(random.integers(_HUGE)),
        seed=int(random.integers(_HUGE)),
    )


def changed(case: Case, random: np.random.Generator, most_records: int) -> Case:
    """`case` with one property drawn anew, or moved a little."""
    other = drawn(random, case.method, most_records)
    name = str(random.choice([field.name for field in dataclasses.fields(case) if field.name != "method"]))
    value: Any = getattr(other, name)
    if name in {"max_grad_norm", "logit_scale", "weight_size", "bias", "feature_size"} and random.random() < 0.6:
        value = getattr(case, name) * float(np.exp(random.normal() * 0.3))
    limits = {"weight_size": 100.0, "logit_scale": 1000.0}
    if name in limits:
        value = min(value, limits[name])
    if name == "max_grad_norm":
        value = min(max(value, 1e-6), 1e2)
    return dataclasses.replace(case, **{name: value})


def movement(case: Case) -> float:
    """‖S(D) - S(D without one record)‖ in units of max_grad_norm."""
    module, phase, batch = build(case)
    kept = np.arange(case.records) != case.removed % case.records
    numbers = np.arange(case.records)
    rest = dataclasses.replace(
        batch, images=batch.images[torch.from_numpy(kept)], labels=batch.labels[torch.from_numpy(kept)]
    )
    whole = clipped_sum(module, phase, batch, numbers, case.max_grad_norm)
    without = clipped_sum(module, phase, rest, numbers[kept], case.max_grad_norm)
    return float(np.linalg.norm(whole - without)) / case.max_grad_norm


def build(case: Case) -> tuple[torch.nn.Module, Any, Batch]:
    """Module, phase and batch."""
    random = np.random.default_rng(case.seed)
    text = random.normal(size=(case.classes, case.width)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    task = Task(tuple(f"class {number}" for number in range(case.classes)), text, case.logit_scale)
    method = find_method(MethodPlan(name=case.method))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        module = method.build(task).train()
    with torch.no_grad():
        for value in module.parameters():
            if case.weights != "as built":
                value.copy_(torch.from_numpy(_weights(case, value.shape, random)))
            value.clamp_(-100, 100)
        biases = [value for value in module.parameters() if value.dim() == 1]
        if biases:
            biases[-1][0] = float(np.clip(float(biases[-1][0]) + case.bias, -100, 100))
    method.begin_round(module)
    phases = method.phases()
    images = torch.from_numpy(_images(case, random))
    labels = random.integers(0, 1 if case.one_label else case.classes, case.records)
    batch = Batch(images, torch.from_numpy(labels), torch.from_numpy(text), case.logit_scale)
    return module, phases[case.phase % len(phases)], batch


def _weights(case: Case, shape: Sequence[int], random: np.random.Generator) -> npt.NDArray[np.float32]:
    normal = random.normal(size=tuple(shape))
    found = {
        "constant": np.ones_like(normal),
        "signs": np.sign(normal),
        "normal": normal,
        "rows alike": np.broadcast_to(np.sign(normal[:1]), normal.shape),
    }[case.weights]
    return (case.weight_size * found).astype(np.float32)


def _images(case: Case, random: np.random.Generator) -> npt.NDArray[np.float32]:
    normal = random.normal(size=(case.records, case.width))
    few = random.normal(size=(2, case.width))
    found: Callable[[], npt.NDArray[np.float64]] = {
        "normal": lambda: normal,
        "positive": lambda: np.abs(normal),
        "two kinds": lambda: few[random.integers(0, 2, case.records)],
        "nearly alike": lambda: few[0] + 1e-4 * normal,
        "of all sizes": lambda: normal * 10 ** random.uniform(-6, 6, (case.records, 1)),
        "sparse": lambda: normal * (random.random(normal.shape) < 0.1),
    }[case.kind]
    return (case.feature_size * found()).astype(np.float32)


def search(method: str, random: np.random.Generator, draws: int, changes: int, most_records: int) -> tuple[float, Case]:
    """The furthest movement that was found, and the case."""
    found = [(movement(case), case) for case in (drawn(random, method, most_records) for _ in range(draws))]
    best = sorted(found, key=lambda pair: -pair[0])[:4]
    for place in range(len(best) * changes):
        most, case = best[place % len(best)]
        other = changed(case, random, most_records)
        moved = movement(other)
        if moved >= most:
            best[place % len(best)] = moved, other
    return max(best, key=lambda pair: pair[0])
