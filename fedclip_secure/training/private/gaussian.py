"""The Gaussian mechanism: the one way from a clipped sum to something that may be seen.

Normal deviates are Box and Muller's (1958), both of each pair, in float64 from 53-bit uniforms, and the noisy sum is
rounded to a power-of-two grid. What this leaves open, compared with real numbers:

- The tail ends at sqrt(2 · 53 · ln 2) = 8.57 deviations. A normal variable lies beyond with probability 1.02e-17:
  over 525,312 coordinates and 2,000 steps that adds 1.1e-8 to delta.
- Functions of float64 are rounded, so the chance of each point of the grid is right only to rounding; it is not the
  exact discrete Gaussian. What the grid takes away are the low bits, by which a float64 sum of noise and value gives
  the value away (Mironov 2012, "On Significance of the Least Significant Bits For Differential Privacy"): the grid
  follows from the plan alone, and everything after it is post-processing.
- One unit moves the clipped sum by at most C, bit for bit: the argument stands in clipping.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedclip_secure.secagg.keystream import Drawer, keystream

Doubles = npt.NDArray[np.float64]
_CHUNK = 1 << 16  # deviates at a time, 0.5 MiB: they stay in a core's second-level cache
_GRID_BITS = 16  # the grid is this much finer than the noise


class _Normals:
    """Draws independent standard normal deviates, float64, into one set of buffers."""

    def __init__(self) -> None:
        self._drawer = Drawer(2 * _CHUNK)
        self._uniform = torch.empty(_CHUNK, dtype=torch.float64)
        self._scratch = torch.empty(_CHUNK // 2, dtype=torch.float64)

    def draw(self, key: bytes, start: int, stop: int) -> Doubles:
        """Deviates `start` (even) to `stop` of `key`, at most _CHUNK; they stand until the next draw."""
        pairs = -(-(stop - start) // 2)
        words = self._drawer.draw(keystream(key, 2 * start), 4 * pairs).view("<u8")
        np.right_shift(words, 11, out=words)
        uniform = self._uniform[: 2 * pairs]
        np.copyto(uniform.numpy(), words.view("<i8"), casting="unsafe")  # below 2⁵³: exact, and fast as from signed
        uniform.add_(1).mul_(2.0**-53)  # in (0, 1]
        _box_muller(uniform[:pairs], uniform[pairs:], self._scratch[:pairs])
        deviates: Doubles = uniform[: stop - start].numpy()
        return deviates


def _box_muller(first: Tensor, second: Tensor, scratch: Tensor) -> None:
    """Turn uniforms `first` and `second` in (0, 1] into as many normal deviates, in place.

    They are r·cos θ and r·sin θ with r = sqrt(-2 ln u) and θ = 2πv. By torch, whose functions are vectorised where
    numpy's are not, with errors below one unit in the last place.
    """
    first.log_().mul_(-2).sqrt_()
    second.mul_(2 * math.pi)
    torch.cos(second, out=scratch)
    second.sin_().mul_(first)
    first.mul_(scratch)


@dataclass(frozen=True, slots=True)
class GaussianMechanism:
    """Noise of deviation `noise_multiplier` · `max_grad_norm` on a sum, and the constant that the sum is divided by.

    Nothing here depends on how many records there are.
    """

    noise_multiplier: float  # sigma
    max_grad_norm: float  # C
    update_divisor: float
    _normals: _Normals = field(init=False, repr=False, compare=False, default_factory=_Normals)

    @property
    def deviation(self) -> float:
        """Standard deviation of each coordinate of the noisy sum: σ·C."""
        return self.noise_multiplier * self.max_grad_norm

    @property
    def grid(self) -> float:
        """Step of the grid that the noisy sum is rounded to: the largest power of two up to σ·C·2⁻¹⁶."""
        return math.ldexp(1.0, math.frexp(self.deviation)[1] - 1 - _GRID_BITS)

    def release(self, total: Doubles, key: bytes) -> npt.NDArray[np.float32]:
        """(`total` + noise from `key`), rounded to the grid and divided: (d,) float64 to (d,) float32.

        Every coordinate has noise of its own; `key` are 32 bytes from the operating system that are used only here.
        One release at a time: they share buffers.
        """
        released = np.empty(total.size, dtype=np.float32)
        for start in range(0, total.size, _CHUNK):
            chunk = slice(start, min(start + _CHUNK, total.size))
            noisy = self._normals.draw(key, chunk.start, chunk.stop)
            noisy *= self.deviation
            noisy += total[chunk]
            noisy *= 1 / self.grid  # exact: a power of two
            np.rint(noisy, out=noisy)
            noisy *= self.grid / self.update_divisor
            released[chunk] = noisy
        return released
