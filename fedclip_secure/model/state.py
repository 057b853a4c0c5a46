"""The shared parameters: named float32 arrays, the flat vector that is averaged, and its digest."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load

from fedclip_secure import canonical
from fedclip_secure.errors import ModelError
from fedclip_secure.files import writing_atomically

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
        # Both are NaN where any value is; no array of booleans is made.
        if not (math.isfinite(self.vector.min()) and math.isfinite(self.vector.max())):
            raise ModelError("the adapter holds NaN or infinity; train again from an earlier one")

    @property
    def digest(self) -> bytes:
        """32 bytes over names, shapes and the values as little-endian float32."""
        values = hashlib.sha256(self._values).digest()
        shapes = [[name, list(shape)] for name, shape in self.layout.entries]
        return canonical.digest("fedclip/v1/model", shapes, values)

    @property
    def _values(self) -> memoryview:
        """The values as little-endian float32; no copy where the machine keeps them so."""
        return np.ascontiguousarray(self.vector, dtype="<f4").data.cast("B")

    def arrays(self) -> dict[str, Floats]:
        """The named arrays, as views into the vector."""
        return dict(_cut(self.layout, self.vector))

    def to_safetensors(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """The arrays as one safetensors file."""
        return b"".join(self._pieces(metadata))

    def to_file(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the bytes of `to_safetensors`, which are never in memory as a whole.

        Raises:
            DataError: the disk refuses; `path` is as it was.
        """
        with writing_atomically(path) as file:
            file.writelines(self._pieces(metadata))

    def _pieces(self, metadata: Mapping[str, str] | None) -> tuple[bytes, memoryview]:
        """Header and values, by the format's specification.

        The library's `save_file` takes no open file: it renames one of its own, which is not synced, over the path.
        """
        header: dict[str, object] = {"__metadata__": dict(metadata or {})}
        start = 0
        for name, array in self.arrays().items():
            end = start + array.nbytes
            header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligns the values
        return len(text).to_bytes(8, "little") + text, self._values

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
        with _readable(source):
            arrays = load(data)
            return _gather(layout, {name: array.shape for name, array in arrays.items()}, arrays.__getitem__, source)

    @classmethod
    def from_file(cls, path: Path, layout: Layout, source: str) -> AdapterState:
        """Read an adapter tensor by tensor: beside the vector, one of them is in memory.

        Raises:
            ModelError: as `from_safetensors`.
            OSError: the file cannot be opened.
        """
        path.open("rb").close()  # safe_open's own errors carry no errno
        with _readable(source), safe_open(path, "numpy", backend="pread") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
            return _gather(layout, shapes, file.get_tensor, source)


def _cut(layout: Layout, vector: Floats) -> Iterator[tuple[str, Floats]]:
    start = 0
    for name, shape in layout.entries:
        end = start + math.prod(shape)
        yield name, vector[start:end].reshape(shape)
        start = end


@contextmanager
def _readable(source: str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{source}: is not a safetensors file ({error}); get it again") from error


def _gather(
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], npt.NDArray[np.generic]],
    source: str,
) -> AdapterState:
    """Check names and shapes, then fill the vector with one tensor after the other."""
    wanted = dict(layout.entries)
    for name in {**wanted, **shapes}:
        here = shapes.get(name, "(absent)")
        if here != wanted.get(name):
            raise ModelError(
                f"{source}: parameter {name!r} has shape {here}, the plan says {wanted.get(name, '(absent)')}"
            )
    vector = np.empty(layout.size, dtype=np.float32)
    with np.errstate(over="ignore"):  # what overflows float32 is infinity, and refused as such
        for name, part in _cut(layout, vector):
            part[...] = tensor(name)
    try:
        return AdapterState(layout, vector)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error
