"""Clipped sums: the gradient of each unit, cut to a norm, added up (Abadi et al. 2016, arXiv:1607.00133, algorithm 1).

A unit is a set of records - one image, or all of a patient's - and what is clipped is the gradient of their summed
loss. One unit more or less moves the sum by at most C:

1. What a unit adds follows from its own records alone, to the last bit. Where a method is linear layers, records share
   a pass that computes so (`exact.py`). Elsewhere each record has a pass of its own, to which nothing else of the batch
   is given, no random number either. Which of the two it is follows from module and loss, and not from the batch.
2. Its norm is at most C(1 - 2⁻²⁰)(1 + 2⁻²⁵): the factor is found in float64, of norms that are right to 2⁻²⁶.
3. The sum is rounded, in an order that depends on who is there. Sums of at most _ROWS terms come first, of whole
   units, and then their sum: of N records there are at most 2N/_ROWS + 1 such sums. By Higham 2002, section 3.1, the
   whole is off by at most (_ROWS + 2N/_ROWS + 1) · 2⁻⁵³ times the sum of its terms' norms, in whatever order. A unit's
   terms come to C, or to 16 C where it has several records (`linear_layers.py`); neither N nor their sum, in C, may be
   above MOST_TERMS. So each of the two sums, with the unit and without, is off by less than 2⁻²¹·⁴ C, and both
   together by less than the 2⁻²⁰ - 2⁻²⁵ that 2. leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedclip_secure.errors import DataError, ModelError
from fedclip_secure.methods.base import Batch, Phase
from fedclip_secure.training.device_records import select
from fedclip_secure.training.private.exact import UnknownOperationError, keeps_small_numbers
from fedclip_secure.training.private.gradients import Integers, as_double, clip_factors
from fedclip_secure.training.private.linear_layers import (
    MOST_CANCELLED,
    LayerGradients,
    Place,
    UnfitLayersError,
    find_layers,
    layer_gradients,
    record_losses,
)
from fedclip_secure.training.shared_parameters import parameters_like

MOST_TERMS = 1 << 20  # of one sum
_ROWS = 1024  # records in a micro-batch


def clipped_sum(
    module: nn.Module, phase: Phase, batch: Batch, units: Integers, max_grad_norm: float
) -> npt.NDArray[np.float64]:
    """Σ_u min(1, C/‖g_u‖)·g_u over the units of `batch`, g_u the gradient of the phase's loss summed over u's records.

    Args:
        module: in training mode.
        units: (B,) which unit each record belongs to; any numbers.
        max_grad_norm: C > 0.

    Returns:
        (d,) float64: the phase's parameters in the module's order, each flattened; without records, zeros.
        A unit with a value in its gradient that is not finite adds nothing.

    Raises:
        ModelError: the gradient of one record cannot be told from that of the others; the model draws random numbers;
            threads compute differently.
        DataError: more records than the argument reaches to.
    """
    _check_terms(units)
    if not keeps_small_numbers():
        raise ModelError(
            "torch's threads treat very small numbers differently, which a library loaded beside it may have set; run "
            "with OMP_NUM_THREADS=1"
        )
    summing = _Summing(module, phase, batch, units, max_grad_norm)
    with _as_clipped(module, phase, batch), _drawing_nothing(batch.labels.device):
        layers = _shared_layers(module, summing.parameters)
        if layers is not None:
            try:
                return summing.add_up(layers)
            except (UnfitLayersError, UnknownOperationError):  # known only once records went through them
                pass
        check_layers(module)
        return summing.add_up_one_by_one()


def _check_terms(units: Integers) -> None:
    records = np.unique(units, return_counts=True)[1]
    terms = max(len(units), int(np.where(records > 1, MOST_CANCELLED, 1).sum()))
    if terms > MOST_TERMS:
        raise DataError(
            f"{len(units):,} records of {len(records):,} units fell into one step; what rounding does to their sum is "
            f"bounded for {MOST_TERMS:,} records, and {MOST_TERMS // MOST_CANCELLED:,} units of several: train on "
            "fewer, or ask the coordinator for a smaller privacy.sample_rate"
        )


def shared_pass(module: nn.Module, phase: Phase, batch: Batch) -> LayerGradients | None:
    """The gradients of single records (at least one), found in one pass; None where each needs a pass of its own."""
    with _as_clipped(module, phase, batch):
        layers = _shared_layers(module, parameters_like(module, phase.parameters))
        try:
            return None if layers is None else layer_gradients(module, phase, layers, batch)
        except (UnfitLayersError, UnknownOperationError):
            return None


def _shared_layers(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[Place] | None:
    device = next(iter(parameters.values())).device
    return None if device.type == "mps" else find_layers(module, parameters)  # MPS has no float64


@contextmanager
def _drawing_nothing(device: torch.device) -> Iterator[None]:
    """Refuse a model that draws random numbers: those of one record would depend on how many came before it.

    Raises:
        ModelError: torch's generators were used.
    """
    before = _generators(device)
    yield
    if not all(map(torch.equal, before, _generators(device))):
        raise ModelError(
            "the model draws random numbers while it trains, as dropout does, and so what one record adds would depend "
            "on others; it cannot be trained with `privacy`: set its dropout to 0, or choose another `method` or model"
        )


def _generators(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def check_layers(module: nn.Module) -> None:
    """Refuse BatchNorm, which mixes the records of a batch whether it has parameters or not.

    Raises:
        ModelError: there is one.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and (layer.training or not layer.track_running_stats):
            raise ModelError(
                f"the layer {name} is a BatchNorm, which mixes the records of a batch; this method cannot be trained "
                "with `privacy`: choose another `method`, or leave `privacy` out"
            )


class _Summing:
    """One clipped sum, however its gradients are found."""

    def __init__(self, module: nn.Module, phase: Phase, batch: Batch, units: Integers, max_grad_norm: float) -> None:
        self.parameters = parameters_like(module, phase.parameters)
        self.size = sum(value.numel() for value in self.parameters.values())
        self._module, self._phase = module, phase
        self._batch, self._units, self._max_grad_norm = batch, units, max_grad_norm

    def add_up(self, layers: Sequence[Place]) -> npt.NDArray[np.float64]:
        """The sum over micro-batches of whole units and at most _ROWS records; a larger unit is summed by itself."""
        total = self._zeros()
        for rows, numbers in _micro_batches(self._units, _ROWS):
            part = self._select(rows)
            if len(rows) > _ROWS:
                total += self._cut(self._of_large_unit(part, layers))
            else:
                gradients = layer_gradients(self._module, self._phase, layers, part)
                total += gradients.clipped(numbers, self._max_grad_norm, self.size)
        return total.cpu().numpy()

    def _of_large_unit(self, batch: Batch, layers: Sequence[Place]) -> Tensor:
        """The summed gradient (d,) float64 of all of `batch`, _ROWS records at a time."""
        summed = self._zeros()
        for rows in torch.split(torch.arange(len(batch.labels), device=batch.labels.device), _ROWS):
            summed += layer_gradients(self._module, self._phase, layers, select(batch, rows)).summed(self.size)
        return summed

    def add_up_one_by_one(self) -> npt.NDArray[np.float64]:
        """The sum by a pass for each record alone.

        Towers round a record by its place among the others, and where a ReLU sits on its edge the last bit decides a
        whole gradient.
        """
        total, numbers = self._zeros(), np.unique(self._units)
        for first in range(0, len(numbers), _ROWS):
            some = self._zeros()
            for unit in numbers[first : first + _ROWS]:
                some += self._cut(self._of_one_unit(self._select(np.flatnonzero(self._units == unit))))
            total += some
        return total.cpu().numpy()

    def _zeros(self) -> Tensor:
        device = as_double(next(iter(self.parameters.values()))[:0]).device
        return torch.zeros(self.size, dtype=torch.float64, device=device)

    def _select(self, rows: Integers) -> Batch:
        return select(self._batch, torch.from_numpy(rows).to(self._batch.labels.device))

    def _of_one_unit(self, batch: Batch) -> Tensor:
        """The summed gradient (d,) float64 of all of `batch`, one record at a time."""
        parameters, summed = list(self.parameters.values()), self._zeros()
        for row in torch.arange(len(batch.labels), device=batch.labels.device)[:, None]:
            losses = record_losses(self._module, self._phase, select(batch, row))
            found = torch.autograd.grad(losses.sum(), parameters, materialize_grads=True)
            summed += torch.cat([as_double(gradient).reshape(-1) for gradient in found])
        return summed

    def _cut(self, gradient: Tensor) -> Tensor:
        """`gradient` (d,) cut to C; nothing where it is not finite."""
        factor = clip_factors(gradient.square().sum(), self._max_grad_norm)
        return gradient * factor if factor > 0 else self._zeros()


def _micro_batches(units: Integers, most: int) -> Iterator[tuple[Integers, Integers]]:
    """Rows of `units` (B,) and their units' numbers 0, 0, 1, ..: as many whole units as have `most` rows together.

    A unit with more rows comes alone.
    """
    order = np.argsort(units, kind="stable")
    counts = np.unique(units, return_counts=True)[1]
    ends = np.cumsum(counts)
    first = done = 0  # units, and rows, that came before
    while first < len(counts):
        last = max(first + 1, int(np.searchsorted(ends, done + most, side="right")))
        yield order[done : ends[last - 1]], np.repeat(np.arange(last - first), counts[first:last])
        first, done = last, int(ends[last - 1])


@contextmanager
def _as_clipped(module: nn.Module, phase: Phase, batch: Batch) -> Iterator[None]:
    """No autocast, no TF32 and no bfloat16 in the matrix products, whatever the process had set.

    Only the phase's parameters take gradients: none is made for others, or left behind.
    """
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    before = {value: value.requires_grad for value in module.parameters()}
    trained = parameters_like(module, phase.parameters).values()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    module.requires_grad_(False)
    for value in trained:
        value.requires_grad_(True)
    try:
        with torch.autocast(batch.labels.device.type, enabled=False), torch.enable_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
        for value, wanted in before.items():
            value.requires_grad_(wanted)
