"""The aggregator's files: vectors named by their SHA-256, models by their digest, and what the lock names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fedclip_secure.files import sync_folder, write_atomically


@dataclass(frozen=True, slots=True)
class Blobs:
    """Files below `folder`."""

    folder: Path

    def make_folders(self) -> None:
        """Make the folders where they are missing (0700: who reads vectors and keys could unmask a sum)."""
        for part in ("", "vectors", "models", "files"):
            (self.folder / part).mkdir(mode=0o700, parents=True, exist_ok=True)

    def vector_path(self, sha256: bytes) -> Path:
        """Where a masked vector or a sum lies."""
        return self.folder / "vectors" / f"{sha256.hex()}.words"

    def save_vector(self, sha256: bytes, data: memoryview) -> None:
        """Keep a sum."""
        write_atomically(self.vector_path(sha256), data.cast("B"))

    def sync_vectors(self) -> None:
        """Put the names of vectors that have arrived on the disk."""
        sync_folder(self.folder / "vectors")

    def new_vector_path(self) -> Path:
        """A name for a vector that is still arriving."""
        return self.folder / "vectors" / f"{os.urandom(16).hex()}.part"

    def keep_vectors(self, wanted: Collection[bytes]) -> None:
        """Remove all but these: what was arriving, or about to be removed, when the server stopped."""
        for path in set((self.folder / "vectors").iterdir()) - {self.vector_path(sha256) for sha256 in wanted}:
            path.unlink()

    def save_model(self, digest: bytes, data: bytes) -> None:
        """Keep a model as safetensors."""
        write_atomically(self.folder / "models" / f"{digest.hex()}.safetensors", data)

    def save_file(self, data: bytes) -> None:
        """Keep a file that the lock names by its SHA-256."""
        write_atomically(self.folder / "files" / hashlib.sha256(data).hexdigest(), data)

    def file(self, sha256: bytes) -> bytes | None:
        """A file that the lock names, or None."""
        path = self.folder / "files" / sha256.hex()
        return path.read_bytes() if path.is_file() else None

    def model(self, digest: bytes) -> bytes | None:
        """A model as safetensors, or None."""
        path = self.folder / "models" / f"{digest.hex()}.safetensors"
        return path.read_bytes() if path.is_file() else None
