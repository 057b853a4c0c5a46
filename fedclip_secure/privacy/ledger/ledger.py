"""What an organisation has spent of its units' privacy: reserved before data are touched, and never given back.

One ledger serves all of an organisation's identities, several processes at once. Its entries are signed and chained
(entries.py) and may be shown to anybody; who was in which set stays in tables beside them (units.py). Every rule is
checked at each opening, and of what another process wrote before anything is decided. What cannot be seen from within,
that the whole folder was exchanged for an older one, a note outside of it and the coordinator's receipts show.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedclip_secure.errors import ConfigError, DataError, TrustError
from fedclip_secure.files import write_atomically
from fedclip_secure.privacy.accounting.privacy_filter import Cap
from fedclip_secure.privacy.ledger import gate
from fedclip_secure.privacy.ledger.admission import Need, check_delta
from fedclip_secure.privacy.ledger.book import Book, told
from fedclip_secure.privacy.ledger.entries import Run, SignedEntry
from fedclip_secure.privacy.ledger.limit_history import as_entry, changed, limit_of
from fedclip_secure.privacy.ledger.run_terms import RunTerms
from fedclip_secure.privacy.ledger.spending import Account, account_of, holders, outlook, remembered
from fedclip_secure.privacy.ledger.storage import RESTORE
from fedclip_secure.privacy.ledger.unit_sets import Numbers


@dataclass(frozen=True, slots=True)
class Reservation:
    """A round that is paid for. `entry` is the hash of its entry."""

    run: bytes
    round: int
    retrain: int  # how often the run has trained again, this time included
    entry: bytes


class Ledger:
    """The ledger in a folder, made on first use. Other processes may use it meanwhile: each write is one transaction.

    When a method returns, what it wrote is on the disk. Where it raises, nothing was written and nothing is lost.
    """

    def __init__(
        self,
        folder: Path,
        silo: str,
        sign: Callable[[bytes], bytes],
        public_key: bytes,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open it and check all of it. `sign` is Ed25519 (RFC 8032), `public_key` has 32 bytes.

        Raises:
            DataError: another process holds it for long, it is damaged, or the disk refuses.
            TrustError: it was edited, or its key is gone.
        """
        self._book = Book(folder, silo, sign, public_key, clock)
        self._open: OpenRun | None = None

    def close(self) -> None:
        """Close its files."""
        self._open = None
        self._book.close()

    @property
    def head(self) -> bytes:
        """Hash of the newest entry that is known here, 32 bytes; zeros before the first."""
        return self._book.chain.head

    def entries(self) -> list[SignedEntry]:
        """All, oldest first."""
        return list(self._book.chain.signed)

    def check_receipts(self, heads: Iterable[bytes]) -> None:
        """Check that every head that the coordinator countersigned is the hash of an entry here.

        Raises:
            TrustError: the ledger was rolled back or forked.
        """
        lost = sum(head not in self._book.chain.numbers for head in heads)
        if lost:
            raise TrustError(
                f"'{self._book.path}': lacks {lost} of the entries that the coordinator holds receipts for, so it is "
                f"not the newest, and what was spent since would be spent twice; {RESTORE}; if none is, start no run "
                "and tell the coordinator"
            )

    def check_newest(self, head: bytes) -> None:
        """Check that the entry is here that a note outside of the folder calls the newest.

        Raises:
            TrustError: the ledger was rolled back, or lost.
        """
        if head not in self._book.chain.numbers:
            raise TrustError(
                f"'{self._book.path}': lacks the entry that was written last, so it is not the newest, and what was "
                f"spent since would be spent twice; {RESTORE}; if none is, start no run with these data"
            )

    def note_newest(self, note: Path) -> None:
        """Write the hash of the newest entry into a file outside of the folder, for `check_newest`.

        Nobody writes into the ledger meanwhile, so that of two processes none can put the note back.

        Raises:
            DataError: the disk refuses, or another process holds the ledger for long.
        """
        with self._book.writing():
            write_atomically(note, f"{self.head.hex()}\n".encode(), 0o600)

    def remembered(self) -> str | None:
        """How old it is and whose spending it knows, for the silo's own screen; None before the first entry."""
        return remembered(self._book.chain, len(self._book.units))

    def check_clock(self) -> None:
        """Check that the clock is not behind the newest entry.

        Raises:
            DataError: it is.
        """
        self._book.now()

    def warnings(self, cap: Cap | None) -> list[str]:
        """What a person should know before more is spent: a clock that is behind, a limit that was changed."""
        found = (self._book.behind(), changed(self._book.chain, self._book.silo, cap))
        return [line for line in found if line is not None]

    def has_run(self, plan: bytes, roster: bytes) -> bool:
        """Whether this silo's run of a plan was begun here."""
        return self._book.chain.found(self._book.silo, plan.hex(), roster.hex()) is not None

    def has_ended(self, plan: bytes, roster: bytes) -> bool:
        """Whether this silo's run of a plan was begun here, and nothing more is paid for in it."""
        run = self._book.chain.found(self._book.silo, plan.hex(), roster.hex())
        return run is not None and run.ended

    def outlook(self, plan: bytes, roster: bytes, whole: Need, cap: Cap) -> str:
        """What is spent of a limit, and what this silo's run of a plan, `whole` from its begin, may still add to it."""
        run = self._book.chain.found(self._book.silo, plan.hex(), roster.hex())
        need = Need(whole.per_round, run.held if run else whole.rounds)
        return outlook(self._book.charges(), self._book.committed(besides=run), need, cap)

    def units_of(self, plan: bytes, roster: bytes) -> int:
        """How many units this silo's run of a plan has now, for its own eyes; 0 before it begins."""
        run = self._book.chain.found(self._book.silo, plan.hex(), roster.hex())
        return len(self._book.sets(run)[-1].admitted) if run else 0

    def account(self, cap: Cap | None = None) -> Account:
        """What was spent, for the silo's own screen: the counts in it depend on the data."""
        return account_of(self._book.chain, self._book.charges(), self._book.committed(besides=None), cap)

    def open_run(
        self, terms: RunTerms, units: Sequence[bytes], cap: Cap | None, *, changed_data: bool = False
    ) -> OpenRun:
        """Begin the run, or find it again (same plan, roster and silo), and decide which units take part in it.

        A unit takes part if its own history, what unfinished runs may still cost it, and all that this run may still
        cost fit the cap; who is left out stays so for the run. `units` are ids of 32 bytes, repeated or not. A run that
        was opened before is closed by this.

        Raises:
            PolicyError: the cap, or the plan's delta or kind of unit, forbids it.
            DataError: the run's data are not those it had and `changed_data` is not set; or the clock is behind.
            TrustError: the run began with other terms.
        """
        with self._book.writing():
            self._book.now()
            gate.check_units(self._book, terms)
            run, members = gate.found(self._book, terms), self._book.units.members(units)
            mine: Numbers = np.unique(members.numbers)
            if not len(mine):
                raise DataError("there is no unit to train on; check `data` in silo.yaml")
            check_delta(terms.delta, len(mine), cap)
            need = Need(terms.per_round(), run.held if run else terms.rounds + terms.max_retrains)
            takes_part = gate.takes_part(self._book, mine, need, run, cap, new=len(members.new))
            admitted, left_out = mine[takes_part], mine[~takes_part]
            name = os.urandom(16).hex() if run is None else run.begin.run
            if run is None:
                begin = {"kind": "begin", "run": name, **terms.fields(), "limit": as_entry(cap)}
                self._book.write_with_set(begin, admitted, left_out, members.new)
            elif not run.ended and gate.differs(self._book, run, admitted, left_out, changed_data):
                self._book.write_with_set({"kind": "data", "run": name}, admitted, left_out, members.new)
        chosen = np.isin(members.numbers, admitted).tolist()
        ids = frozenset(itertools.compress(units, chosen))
        self._open = OpenRun(self, self._book.chain.runs[name], ids, len(left_out), cap=cap, code=terms.code)
        return self._open

    # What a person decides

    def end_runs(self, federation: str) -> int:
        """Reserve nothing more in this silo's unfinished runs of a federation; how many rounds that frees.

        Raises:
            ConfigError: it has no such run.
            DataError: the clock is behind, or the disk refuses.
        """
        return sum(self._end(run) for run in self._unfinished(federation))

    def unfinished(self, federation: str) -> str:
        """This silo's unfinished runs of a federation, for a person.

        Raises:
            ConfigError: it has no such run.
        """
        return holders(self._unfinished(federation))

    def mend_clock(self) -> None:
        """Note that the clock was wrong, so that entries may go on at the time that it shows now.

        Raises:
            ConfigError: the newest entry is not ahead of the clock.
        """
        with self._book.writing():
            entries = self._book.chain.entries
            if not entries or entries[-1].at <= self._book.hour():
                newest = f"its newest entry is of {told(entries[-1].at)}" if entries else "it has no entry"
                raise ConfigError(f"'{self._book.path}': {newest}, not ahead of the clock; there is nothing to mend")
            self._book.write_clock()

    # For OpenRun

    def reserve(self, opened: OpenRun, round_number: int) -> Reservation:
        """As `OpenRun.reserve`."""
        run = self._usable(opened)
        self._note_code(run, opened.code)
        self._note_limit(run, opened.cap)
        with self._book.writing():
            begin, retrain = run.begin, run.retrains + (round_number in run.rounds)
            gate.check_round(run, round_number)
            gate.check_data(self._book, run, opened.set)
            gate.check_room(self._book, run, opened.cap, round_number)
            place = {"kind": "reserve", "run": begin.run, "set": run.sets[-1], "round": round_number}
            signed = self._book.write({**place, "retrain": retrain} | dataclasses.asdict(begin.per_round))
        return Reservation(bytes.fromhex(begin.run), round_number, retrain, signed.hash)

    def settle(self, opened: OpenRun, reservation: Reservation) -> None:
        """As `OpenRun.settle`."""
        run = self._usable(opened)
        with self._book.writing():
            if reservation.entry.hex() not in run.reservations or reservation.entry.hex() in run.settled:
                raise ValueError("no open reservation of this run")
            self._book.write({"kind": "settle", "reservation": reservation.entry.hex()})

    def finish(self, opened: OpenRun) -> None:
        """As `OpenRun.finish`."""
        self._end(self._usable(opened))

    # Within

    def _unfinished(self, federation: str) -> list[Run]:
        mine = [run for run in self._book.holding(None) if run.begin.silo == self._book.silo]
        chosen = [run for run in mine if run.begin.federation == federation]
        if not chosen:
            raise ConfigError(
                f"'{self._book.path}': {self._book.silo} has no unfinished run of a federation {federation} here; "
                f"unfinished are: {holders(self._book.holding(None)) or 'none'}"
            )
        return chosen

    def _note_code(self, run: Run, code: str) -> None:
        if code in run.codes[-1:]:
            return
        with self._book.writing():
            if not run.ended:
                self._book.write({"kind": "code", "run": run.begin.run, "code": code})

    def _note_limit(self, run: Run, cap: Cap | None) -> None:
        if limit_of(cap) in run.limits[-1:]:
            return
        with self._book.writing():
            if not run.ended:
                self._book.write({"kind": "limit", "run": run.begin.run, "limit": as_entry(cap)})

    def _end(self, run: Run) -> int:
        """How many rounds that frees."""
        with self._book.writing():
            held = run.held
            if held:
                self._book.write({"kind": "end", "run": run.begin.run})
        return held

    def _usable(self, opened: OpenRun) -> Run:
        if opened is not self._open:
            raise ValueError("another run was opened since, or the ledger was closed")
        return opened.state


class OpenRun:
    """A run that may be trained now, and the units that take part in it."""

    def __init__(
        self, ledger: Ledger, state: Run, admitted: frozenset[bytes], left_out: int, *, cap: Cap | None, code: str
    ) -> None:
        self._ledger, self.state, self.cap, self.code = ledger, state, cap, code
        self.set = state.sets[-1]  # of the units that are admitted
        self.admitted = admitted  # ids, as they were handed in
        self.left_out = left_out  # units that are not admitted

    @property
    def run(self) -> bytes:
        """Its random name, 16 bytes."""
        return bytes.fromhex(self.state.begin.run)

    @property
    def retrains_left(self) -> int:
        """How many rounds may still be trained again."""
        return self.state.retrains_left

    def may_train(self, round_number: int) -> bool:
        """Whether `reserve` would take this round, for the first time or again."""
        return self.state.may_train(round_number)

    def reserve(self, round_number: int) -> Reservation:
        """Pay for a round, before the data are touched. A round that was paid for before is a retrain.

        Raises:
            PolicyError: no retrain is left, the run was ended, the plan has no such round, or it is above the cap.
            DataError: the disk refuses, another process holds the ledger for long, or the clock is behind.
        """
        return self._ledger.reserve(self, round_number)

    def settle(self, reservation: Reservation) -> None:
        """Note that the round was trained.

        Raises:
            DataError: the disk refuses, or the clock is behind.
        """
        self._ledger.settle(self, reservation)

    def finish(self) -> None:
        """The federation has come to its end: what was held for rounds that this silo was not in is free.

        Raises:
            DataError: the disk refuses, or the clock is behind.
        """
        self._ledger.finish(self)
