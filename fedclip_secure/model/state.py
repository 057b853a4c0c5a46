"""The shared parameters: named float32 arrays, the flat vector that is averaged, and its digest."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedclip_secure import canonical
from fedclip_secure.errors import ModelError

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Layout:
    """Names and shapes of the shared parameters, in the order in which they fill the flat vector."""

    entries: tuple[tuple[str, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.entries]
        if not names or len(set(names)) != len(names):
            raise ModelError("a layout needs parameters, each name once")
        if any(side < 1 for _, shape in self.entries for side in shape):
            raise ModelError("a shared parameter cannot be empty")

    @property
    def size(self) -> int:
        """Coordinates of the flat vector."""
        return sum(math.prod(shape) for _, shape in self.entries)


@dataclass(frozen=True, slots=True, eq=False)
class AdapterState:
    """One adapter: `vector` (layout.size,) float32, finite, cut into named arrays by `layout`."""

    layout: Layout
    vector: Floats

    def __post_init__(self) -> None:
        if self.vector.shape != (self.layout.size,) or self.vector.dtype != np.float32:
            raise ModelError(
                f"the adapter has {self.vector.shape} {self.vector.dtype} values, "
                f"the plan's layout ({self.layout.size},) float32"
            )
        if not np.isfinite(self.vector).all():
            raise ModelError("the adapter holds NaN or infinity; train again from an earlier one")

    @property
    def digest(self) -> bytes:
        """32 bytes over names, shapes and the values as little-endian float32."""
        values = hashlib.sha256(self.vector.astype("<f4").data).digest()
        shapes = [[name, list(shape)] for name, shape in self.layout.entries]
        return canonical.digest("fedclip/v1/model", shapes, values)

    def arrays(self) -> dict[str, Floats]:
        """The named arrays, as views into the vector."""
        arrays, start = {}, 0
        for name, shape in self.layout.entries:
            end = start + math.prod(shape)
            arrays[name] = self.vector[start:end].reshape(shape)
            start = end
        return arrays

    def to_safetensors(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """The arrays as one safetensors file."""
        return save({k: np.asarray(v, order="C") for k, v in self.arrays().items()}, dict(metadata or {}))

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, npt.NDArray[np.generic]], names: Sequence[str] | None = None
    ) -> AdapterState:
        """Flatten named arrays, in the order of `names` (default: as given)."""
        order = list(arrays) if names is None else list(names)
        layout = Layout(tuple((name, tuple(arrays[name].shape)) for name in order))
        parts = [np.asarray(arrays[name], dtype=np.float32).reshape(-1) for name in order]
        return cls(layout, np.concatenate(parts))

    @classmethod
    def from_safetensors(cls, data: bytes, layout: Layout, source: str) -> AdapterState:
        """Read an adapter that must have exactly `layout`.

        Raises:
            ModelError: not safetensors, or other names or shapes; names `source` and the first difference.
        """
        try:
            arrays = load(data)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{source}: is not a safetensors file ({error}); get it again") from error
        wanted = dict(layout.entries)
        for name in {**wanted, **arrays}:
            here = tuple(arrays[name].shape) if name in arrays else "(absent)"
            if here != wanted.get(name):
                raise ModelError(
                    f"{source}: parameter {name!r} has shape {here}, the plan says {wanted.get(name, '(absent)')}"
                )
        with np.errstate(over="ignore"):  # what overflows float32 is infinity, and refused as such
            try:
                return cls.from_arrays(arrays, list(wanted))
            except ModelError as error:
                raise ModelError(f"{source}: {error}") from error
