"""The ledger's entries and sets of units, each checked when it was read, and the one way to add to them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedclip_secure.errors import DataError, TrustError
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.privacy.ledger.admission import Need
from fedclip_secure.privacy.ledger.entries import HOUR, VERSION, Begin, Chain, Data, Entry, Run, SignedEntry
from fedclip_secure.privacy.ledger.storage import RESTORE, LedgerFile, StoredSet
from fedclip_secure.privacy.ledger.unit_sets import NAME_BYTES, Charges, Numbers, Units, UnitSet


class Book:
    """What is on the disk, as it was when this process last read or wrote there; others may write in between."""

    def __init__(
        self, folder: Path, silo: str, sign: Callable[[bytes], bytes], public_key: bytes, clock: Callable[[], float]
    ) -> None:
        """Open and check it.

        Raises:
            DataError: another process holds it for long, it is damaged, or the disk refuses.
            TrustError: it was edited, or its key is gone.
        """
        self.silo, self.key = silo, public_key.hex()
        self._sign, self._clock = sign, clock
        self._file, self.chain, self._sets = LedgerFile(folder), Chain(), dict[str, UnitSet]()
        self.units, self.path = Units(self._file.key), self._file.path
        self._written: tuple[SignedEntry, Entry, UnitSet | None, Sequence[bytes]] | None = None
        try:
            with self._file.reading():
                self._catch_up()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files."""
        self._file.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Alone with the ledger, after what others wrote was read and checked; one entry may be written inside.

        When this ends, the entry survives a power cut. Where it raises, nothing was written.

        Raises:
            DataError: another process holds it for long, or the disk refuses.
            TrustError: what others wrote breaks a rule.
        """
        self._written = None
        with self._file.writing():
            self._catch_up()
            yield
        if self._written is not None:
            self._keep(*self._written)

    def sets(self, run: Run) -> list[UnitSet]:
        """Those of a run; the last is in use."""
        return [self._sets[name] for name in run.sets]

    def charges(self, new: int = 0) -> Charges:
        """What each unit was charged, and nothing for `new` ones."""
        return Charges.of(self._reserved(), len(self.units) + new)

    def committed(self, new: int = 0, *, besides: Run | None) -> Charges:
        """What each unit was charged, and what all runs but one may still reserve for it."""
        held = ((run, Need(run.begin.per_round, run.held).total) for run in self.holding(besides))
        more = [(self._sets[run.sets[-1]], event) for run, event in held if event is not None]
        return Charges.of([*self._reserved(), *more], len(self.units) + new)

    def holding(self, besides: Run | None) -> list[Run]:
        """Runs that have room kept for them, but one."""
        return [run for run in self.chain.runs.values() if run is not besides and run.held]

    def hour(self) -> int:
        """Seconds since 1970, in whole hours: between two entries a silo trains, for longer with more records."""
        return int(self._clock()) // HOUR * HOUR

    def now(self) -> int:
        """As `hour`.

        Raises:
            DataError: the clock is behind the newest entry.
        """
        behind = self.behind()
        if behind is not None:
            raise DataError(behind)
        return self.hour()

    def behind(self) -> str | None:
        """That the clock is behind the newest entry, and what to do; None where it is not."""
        entries = self.chain.entries
        if not entries or self.hour() >= entries[-1].at:
            return None
        return (
            f"'{self.path}': its newest entry is of {told(entries[-1].at)}, and the clock is behind that; set the "
            "clock, or if it was wrong when that was written, run `fedclip-silo budget --clock-was-wrong`"
        )

    def write(self, values: dict[str, Any]) -> SignedEntry:
        """Sign and write the next entry."""
        signed, entry = self._signed(values, self.now())
        self._file.append(entry.number, signed)
        self._written = signed, entry, None, ()
        return signed

    def write_clock(self) -> None:
        """Sign and write that the clock had been wrong, at an hour that is before that of the newest entry."""
        signed, entry = self._signed({"kind": "clock"}, self.hour())
        self._file.append(entry.number, signed)
        self._written = signed, entry, None, ()

    def write_with_set(
        self, values: dict[str, Any], admitted: Numbers, left_out: Numbers, new: Sequence[bytes]
    ) -> None:
        """Sign and write the next entry, and the set of units that it names; `new` are pseudonyms of new ones in it."""
        chosen = UnitSet(os.urandom(NAME_BYTES), admitted, left_out)
        signed, entry = self._signed({**values, "set": chosen.name.hex()}, self.now())
        self._file.add_set(StoredSet(chosen, self.units.code(chosen, new)), len(self.units), new)
        self._file.append(entry.number, signed)
        self._written = signed, entry, chosen, new

    # Within

    def _reserved(self) -> Iterator[tuple[UnitSet, Event]]:
        runs = self.chain.runs.values()
        return ((self._sets[entry.set], entry.event) for run in runs for entry in run.reservations.values())

    def _keep(self, signed: SignedEntry, entry: Entry, chosen: UnitSet | None, new: Sequence[bytes]) -> None:
        if chosen is not None:
            self.units.add(new)
            self._sets[chosen.name.hex()] = chosen
        self.chain.take(signed, entry)

    def _catch_up(self) -> None:
        """Read and check what was written since, from the last entry that is known on."""
        known = self.chain.signed[-1:]
        entries = self._file.entries(max(1, len(self.chain.signed)))
        try:
            if entries[: len(known)] != known:
                raise TrustError("it was exchanged for another one while this program used it")
            self.units.add(self._file.units(len(self.units)))
            for signed in entries[len(known) :]:
                entry = self.chain.check(signed)
                chosen = self._checked_set(entry) if isinstance(entry, Begin | Data) else None
                self._keep(signed, entry, chosen, ())
        except TrustError as error:
            raise TrustError(f"'{self.path}': was edited, or mixed from several backups: {error}; {RESTORE}") from error

    def _checked_set(self, entry: Begin | Data) -> UnitSet:
        try:
            kept = self._file.set_named(bytes.fromhex(entry.set))
            if kept is None:
                raise TrustError("its units are missing")
            self.units.check(kept.units, kept.code)
        except TrustError as error:
            raise TrustError(f"entry {entry.number} of the ledger: {error}") from error
        return kept.units

    def _signed(self, values: dict[str, Any], at: int) -> tuple[SignedEntry, Entry]:
        place = {"version": VERSION, "number": len(self.chain.entries) + 1, "previous": self.chain.head.hex()}
        signer = {"at": at, "silo": self.silo, "key": self.key}
        signed = SignedEntry.signed({**place, **signer, **values}, self._sign)
        return signed, self.chain.check(signed)  # what is written cannot be taken back


def told(at: int) -> str:
    """The hour of an entry, for a person."""
    return time.strftime("%Y-%m-%d %H h UTC", time.gmtime(at))
