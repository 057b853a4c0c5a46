"""Features that were made elsewhere: one safetensors or npz file.

A file numbers its classes itself, and says so: by the metadata key `classes` (a JSON list) in
safetensors, by an array `classes` of strings in npz. Labels are then carried over by name, for two
sites that number their classes differently would otherwise train against each other unseen.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from fedclip_secure.data.dataset import FeatureSet, Floats
from fedclip_secure.disk import refused
from fedclip_secure.errors import DataError

Array = npt.NDArray[np.generic]
_HOW_TO_NAME = 'safetensors metadata {"classes": "[\\"cat\\", \\"dog\\"]"}, or an npz array `classes` of strings'


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    arrays: dict[str, Array]
    classes: list[str]

    def array(self, name: str, kinds: str, shape: tuple[int | None, ...]) -> Array:
        """The array `name`, whose dtype kind is one of `kinds` and whose sides match `shape` (None: any)."""
        if name not in self.arrays:
            raise DataError(f"'{self.path}': has no array `{name}`, but {', '.join(sorted(self.arrays)) or 'none'}")
        array = self.arrays[name]
        fits = len(shape) == array.ndim and all(w in (None, s) for w, s in zip(shape, array.shape, strict=True))
        if array.dtype.kind not in kinds or not fits:
            sides = ", ".join("any" if side is None else str(side) for side in shape)
            kind = {"f": "floats", "iu": "integers", "u": "uint8"}[kinds]
            raise DataError(
                f"'{self.path}': array `{name}` is {array.shape} {array.dtype}, must be ({sides}) {kind}; export again"
            )
        return array


def read_embeddings(path: Path, classes: Sequence[str], dim: int) -> FeatureSet:
    """Read `features` (N, dim) floats, `labels` (N,) integers and, where there, `ids` (N, 32) uint8.

    Without `ids` a record's unit is the SHA-256 of its feature as little-endian float32, which is good for
    splits; `record_ids` are then None, for it would not last. `labels`
    count in the file's own classes and are carried over to the order of `classes` by name.

    Raises:
        DataError: names the file and the array or row at fault.
    """
    file = _read(path)
    _check_classes(file, classes)
    raw = file.array("features", "f", (None, dim))
    if not len(raw):
        raise DataError(f"'{path}': array `features` has no rows; export it again")
    with np.errstate(over="ignore"):  # what overflows float32 is infinity, and refused as such with its row
        features = raw.astype(np.float32)
    labels = _labels(file, len(raw), classes)
    ids = _ids(file, features)
    return FeatureSet(features, labels, ids, str(path), ids if "ids" in file.arrays else None)


def read_text_features(path: Path, classes: Sequence[str], dim: int) -> tuple[Floats, float]:
    """Read `text_features` (C, dim) floats and `logit_scale` () of a file that names its classes.

    Returns the features in the order of `classes`, each divided by its norm, and the scale.

    Raises:
        DataError: names the file and the array or class at fault.
    """
    file = _read(path)
    _check_classes(file, classes)
    missing = [name for name in classes if name not in file.classes]
    if missing:
        raise DataError(f"'{path}': has no text feature for {', '.join(missing)}; export it with all classes")
    raw = file.array("text_features", "f", (len(classes), dim)).astype(np.float64)
    ordered = raw[[file.classes.index(name) for name in classes]]
    norms = np.linalg.norm(ordered, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and (norms > 0).all()):
        bad = int(np.argmin(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
        raise DataError(
            f"'{path}': array `text_features`, class {classes[bad]!r}: is zero, NaN or infinite; export again"
        )
    scale = float(file.array("logit_scale", "f", ()))
    if not (np.isfinite(scale) and scale > 0):
        raise DataError(f"'{path}': array `logit_scale` is {scale}, must be positive (CLIP's temperature after exp)")
    return (ordered / norms).astype(np.float32), scale


def _read(path: Path) -> _File:
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"'{path}': must be a .safetensors or .npz file")
    try:
        path.open("rb").close()  # safe_open's own errors carry no errno
        return reader(path)
    except OSError as error:
        raise DataError(refused(error, path, otherwise="check `data.path`")) from error
    except (SafetensorError, zipfile.BadZipFile, ValueError, KeyError, TypeError, EOFError, AttributeError) as error:
        raise DataError(f"'{path}': is damaged or holds what is no plain array ({error}); export it again") from error


def _read_safetensors(path: Path) -> _File:
    with safe_open(path, framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        listed = (file.metadata() or {}).get("classes", "null")
    return _File(path, arrays, _names(path, json.loads(listed)))


def _read_npz(path: Path) -> _File:
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    listed = arrays.pop("classes", None)
    return _File(path, arrays, _names(path, None if listed is None else listed.tolist()))


def _names(path: Path, listed: object) -> list[str]:
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    if not isinstance(listed, list) or not names or len(names) != len(listed) or len(set(names)) != len(names):
        raise DataError(
            f"'{path}': does not name its classes, each once: add {_HOW_TO_NAME}, in the order of its numbers"
        )
    return names


def _check_classes(file: _File, classes: Sequence[str]) -> None:
    unknown = [name for name in file.classes if name not in classes]
    if unknown:
        raise DataError(
            f"'{file.path}': class(es) unknown to the plan: {', '.join(unknown)}; "
            f"the plan's classes are {', '.join(classes)}; rename them in the file or leave their records out"
        )


def _labels(file: _File, rows: int, classes: Sequence[str]) -> npt.NDArray[np.int64]:
    own = file.array("labels", "iu", (rows,)).astype(np.int64)
    outside = np.flatnonzero((own < 0) | (own >= len(file.classes)))
    if len(outside):
        row = outside[0]
        raise DataError(
            f"'{file.path}': array `labels`, row {row}: {own[row]} is not in 0..{len(file.classes) - 1}, "
            f"for the file names {len(file.classes)} classes"
        )
    order = np.array([classes.index(name) for name in file.classes], dtype=np.int64)
    return order[own]


def _ids(file: _File, features: Floats) -> npt.NDArray[np.uint8]:
    if "ids" not in file.arrays:
        digests = b"".join(hashlib.sha256(row.astype("<f4").tobytes()).digest() for row in features)
        return np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32)
    ids = file.array("ids", "u", (len(features), 32))
    if ids.dtype != np.uint8:
        raise DataError(f"'{file.path}': array `ids` is {ids.dtype}, must be uint8: 32 bytes a record")
    return ids.astype(np.uint8)
