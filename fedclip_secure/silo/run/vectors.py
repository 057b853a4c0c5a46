"""The vector that a silo drew for a model, as a file that outlives a crash: it may be of hundreds of megabytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedclip_secure.files import write_atomically
from fedclip_secure.secagg.ring import WORD, Words


@dataclass(frozen=True, slots=True)
class Vectors:
    """Files in `folder`, named by the SHA-256 of their words. Every method may raise OSError."""

    folder: Path

    def make_folder(self) -> None:
        """Make the folder where it is missing (0700: who reads vectors and a sum could take one from the other)."""
        self.folder.mkdir(mode=0o700, exist_ok=True)

    def save(self, vector: Words) -> bytes:
        """Put the vector (words,) on the disk; its SHA-256."""
        body = vector.astype(WORD, copy=False).data.cast("B")
        sha256 = hashlib.sha256(body).digest()
        write_atomically(self._path(sha256), body, 0o600)
        return sha256

    def open(self, sha256: bytes) -> Words | None:
        """The vector (words,), mapped from its file; None where it is lost or damaged."""
        if not self._path(sha256).is_file():
            return None
        try:
            words: Words = np.memmap(self._path(sha256), dtype=WORD, mode="r")
        except ValueError:  # it is empty, or cut within a word
            return None
        intact = hashlib.sha256(words.data.cast("B")).digest() == sha256
        return words if intact else None

    def keep(self, sha256: bytes | None) -> None:
        """Remove all but this one."""
        kept = set() if sha256 is None else {self._path(sha256)}
        for path in set(self.folder.iterdir()) - kept:
            path.unlink()

    def _path(self, sha256: bytes) -> Path:
        return self.folder / f"{sha256.hex()}.words"
