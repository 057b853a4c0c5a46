"""Records on the device that trains."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fedclip_secure.data.dataset import FeatureSet, Task
from fedclip_secure.methods.base import Batch


def load_records(features: FeatureSet, task: Task, device: torch.device) -> Batch:
    """All of `features` with their task, on `device`; what a method takes in their place stays in the CPU's memory."""
    images, labels = torch.from_numpy(features.taken), torch.from_numpy(features.labels)
    text = torch.from_numpy(task.text_features)
    here = images if features.inputs is not None else images.to(device)
    return Batch(here, labels.to(device), text.to(device), task.logit_scale)


def select(batch: Batch, rows: Tensor) -> Batch:
    """The records of `batch` at `rows` (B,) int64, in that order."""
    images = batch.images[rows.to(batch.images.device)].to(batch.labels.device)
    return dataclasses.replace(batch, images=images, labels=batch.labels[rows])
