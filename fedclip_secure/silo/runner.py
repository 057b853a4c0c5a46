"""A silo's life in a run: train, join, and go through the stages, until the plan's last round."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedclip_secure.data.dataset import Counts
from fedclip_secure.errors import DataError, ProtocolError, TrustError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.identity import Identity
from fedclip_secure.secagg.messages import Complaint, ServerAd, Void, open_message, sign_message
from fedclip_secure.secagg.opening import Opening, check_opening
from fedclip_secure.secagg.outcome import Outcome
from fedclip_secure.secagg.silo_session import ModelRecord, SiloSession
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.journal import Journal
from fedclip_secure.silo.link import LeftOutError, Link, present
from fedclip_secure.transport.messages import OpeningAnswer

_PATIENT_CODES = ("agreed",)  # this silo leaves the attempt, and may take part in the next


class Trainer(Protocol):
    """What the runner needs of training."""

    records: int

    def train(self, received: AdapterState) -> npt.NDArray[np.float64]:
        """The update (d,) that this silo's records make of `received`."""

    def validate(self, state: AdapterState) -> Counts:
        """How `state` does on this silo's validation records."""


@dataclass(frozen=True, slots=True)
class Party:
    """Who takes part in what."""

    identity: Identity
    terms: Terms

    def weight(self, records: int) -> int:
        """This silo's weight by the plan."""
        if self.terms.public_weights is not None:
            return self.terms.public_weights[self.identity.name]
        return min(records, self.terms.grid.max_weight)


class Runner:
    """Takes part in a run until its last round. `say` is told what a person would want to know."""

    def __init__(
        self, party: Party, trainer: Trainer, link: Link, journal: Journal, say: Callable[[str], None]
    ) -> None:
        self._party, self._terms = party, party.terms
        self._trainer, self._link, self._journal, self._say = trainer, link, journal, say
        self._position = journal.position(self._terms.roster.digest)
        self._model: AdapterState | None = None  # the newest that this silo knows
        self._record: ModelRecord | None = None  # of the model that this process works on
        self._said = ""

    async def run(self) -> None:
        """Until the aggregator says that the run is finished.

        Raises:
            ProtocolError: the server broke a rule; nothing of this silo's update is at risk.
            TrustError: the aggregator halted the run.
            TransportError: the server refuses this silo.
        """
        after = self._position.attempt  # one that is still open cannot be joined a second time
        idle = after > 0
        while True:
            answer = await self._link.opening(after, idle=idle)
            if answer.state == "finished":
                return
            if answer.state == "halted":
                raise TrustError(self._halted(answer))
            if answer.state == "waiting" or answer.opening is None:
                self._tell(f"waiting: {answer.reason}")
                continue
            opening = check_opening(self._terms, self._position, answer.opening, answer.results)
            after = opening.ad.attempt
            idle = self._must_sit_out(opening)
            if idle:
                self._tell(
                    f"{self._name(opening)}: this silo sent an update over this very model before it was "
                    "restarted, and a second one could disclose it; sitting out until the model has moved on"
                )
                continue
            try:
                await self._attempt(opening)
            except LeftOutError as error:
                self._tell(f"{self._name(opening)} goes on without this silo: {error}; waiting for the next")

    def _must_sit_out(self, opening: Opening) -> bool:
        mine = self._record is not None and self._record.model == opening.ad.model
        return not mine and self._journal.sent(opening.ad.model, trains=self._terms.trains(opening.ad.round))

    async def _attempt(self, opening: Opening) -> None:
        ad = opening.ad
        old = await self._model_of(ad.model)
        if self._record is None or self._record.model != ad.model:
            async with present(self._link, ad.attempt):
                self._record = await asyncio.to_thread(self._make_record, ad.round, old)
        self._journal.join(ad)
        self._position = self._journal.position(self._terms.roster.digest)
        identity = self._party.identity
        session = SiloSession(self._terms, identity.name, identity.sign, opening, self._record)
        try:
            outcome = await self._stages(session, ad, old)
        except ProtocolError as error:
            if error.code in _PATIENT_CODES:
                raise LeftOutError(str(error)) from error
            raise
        self._model = outcome.model
        validation = f"; the model before it had {outcome.correct} of {outcome.total} right" if outcome.total else ""
        self._tell(f"{self._name(opening)}: averaged {', '.join(outcome.survivors)}{validation}")

    async def _stages(self, session: SiloSession, ad: ServerAd, old: AdapterState) -> Outcome:
        """Stages 0 to 5. From `agree` on others can finish without this silo, so lateness is no failure."""
        link, attempt = self._link, ad.attempt
        await link.send(attempt, "key-ads", session.join())
        await link.send_shares(attempt, session.share(await link.messages(attempt, "key-ads")))
        shares = await link.shares(attempt)
        try:
            upload = session.upload(shares.bundles, {peer: (pair[0], pair[1]) for peer, pair in shares.inbox.items()})
        except ProtocolError as error:
            await self._complain(session, attempt, error)
            raise
        self._journal.send(ad.model, trains=self._terms.trains(ad.round))
        await link.send_upload(attempt, session.seal_upload(upload))
        agree = session.agree(await link.messages(attempt, "uploads"))
        await link.send_if_in_time(attempt, "agrees", agree)
        unmask = session.unmask(await link.messages(attempt, "agrees"))
        await link.send_if_in_time(attempt, "unmasks", unmask)
        signed, outcome = session.result(await link.sum(attempt, self._terms), old)
        await link.send_if_in_time(attempt, "results", signed)
        return outcome

    async def _complain(self, session: SiloSession, attempt: int, error: ProtocolError) -> None:
        """A peer's fault is told to the server, and the next attempt is waited for; any other fault is the server's."""
        if error.code != "bundle" or error.silo is None:
            return
        complaint = Complaint(transcript=session.transcript, accused=error.silo, code=error.code)
        identity = self._party.identity
        wire = sign_message(complaint, self._terms.federation, identity.name, identity.sign)
        await self._link.send(attempt, "complaints", wire)
        raise LeftOutError(f"complained to the coordinator: {error}") from error

    def _make_record(self, round_number: int, old: AdapterState) -> ModelRecord:
        """Train, and round the weighted update to the grid, once for this model."""
        terms, weight = self._terms, self._party.weight(self._trainer.records)
        counts = Counts(0, 0)
        if terms.vector.counts and round_number >= terms.counted_from:
            counts = self._trainer.validate(old)
            if counts.total > terms.grid.bound:
                raise DataError(
                    f"{counts.total} validation records are more than the {terms.grid.bound} that a sum over "
                    f"{terms.grid.silos} silos can hold; ask for a smaller `splits.validation`"
                )
        update = self._trainer.train(old) if terms.trains(round_number) else np.zeros(terms.layout.size)
        integers = terms.grid.quantize(update, weight)
        return ModelRecord(old.digest, terms.vector.pack(integers, weight, counts.correct, counts.total))

    async def _model_of(self, digest: bytes) -> AdapterState:
        if self._model is None or self._model.digest != digest:
            self._model = await self._link.model(digest, self._terms)
        return self._model

    def _name(self, opening: Opening) -> str:
        return self._terms.round_name(opening.ad.round)

    def _halted(self, answer: OpeningAnswer) -> str:
        """The reason, once the aggregator's signature on it is checked where there is one."""
        if answer.void is not None:
            signed = open_message(answer.void, Void, self._terms.federation, self._terms.roster)
            if signed.sender == AGGREGATOR:
                return f"the aggregator declared the sum void: {signed.body.reason}; ask the coordinator how to go on"
        return f"the aggregator halted the run: {answer.reason}; ask the coordinator how to go on"

    def _tell(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._say(text)
