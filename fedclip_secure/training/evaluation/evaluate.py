"""How often an adapter is right, class by class, next to zero-shot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.data.dataset import Counts, FeatureSet, Task
from fedclip_secure.errors import DataError
from fedclip_secure.features.encoder import Encoder
from fedclip_secure.methods.base import Batch
from fedclip_secure.methods.registry import find_method
from fedclip_secure.methods.zero_shot import zero_shot_logits
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.shared_parameters import load_shared

Confusion = npt.NDArray[np.int64]
Logits = Callable[[Batch], Tensor]  # a batch to logits (B, C)
_VALUES = 1 << 21  # of one batch: 8 MB of float32; 4096 records at D = 512


@dataclass(frozen=True, slots=True)
class ClassResult:
    """One class: how the adapter and zero-shot did on its records; without zero-shot, 0 of 0 were right."""

    name: str
    adapter: Counts
    zero_shot: Counts


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """An adapter on one split, next to zero-shot on the same records.

    `names` are the C classes. A confusion is (C, C) int64, how many records of class `row` were taken
    for class `column`. That of zero-shot is None where the encoder reads no text.
    """

    names: tuple[str, ...]
    confusion: Confusion
    zero_shot_confusion: Confusion | None

    @property
    def classes(self) -> tuple[ClassResult, ...]:
        """Class by class, in the plan's order."""
        plain = self.zero_shot_confusion
        zero_shot = [Counts(0, 0) for _ in self.names] if plain is None else _diagonal(plain)
        both = zip(self.names, _diagonal(self.confusion), zero_shot, strict=True)
        return tuple(ClassResult(*row) for row in both)

    @property
    def adapter(self) -> Counts:
        """The adapter over all classes."""
        return _total(self.confusion)

    @property
    def zero_shot(self) -> Counts:
        """Zero-shot over all classes; 0 of 0 where there is none, so that its accuracy is None."""
        return Counts(0, 0) if self.zero_shot_confusion is None else _total(self.zero_shot_confusion)


def evaluate(
    plan: FederationPlan,
    task: Task,
    features: FeatureSet,
    state: AdapterState,
    device: torch.device,
    *,
    encoder: Encoder | None = None,
) -> Evaluation:
    """Classify `features` with the adapter `state`, and with zero-shot where the encoder reads text.

    Raises:
        DataError: there are no records.
        ModelError: `state` is not the plan's method's.
    """
    if not len(features):
        raise DataError(f"{features.source}: this split holds no records; enlarge its share in the plan's `splits`")
    count = len(task.classes)
    found = classify(features, task, device, predictor(plan, task, state, device, encoder))
    confusion = _confusion(features.labels, found, count)
    if not len(task.text_features):
        return Evaluation(task.classes, confusion, None)
    plain = classify(replace(features, inputs=None), task, device, zero_shot_logits)
    return Evaluation(task.classes, confusion, _confusion(features.labels, plain, count))


def predictor(
    plan: FederationPlan, task: Task, state: AdapterState, device: torch.device, encoder: Encoder | None = None
) -> Logits:
    """The plan's method with the adapter `state`: a batch on `device` to logits (B, C).

    Raises:
        ModelError: `state` is not the plan's method's.
    """
    method = find_method(plan.method)
    module = method.build(task, encoder).to(device).eval()
    load_shared(module, method.spec, state)
    return lambda batch: method.predict(module, batch)


@torch.inference_mode()
def classify(features: FeatureSet, task: Task, device: torch.device, logits: Logits) -> npt.NDArray[np.int64]:
    """The most likely class of every record, (N,)."""
    if not len(features):
        return np.zeros(0, dtype=np.int64)
    guesses = [logits(batch).argmax(dim=-1) for batch in batches(features, task, device)]
    return torch.cat(guesses).cpu().numpy()


def batches(features: FeatureSet, task: Task, device: torch.device) -> Iterator[Batch]:
    """The records in order, so many at a time that they fit beside an encoder."""
    text = torch.from_numpy(task.text_features).to(device)
    count = max(1, _VALUES // max(1, math.prod(features.taken.shape[1:])))
    for start in range(0, len(features), count):
        cut = slice(start, start + count)
        images = torch.from_numpy(features.taken[cut]).to(device)
        yield Batch(images, torch.from_numpy(features.labels[cut]).to(device), text, task.logit_scale)


def _confusion(labels: npt.NDArray[np.int64], guesses: npt.NDArray[np.int64], count: int) -> Confusion:
    return np.bincount(labels * count + guesses, minlength=count * count).reshape(count, count)


def _diagonal(confusion: Confusion) -> list[Counts]:
    return [Counts(int(row[label]), int(row.sum())) for label, row in enumerate(confusion)]


def _total(confusion: Confusion) -> Counts:
    return Counts(int(confusion.trace()), int(confusion.sum()))
