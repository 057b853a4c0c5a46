"""Who was in which set, and what each unit was charged: kept at home, under a key that never leaves it.

A unit (record or patient) goes by HMAC-SHA256 (RFC 2104) of its 32-byte id under the ledger's own key, so that whoever
sees the table alone cannot look a patient up in it. Within the ledger a unit has a number, from 0.
"""

from __future__ import annotations

import hmac
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedclip_secure.disk import refused
from fedclip_secure.errors import DataError, TrustError
from fedclip_secure.files import write_atomically
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.privacy.accounting.privacy_filter import Cap

KEY_BYTES = 32
NAME_BYTES = 16  # of a set's random name
_SET_LABEL = b"fedclip/v1/ledger-set\x00"  # longer than an id, so that no set is authenticated as a unit is named
Numbers = npt.NDArray[np.uint32]


def make_key(path: Path) -> bytes:
    """Draw the ledger's key and write it, readable by its owner alone.

    Raises:
        DataError: the disk refuses.
    """
    key = os.urandom(KEY_BYTES)
    write_atomically(path, key, 0o600)
    return key


def load_key(path: Path) -> bytes:
    """Read what `make_key` wrote.

    Raises:
        TrustError: missing, damaged, or open to others on this machine.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            key = file.read()
    except FileNotFoundError as error:
        raise TrustError(
            f"'{path}': is missing, and without it the ledger knows none of its units again; restore it from the "
            "newest backup"
        ) from error
    except OSError as error:
        raise DataError(refused(error, path, otherwise="restore the ledger's key from the newest backup")) from error
    if mode & 0o077:
        raise TrustError(f"'{path}': others here may read this key (mode {mode:04o}); run `chmod 600 {path}`")
    if len(key) != KEY_BYTES:
        raise TrustError(f"'{path}': is damaged as the ledger's key; restore it from the newest backup")
    return key


@dataclass(frozen=True, slots=True)
class UnitSet:
    """The data of a run: units that take part, and those that are left out; numbers, rising."""

    name: bytes
    admitted: Numbers
    left_out: Numbers

    @property
    def everyone(self) -> Numbers:
        """Both, rising."""
        return np.union1d(self.admitted, self.left_out)


@dataclass(frozen=True, slots=True)
class Members:
    """Units as the ledger knows them: `numbers` (units,) in the order of the ids; `new` would get the next ones."""

    numbers: Numbers
    new: list[bytes]


class Units:
    """Every unit that was ever in a set, by its pseudonym."""

    def __init__(self, key: bytes) -> None:
        self._key, self._numbers, self._table = key, dict[bytes, int](), np.zeros((0, 32), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._numbers)

    def members(self, ids: Iterable[bytes]) -> Members:
        """Numbers of units by their ids (32 bytes each); nothing is kept of new ones yet."""
        pseudonyms = [self._pseudonym(unit) for unit in ids]
        new = sorted(set(pseudonyms) - self._numbers.keys())  # in no order of the data
        later = {pseudonym: number for number, pseudonym in enumerate(new, len(self))}
        numbers = [later[name] if name in later else self._numbers[name] for name in pseudonyms]
        return Members(np.array(numbers, dtype=np.uint32), new)

    def add(self, new: Sequence[bytes]) -> None:
        """Keep pseudonyms (32 bytes each) that get the next numbers.

        Raises:
            TrustError: they were edited: a unit with two numbers would have two accounts.
        """
        odd = any(len(pseudonym) != 32 or pseudonym in self._numbers for pseudonym in new)
        if odd or len(set(new)) != len(new):
            raise TrustError("the table of units was edited")
        self._table = _extended(self._table, new)
        self._numbers |= {pseudonym: number for number, pseudonym in enumerate(new, len(self))}

    def code(self, chosen: UnitSet, new: Sequence[bytes] = ()) -> bytes:
        """32 bytes that authenticate a set: its name, and the pseudonyms in it in the order of their numbers."""
        table = _extended(self._table, new)
        parts = [_SET_LABEL, chosen.name]
        for numbers in (chosen.admitted, chosen.left_out):
            parts += [len(numbers).to_bytes(8, "big"), table[numbers].tobytes()]
        return hmac.digest(self._key, b"".join(parts), "sha256")

    def check(self, chosen: UnitSet, code: bytes) -> None:
        """Check that a stored set is the one that was stored.

        Raises:
            TrustError: it, or a unit in it, was edited; or the key is another ledger's.
        """
        missing = any(
            len(numbers) and int(numbers.max()) >= len(self) for numbers in (chosen.admitted, chosen.left_out)
        )
        if missing or not hmac.compare_digest(self.code(chosen), code):
            raise TrustError("its units are not those that it was written with")

    def _pseudonym(self, unit: bytes) -> bytes:
        if len(unit) != 32:
            raise ValueError("the id of a unit has 32 bytes")
        return hmac.digest(self._key, unit, "sha256")


@dataclass(frozen=True, slots=True)
class Charges:
    """Of each unit, how many steps of which kind it was charged."""

    kinds: tuple[Event, ...]  # of one step each, in a fixed order, so that equal histories add up to equal sums
    steps: npt.NDArray[np.int64]  # (units, kinds)

    @classmethod
    def of(cls, reserved: Iterable[tuple[UnitSet, Event]], units: int) -> Charges:
        """Each unit of a set is charged each event of that set."""
        by_set: dict[bytes, tuple[UnitSet, dict[Event, int]]] = {}
        for chosen, event in reserved:
            steps = by_set.setdefault(chosen.name, (chosen, {}))[1]
            kind = _one_step(event)
            steps[kind] = steps.get(kind, 0) + event.steps
        kinds = sorted({kind for _, steps in by_set.values() for kind in steps}, key=_order)
        charged = np.zeros((units, len(kinds)), dtype=np.int64)
        for chosen, steps in by_set.values():
            for kind, count in steps.items():
                charged[chosen.admitted, kinds.index(kind)] += count
        return cls(tuple(kinds), charged)

    def spent(self, cap: Cap, more: Event | None = None) -> npt.NDArray[np.float64]:
        """RDP at the cap's order (units,); with `more` what it would be after that."""
        steps: Mapping[Event, npt.NDArray[np.int64]] = dict(zip(self.kinds, self.steps.T, strict=True))
        if more is not None:
            kind = _one_step(more)
            steps = {**steps, kind: steps.get(kind, np.zeros(len(self.steps), dtype=np.int64)) + more.steps}
        total = np.zeros(len(self.steps))
        for kind in sorted(steps, key=_order):
            charged = steps[kind] > 0  # a rate may be infinite
            total[charged] += steps[kind][charged] * cap.cost((kind,))
        return total


def _extended(table: npt.NDArray[np.uint8], new: Sequence[bytes]) -> npt.NDArray[np.uint8]:
    if not new:
        return table
    return np.concatenate([table, np.frombuffer(b"".join(new), dtype=np.uint8).reshape(-1, 32)])


def _one_step(event: Event) -> Event:
    return Event(event.noise_multiplier, event.sample_rate, 1, event.mechanism)


def _order(kind: Event) -> tuple[str, float, float]:
    return kind.mechanism, kind.noise_multiplier, kind.sample_rate
