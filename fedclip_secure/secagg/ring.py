"""Between real numbers and the integers modulo 2^32 in which masks cancel."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context

import numpy as np
import numpy.typing as npt

from fedclip_secure.errors import ConfigError, ProtocolError
from fedclip_secure.model.state import Floats
from fedclip_secure.names import MIN_SILOS

Words = npt.NDArray[np.uint32]
Doubles = npt.NDArray[np.float64]
WORD = np.dtype("<u4")  # on the wire and on disk
CLAMPED_AT_MOST = 0.001  # fraction of the coordinates
_TWO_DIGITS_UP = Context(prec=2, rounding=ROUND_CEILING)


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """The integer grid that every silo's weighted update is rounded to.

    With n silos each coordinate stays within ±Q, Q = floor((2^29 - 1) / n), so a sum of n of them
    stays within ±2^29: it cannot wrap, and one that lies outside was forged.
    """

    clip: float  # largest magnitude of one coordinate of an update
    silos: int  # n, in the pinned roster
    max_weight: int  # largest weight of one silo

    def __post_init__(self) -> None:
        if self.silos < MIN_SILOS:
            raise ConfigError("secure aggregation needs at least 3 silos: with 2, each can subtract itself")
        if not (self.clip > 0 and math.isfinite(self.clip)):
            raise ConfigError("secure_aggregation.coordinate_clip must be a positive number")
        if not 1 <= self.max_weight <= self.bound:
            raise ConfigError(
                f"secure_aggregation.max_weight must lie in 1..{self.bound} for {self.silos} silos: no sum may wrap"
            )

    @property
    def bound(self) -> int:
        """Q: the largest magnitude of one silo's integer."""
        return int((2**29 - 1) // self.silos)

    @property
    def step(self) -> float:
        """s: the real value of one integer at full weight."""
        return self.clip / self.bound

    def quantize(self, update: Floats | Doubles, weight: int) -> Words:
        """Round `weight` times `update` (d,) to the grid, up or down at random so that the mean is exact.

        Returns (d,) uint32, two's complement. The randomness is the operating system's.

        Raises:
            ProtocolError: `not-finite`; or `clip` where more than 0.1 % of the coordinates are beyond it.
            ValueError: a weight outside 1..max_weight.
        """
        if not 1 <= weight <= self.max_weight:
            raise ValueError(f"weight {weight} is not in 1..{self.max_weight}")
        values: Doubles = update.astype(np.float64)
        if not np.isfinite(values).all():
            raise ProtocolError(
                "not-finite", "the update holds NaN or infinity and was not sent; lower the learning rate"
            )
        self._check_clamped(values)
        scaled = weight * np.clip(values, -self.clip, self.clip) / (self.step * self.max_weight)
        below = np.floor(scaled)
        rounded = below + (_uniform(values.size) < scaled - below)
        # clip / (clip / Q) may come out one unit in the last place above Q.
        words: Words = np.clip(rounded, -self.bound, self.bound).astype(np.int32).view(np.uint32)
        return words

    def mean(self, total: npt.NDArray[np.int64], weight: int) -> Doubles:
        """The weighted mean update (d,) that integer sums (d,) over silos of total weight `weight` stand for."""
        return (self.step * total.astype(np.float64)) * self.max_weight / weight

    def error_bound(self, silos: int, weight: int) -> float:
        """Largest rounding error of one coordinate of the mean over `silos` updates of total weight `weight`."""
        return silos * self.step * self.max_weight / weight

    def _check_clamped(self, values: Doubles) -> None:
        beyond = np.count_nonzero(np.abs(values) > self.clip)
        if beyond > CLAMPED_AT_MOST * values.size:
            # "higher": between two coordinates lies a clip that is still exceeded too often.
            fits = float(np.quantile(np.abs(values), 1 - CLAMPED_AT_MOST, method="higher"))
            raise ProtocolError(
                "clip",
                f"{beyond / values.size:.1%} of the update's coordinates lie beyond coordinate_clip {self.clip:g} "
                f"(at most {CLAMPED_AT_MOST:.1%} may) and it was not sent; "
                f"secure_aggregation.coordinate_clip: {_TWO_DIGITS_UP.create_decimal_from_float(fits):g} would fit, "
                "or a lower learning rate",
            )


@dataclass(frozen=True, slots=True)
class VectorLayout:
    """What stands where in the masked vector: d coordinates, the weight, and the validation counts."""

    parameters: int  # d
    counts: bool  # correct and total of the silo's validation split

    @property
    def words(self) -> int:
        """Length of the vector."""
        return self.parameters + (3 if self.counts else 1)

    def pack(self, update: Words, weight: int, correct: int = 0, total: int = 0) -> Words:
        """One silo's vector (words,) uint32."""
        tail = [weight, correct, total] if self.counts else [weight]
        return np.concatenate([update, np.array(tail, dtype=np.uint32)])


@dataclass(frozen=True, slots=True, eq=False)
class Total:
    """A sum over silos that passed the bounds."""

    update: npt.NDArray[np.int64]  # (d,)
    weight: int
    correct: int
    total: int


def read_total(words: Words, layout: VectorLayout, grid: FixedPoint, silos: int) -> Total:
    """Read the unmasked sum (layout.words,) over `silos` silos, refusing what honest silos cannot add up to.

    With |q| ≤ w·Q/max_weight + 1 for each silo, the mean stays within ±clip whoever lies.

    Raises:
        ProtocolError: `sum-bounds`.
    """
    values = words.view(np.int32).astype(np.int64)
    update, tail = values[: layout.parameters], [int(v) for v in values[layout.parameters :]]
    weight, (correct, total) = tail[0], tail[1:] or (0, 0)
    if not silos <= weight <= silos * grid.max_weight:
        raise ProtocolError("sum-bounds", f"the weights of {silos} silos add up to {weight}: a silo sent garbage")
    if int(np.abs(update).max()) * grid.max_weight > grid.bound * weight + silos * grid.max_weight:
        raise ProtocolError("sum-bounds", "a coordinate of the sum is beyond the clip: a silo sent garbage")
    if not 0 <= correct <= total <= silos * grid.bound:
        raise ProtocolError("sum-bounds", f"validation counts add up to {correct} of {total}: a silo sent garbage")
    return Total(update, weight, correct, total)


def _uniform(count: int) -> Doubles:
    """`count` uniforms in [0, 1) with 53 bits each, from the operating system."""
    bits = np.frombuffer(os.urandom(8 * count), dtype="<u8")
    uniforms: Doubles = np.multiply(bits >> np.uint64(11), 2.0**-53, dtype=np.float64)
    return uniforms
