"""What a trainer releases, seen from outside: each gradient that one of its optimisers is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fedclip_secure.training.private.dp_sgd import system_coins

Floats = npt.NDArray[np.float32]


class Recorder:
    """The system's coins, and what they were.

    Attributes:
        drawn: every key, in order.
    """

    def __init__(self) -> None:
        self.drawn: list[bytes] = []
        self._taken = 0

    def __call__(self) -> bytes:
        """As Coins."""
        self.drawn.append(system_coins())
        return self.drawn[-1]

    def since(self) -> list[bytes]:
        """The keys that were drawn since this was asked last."""
        new = self.drawn[self._taken :]
        self._taken = len(self.drawn)
        return new


@contextmanager
def watching(see: Callable[[list[Tensor]], None]) -> Iterator[None]:
    """Call `see` before every step of any optimiser of torch, with the parameters that it is about to move.

    Steps that `see` itself brings about are not shown to it.
    """
    within = False

    def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:  # noqa: ARG001 - torch's
        nonlocal within
        if within:
            return
        within = True
        try:
            see([value for group in optimizer.param_groups for value in group["params"]])
        finally:
            within = False

    handle = register_optimizer_step_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def flat_gradients(parameters: list[Tensor]) -> Floats:
    """(d,) float32: the gradients of `parameters` in their order; zeros where there is none."""
    found = [torch.zeros_like(value) if value.grad is None else value.grad for value in parameters]
    return _flat(found)


def flat_values(parameters: list[Tensor]) -> Floats:
    """(d,) float32."""
    return _flat(parameters)


def _flat(tensors: list[Tensor]) -> Floats:
    flat: Floats = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors]).cpu().numpy()
    return flat
