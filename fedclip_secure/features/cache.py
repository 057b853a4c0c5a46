"""A content-addressed store of raw image features.

One folder for each encoder digest; in it shards, each a safetensors file with `keys` (N, 32) uint8 -
SHA-256 of the image files' bytes - and `features` (N, ...) float32. A shard is named by the SHA-256 of
its own bytes, so a bit that flipped on the disk shows. In memory there are only the keys and where they lie.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedclip_secure.data.dataset import Floats, empty_rows
from fedclip_secure.disk import refused, telling
from fedclip_secure.errors import DataError
from fedclip_secure.files import write_atomically

_log = logging.getLogger(__name__)
Keys = npt.NDArray[np.uint8]


class FeatureCache:
    """What one encoder has made at one stage, kept under `folder`; `shape` is that of one image's.

    Every shard is verified when the cache is opened. `damaged` lists those that did not pass: they
    are set aside as `*.damaged`, and their images count as not cached.

    Raises:
        DataError: a shard cannot be read at all, or nothing can be written.
    """

    def __init__(self, folder: Path, encoder_digest: bytes, shape: tuple[int, ...]) -> None:
        self._folder = folder / encoder_digest.hex()
        self._shape = shape
        self._shards: list[Path] = []
        self._places: dict[bytes, tuple[int, int]] = {}  # key: number of its shard, row there
        self.damaged: list[Path] = []
        with telling(self._folder):  # a folder that may not be listed is no empty one
            shards = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
        for path in shards:
            if path.suffix == ".safetensors":
                self._open(path)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def gather(self, keys: Sequence[bytes]) -> Floats:
        """The features of `keys`, all of which are cached, in their order: (N, ...) float32.

        The shards are read and verified one after the other, so there is one of them in memory at a time.

        Raises:
            DataError: a shard was damaged since the cache was opened.
        """
        places = np.array([self._places[key] for key in keys], dtype=np.int64).reshape(-1, 2)
        order = np.argsort(places[:, 0], kind="stable")
        found = empty_rows((len(keys), *self._shape), self._folder.parent)
        for part in np.split(order, np.flatnonzero(np.diff(places[order, 0])) + 1):
            if len(part):
                path = self._shards[places[part[0], 0]]
                found[part] = self._features(path)[places[part, 1]]
        return found

    def add(self, keys: Sequence[bytes], features: Floats) -> None:
        """Store `features` (N, ...) float32 under `keys`, on the disk before this returns.

        Raises:
            DataError: the disk is full or not writable; what was stored before stays.
        """
        if features.shape != (len(keys), *self._shape) or features.dtype != np.float32:
            raise DataError(
                f"the encoder gave {features.shape} {features.dtype} for {len(keys)} images, "
                f"the lock says {(len(keys), *self._shape)} float32; run `fedclip-agg prepare` again"
            )
        if not np.isfinite(features).all():
            raise DataError(
                "the encoder gave NaN or infinity; its weights are damaged or do not suit this device and "
                "precision: set `precision: fp32` in silo.yaml"
            )
        packed = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32)
        data = save({"keys": packed, "features": np.ascontiguousarray(features)})
        path = self._folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        write_atomically(path, data)
        self._enter(path, packed)

    def _open(self, path: Path) -> None:
        shard = self._read(path)
        if shard is not None:
            self._enter(path, shard[0])
            return
        try:
            aside = path.replace(path.with_suffix(".damaged"))
        except OSError as error:
            raise DataError(refused(error, path, "be set aside, and it is damaged", "delete the file")) from error
        self.damaged.append(aside)
        _log.warning("'%s': is damaged and was set aside; its images are encoded again", aside)

    def _enter(self, path: Path, keys: Keys) -> None:
        number, packed = len(self._shards), keys.tobytes()
        self._shards.append(path)
        self._places.update((packed[32 * row : 32 * row + 32], (number, row)) for row in range(len(keys)))

    def _features(self, path: Path) -> Floats:
        shard = self._read(path)
        if shard is None:
            raise DataError(f"'{path}': was damaged while it was in use; run again, and its images are encoded again")
        return shard[1]

    def _read(self, path: Path) -> tuple[Keys, Floats] | None:
        """Keys and features of a shard; None where it does not verify."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(refused(error, path, otherwise="run again: its images are encoded again")) from error
        if hashlib.sha256(data).hexdigest() != path.stem:
            return None
        try:
            arrays = load(data)
            keys, features = arrays["keys"], arrays["features"]
        except (SafetensorError, ValueError, KeyError):
            return None
        count = len(keys)
        if keys.shape != (count, 32) or keys.dtype != np.uint8 or features.shape != (count, *self._shape):
            return None
        if features.dtype != np.float32 or not np.isfinite(features).all():
            return None
        return keys, features
