"""Arithmetic in which what comes of one record follows from that record alone, to the last bit.

A library adds up in whatever order suits the shapes that it is given: in a product over many records the last bits of
one record's row change with its place in the batch, and so with who else is there. In a model made for it these bits
grow into whole gradients, which no clipping bounds. Here every operation on a batch is of one of three kinds, and for
each of them the place of a record makes no difference, whatever the library, the device and its threads:

1. One operation of IEEE 754 for each element (section 5.4.1: addition, subtraction, multiplication, division, square
   root, comparison, conversion). Its result is the one number of its format that is closest to the true value, however
   it is found. No two of them are asked for at once, so none can be fused. (A device may divide by a number of the
   program's own by multiplying with its inverse: all elements alike.)
2. A sum, or a product of matrices, in which nothing is ever rounded: its terms, in double precision, are rounded
   beforehand to whole multiples of one unit, so few that every partial sum is a whole number of units below 2⁵³, which
   a double holds. So all orders of adding up, and fused operations too, give the same. The unit follows from the
   largest term of the row (of the column, of the second factor) itself. This is how Demmel & Nguyen 2015 (IEEE Trans.
   Computers 64:7) and Ozaki et al. 2012 (Numerical Algorithms 59) make sums reproducible. Its result is rounded once.
3. A selection, a copy, a change of shape.

exp, log and tanh are made of these, by their series. Between the sums all is in single precision, as the methods train
without privacy. What is not in the tables below is refused: the engine then gives each record a pass of its own.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_DIGITS = 51  # bits of a sum in units; two fewer than a double's, for a product found by sums of sums (Strassen 1969)
_TERMS = 1024  # of one exact sum: more would leave each with few bits
_ROUND = 1.5 * 2.0**52  # added to a number of units and taken off again, it leaves whole ones (up to 2⁵¹ of them)
# Whole numbers of this size, the bits of an exponent, and what a row's largest term counts as at least: from there on
# a unit, and the product of two, is a normal number.
_FORMATS = {
    torch.float32: (torch.int32, 0x7F800000, 2.0**-126),
    torch.float64: (torch.int64, 0x7FF0000000000000, 2.0**-450),
}
_LARGEST_EXP = 87.0  # e⁸⁷ is a single, and its inverse a normal one
_LN2, _LN2_REST = 355 / 512, math.log(2) - 355 / 512  # whole numbers of the former, up to 2¹⁴, are exact
_EXP_TERMS = 6  # of the series on |r| <= ln(2)/2: what is left out is below 2⁻²³ of the result
_LOG_TERMS = 5  # of the series on s <= 0.172: below 2⁻²⁸


class UnknownOperationError(Exception):
    """Nothing is known here of how an operation treats the records of a batch. It is named."""


class ExactArithmetic(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it no types
    """While it is entered, torch computes as this module says, forward as backward.

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
        kinds = {value.dtype for value in args if isinstance(value, Tensor)}
        work = _SUMS.get(func) if kinds <= _FORMATS.keys() else None
        if kinds == {torch.float32}:
            work = _SERIES.get(func, work)
        if work is not None:
            try:
                return work(*args, **given)
            except TypeError as error:  # an argument that is not provided for
                raise UnknownOperationError(f"{func}: {error}") from error
        if func in _PLAIN and _is_plain(func, args, given):
            return func(*args, **given)
        raise UnknownOperationError(str(func))


def keeps_small_numbers() -> bool:
    """Whether all threads of torch treat denormal numbers alike: a library built with -ffast-math may set one's way.

    Arithmetic of one record would then follow from the thread that it falls to.
    """
    count = torch.get_num_threads() << 16  # of which each thread takes a part
    tiny = torch.full((count,), 1, dtype=torch.int32).view(torch.float32)  # 2⁻¹⁴⁹, by its bits
    bits = (tiny + tiny).view(torch.int32)
    return bool((bits == bits[0]).all())


def matmul(first: Tensor, second: Tensor) -> Tensor:
    """first (M, K) · second (K, N), of one format: each element follows from its row and its column alone.

    Rows and columns are rounded to (51 - log2 K)/2 bits of their largest element: 21 at K = 512, which is what
    single precision keeps of a sum of such length. Products of more terms are made of several, added one by one.
    """
    pairs = zip(torch.split(first, _TERMS, dim=1), torch.split(second, _TERMS, dim=0), strict=True)
    return _added(_product(left, right) for left, right in pairs)


def total(values: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """The sum of `values` over `dims`, of terms rounded to 51 - log2 n bits of the largest of the n."""
    return _total(values, [dim % values.dim() for dim in dims], keepdim).to(values.dtype)


def squared_norms(rows: Tensor) -> Tensor:
    """(R, K) float32 -> (R,) float64, off by less than 2⁻³⁰ of itself: squares of singles are doubles."""
    return _total(rows.double().square_(), [1])


def exp(values: Tensor) -> Tensor:
    """e to the power of float32 `values`, which count as ±87 beyond that."""
    rest, power = _exp_parts(values)
    return rest.mul_(power).add_(power)


def log(values: Tensor) -> Tensor:
    """The natural logarithm of float32 `values` above 0 (normal numbers)."""
    mantissa, exponent = torch.frexp(values)  # in [0.5, 1)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2, mantissa)
    quotient = (mantissa - 1) / (mantissa + 1)
    square, series = quotient * quotient, torch.zeros_like(quotient)
    for term in range(_LOG_TERMS - 1, -1, -1):
        series.mul_(square).add_(2 / (2 * term + 1))
    power = exponent.float() - small.float()
    found = power * _LN2 + (quotient * series + power * _LN2_REST)
    return torch.where(torch.isfinite(values), found, values)


def tanh(values: Tensor) -> Tensor:
    """By e^(-2|x|) - 1."""
    rest, power = _exp_parts(values.abs() * -2)
    less = rest.mul_(power).add_(power - 1)
    return less / (-2 - less) * values.sign()


def _exp_parts(values: Tensor) -> tuple[Tensor, Tensor]:
    """eʳ - 1 and 2ᵏ, with e^x = 2ᵏ eʳ."""
    limited = values.clamp(-_LARGEST_EXP, _LARGEST_EXP)
    power = (limited * (1 / math.log(2))).round_()
    rest = limited.sub_(power * _LN2).sub_(power * _LN2_REST)
    series = rest * (1 / math.factorial(_EXP_TERMS))
    for term in range(_EXP_TERMS - 1, 0, -1):
        series.add_(1 / math.factorial(term)).mul_(rest)
    bits = power.nan_to_num_().add_(127).mul_(2.0**23)  # of a single with this exponent
    return series, bits.to(torch.int32).view(torch.float32)


def _product(first: Tensor, second: Tensor) -> Tensor:
    bits = (_DIGITS - _log2(first.shape[1])) // 2
    found = torch.mm(_rounded(first, (1,), bits), _rounded(second, (0,), bits))
    return found.add_(0.0).to(first.dtype)  # whether a zero has a sign is left to the library; plus 0 it has none


def _total(values: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """The sum in float64; of more than _TERMS, parts are added."""
    if not values.numel():
        return values.double().sum(tuple(dims), keepdim)
    for dim in dims:
        if values.shape[dim] > _TERMS:
            return _added(_total(part, dims, keepdim) for part in torch.split(values, _TERMS, dim))
    count = math.prod(values.shape[dim] for dim in dims)
    return _rounded(values, dims, _DIGITS - _log2(count)).sum(tuple(dims), keepdim).add_(0.0)


def _added(parts: Iterator[Tensor]) -> Tensor:
    """Their sum, one operation for each element after the other."""
    return functools.reduce(operator.add, parts)


def _log2(count: int) -> int:
    return max(0, count - 1).bit_length()


def _rounded(values: Tensor, dims: Sequence[int], bits: int) -> Tensor:
    """`values` in float64, rounded to whole units: at most 2^bits of them.

    The unit is a power of two that the largest value over `dims` decides.
    """
    whole, mask, smallest = _FORMATS[values.dtype]
    largest = values.abs().amax(tuple(dims), keepdim=True)
    power = (largest.view(whole) & mask).view(values.dtype).clamp_(min=smallest)  # of two, up to the largest
    shift = power.double() * (_ROUND * 2.0 ** (1 - bits))
    return (values.double() + shift).sub_(shift)


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
    squares = values.to(torch.float64, copy=True).square_()
    return _total(squares, [one % values.dim() for one in dim], keepdim).sqrt_().to(values.dtype)


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
}
_SERIES: dict[Any, Callable[..., Tensor]] = {  # in float32
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
