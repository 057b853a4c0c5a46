"""The types of the data: image files, feature sets, the classification task, and the splits."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedclip_secure import canonical
from fedclip_secure.errors import DataError

Floats = npt.NDArray[np.float32]
_IN_MEMORY = 1 << 30  # bytes of one array; larger ones are mapped from the disk
_ROWS = 1024  # copied at a time
UNLABELLED = -1  # an image whose class is what is asked
_UNIT_NORM_TOLERANCE = 1e-3  # float32 rounding over some thousand dimensions stays far below


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image; `label` is the class's place in the plan, or UNLABELLED.

    `unit` (32 bytes) stands for the patient; None where each image is a unit of its own.
    """

    path: Path
    label: int
    unit: bytes | None = None


@dataclass(frozen=True, slots=True, eq=False)
class FeatureSet:
    """N records: `image_features` (N, D) float32, `labels` (N,) int64, `unit_ids` (N, 32) uint8.

    The features are finite and not normalised. Records of one unit (one image, one patient) share their
    id, and so their split. `source` names the file or folder in errors. `record_ids` (N, 32) uint8 are
    those of the images' bytes, also where a patient is known; None where only features are there.
    `inputs` (N, ...) float32 are what a method takes in place of the features: tokens or pixels.
    """

    image_features: Floats
    labels: npt.NDArray[np.int64]
    unit_ids: npt.NDArray[np.uint8]
    source: str
    record_ids: npt.NDArray[np.uint8] | None = None
    inputs: Floats | None = None

    def __post_init__(self) -> None:
        rows = len(self.labels)
        _expect(self.image_features, "image_features", np.dtype(np.float32), (rows, *self.image_features.shape[1:2]))
        _expect(self.labels, "labels", np.dtype(np.int64), (rows,))
        _expect(self.unit_ids, "unit_ids", np.dtype(np.uint8), (rows, 32))
        if self.record_ids is not None:
            _expect(self.record_ids, "record_ids", np.dtype(np.uint8), (rows, 32))
        if self.inputs is not None:
            _expect(self.inputs, "inputs", np.dtype(np.float32), (rows, *self.inputs.shape[1:]))
        finite = np.isfinite(self.image_features).all(axis=1)
        if not finite.all():
            bad = np.flatnonzero(~finite)
            raise DataError(
                f"{self.source}: image features hold NaN or infinity in {len(bad)} row(s), first row {bad[0]}; "
                "remove these records or make the features again"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def taken(self) -> Floats:
        """What the plan's method takes: `inputs`, or the features where there are none."""
        return self.image_features if self.inputs is None else self.inputs

    def select(self, mask: npt.NDArray[np.bool_]) -> FeatureSet:
        """The records where `mask` (N,) is true, in order."""
        return FeatureSet(
            self.image_features[mask],
            self.labels[mask],
            self.unit_ids[mask],
            self.source,
            None if self.record_ids is None else self.record_ids[mask],
            None if self.inputs is None else chosen_rows(self.inputs, mask),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What is classified: C `classes` in the plan's order, `text_features` (C, D) float32 of norm 1, `logit_scale`.

    An encoder that reads no text has text features of shape (0, D), and no zero-shot. `phrases` say each class in
    words, and `templates` have {} where a phrase goes: what text features were made of, where an encoder made them.
    """

    classes: tuple[str, ...]
    text_features: Floats
    logit_scale: float
    phrases: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _expect(
            self.text_features,
            "text_features",
            np.dtype(np.float32),
            (len(self.classes) if len(self.text_features) else 0, *self.text_features.shape[1:]),
        )
        norms = np.linalg.norm(self.text_features, axis=1)
        if not np.allclose(norms, 1.0, atol=_UNIT_NORM_TOLERANCE):
            bad = int(np.argmax(~np.isclose(norms, 1.0, atol=_UNIT_NORM_TOLERANCE)))
            raise DataError(
                f"the text feature of class {self.classes[bad]!r} has norm {norms[bad]:.4g}, not 1; "
                "check its prompts and the encoder's weights"
            )


def empty_rows(shape: tuple[int, ...], folder: Path | None = None) -> Floats:
    """Room for float32 rows: in memory, or, where they take more than _IN_MEMORY bytes, in a file without a name.

    The file lies in `folder` (default: the system's for temporary files) and is gone with the array.
    """
    if 4 * math.prod(shape) <= _IN_MEMORY:
        return np.empty(shape, dtype=np.float32)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype=np.float32, mode="w+", shape=shape)


def chosen_rows(rows: Floats, mask: npt.NDArray[np.bool_]) -> Floats:
    """The `rows` where `mask` is true, wherever there is room for them."""
    chosen = np.flatnonzero(mask)
    found = empty_rows((len(chosen), *rows.shape[1:]))
    for start in range(0, len(chosen), _ROWS):
        part = chosen[start : start + _ROWS]
        found[start : start + len(part)] = rows[part]
    return found


@dataclass(frozen=True, slots=True)
class Counts:
    """Records and how many of them were classified right."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float | None:
        """Share of right ones, 0..1; None where there are no records."""
        return self.correct / self.total if self.total else None


def split(features: FeatureSet, federation: str, shares: Mapping[str, float]) -> dict[str, FeatureSet]:
    """Cut `features` into the named `shares`, which add up to 1.

    A unit's place is a hash of its id as a fraction of 1, so a record that is added or removed moves
    no other. The federation's name is hashed too: two federations cut the same data differently.
    """
    places = places_of(features, federation, shares)
    return {name: features.select(places == number) for number, name in enumerate(shares)}


def places_of(features: FeatureSet, federation: str, shares: Mapping[str, float]) -> npt.NDArray[np.int64]:
    """The number of each record's split, (N,); as `split`."""
    places = np.array([_place(federation, unit.tobytes()) for unit in features.unit_ids], dtype=np.uint64)
    edges = np.cumsum(list(shares.values()))[:-1]  # the last share takes what rounding leaves
    return np.searchsorted(edges, places / 2.0**64, side="right").astype(np.int64)


def _place(federation: str, unit_id: bytes) -> int:
    return int.from_bytes(canonical.digest("fedclip/v1/split", federation, unit_id)[:8], "big")


def _expect(array: npt.NDArray[np.generic], name: str, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise DataError(f"{name} must be {shape} {dtype}, is {array.shape} {array.dtype}; make the features again")
