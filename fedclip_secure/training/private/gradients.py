"""Gradients of units in double precision, and by what they are cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Integers = npt.NDArray[np.int64]

# What rounding may add to a sum of clipped gradients comes off each of them (the argument stands in clipping.py).
_ROUNDING = 2.0**-20


def as_double(tensor: Tensor) -> Tensor:
    """`tensor` in float64, cut off from its graph; on the CPU where the device is MPS, which has no float64."""
    here = tensor.detach()
    return (here.cpu() if here.device.type == "mps" else here).double()


def clip_factors(squares: Tensor, max_grad_norm: float) -> Tensor:
    """min(1, C(1 - 2⁻²⁰)/‖g‖) for squared norms (U,) float64; 0 where a norm is not finite."""
    factors: Any = (max_grad_norm * (1 - _ROUNDING) / squares.sqrt()).clamp(max=1.0)
    return torch.where(torch.isfinite(squares), factors, 0.0)
