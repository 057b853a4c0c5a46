"""Deep grey values to 8 bits, by the range that the plan says counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedclip_secure.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, eq=False)
class Windowed:
    """`values` (H, W) uint8, and the shares of pixels, 0..1, at or beyond the window's black and its white end."""

    values: npt.NDArray[np.uint8]
    below: float
    above: float

    def inverted(self) -> Windowed:
        """Of a picture whose highest values are black."""
        return Windowed(255 - self.values, self.above, self.below)


def to_grey(values: npt.NDArray[np.generic], path: Path, window: tuple[int, int] | None) -> Windowed:
    """Map `values` (H, W) from `window` [low, high] to 0..255, cut off at both ends.

    Raises:
        ConfigError: the plan has no window.
        DataError: NaN or infinite pixels. Both name `path`.
    """
    wide = values.astype(np.float64)  # exact for 32-bit integers; worked on in place, for mammograms are large
    if not np.isfinite(wide).all():
        raise DataError(f"'{path}': holds NaN or infinite pixels; replace it or move it away")
    if window is None:
        raise ConfigError(
            f"'{path}': holds grey values from {wide.min():g} to {wide.max():g}, and the plan must say which range "
            "counts; ask the coordinator to set `model.image_window: [low, high]`"
        )
    low, high = window
    below, above = float((wide <= low).mean()), float((wide >= high).mean())
    wide -= low
    wide *= 255.0 / (high - low)
    np.clip(wide, 0.0, 255.0, out=wide)
    return Windowed(np.rint(wide, out=wide).astype(np.uint8), below, above)
