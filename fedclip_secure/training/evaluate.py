"""How often an adapter is right, class by class, next to zero-shot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.data.dataset import Counts, FeatureSet, Task
from fedclip_secure.errors import DataError
from fedclip_secure.methods.base import Batch
from fedclip_secure.methods.registry import find_method
from fedclip_secure.methods.zero_shot import zero_shot_logits
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.shared import load_shared

_BATCH = 4096  # records at a time; 8 MB of features at D = 512


@dataclass(frozen=True, slots=True)
class ClassResult:
    """One class: how the adapter and zero-shot did on its records."""

    name: str
    adapter: Counts
    zero_shot: Counts


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An adapter on one split, next to zero-shot on the same records."""

    classes: tuple[ClassResult, ...]

    @property
    def adapter(self) -> Counts:
        """The adapter over all classes."""
        return _total(result.adapter for result in self.classes)

    @property
    def zero_shot(self) -> Counts:
        """Zero-shot over all classes."""
        return _total(result.zero_shot for result in self.classes)


def evaluate(
    plan: FederationPlan, task: Task, features: FeatureSet, state: AdapterState, device: torch.device
) -> Evaluation:
    """Classify `features` with the adapter `state` and with zero-shot.

    Raises:
        DataError: there are no records.
        ModelError: `state` is not the plan's method's.
    """
    if not len(features):
        raise DataError(f"{features.source}: this split holds no records; enlarge its share in the plan's `splits`")
    method = find_method(plan.method)
    module = method.build(task).to(device).eval()
    load_shared(module, method.spec, state)
    adapted = classify(features, task, device, lambda batch: method.predict(module, batch))
    plain = classify(features, task, device, zero_shot_logits)
    return Evaluation(
        tuple(
            ClassResult(name, *(_counts(guess, features.labels, label) for guess in (adapted, plain)))
            for label, name in enumerate(task.classes)
        )
    )


@torch.inference_mode()
def classify(
    features: FeatureSet, task: Task, device: torch.device, logits: Callable[[Batch], Tensor]
) -> npt.NDArray[np.int64]:
    """The most likely class of every record, (N,)."""
    if not len(features):
        return np.zeros(0, dtype=np.int64)
    guesses = [logits(batch).argmax(dim=-1) for batch in batches(features, task, device, _BATCH)]
    return torch.cat(guesses).cpu().numpy()


def batches(features: FeatureSet, task: Task, device: torch.device, size: int) -> Iterator[Batch]:
    """The records in order, `size` at a time."""
    text = torch.from_numpy(task.text_features).to(device)
    for start in range(0, len(features), size):
        cut = slice(start, start + size)
        images = torch.from_numpy(features.image_features[cut]).to(device)
        yield Batch(images, torch.from_numpy(features.labels[cut]).to(device), text, task.logit_scale)


def _counts(guesses: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], label: int) -> Counts:
    own = labels == label
    return Counts(int((guesses[own] == label).sum()), int(own.sum()))


def _total(parts: Iterator[Counts]) -> Counts:
    listed = list(parts)
    return Counts(sum(part.correct for part in listed), sum(part.total for part in listed))
