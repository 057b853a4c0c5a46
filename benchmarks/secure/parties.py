"""The two parties of an attempt, with a clock at each stage: what the benchmarks know of the protocol's sessions.

Where a folder is given, all that is as long as the model lies in files there; else in memory.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclip_secure.model.state import AdapterState
from fedclip_secure.secagg.aggregator_session import AggregatorSession, Phase
from fedclip_secure.secagg.messages import Ciphertexts
from fedclip_secure.secagg.opening_checks import Opening
from fedclip_secure.secagg.ring import WORD, Words
from fedclip_secure.secagg.sealing import SealKey
from fedclip_secure.secagg.silo_session import ModelRecord, Shares, SiloSession
from fedclip_secure.secagg.terms import Terms
from secure.federation import WEIGHT, draw

_PIECE = 2**18  # bytes that a server reads of a body at a time


class Stopwatch:
    """`seconds` of whatever was timed last under a name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what the block does."""
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began


class Silo:
    """One silo in one attempt."""

    def __init__(self, terms: Terms, name: str, key: bytes, opening: Opening, folder: Path | None) -> None:
        self._terms, self._name, self._key = terms, name, Ed25519PrivateKey.from_private_bytes(key)
        self._opening, self._folder = opening, folder
        self._sealed: list[bytes] = []
        self._clock = Stopwatch()

    def seconds(self) -> dict[str, float]:
        """What each stage took."""
        return self._clock.seconds

    def know_model(self) -> None:
        """Have the round's model at hand, as a silo has that trains from it."""
        self._old = _model(self._folder, self._terms)

    def join(self, seed: int) -> bytes:
        """Draw an update, round it to the grid, then stage 0."""
        update = draw(self._terms.layout.size, seed)
        with self._clock("quantise"):
            vector = self._terms.vector.quantize(self._terms.grid, update, WEIGHT)
            own = _keep(vector, self._folder, f"{self._name}.own")
        del update, vector
        with self._clock("join"):
            record = ModelRecord(self._opening.ad.model, lambda: _words(own))
            self._session = SiloSession(self._terms, self._name, self._key.sign, self._opening, record)
            return self._session.join()

    def share(self, ads: Sequence[bytes]) -> Shares:
        """Stage 1."""
        with self._clock("share"):
            return self._session.share(ads)

    def upload(self, bundles: Sequence[bytes], inbox: Mapping[str, Ciphertexts]) -> int:
        """Stage 2: how many bytes it sealed."""
        with self._clock("mask"):
            upload = self._session.upload(bundles, inbox)
        with self._clock("seal"):
            body = self._session.seal_upload(upload)
            if self._folder is None:
                self._sealed = list(body.pieces(upload.body))
            else:
                _write(self._folder / f"{self._name}.sealed", body.pieces(upload.body))
        return body.length(upload.body)

    def take_sealed(self) -> list[bytes]:
        """What `upload` sealed, if it is in memory; it is forgotten here."""
        sealed, self._sealed = self._sealed, []
        return sealed

    def agree(self, uploads: Sequence[bytes]) -> bytes:
        """Stage 3."""
        return self._session.agree(uploads)

    def unmask(self, agrees: Sequence[bytes]) -> bytes:
        """Stage 4."""
        with self._clock("unmask"):
            return self._session.unmask(agrees)

    def result(self, total: Words | Path) -> bytes:
        """Stage 5."""
        with self._clock("result"):
            return self._session.result(_words(total), self._old)[0]


class Server:
    """The aggregator in one attempt."""

    def __init__(self, terms: Terms, opening: Opening, seal: SealKey, folder: Path | None) -> None:
        self._session = AggregatorSession(terms, opening, seal)
        self._terms, self._folder = terms, folder
        self._vectors: dict[str, Words | Path] = {}
        self._clock = Stopwatch()

    def seconds(self) -> dict[str, float]:
        """What each stage took."""
        return self._clock.seconds

    def close(self) -> list[bytes]:
        """Close the present stage; its list."""
        self._session.close()
        messages = self._session.answered(Phase(self._session.phase - 1))
        return [messages[name].wire for name in sorted(messages)]

    def join(self, name: str, wire: bytes) -> None:
        """Stage 0."""
        self._session.receive_key_ad(name, wire)

    def share(self, name: str, shares: Shares) -> None:
        """Stage 1."""
        self._session.receive_bundles(name, shares.bundles, shares.ciphertexts)

    def inbox(self, name: str) -> dict[str, Ciphertexts]:
        """What the others sealed to a silo."""
        return self._session.inbox(name)

    def upload(self, name: str, sealed: list[bytes]) -> None:
        """Stage 2, as over HTTP: open the body as it arrives, hash it, keep it."""
        opener, sha256 = self._session.open_upload(name), hashlib.sha256()

        def opened() -> Iterator[bytes]:
            for piece in sealed if self._folder is None else _pieces(self._folder / f"{name}.sealed"):
                for words in opener.feed(piece):
                    sha256.update(words)
                    yield words
            opener.finish()

        if self._folder is None:
            self._vectors[name] = np.frombuffer(b"".join(opened()), dtype=WORD)
        else:
            self._vectors[name] = _write(self._folder / f"{name}.words", opened())
        assert opener.header is not None  # noqa: S101 - the body was whole
        self._session.receive_upload(name, opener.header, sha256.digest())

    def agree(self, name: str, wire: bytes) -> None:
        """Stage 3."""
        self._session.receive_agree(name, wire)

    def unmask(self, answers: Mapping[str, bytes]) -> Words | Path:
        """Stage 4, from t sealed answers to the sum; then the step to the next model."""
        with self._clock("answers"):
            for name, sealed in answers.items():
                self._session.receive_unmask(name, self._session.open_unmask(name, sealed))
            self._session.close()
        with self._clock("sum"):
            total = self._session.unmask_sum(_words(self._vectors[name]) for name in self._session.uploads)
        old = _model(self._folder, self._terms)
        with self._clock("result"):
            outcome = self._session.compute_result(total, old)
        if self._folder is not None:
            outcome.model.to_file(self._folder / "next")
        return _keep(total, self._folder, "sum")


def _model(folder: Path | None, terms: Terms) -> AdapterState:
    """The model that the attempt starts from."""
    if folder is None:
        return AdapterState(terms.layout, draw(terms.layout.size, seed=0))
    return AdapterState.from_file(folder / "model", terms.layout, "the model")


def _keep(words: Words, folder: Path | None, name: str) -> Words | Path:
    return words if folder is None else _write(folder / name, [words.data.cast("B")])


def _words(kept: Words | Path) -> Words:
    """A file is mapped anew each time, so that its pages are let go of after."""
    return np.asarray(np.memmap(kept, dtype=WORD, mode="r"), dtype=np.uint32) if isinstance(kept, Path) else kept


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> Path:
    """Write a file and put it on the disk."""
    with path.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    return path


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece
