"""What comes of a row follows from that row alone: to the last bit, whatever the shapes and the neighbours."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fedclip_secure.training.private import exact
from fedclip_secure.training.private.exact import ExactArithmetic, UnknownOperationError
from tests.waiting import BOUND

Rows = Callable[[Tensor], Tensor]
LABELS, COLUMNS = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 6, dtype=torch.int64)
BIAS = torch.arange(37.0)
WIDTHS = [1, 2, 3, 5, 7, 16, 31, 64, 100, 129, 333, 512, 1001, 3000]


def rows_of(count: int, width: int, seed: int = 0) -> Tensor:
    """Of very different sizes, with zeros."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(count, width)) * 10.0 ** random.uniform(-8, 8, (count, 1))
    return torch.from_numpy(np.where(random.random((count, width)) < 0.1, 0.0, values)).float()


@functools.lru_cache(maxsize=32)
def weights(width: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=(width, 37)) * 100).float()


def exactly(operation: Rows, rows: Tensor) -> Tensor:
    weights(rows.shape[1])
    with ExactArithmetic():
        return operation(rows)


OPERATIONS: dict[str, Rows] = {
    "matmul": lambda rows: rows @ weights(rows.shape[1]).to(rows.dtype),
    "linear": lambda rows: functional.linear(rows, weights(rows.shape[1]).T, BIAS),
    "sum": lambda rows: rows.sum(dim=1),
    "mean": lambda rows: torch.stack([rows, 2 * rows]).mean(dim=0),
    "norm": lambda rows: torch.linalg.vector_norm(rows, dim=-1, keepdim=True),
    "normalize": lambda rows: functional.normalize(rows, dim=-1),
    "exp": lambda rows: rows.exp(),
    "log": lambda rows: (rows.abs() + 1e-3).log(),
    "tanh": lambda rows: rows.tanh(),
    "softmax": lambda rows: rows.softmax(dim=-1),
    "log_softmax": lambda rows: rows.log_softmax(dim=-1),
    "relu": lambda rows: rows.relu(),
}
IN_DOUBLE = ["matmul", "sum", "norm", "normalize"]


@pytest.mark.parametrize("name", [*OPERATIONS, *(f"{name} in float64" for name in IN_DOUBLE)])
@pytest.mark.parametrize("width", WIDTHS)
def test_row_gets_the_same_bits_wherever_it_lies_and_whoever_is_beside_it(name: str, width: int) -> None:
    values, operation = rows_of(67, width), OPERATIONS[name.split(maxsplit=1)[0]]
    values = values.double() if name.endswith("float64") else values
    whole = exactly(operation, values)
    for rows in ([0], [66], [5, 3], list(range(1, 67)), list(range(66, -1, -1)), [7] * 40 + [66]):
        assert torch.equal(exactly(operation, values[rows]), whole[rows])


def test_squared_norms_are_right_to_what_clipping_leaves_for_them() -> None:
    random = np.random.default_rng(0)
    for width in (1, 512, 1024, 1025, 65_536):
        rows = np.abs(random.normal(size=(3, width))) * 10.0 ** random.uniform(-6, 0, (3, width))
        rows[:, 0] = 1e3  # beside which all others are small
        singles = torch.from_numpy(rows).float()
        found = exact.squared_norms(singles).numpy()
        true = np.array([math.fsum(value * value for value in row) for row in singles.double().tolist()])
        assert np.abs(found / true - 1).max() < 2.0**-30


@pytest.mark.parametrize("threads", [1, 2])
def test_number_of_threads_makes_no_difference(threads: int) -> None:
    values = rows_of(300, 700)
    before = torch.get_num_threads()
    expected = {name: exactly(operation, values) for name, operation in OPERATIONS.items()}
    try:
        torch.set_num_threads(threads)
        for name, operation in OPERATIONS.items():
            assert torch.equal(exactly(operation, values), expected[name])
    finally:
        torch.set_num_threads(before)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(1, 1100), scale=st.sampled_from([1e-15, 1e-6, 1.0, 1e6, 1e15]))
def test_results_are_the_true_ones_to_the_digits_that_are_kept(seed: int, width: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    rows = torch.from_numpy(random.normal(size=(9, width)) * scale).float()
    true, second = rows.double(), weights(width)
    largest = true.abs().amax(dim=1, keepdim=True) * second.double().abs().amax(dim=0) * width
    assert bool(((exact.matmul(rows, second) - true @ second.double()).abs() <= largest * 2.0**-16).all())
    assert torch.allclose(
        exact.total(rows, (1,)).double(), true.sum(dim=1), rtol=2e-7, atol=float(largest.max()) * 1e-9
    )
    small = rows / scale * 10
    assert torch.allclose(exact.exp(small).double(), small.double().exp(), rtol=5e-7, atol=0)
    assert torch.allclose(exact.tanh(small).double(), small.double().tanh(), rtol=1e-6, atol=0)
    tiny = small * 1e-6
    assert torch.allclose(exact.tanh(tiny).double(), tiny.double().tanh(), rtol=1e-6, atol=0)
    above = small.abs() + 1e-9
    assert torch.allclose(exact.log(above).double(), above.double().log(), rtol=3e-7, atol=3e-7)


def test_exponentials_end_where_singles_do_and_numbers_that_are_none_stay_so() -> None:
    ends = torch.tensor([-1e30, -90.0, 0.0, 90.0, float("inf"), float("nan")])
    found = exact.exp(ends)
    assert found[2] == 1
    assert bool((found[:2] < 2e-38).all())
    assert bool((found[:2] >= 2.0**-126).all())
    assert bool((found[3:5] > 6e37).all())
    assert bool(torch.isnan(found[5]))
    assert bool(torch.isnan(exact.tanh(ends)[5]))
    assert bool(torch.isnan(exact.log(ends)[5]))
    assert exact.tanh(ends)[:5].tolist() == [-1, -1, 0, 1, 1]


def test_no_small_row_has_a_norm_of_zero() -> None:
    tiny = torch.full((2, 5), 2.0**-140)
    assert bool((exact.squared_norms(tiny) == 5 * 2.0**-280).all())


def test_value_that_is_not_finite_spoils_its_own_row_alone() -> None:
    values = rows_of(5, 40)
    plain = {name: exactly(operation, values) for name, operation in OPERATIONS.items() if name != "mean"}
    values[2, 3] = float("inf")
    values[3, 0] = float("nan")
    for name, expected in plain.items():
        assert torch.equal(exactly(OPERATIONS[name], values)[[0, 1, 4]], expected[[0, 1, 4]])


def test_gradients_are_those_of_autograd() -> None:
    values = rows_of(20, 24) / 1e6
    labels = torch.arange(20) % 5
    values.requires_grad_()
    layers = torch.nn.Sequential(torch.nn.Linear(24, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5))

    def found() -> Tensor:
        outputs = functional.normalize(layers(values), dim=-1)
        losses = functional.cross_entropy(10 * outputs, labels, reduction="none")
        (gradient,) = torch.autograd.grad(losses, values, torch.ones_like(losses))
        return gradient

    expected = found()
    with ExactArithmetic():
        exactly_found = found()
    assert torch.allclose(exactly_found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "operation",
    [
        lambda rows: rows.sum(),  # over all records
        lambda rows: rows.sum(dim=[]),
        lambda rows: rows.double().softmax(dim=1),
        lambda rows: rows.sum(dim=1, dtype=torch.float64),
        lambda rows: (rows > 0).sum(dim=1),
        lambda rows: rows.unsqueeze(0).matmul(rows.unsqueeze(0).transpose(1, 2)),
        functional.gelu,
        lambda rows: rows.cumsum(dim=1),
        lambda rows: torch.add(rows, rows, alpha=3),  # two operations, which some processors round as one
        lambda rows: torch.zeros_like(rows).scatter_add(1, COLUMNS, rows),
        lambda rows: functional.nll_loss(rows, LABELS),  # a mean over records
        lambda rows: torch.linalg.vector_norm(rows, ord=1, dim=1),
    ],
)
def test_operation_of_which_nothing_is_known_is_refused(operation: Rows) -> None:
    rows = rows_of(4, 6)
    operation(rows)
    with ExactArithmetic(), pytest.raises(UnknownOperationError):
        operation(rows)


def test_threads_that_treat_small_numbers_differently_are_told() -> None:
    program = """
import torch
from fedclip_secure.training.private.exact import keeps_small_numbers
torch.set_num_threads(2)
before = keeps_small_numbers()  # which starts the other thread
flushed = torch.set_flush_denormal(True)  # in this one
print(before, flushed, keeps_small_numbers())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=BOUND)
    before, flushed, after = done.stdout.split()
    assert before == "True"
    assert flushed == "False" or after == "False"


def test_zero_has_no_sign_that_a_library_gives_it() -> None:
    zeros = exact.matmul(torch.zeros(2, 1), torch.full((1, 3), -1.0))
    assert not bool(torch.signbit(zeros).any())
    assert not bool(torch.signbit(exact.total(torch.full((2, 3), -0.0), (1,))).any())
