"""The aggregator's files: vectors named by their SHA-256, models by their digest, and what the lock names."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedclip_secure.disk import refused, telling
from fedclip_secure.files import sync_folder, write_atomically, writing_atomically
from fedclip_secure.model.state import AdapterState
from fedclip_secure.secagg.ring import WORD, Words

_MODEL = re.compile(r"[0-9a-f]{64}\.safetensors|\.[0-9a-f]{64}\.safetensors\.[0-9a-f]{8}\.part")
_VECTOR = re.compile(r"[0-9a-f]{64}\.words|[0-9a-f]{32}\.part|\.[0-9a-f]{64}\.words\.[0-9a-f]{8}\.part")
# Silos do not go back: over an older state the run would stand still.
RESTORE = "restore `state/` as the server last left it; where that is lost, start a new federation"


@dataclass(frozen=True, slots=True)
class Blobs:
    """Files below `folder`. Every method but `make_folders` raises DataError where the disk refuses."""

    folder: Path

    def make_folders(self) -> None:
        """Make the folders where they are missing (0700: who reads vectors and keys could unmask a sum)."""
        for part in ("", "vectors", "models", "files"):
            (self.folder / part).mkdir(mode=0o700, parents=True, exist_ok=True)

    def vector_path(self, sha256: bytes) -> Path:
        """Where a masked vector or a sum lies."""
        return self.folder / "vectors" / f"{sha256.hex()}.words"

    def vector(self, sha256: bytes) -> Words:
        """A masked vector or a sum, read-only, mapped from its file."""
        path = self.vector_path(sha256)
        with telling(path, otherwise=RESTORE):
            return np.asarray(np.memmap(path, dtype=WORD, mode="r"), dtype=np.uint32)

    def save_vector(self, sha256: bytes, data: memoryview) -> None:
        """Keep a sum."""
        write_atomically(self.vector_path(sha256), data.cast("B"))

    def sync_vectors(self) -> None:
        """Put the names of vectors that have arrived on the disk."""
        with telling(self.folder / "vectors", "be written", RESTORE):
            sync_folder(self.folder / "vectors")

    def remove_vector(self, sha256: bytes) -> None:
        """Remove a vector that is of no more use, if it is there."""
        path = self.vector_path(sha256)
        with telling(path, "be removed", RESTORE):
            path.unlink(missing_ok=True)

    def new_vector_path(self) -> Path:
        """A name for a vector that is still arriving."""
        return self.folder / "vectors" / f"{os.urandom(16).hex()}.part"

    def keep_vectors(self, wanted: Collection[bytes]) -> None:
        """Remove all but these: what was arriving, or about to be removed, when the server stopped."""
        kept, folder = {self.vector_path(sha256) for sha256 in wanted}, self.folder / "vectors"
        with telling(folder, "be written", RESTORE):
            for path in _ours(folder, _VECTOR) - kept:
                path.unlink()

    def model_path(self, digest: bytes) -> Path:
        """Where a model lies, as safetensors."""
        return self.folder / "models" / f"{digest.hex()}.safetensors"

    def save_model(self, digest: bytes, model: AdapterState) -> None:
        """Keep a model."""
        model.to_file(self.model_path(digest))

    def keep_models(self, wanted: Collection[bytes]) -> list[str]:
        """Remove all but these: a model can be as large as a whole encoder. What the disk refused is returned."""
        kept, folder, refusals = {self.model_path(digest) for digest in wanted}, self.folder / "models", []
        try:
            found = _ours(folder, _MODEL)
        except OSError as error:
            return [refused(error, folder, otherwise=RESTORE)]
        for path in sorted(found - kept):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                refusals.append(refused(error, path, "be removed", "nothing needs it: remove it by hand"))
        return refusals

    def copy_model(self, digest: bytes, sha256: bytes) -> None:
        """Keep as a model what is there as a file."""
        path = self.file_path(sha256)
        with (
            telling(path, otherwise=RESTORE),
            path.open("rb") as file,
            writing_atomically(self.model_path(digest)) as copy,
        ):
            shutil.copyfileobj(file, copy)

    def file_path(self, sha256: bytes) -> Path:
        """Where a file lies that the lock names by its SHA-256."""
        return self.folder / "files" / sha256.hex()

    def save_file(self, data: bytes) -> None:
        """Keep a file that the lock names."""
        write_atomically(self.file_path(hashlib.sha256(data).digest()), data)


def _ours(folder: Path, name: re.Pattern[str]) -> set[Path]:
    """A disk of its own holds `lost+found` too, and NFS `.nfs...` of what is still open."""
    return {path for path in folder.iterdir() if name.fullmatch(path.name)}
