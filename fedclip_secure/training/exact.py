"""Arithmetic in which what comes of one record follows from that record alone, to the last bit.

A library adds up in whatever order suits the shapes that it is given: in a product over many records the last bits of
one record's row change with its place in the batch, and so with who else is there. In a model made for it these bits
grow into whole gradients, which no clipping bounds. Here every operation on a batch is of one of three kinds, and for
each of them the place of a record makes no difference, whatever the library, the device and its threads:

1. One operation of IEEE 754 for each element (section 5.4.1: addition, subtraction, multiplication, division, square
   root, comparison, conversion). Its result is the one double that is closest to the true value, however it is found.
   No two of them are asked for at once, so none can be fused. (A device may divide by a number of the program's own by
   multiplying with its inverse: all elements alike.)
2. A sum, or a product of matrices, in which nothing is ever rounded: its terms are rounded beforehand to whole
   multiples of one unit, so few that every partial sum is a whole number of units below 2⁵³, which a double holds. So
   all orders of adding up, and fused operations too, give the same. The unit follows from the largest term of the
   row (of the column, of the second factor) itself. This is how Demmel & Nguyen 2015 (IEEE Trans. Computers 64:7) and
   Ozaki et al. 2012 (Numerical Algorithms 59) make sums reproducible.
3. A selection, a copy, a change of shape.

exp, log and tanh are made of these, by their series. What is not in the tables below is refused: the engine then
gives each record a pass of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_DIGITS = 51  # bits of a sum in units; two fewer than a double's, for a product found by sums of sums (Strassen 1969)
_TERMS = 1024  # of one exact sum: more would leave each with few bits
_EXPONENT = 0x7FF0000000000000  # of a double's bits
_MANTISSA = 0x000FFFFFFFFFFFFF
_SMALLEST = 2.0**-900  # of a row's largest term: below it terms have fewer bits, and units stay normal numbers
_LARGEST_EXP = 700.0  # e⁷⁰⁰ is a double, and so is its inverse
_EXP_TERMS, _SQUARINGS = 6, 3  # of the series on |r| <= ln(2)/16: what is left out is below 2⁻⁴¹ of the result
_LOG_TERMS = 11  # of the series on s <= 0.172: below 2⁻⁵³


class UnknownOperationError(Exception):
    """Nothing is known here of how an operation treats the records of a batch. It is named."""


class ExactArithmetic(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it no types
    """While it is entered, torch computes as this module says: all in float64, and forward as backward.

    Raises:
        UnknownOperationError: an operation is none of the three kinds.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do `func` in the way of its kind."""
        given = dict(kwargs or {})
        if func in _SUMS and all(value.dtype == torch.float64 for value in args if isinstance(value, Tensor)):
            try:
                return _SUMS[func](*args, **given)
            except TypeError as error:  # an argument that is not provided for
                raise UnknownOperationError(f"{func}: {error}") from error
        if func in _PLAIN and _is_plain(func, args, given):
            return func(*args, **given)
        raise UnknownOperationError(str(func))


def matmul(first: Tensor, second: Tensor) -> Tensor:
    """first (M, K) · second (K, N), float64: each element follows from its row and its column alone.

    Rows and columns are rounded to (51 - log2 K)/2 bits of their largest element: 21 at K = 512, which is what
    single precision keeps of a sum of such length. Products of more terms are made of several, added one by one.
    """
    if first.shape[1] > _TERMS:
        pairs = zip(torch.split(first, _TERMS, dim=1), torch.split(second, _TERMS, dim=0), strict=True)
        return _added(matmul(left, right) for left, right in pairs)
    bits = (_DIGITS - _log2(first.shape[1])) // 2
    left, unit_left = _in_units(first, (1,), bits)
    right, unit_right = _in_units(second, (0,), bits)
    return torch.mm(left, right) * unit_left * unit_right


def total(values: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """The sum of float64 `values` over `dims`, of terms rounded to 51 - log2 n bits of the largest of the n.

    Over one dimension that is off by less than 2⁻³⁰ of the sum of their sizes: more than _TERMS are added in parts.
    """
    dims = [dim % values.dim() for dim in dims]
    if not values.numel():
        return values.sum(dims, keepdim)
    for dim in dims:
        if values.shape[dim] > _TERMS:
            return _added(total(part, dims, keepdim) for part in torch.split(values, _TERMS, dim))
    whole, unit = _in_units(values, dims, _DIGITS - _log2(math.prod(values.shape[dim] for dim in dims)))
    summed = whole.sum(dims, keepdim=True) * unit
    return summed if keepdim else summed.sum(dims)  # over one element each


def squared_norms(rows: Tensor) -> Tensor:
    """(R, K) float64 -> (R,). Of rows in units of their largest power of two: no small row becomes zero."""
    scaled, unit = _scaled(rows)
    return total(scaled * scaled, (1,)) * unit[:, 0] * unit[:, 0]


def exp(values: Tensor) -> Tensor:
    """e to the power of float64 `values`, which count as ±700 beyond that."""
    limited = values.clamp(-_LARGEST_EXP, _LARGEST_EXP)
    power = (limited * (1 / math.log(2))).round_()
    rest = limited.sub_(power * math.log(2)).mul_(0.5**_SQUARINGS)
    series = rest * (1 / math.factorial(_EXP_TERMS))
    for term in range(_EXP_TERMS - 1, 0, -1):
        series.add_(1 / math.factorial(term)).mul_(rest)
    series.add_(1)
    for _ in range(_SQUARINGS):
        series.mul_(series)
    return series.mul_(((power.nan_to_num_().to(torch.int64) + 1023) << 52).view(torch.float64))


def log(values: Tensor) -> Tensor:
    """The natural logarithm of float64 `values` above 0 (normal numbers)."""
    bits = values.contiguous().view(torch.int64)
    exponent = (bits >> 52) - 1023
    mantissa = ((bits & _MANTISSA) | (1023 << 52)).view(torch.float64)  # in [1, 2)
    large = mantissa > math.sqrt(2)
    mantissa = torch.where(large, mantissa * 0.5, mantissa)
    quotient = (mantissa - 1) / (mantissa + 1)
    square, series = quotient * quotient, torch.zeros_like(quotient)
    for term in range(_LOG_TERMS - 1, -1, -1):
        series.mul_(square).add_(1 / (2 * term + 1))
    found = (exponent + large).to(torch.float64) * math.log(2) + 2 * quotient * series
    return torch.where(torch.isfinite(values), found, values)


def tanh(values: Tensor) -> Tensor:
    """By e^(-2|x|)."""
    small = exp(values.abs() * -2)
    return (1 - small) / (1 + small) * values.sign()


def _added(parts: Iterator[Tensor]) -> Tensor:
    """Their sum, one operation for each element after the other."""
    found = next(parts)
    for part in parts:
        found = found + part
    return found


def _log2(count: int) -> int:
    return max(0, count - 1).bit_length()


def _in_units(values: Tensor, dims: Sequence[int], bits: int) -> tuple[Tensor, Tensor]:
    """`values` as whole numbers up to 2^bits of a unit, a power of two that the largest value over `dims` decides."""
    unit = _power(values, dims) * 2.0 ** (1 - bits)
    return (values / unit).round_(), unit


def _scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    power = _power(rows, (1,))
    return rows / power, power


def _power(values: Tensor, dims: Sequence[int]) -> Tensor:
    """The largest power of two up to the largest value over `dims`, at least _SMALLEST."""
    largest = values.abs().amax(tuple(dims), keepdim=True)
    return (largest.view(torch.int64) & _EXPONENT).view(torch.float64).clamp_(min=_SMALLEST)


# The second kind: sums, and what is made of sums and series.


def _addmm(bias: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return matmul(first, second) + bias


def _sum(values: Tensor, dim: Sequence[int] | None, keepdim: bool = False) -> Tensor:
    if not dim:
        raise UnknownOperationError("a sum over all dimensions")
    return total(values, dim, keepdim)


def _mean(values: Tensor, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    return _sum(values, dim, keepdim) / math.prod(values.shape[one] for one in dim)


def _norm(values: Tensor, order: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
    if order != 2 or not dim:
        raise UnknownOperationError(f"a norm of order {order} over {dim}")
    return total(values * values, dim, keepdim).sqrt()


def _softmax(values: Tensor, dim: int, half_to_float: bool) -> Tensor:  # noqa: ARG001 - torch's signature
    powers = exp(values - values.amax(dim, keepdim=True))
    return powers / total(powers, (dim,), keepdim=True)


def _softmax_backward(gradient: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    return output * (gradient - total(gradient * output, (dim,), keepdim=True))


def _log_softmax(values: Tensor, dim: int, half_to_float: bool) -> Tensor:  # noqa: ARG001 - torch's signature
    below = values - values.amax(dim, keepdim=True)
    return below - log(total(exp(below), (dim,), keepdim=True))


def _log_softmax_backward(gradient: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    return gradient - exp(output) * total(gradient, (dim,), keepdim=True)


def _tanh_backward(gradient: Tensor, output: Tensor) -> Tensor:
    return gradient * (1 - output * output)


_SUMS: dict[Any, Callable[..., Tensor]] = {
    _aten.mm.default: matmul,
    _aten.addmm.default: _addmm,
    _aten.sum.dim_IntList: _sum,
    _aten.mean.dim: _mean,
    _aten.linalg_vector_norm.default: _norm,
    _aten.exp.default: exp,
    _aten.log.default: log,
    _aten.tanh.default: tanh,
    _aten.tanh_backward.default: _tanh_backward,
    _aten._softmax.default: _softmax,
    _aten._softmax_backward_data.default: _softmax_backward,
    _aten._log_softmax.default: _log_softmax,
    _aten._log_softmax_backward_data.default: _log_softmax_backward,
}

# The first kind and the third.
_PLAIN = {
    *(_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.div.Scalar, _aten.neg.default),
    *(_aten.sqrt.default, _aten.abs.default, _aten.clamp_min.default, _aten.relu.default),
    *(_aten.threshold_backward.default, _aten._to_copy.default),
    *(_aten.gt.Scalar, _aten.ge.Scalar, _aten.lt.Scalar, _aten.le.Scalar, _aten.eq.Scalar),
    *(_aten.where.self, _aten.masked_fill.Scalar, _aten.masked_fill_.Scalar),
    *(_aten.gather.default, _aten.scatter_add.default, _aten.select.int, _aten.select_backward.default),
    *(_aten.nll_loss_forward.default, _aten.nll_loss_backward.default),
    *(_aten.t.default, _aten.permute.default, _aten.transpose.int, _aten.view.default, _aten.unsqueeze.default),
    *(_aten.squeeze.dim, _aten.expand.default, _aten.cat.default, _aten.stack.default, _aten.slice.Tensor),
    *(_aten.detach.default, _aten.clone.default, _aten.alias.default),
    *(_aten.ones_like.default, _aten.zeros_like.default, _aten.new_zeros.default, _aten.scalar_tensor.default),
}
_ONE_TERM = {_aten.add.Tensor, _aten.sub.Tensor}
_LOSSES = {_aten.nll_loss_forward.default: 2, _aten.nll_loss_backward.default: 3}  # place of `weight`


def _is_plain(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments make no sum of it."""
    if func in _ONE_TERM:
        return bool(kwargs.get("alpha", 1) == 1)
    if func == _aten.scatter_add.default:
        return bool(args[2].shape[args[1]] == 1)  # one addition for each row
    if func in _LOSSES:  # one value of each row, without weights and without a mean
        weight = _LOSSES[func]
        return args[weight] is None and args[weight + 1] == 0
    return True
