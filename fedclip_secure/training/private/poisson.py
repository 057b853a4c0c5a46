"""Who is in a step: each unit by a coin of its own (Mironov et al. 2019, arXiv:1908.10530, section 3)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedclip_secure.secagg.keystream import Drawer, keystream


def draw_members(key: bytes, units: int, sample_rate: float) -> npt.NDArray[np.bool_]:
    """Which of `units` units are in a step, (units,) bool, each with probability `sample_rate`, 0 < q <= 1.

    Coin u is the u-th 64-bit word of the single-use 32-byte `key`'s stream (AES-256-CTR); a unit is in where its word
    lies below q·2⁶⁴. That is q exactly, or less by under 2⁻⁶⁴ where q < 2⁻¹¹. The batch is as large as it comes.
    """
    threshold = int(sample_rate * 2.0**64)
    words: npt.NDArray[np.uint64] = Drawer(2 * units).draw(keystream(key), 2 * units).view("<u8")
    members: npt.NDArray[np.bool_] = words < threshold
    return members
