"""The state machine of a run: opens attempts, waits for silos, closes phases, moves the model.

It decides only when a phase ends. What a message must say is the session's business, what must
outlive a crash the store's. After a restart it goes on from the store; deadlines start anew.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable

from fedclip_secure.aggregator.attempt import LiveAttempt
from fedclip_secure.aggregator.blobs import RESTORE
from fedclip_secure.aggregator.complaints import excluded
from fedclip_secure.aggregator.notes import REASON, Notes, listed, name_of, waits_for
from fedclip_secure.aggregator.presence import Presence
from fedclip_secure.aggregator.store import RoundRow, Store, ended
from fedclip_secure.config.plan import Deadlines
from fedclip_secure.errors import DataError, ProtocolError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.keys import SigningKey
from fedclip_secure.privacy.ledger.receipts import Receipt
from fedclip_secure.secagg.aggregator_session import Phase
from fedclip_secure.secagg.messages import ServerAd, Void, sign_message, vector_hash
from fedclip_secure.secagg.ring import WORD, Words
from fedclip_secure.secagg.sealing import SealKey
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.transport.messages import OpeningAnswer

_RESTORED = f"which the coordinator's state does not know: it was restored from an older backup; {RESTORE}"
_QUICK, _LONGEST_PAUSE = 5, 60.0  # attempts at one round without a pause between; seconds


class AttemptEndedError(Exception):
    """This attempt is over without a result; the next one starts."""


class HaltedError(Exception):
    """The run cannot go on without a person."""


class Rounds:
    """One federation's run, from the frozen roster to the plan's last round."""

    def __init__(
        self, store: Store, terms: Terms, key: SigningKey, deadlines: Deadlines, say: Callable[[str], None]
    ) -> None:
        self.store, self.terms = store, terms
        self.presence = Presence(store)
        self.live: LiveAttempt | None = None
        self._key, self._say = key, say
        self._seconds = {
            Phase.JOIN: deadlines.join,
            Phase.SHARE: deadlines.share,
            Phase.UPLOAD: deadlines.upload,
            Phase.AGREE: deadlines.agree,
            Phase.UNMASK: deadlines.unmask,
        }
        self._changed = asyncio.Event()
        self._stopping = False
        self._pardoned = False  # whether complaints keep nobody out of the present attempt: the rest are too few
        self._broken: str | None = None  # why the present attempt cannot go on
        self._notes = Notes(store, terms)

    @property
    def finished(self) -> bool:
        """Whether the last round is confirmed."""
        return self.live is None and ended(self.store.rounds(), self.terms)

    async def run(self) -> None:
        """Run until the last round, or until only a person can help."""
        self.store.blobs.keep_vectors(self.store.vectors_wanted())
        self._keep_models()
        try:
            while self.store.halted() is None and (live := self._resume() or self._open()) is not None:
                self._set_live(live)
                try:
                    await self._drive(live)
                except AttemptEndedError as ended:
                    self._end(live, str(ended))
                    await self._pause(live.row.round)
        except HaltedError:
            pass  # the store says why
        if (halted := self.store.halted()) is not None:
            self._say(f"halted: {halted[0]}")
        # Not when the server is told to stop: whoever is answered that the attempt is over leaves it for good.
        self._set_live(None)

    async def _pause(self, round_number: int) -> None:
        """A silo that breaks one attempt after the other must not fill the disk with them."""
        quick = self.store.ended_attempts(round_number) - _QUICK
        if quick > 0:
            await self.wait(lambda: False, min(2.0 ** (quick - 1), _LONGEST_PAUSE))

    def notify(self) -> None:
        """Something was received: wake all who wait."""
        self._changed.set()
        self._changed = asyncio.Event()

    def release(self) -> None:
        """The server stops: all who wait go away, to ask again."""
        self._stopping = True
        self.notify()

    async def wait(self, until: Callable[[], bool], seconds: float | None) -> bool:
        """Wait until `until()` holds, at most `seconds`; whether it does."""
        end = None if seconds is None else time.monotonic() + seconds
        while not until():
            if self._stopping:
                return False
            left = 1.0 if end is None else min(1.0, end - time.monotonic())
            if left <= 0:
                return False
            try:  # presence fades without an event, so look again every second
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                continue
        return True

    def current(self, number: int) -> LiveAttempt:
        """The attempt `number`, if it is the one going on.

        Raises:
            ProtocolError: `ended`, with the reason.
        """
        if self.live is not None and self.live.row.number == number:
            return self.live
        last = self.store.last_attempt()
        halted = self.store.halted()
        reason = halted[0] if halted else last.ended if last is not None and last.number == number else None
        why = f": {reason[:REASON]}" if reason and reason != "done" else ""
        raise ProtocolError("ended", f"attempt {number} is over{why}")

    def left_out(self) -> set[str]:
        """Silos that complaints keep out of this round's attempts."""
        return set() if self._pardoned else excluded(self.store.complaints(self._next_round()), self.terms)

    def complain(self, live: LiveAttempt, accuser: str, wire: bytes) -> None:
        """Take a complaint: it ends the attempt."""
        complaint = live.session.receive_complaint(accuser, wire)
        self.store.add_complaint(live.row, accuser, complaint.accused)
        self._broken = f"{accuser} complains that what {complaint.accused} sent it does not open ({complaint.code})"
        self.notify()

    def receipt(self, live: LiveAttempt, silo: str) -> bytes | None:
        """With privacy: where the silo's ledger stood at its upload, signed; kept before it is given."""
        if not self.terms.private:
            return None
        wire = Receipt(
            plan=self.terms.plan,
            roster=self.terms.roster.digest,
            silo=silo,
            round=live.row.round,
            attempt=live.row.number,
            head=live.session.uploads[silo].body.ledger,
        ).signed(self._key.sign)
        self.store.keep_receipt(silo, wire)
        return wire

    def answer_opening(self, silo: str, after: int) -> OpeningAnswer | None:
        """What `silo`, which knows of attempt `after`, should do now; None while there is nothing new for it."""
        halted = self.store.halted()
        if halted is not None:
            return OpeningAnswer(state="halted", reason=halted[0], void=halted[1])
        last = self.store.last_attempt()
        if last is not None and after > last.number:
            return OpeningAnswer(state="halted", reason=f"{silo} has seen attempt {after}, {_RESTORED}")
        if self.finished:
            return OpeningAnswer(state="finished")
        if self.live is None or self.live.row.number <= after or self.live.session.phase is not Phase.JOIN:
            return None
        if silo in self.left_out():
            return None
        row = self.live.row
        return OpeningAnswer(
            state="open", opening=row.opening, attempt=row.number, results=self.results_of(row.round - 1)
        )

    def results_of(self, round_number: int) -> list[bytes]:
        """The signed results of a finished round, in the order of silos."""
        row = next((row for row in self.store.rounds() if row.round == round_number), None)
        if row is None:
            return []
        return [wire for _, wire in sorted(self.store.messages(row.attempt, Phase.RESULT))]

    def describe(self) -> str:
        """What the run is waiting for, for a silo that has nothing to do."""
        if self.live is None:
            return "the next attempt is being opened"
        return waits_for(self.live, self.terms)

    def note_refusal(self, silo: str, error: ProtocolError) -> None:
        """Remember that a message was refused, and why."""
        if self.live is not None:
            self._notes.refusal(self.live, silo, error)

    async def _drive(self, live: LiveAttempt) -> None:
        if live.session.phase is Phase.JOIN:
            await self._join(live)
        while live.session.phase in (Phase.SHARE, Phase.UPLOAD, Phase.AGREE):
            await self._collect(live)
        if live.session.phase is Phase.UNMASK:
            await self._unmask(live)
        await self._confirm(live)

    async def _join(self, live: LiveAttempt) -> None:
        """Until all who are present have joined and the floor holds; at the deadline, until the floor holds."""
        session, floor = live.session, self.terms.floor
        out = self.left_out()
        if out:
            self._say(f"{self._name(live)}: complaints keep out {listed(sorted(out))}")

        def complete() -> bool:
            present = self.presence.present() & set(self.terms.roster.silos) - out
            return present <= set(session.ads) and len(session.joinable()) >= floor

        if not await self.wait(complete, self._seconds[Phase.JOIN]) and len(session.joinable()) < floor:
            joined = f"{len(session.ads)} joined"
            if len(session.joinable()) < len(session.ads):
                joined += ", who cannot all go on together"
            why = self._notes.stuck(live, self.presence.idle)
            self._say(f"{self._name(live)}: {joined}, {floor} are needed; waiting{why}")
            self._pardoned = True  # an accuser whose accused is gone is needed after all
            self.notify()
            seconds = self._seconds[Phase.JOIN] if any(ad.body.agreed for ad in session.ads.values()) else None
            if not await self.wait(lambda: len(session.joinable()) >= floor, seconds):
                # Whoever gives the round up can only join an attempt that it has not joined before.
                raise AttemptEndedError("too few can go on together; opened anew for those who gave the round up")
        self._close(live)

    async def _collect(self, live: LiveAttempt) -> None:
        """Until all expected have answered, or until the deadline; then the floor decides."""
        session, phase = live.session, live.session.phase
        await self.wait(lambda: self._broken is not None or not session.missing(), self._seconds[phase])
        self._note_conflicts(live)
        if self._broken is not None:
            raise AttemptEndedError(self._broken)
        self._notes.missing(live, self._seconds[phase])
        try:
            self._close(live)
        except ProtocolError as error:
            raise AttemptEndedError(str(error)) from error

    def _note_conflicts(self, live: LiveAttempt) -> None:
        """An attempt whose masks would not cancel ends while it still can be started again."""
        for pair in live.session.conflicts:
            # Neither has accused the other: whom a case keeps out where it may be only one, chance decides.
            one, other = secrets.choice((pair, pair[::-1]))
            self.store.add_complaint(live.row, one, other)
        if live.session.conflicts:
            pairs = listed([f"{one} and {other}" for one, other in live.session.conflicts])
            self._broken = f"{pairs} masked with different keys: one of the two shared garbage"

    async def _unmask(self, live: LiveAttempt) -> None:
        """Shares may be out already, so this waits for t answers however long it takes."""
        session, seconds = live.session, self._seconds[Phase.UNMASK]
        told = set[str]()
        while True:
            complete = await self.wait(lambda: not session.missing() or self._given_up(live), seconds)
            if self._given_up(live):
                raise AttemptEndedError("the coordinator gave it up while shares were coming in")
            if not complete and not told:
                self._notes.missing(live, seconds)
                told.add("")
            if len(session.unmasks) < self.terms.threshold:
                continue
            try:
                total = await asyncio.to_thread(session.unmask_sum, live.vectors())
                break
            except ProtocolError as error:
                if complete:
                    self._halt(live, str(error), void=None)
                if str(error) not in told:
                    told.add(str(error))
                    self._notes.event(live, "blocked", error.silo, str(error))
                    self._say(f"{self._name(live)}: {error}; waiting for more answers")
        await self._finish_round(live, total)

    def _given_up(self, live: LiveAttempt) -> bool:
        last = self.store.last_attempt()
        return last is not None and last.number == live.row.number and bool(last.given_up)

    async def _finish_round(self, live: LiveAttempt, total: Words) -> None:
        try:
            row = await asyncio.to_thread(self._save_result, live, total)
        except ProtocolError as error:
            self._halt(live, str(error), self._void(live, str(error)))
        self.store.end_round(row)
        live.session.close()
        counts = f"; the model before it had {row.correct} of {row.total} right" if row.total else ""
        self._say(f"{self.terms.round_name(row.round)}: averaged {', '.join(row.survivors)}{counts}")
        self._keep_models()
        self.notify()

    def _keep_models(self) -> None:
        for refusal in self.store.blobs.keep_models(self.store.models_wanted(self.terms.initial_model)):
            self._say(f"an older model stays: {refusal}")

    def _save_result(self, live: LiveAttempt, total: Words) -> RoundRow:
        """Step to the next model and put sum and model on the disk, which takes seconds where they are large."""
        start, sum_hash = live.opening.ad.model, vector_hash(total)
        outcome = live.session.compute_result(total, self._model(start))
        digest = outcome.model.digest
        if self.terms.verify_sum:
            live.session.sum_proof()  # now, and not while a silo waits for it: that opens a text for each two silos
        self.store.blobs.save_vector(sum_hash, total.astype(WORD, copy=False).data)
        self.store.blobs.save_model(digest, outcome.model)
        return RoundRow(
            live.row.round, live.row.number, outcome.survivors, outcome.weight, outcome.correct, outcome.total,
            start, digest, sum_hash, time.time(),
        )  # fmt: skip

    async def _confirm(self, live: LiveAttempt) -> None:
        """Until t silos have signed the result: only they can open the next round."""
        session, enough, seconds = live.session, self.terms.threshold, self._seconds[Phase.UNMASK]
        if not await self.wait(lambda: len(session.results) >= enough, seconds) and not self._stopping:
            self._notes.missing(live, seconds)
            there = f"{len(session.results)} of {enough} signatures on its result are there"
            self._say(f"{self._name(live)}: {there}; waiting for {listed(sorted(session.missing()))}")
            await self.wait(lambda: len(session.results) >= enough, None)
        live.close_phase()
        self._end(live, "done")

    def _resume(self) -> LiveAttempt | None:
        """The attempt that was going on when the server stopped, if any."""
        row = self.store.last_attempt()
        if row is None or row.ended is not None:
            return None
        live = LiveAttempt.restore(self.terms, self.store, row)
        if live.session.phase is Phase.RESULT:
            total = self.store.blobs.vector(self.store.rounds()[-1].sum_hash)
            live.session.compute_result(total, self._model(live.opening.ad.model))
            live.restore_results()
        self._say(f"{self._name(live)}: going on at stage {live.session.phase.name.lower()}")
        return live

    def _open(self) -> LiveAttempt | None:
        """Open the next attempt; None after the last round, and where no silo could join it."""
        done, last = self.store.rounds(), self.store.last_attempt()
        if ended(done, self.terms):
            return None
        model = done[-1].model if done else self.terms.initial_model
        if (earlier := next((row.round for row in done if row.start_model == model), None)) is not None:
            self.store.halt(self.terms.circle(done[-1].round, earlier), None)
            return None
        round_number, number = self._next_round(), 1 if last is None else last.number + 1
        seal = SealKey.generate()
        ad = ServerAd(
            plan=self.terms.plan,
            roster=self.terms.roster.digest,
            round=round_number,
            attempt=number,
            model=model,
            nonce=os.urandom(32),
            seal_public=seal.public,
        )
        wire = sign_message(ad, self.terms.federation, AGGREGATOR, self._key.sign)
        self.store.open_attempt(number, round_number, wire, seal.private, time.time())
        row = self.store.last_attempt()
        assert row is not None  # noqa: S101 - written above
        return LiveAttempt.restore(self.terms, self.store, row)

    def _name(self, live: LiveAttempt) -> str:
        return name_of(live, self.terms)

    def _next_round(self) -> int:
        done = self.store.rounds()
        return done[-1].round + 1 if done else 1

    def _model(self, digest: bytes) -> AdapterState:
        path = self.store.blobs.model_path(digest)
        if not path.is_file():
            raise DataError(f"the model {digest.hex()} is missing from the aggregator's state; {RESTORE}")
        return AdapterState.from_file(path, self.terms.layout, digest.hex())

    def _close(self, live: LiveAttempt) -> None:
        phase = live.session.phase
        live.close_phase()
        names = set(live.session.answered(phase))
        absent = (
            set(self.terms.roster.silos if phase is Phase.JOIN else live.session.answered(Phase(phase - 1))) - names
        )
        without = f", without {', '.join(sorted(absent))}" if absent else ""
        self._say(f"{self._name(live)}: {phase.name.lower()} closed with {', '.join(sorted(names))}{without}")
        self.notify()

    def _end(self, live: LiveAttempt, reason: str) -> None:
        self.store.end_attempt(live.row.number, reason)
        if reason != "done":
            self._notes.event(live, "ended", None, reason)
            self._say(f"{self._name(live)} ended: {reason}")
        self._set_live(None)

    def _set_live(self, live: LiveAttempt | None) -> None:
        self.live, self._broken, self._pardoned = live, None, False
        self._notes.begin()
        self.notify()

    def _halt(self, live: LiveAttempt, reason: str, void: bytes | None) -> None:
        self._notes.event(live, "halted", None, reason)
        self.store.halt(reason, void)
        raise HaltedError(reason)

    def _void(self, live: LiveAttempt, reason: str) -> bytes:
        body = Void(transcript=live.session.transcript2, reason=reason)
        return sign_message(body, self.terms.federation, AGGREGATOR, self._key.sign)
