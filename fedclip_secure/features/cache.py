"""A content-addressed store of raw image features.

One folder for each encoder digest; in it shards, each a safetensors file with `keys` (N, 32) uint8 -
SHA-256 of the image files' bytes - and `features` (N, D) float32. A shard is named by the SHA-256 of
its own bytes, so a bit that flipped on the disk shows.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedclip_secure.data.dataset import Floats
from fedclip_secure.errors import DataError
from fedclip_secure.files import write_atomically

_log = logging.getLogger(__name__)


class FeatureCache:
    """The features that one encoder has made, kept under `folder`; `dim` is D.

    Every shard is verified when the cache is opened. `damaged` lists those that did not pass: they
    are set aside as `*.damaged`, and their images count as not cached.

    Raises:
        DataError: a shard cannot be read at all, or nothing can be written.
    """

    def __init__(self, folder: Path, encoder_digest: bytes, dim: int) -> None:
        self._folder = folder / encoder_digest.hex()
        self._dim = dim
        self._rows: dict[bytes, Floats] = {}
        self.damaged: list[Path] = []
        for path in sorted(self._folder.glob("*.safetensors")):
            self._open(path)

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, keys: Iterable[bytes]) -> dict[bytes, Floats]:
        """The features (D,) of those `keys` that are cached."""
        return {key: self._rows[key] for key in keys if key in self._rows}

    def add(self, keys: Sequence[bytes], features: Floats) -> None:
        """Store `features` (N, D) float32 under `keys`, on the disk before this returns.

        Raises:
            DataError: the disk is full or not writable; what was stored before stays.
        """
        if features.shape != (len(keys), self._dim) or features.dtype != np.float32:
            raise DataError(
                f"the encoder gave {features.shape} {features.dtype} for {len(keys)} images, "
                f"the lock says ({len(keys)}, {self._dim}) float32; run `fedclip-agg prepare` again"
            )
        if not np.isfinite(features).all():
            raise DataError("the encoder gave NaN or infinity; its weights are damaged or do not suit this device")
        packed = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32)
        data = save({"keys": packed, "features": np.ascontiguousarray(features)})
        write_atomically(self._folder / f"{hashlib.sha256(data).hexdigest()}.safetensors", data)
        self._rows.update(zip(keys, features, strict=True))

    def _open(self, path: Path) -> None:
        try:
            data = path.read_bytes()
            shard = self._verified(path, data)
            if shard is not None:
                self._rows.update(shard)
                return
            aside = path.replace(path.with_suffix(".damaged"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the disk, or delete the file") from error
        self.damaged.append(aside)
        _log.warning("%s: is damaged and was set aside; its images are encoded again", aside)

    def _verified(self, path: Path, data: bytes) -> dict[bytes, Floats] | None:
        if hashlib.sha256(data).hexdigest() != path.stem:
            return None
        try:
            arrays = load(data)
            keys, features = arrays["keys"], arrays["features"]
        except (SafetensorError, ValueError, KeyError):
            return None
        count = len(keys)
        if keys.shape != (count, 32) or keys.dtype != np.uint8 or features.shape != (count, self._dim):
            return None
        if features.dtype != np.float32 or not np.isfinite(features).all():
            return None
        return {key.tobytes(): row for key, row in zip(keys, features, strict=True)}
