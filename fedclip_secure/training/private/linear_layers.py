"""Clipped sums of linear layers from one backward pass, without the gradient of any record.

That gradient is g aᵀ in a layer's weight and g in its bias, where `a` is what the layer got and g the gradient of
what it gave. So its squared norm is ‖g‖²(‖a‖² + 1) (Goodfellow 2015, arXiv:1510.01799), the inner product of two
records' gradients is (g·g')(a·a' + 1), and a sum of scaled gradients is one product of matrices. The pass computes as
`exact.py` says, so that a, g and the norm of a record are the same to the last bit whoever shares the pass.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedclip_secure.errors import ModelError
from fedclip_secure.methods.base import Batch, Phase
from fedclip_secure.training.device_records import select
from fedclip_secure.training.private.exact import ExactArithmetic, squared_norms
from fedclip_secure.training.private.gradients import Integers, clip_factors

MOST_CANCELLED = 16  # how much shorter than its records' gradients together a unit's may count


class UnfitLayersError(Exception):
    """A layer was used more than once, or not at all, or did not get one row for each record."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A layer, and where its weight and bias lie in the flat vector; None where they are not trained."""

    layer: nn.Linear
    weight: slice | None
    bias: slice | None


def find_layers(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[Place] | None:
    """The linear layers that hold all of `parameters`; None where something else holds one, or two layers do."""
    places: dict[int, slice] = {}
    start = 0
    for value in parameters.values():
        places[id(value)] = slice(start, start + value.numel())
        start += value.numel()
    layers = [layer for layer in module.modules() if type(layer) is nn.Linear]
    found = [Place(layer, places.get(id(layer.weight)), places.get(id(layer.bias))) for layer in layers]
    held = [part for place in found for part in (place.weight, place.bias) if part is not None]
    if len(held) != len(places) or len({part.start for part in held}) != len(held):
        return None
    return [place for place in found if place.weight is not None or place.bias is not None]


@dataclass(frozen=True, slots=True, eq=False)
class Used:
    """A layer in one pass: `inputs` (R, in) and `gradients` (R, out) of its outputs, float32."""

    place: Place
    inputs: Tensor
    gradients: Tensor

    def squares(self) -> Tensor:
        """Squared norms of the records' gradients, (R,)."""
        return squared_norms(self.gradients) * self._with_bias(squared_norms(self.inputs))

    def square_of_sum(self, rows: slice) -> Tensor:
        """The squared norm of the sum of the gradients of the records at `rows`, (), of these records alone."""
        gradients, inputs = self.gradients[rows].double(), self.inputs[rows].double()
        return ((gradients @ gradients.T) * self._with_bias(inputs @ inputs.T)).sum()

    def write_sum(self, factors: Tensor, found: Tensor) -> None:
        """Write the sum of the gradients, each times its factor (R,), into its place in `found`."""
        scaled = self.gradients.double().mul_(factors[:, None])
        if self.place.weight is not None:
            torch.mm(scaled.T, self.inputs.double(), out=found[self.place.weight].view(scaled.shape[1], -1))
        if self.place.bias is not None:
            torch.sum(scaled, dim=0, out=found[self.place.bias])

    def _with_bias(self, products: Tensor) -> Tensor:
        if self.place.weight is None:
            return torch.ones_like(products)
        return products if self.place.bias is None else products + 1


@dataclass(frozen=True, slots=True, eq=False)
class LayerGradients:
    """The gradients of R records in all layers."""

    layers: Sequence[Used]

    def squares(self) -> Tensor:
        """Squared norms of the records' gradients, (R,); layer by layer, so that no sum has an order of its own."""
        return functools.reduce(operator.add, (layer.squares() for layer in self.layers))

    def clipped(self, units: Integers, max_grad_norm: float, size: int) -> Tensor:
        """The sum (size,) float64 of the units' gradients, each cut to `max_grad_norm`.

        `units` (R,) numbers the unit of each record: 0, 0, 1, .., rising. A unit with a value that is not finite
        adds nothing.
        """
        groups = torch.from_numpy(units).to(self.layers[0].inputs.device)
        squares = self.squares()
        self._drop_not_finite(squares, groups)
        if int(units[-1]) + 1 < len(units):
            squares = self._of_units(squares, groups)
        factors = clip_factors(squares, max_grad_norm)[groups]
        found = torch.empty(size, dtype=torch.float64, device=groups.device)
        for layer in self.layers:
            layer.write_sum(factors, found)
        return found

    def summed(self, size: int) -> Tensor:
        """The sum (size,) float64 of all of them, uncut."""
        found = torch.empty(size, dtype=torch.float64, device=self.layers[0].inputs.device)
        for layer in self.layers:
            layer.write_sum(torch.ones_like(layer.gradients[:, 0], dtype=torch.float64), found)
        return found

    def equals(self, other: LayerGradients, rows: Tensor) -> bool:
        """Whether these are the gradients that `other` has at `rows`, to the last bit."""
        pairs = zip(self.layers, other.layers, strict=True)
        return torch.equal(self.squares(), other.squares()[rows]) and all(
            torch.equal(mine.inputs, its.inputs[rows]) and torch.equal(mine.gradients, its.gradients[rows])
            for mine, its in pairs
        )

    def _drop_not_finite(self, squares: Tensor, groups: Tensor) -> None:
        bad = ~torch.isfinite(squares)
        if bad.any():
            bad = torch.isin(groups, groups[bad])
            for values in (squares, *(part for layer in self.layers for part in (layer.inputs, layer.gradients))):
                values[bad] = 0

    def _of_units(self, squares: Tensor, groups: Tensor) -> Tensor:
        """The units' squared norms, (U,), from those of their records, (R,); at least (the sum of their norms / 16)².

        Where gradients of one unit cancel, little is left to go by: the error of a dot product of n terms is at most
        n · 2⁻⁵³ times the product of the norms (Higham 2002, section 3.1), and so may be large beside the norm of the
        sum, and what is scaled up large beside C. A unit that cancels further is cut as if it did not.
        """
        # One unit at a time, of its own records alone: what a unit adds must not depend on who else is there.
        sizes = torch.bincount(groups).tolist()
        ends = itertools.accumulate(sizes)
        parts = (slice(end - size, end) for size, end in zip(sizes, ends, strict=True))
        return torch.stack([self._of_unit(squares[rows], rows) for rows in parts])

    def _of_unit(self, squares: Tensor, rows: slice) -> Tensor:
        if len(squares) == 1:
            return squares[0]
        whole = torch.stack([layer.square_of_sum(rows) for layer in self.layers]).sum()
        return torch.maximum(whole, (squares.sqrt().sum() / MOST_CANCELLED).square())


def layer_gradients(module: nn.Module, phase: Phase, places: Sequence[Place], batch: Batch) -> LayerGradients:
    """The gradients of `batch` in the layers at `places`, each to the last bit as if its record were alone.

    Raises:
        UnfitLayersError, UnknownOperationError: they must be found in another way.
        ModelError: the loss does not give one value for each record.
    """
    with torch.no_grad():  # what sees one row, or as many prompts as there are records here, does not see these as well
        for count in (1, 2):
            _watched(module, phase, places, select(batch, torch.zeros(count, dtype=torch.int64)))
    with ExactArithmetic():
        losses, seen = _watched(module, phase, places, batch)
        outputs = [seen[place.layer][1] for place in places]
        found = torch.autograd.grad(losses, outputs, torch.ones_like(losses), materialize_grads=True)
    return LayerGradients(
        [Used(place, seen[place.layer][0], gradient) for place, gradient in zip(places, found, strict=True)]
    )


def _watched(
    module: nn.Module, phase: Phase, places: Sequence[Place], batch: Batch
) -> tuple[Tensor, dict[nn.Module, tuple[Tensor, Tensor]]]:
    """The losses, and what each layer got and gave: one row for each record."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def see(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if layer in seen or inputs[0].shape != (len(batch.labels), layer.in_features):
            raise UnfitLayersError
        seen[layer] = (inputs[0].detach(), output)
        return output.clone()  # what comes next may change it in place

    handles = [place.layer.register_forward_hook(see) for place in places]
    try:
        losses = record_losses(module, phase, batch)
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) < len(places):
        raise UnfitLayersError
    return losses, seen


def record_losses(module: nn.Module, phase: Phase, batch: Batch) -> Tensor:
    """The phase's loss of each record, (B,).

    Raises:
        ModelError: it has another shape.
    """
    losses = phase.loss(module, batch)
    if losses.shape != batch.labels.shape:
        raise ModelError(
            f"the method's loss gives values of shape {tuple(losses.shape)} for a batch of {len(batch.labels)} rows; "
            "with `privacy` it must give one for each"
        )
    return losses
