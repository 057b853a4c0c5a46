"""One round in memory against Flower's SecAgg+, and masking against AES-256-CTR alone."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from peers.environment import Flower

from fedclip_secure.secagg import masks
from fedclip_secure.secagg.messages import vector_hash
from fedclip_secure.secagg.terms import Terms
from secure.attempt import Attempt
from secure.federation import Federation
from secure.remote import Remote

Best = dict[str, float]  # the least seconds of each operation
AFTER = " after drop-outs"
KEYS = 50  # masks of one vector, where masking is compared with AES


@dataclass(frozen=True, slots=True)
class Size:
    """One size of federation, and Flower's parameters for it."""

    silos: int
    neighbours: int
    threshold: int
    dropped: int  # where drop-outs are measured as well
    runs: int


SIZES = (Size(5, 4, 3, 0, 10), Size(20, 18, 12, 0, 6), Size(50, 48, 33, 5, 3))


@dataclass(frozen=True, slots=True)
class Compared:
    """Both at one size: least seconds over all runs, and bytes of one upload."""

    size: Size
    flower_version: str
    flower: Best
    ours: Best
    flower_bytes: int
    our_bytes: int

    def ratio(self, operation: str) -> float:
        """Flower's seconds over ours."""
        return self.flower[operation] / self.ours[operation]


def against_flower(size: Size, parameters: int) -> Compared:
    """Both take turns, and each keeps its best. On both sides one client is alone in its process."""
    federation, attempts = Federation.create(size.silos, parameters), itertools.count(1)
    theirs, ours = Best(), Best()
    with Flower() as everybody, Flower() as client, Remote() as silo, tempfile.TemporaryDirectory() as folder:
        alone = str(Path(folder, "client"))
        opened = everybody(
            "open",
            clients=size.silos,
            neighbours=size.neighbours,
            threshold=size.threshold,
            parameters=parameters,
            alone=alone,
        )
        client("load", alone=alone)
        for _ in range(size.runs):
            for dropped in sorted({0, size.dropped}):
                _keep_best(theirs, _time_flower(everybody, client, dropped))
                attempt = Attempt(federation, next(attempts), silo, dropped=dropped)
                attempt.run()
                _keep_best(ours, _times(attempt, dropped))
        silo.make(Parts, federation.terms)
        _keep_best(ours, silo.seconds())
    return Compared(size, opened["version"], theirs, ours, opened["upload_bytes"], attempt.upload_bytes)


def _time_flower(everybody: Flower, client: Flower, dropped: int) -> Best:
    after = AFTER if dropped else ""
    return {
        "share": client("share"),
        "client mask": client("mask"),
        f"add{after}": everybody("add", dropped=dropped),
        f"server unmask{after}": everybody("unmask", dropped=dropped),
    }


def _times(attempt: Attempt, dropped: int) -> Best:
    silo, server, after = attempt.first.seconds(), attempt.server.seconds(), AFTER if dropped else ""
    return {
        **silo,
        "client mask": silo["quantise"] + silo["mask"] + silo["seal"],
        f"answers{after}": server["answers"],
        f"sum{after}": server["sum"],
        f"server unmask{after}": server["answers"] + server["sum"],
    }


class Parts:
    """Two of the parts of stage 2 by themselves: masks, and the hash."""

    def __init__(self, terms: Terms) -> None:
        self._words = np.zeros(terms.vector.words, dtype=np.uint32)
        self._keys = [os.urandom(32) for _ in terms.roster.silos]

    def seconds(self) -> Best:
        """Least seconds of each."""
        return {
            "masks alone": _least(lambda: masks.masked(self._words, self._keys[::2], self._keys[1::2])),
            "hash alone": _least(lambda: vector_hash(self._words)),
        }


@dataclass(frozen=True, slots=True)
class Masking:
    """Bytes per second of masks: applied to a vector, and of the cipher alone on one core."""

    masked: float  # on one core
    cipher: float
    on_all_cores: float  # masked

    @property
    def fraction(self) -> float:
        """How near masking comes to the cipher's own speed; both on one core."""
        return self.masked / self.cipher


def against_aes(parameters: int) -> Masking:
    """`KEYS` masks added to one vector, against the same bytes out of `update_into` into a reused buffer."""
    words, keys = np.zeros(parameters, dtype=np.uint32), [os.urandom(32) for _ in range(KEYS)]
    mask = lambda: masks.apply(words, keys[::2], keys[1::2])  # noqa: E731
    size = KEYS * words.nbytes
    with _one_core():
        cipher, masked = float("inf"), float("inf")
        for _ in range(10):
            # The cipher may have the buffer that suits it best on this machine.
            cipher = min(cipher, *(_seconds(lambda c=c: _expand(keys, words.nbytes, c)) for c in (2**16, 2**18, 2**21)))
            masked = min(masked, _seconds(mask))
    return Masking(size / masked, size / cipher, size / _least(mask))


def _expand(keys: list[bytes], length: int, chunk: int) -> None:
    zeros, buffer = memoryview(bytes(chunk)), bytearray(chunk + 15)
    for key in keys:
        stream = Cipher(AES256(key), CTR(bytes(16))).encryptor()
        for start in range(0, length, chunk):
            stream.update_into(zeros[: min(chunk, length - start)], buffer)


@contextmanager
def _one_core() -> Iterator[None]:
    """Hold this thread to one core, where the system can; masking then starts no others."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _keep_best(best: Best, *times: Best) -> None:
    for seconds in times:
        for name, value in seconds.items():
            best[name] = min(value, best.get(name, value))


def _least(work: Callable[[], object]) -> float:
    return min(_seconds(work) for _ in range(10))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
