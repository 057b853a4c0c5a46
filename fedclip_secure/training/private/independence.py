"""Whether what a clipped sum takes for the gradient of a record is the gradient of that record alone."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedclip_secure.data.dataset import Task
from fedclip_secure.errors import ModelError
from fedclip_secure.methods.base import Batch, Phase
from fedclip_secure.training.device_records import select
from fedclip_secure.training.private.clipping import check_layers, clipped_sum, shared_pass
from fedclip_secure.training.private.exact import ExactArithmetic
from fedclip_secure.training.private.gradients import as_double, clip_factors
from fedclip_secure.training.private.linear_layers import LayerGradients
from fedclip_secure.training.shared_parameters import parameters_like

_TOLERANCE = 0.01  # of C: rounding stays far below it, and the gradient of another record far above
_TOLD = 1e-8  # of the largest gradient's square: what is smaller may be rounding alone
_TRIED = 8  # classes that made-up records may be of
_REMEDY = "this method cannot be trained with `privacy`: choose another `method`, or leave `privacy` out"


def check_records_apart(
    module: nn.Module, phase: Phase, task: Task, shape: tuple[int, ...], device: torch.device
) -> None:
    """Refuse a module and loss whose clipped sum over made-up records is not what autograd finds for each alone.

    That tells losses and layers that mix records, and parameters that are not reached through the records: a layer
    that sees text prompts has one row for each class, which is easily taken for a record. Nowhere may a record's loss
    depend on its neighbours, and where records share a pass each must get the very same bits with others. No data are
    touched; `shape` is that of one record's images.

    Raises:
        ModelError: they differ.
    """
    check_layers(module)
    batch = _hard(module, phase, _made_up(task, shape, device))
    rows = torch.arange(len(batch.labels))
    _check_losses(module, phase, batch)
    shared = shared_pass(module, phase, batch)
    if shared is not None:
        _check_bits(module, phase, batch, shared)
    alone = torch.stack([_gradient(module, phase, select(batch, row), shared) for row in rows[:, None].to(device)])
    squares = alone.square().sum(dim=1)
    norms = squares[squares > squares.max() * _TOLD].sqrt().tolist() or [1.0]
    for cut in (min(norms) / 2, max(norms) * 2):  # by which all are clipped, and none
        found = clipped_sum(module, phase, batch, rows.numpy(), cut)
        wrong = torch.from_numpy(found) - (clip_factors(squares, cut) @ alone).cpu()
        if not wrong.norm() <= _TOLERANCE * cut:
            raise ModelError(f"what one record adds to a batch's gradient is not its own gradient; {_REMEDY}")


def _check_losses(module: nn.Module, phase: Phase, batch: Batch) -> None:
    """Where each record has a pass of its own, a loss that couples records would train something else unnoticed."""
    with torch.no_grad():
        together = phase.loss(module, batch)
        rows = torch.arange(len(batch.labels), device=batch.labels.device)
        alone = torch.cat([phase.loss(module, select(batch, row)).reshape(-1) for row in rows[:, None]])
    if together.shape == alone.shape and not torch.allclose(together, alone, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise ModelError(f"the loss of a record depends on its neighbours; {_REMEDY}")


def _check_bits(module: nn.Module, phase: Phase, batch: Batch, whole: LayerGradients) -> None:
    count = len(batch.labels)
    for rows in (torch.arange(count).flip(0), torch.tensor([count - 1]), torch.arange(1, count).repeat(5)):
        part = shared_pass(module, phase, select(batch, rows.to(batch.labels.device)))
        if part is None or not part.equals(whole, rows):
            raise ModelError(f"what one record adds to a batch's gradient depends on its neighbours; {_REMEDY}")


def _made_up(task: Task, shape: tuple[int, ...], device: torch.device) -> Batch:
    """A few records; not as many as there are classes, so that one is not taken for the other."""
    classes = len(task.classes)
    count = 5 if classes == 4 else 4
    images = torch.sin(torch.arange(1.0, count * math.prod(shape) + 1).square()).reshape(count, *shape)
    text = torch.from_numpy(task.text_features)
    return Batch(images.to(device), (torch.arange(count) % classes).to(device), text.to(device), task.logit_scale)


def _hard(module: nn.Module, phase: Phase, batch: Batch) -> Batch:
    """`batch` with the labels that are lost most on: of a record that a model is sure of, the gradient is rounding."""
    labels = torch.arange(min(_TRIED, max(1, int(batch.labels.max()) + 1)), device=batch.labels.device)
    with torch.no_grad():
        tried = [phase.loss(module, replace(batch, labels=label.expand_as(batch.labels))) for label in labels]
    if any(losses.shape != batch.labels.shape for losses in tried):
        return batch
    return replace(batch, labels=labels[torch.stack(tried).nan_to_num().argmax(dim=0)])


def _gradient(module: nn.Module, phase: Phase, batch: Batch, shared: LayerGradients | None) -> Tensor:
    """By autograd, in the arithmetic of the pass."""
    parameters = list(parameters_like(module, phase.parameters).values())
    with nullcontext() if shared is None else ExactArithmetic():
        losses = phase.loss(module, batch)
        found = torch.autograd.grad(losses, parameters, torch.ones_like(losses), materialize_grads=True)
    return torch.cat([as_double(gradient).reshape(-1) for gradient in found])
