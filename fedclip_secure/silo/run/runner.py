"""A silo's life in a run: train, join, and go through the stages, until the plan's last round."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from http import HTTPStatus
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedclip_secure.data.dataset import Counts
from fedclip_secure.errors import ConfigError, DataError, PolicyError, ProtocolError, TransportError, TrustError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.secagg.keys import AttemptSecrets
from fedclip_secure.secagg.messages import KeyAd, ServerAd, Void, open_message
from fedclip_secure.secagg.opening_checks import Opening, check_opening, reopen
from fedclip_secure.secagg.ring import Words
from fedclip_secure.secagg.silo_session import ModelRecord, SiloSession, Stage
from fedclip_secure.silo.run.journal import Drawn, Journal, SavedAttempt, Step
from fedclip_secure.silo.run.link import LeftOutError, Link, present
from fedclip_secure.silo.run.party import Party
from fedclip_secure.silo.run.stages import Stages
from fedclip_secure.transport.messages import OpeningAnswer

_PATIENT_CODES = ("agreed",)  # this silo leaves the attempt, and may take part in the next


class Trainer(Protocol):
    """What the runner needs of training."""

    records: int

    def check(self, received: AdapterState) -> None:
        """Refuse what `train` would not train, before a round is paid for. No record is touched."""

    def train(self, received: AdapterState) -> npt.NDArray[np.float64]:
        """The update (d,) that this silo's records make of `received`."""

    def validate(self, state: AdapterState) -> Counts:
        """How `state` does on this silo's validation records."""


class Budget(Protocol):
    """What the runner needs of an account of privacy spent."""

    @property
    def head(self) -> bytes:
        """Hash of the newest entry."""

    @property
    def ended(self) -> bool:
        """Whether nothing is paid for in the run any more."""

    def may_train(self, round_number: int) -> bool:
        """Whether this round may be trained, for the first time or again."""

    def charged(self, round_number: int) -> AbstractContextManager[None]:
        """Reserve what a round spends before the data are touched, and settle it after."""


def _unpaid(budget: Budget, before: str = "") -> str:
    """Why a round cannot be paid for."""
    if budget.ended:
        return "this silo's run was ended with `fedclip-silo budget --end`, and nothing more is paid for in it"
    return f"{before}the plan's privacy.max_retrains are used up"


class Runner:
    """Takes part in a run until its last round. `say` is told what a person would want to know."""

    def __init__(
        self,
        party: Party,
        trainer: Trainer,
        link: Link,
        journal: Journal,
        say: Callable[[str], None],
        *,
        budget: Budget | None = None,
    ) -> None:
        self._party, self._terms = party, party.terms
        self._trainer, self._link, self._journal, self._say = trainer, link, journal, say
        self._budget = budget
        self._position = journal.position(self._terms.roster.digest)
        self._model: AdapterState | None = None  # the newest that this silo knows
        self._said = ""
        self.missed: dict[int, str] = {}  # by round: why an attempt at it went on without this silo

    async def run(self, abandon: int | None = None) -> None:
        """Until the aggregator says that the run is finished. `abandon`: a round that a person gave up.

        Raises:
            ProtocolError: the server broke a rule; nothing of this silo's update is at risk.
            ConfigError: there is nothing to give up in round `abandon`.
            TrustError: the aggregator halted the run.
            PolicyError: no budget is left to train again, and nobody may be absent.
            TransportError: the server refuses this silo.
        """
        if abandon is None:
            await self._resume()
        after, idle = self._position.attempt, ""
        while True:
            answer = await self._link.opening(after, idle=bool(idle))
            if answer.state == "finished":
                self._journal.leave()
                return
            if answer.state == "halted":
                self._journal.leave()
                raise TrustError(self._halted(answer))
            if answer.state == "waiting" or answer.opening is None:
                self._tell(f"waiting: {answer.reason}")
                continue
            opening = check_opening(self._terms, self._position, answer.opening, answer.results)
            if abandon is not None:
                self._abandon(opening, abandon)
                abandon = None
            after = opening.ad.attempt
            idle = self._why_sit_out(opening)
            if idle:
                self.missed[opening.ad.round] = "it could send no update"
                self._tell(f"{self._name(opening)}: {idle}; sitting out until the model has moved on")
                continue
            await self._take_part(opening, self._attempt(opening, answer.opening))

    async def _resume(self) -> None:
        """Go on with the attempt that was going on when this silo stopped."""
        saved = self._journal.attempt(self._terms.roster.digest)
        if saved is None:
            return
        opening = reopen(self._terms, saved.opening)
        if opening.ad.plan != self._terms.plan:  # another one was accepted since
            self._journal.leave()
            return
        self._tell(f"{self._name(opening)}: going on after {max(saved.steps, default=Stage.OPENED).name.lower()}")
        await self._take_part(opening, self._attempt_again(opening, saved))

    async def _take_part(self, opening: Opening, attempt: Awaitable[None]) -> None:
        try:
            await attempt
        except LeftOutError as error:
            self._journal.leave()
            self.missed[opening.ad.round] = "the others went on without it"
            self._tell(f"{self._name(opening)} goes on without this silo: {error}; waiting for the next")

    async def _attempt(self, opening: Opening, wire: bytes) -> None:
        old = await self._model_of(opening.ad)
        drawn = await self._draw(opening.ad, old)
        session = self._session(opening, drawn, AttemptSecrets.fresh(opening.base))
        self._journal.start(opening, wire, session.secrets, trains=drawn.trains)
        self._position = self._journal.position(self._terms.roster.digest)
        await self._go_through(opening, session, {}, old)

    async def _attempt_again(self, opening: Opening, saved: SavedAttempt) -> None:
        number = opening.ad.attempt
        if Stage.DONE in saved.steps:
            await self._link.send_if_in_time(number, "results", saved.steps[Stage.DONE].sent)
            return
        drawn = self._journal.drawn(opening.ad.model, trains=saved.trains)
        if drawn is None or self._journal.vector(drawn) is None:
            raise LeftOutError("this silo's vector is lost")
        old = await self._model_of(opening.ad)
        session = self._session(opening, self._as_it_joined(drawn, saved), saved.secrets)
        await self._go_through(opening, session, saved.steps, old)

    def _as_it_joined(self, drawn: Drawn, saved: SavedAttempt) -> Drawn:
        """With the names in the `KeyAd` that was sent, to make the same again: `drawn` may have newer ones."""
        joined = saved.steps.get(Stage.JOINED)
        if joined is None:
            return drawn
        ad = open_message(joined.sent, KeyAd, self._terms.federation, self._terms.roster).body
        return replace(drawn, agreed=tuple(ad.agreed))

    def _session(self, opening: Opening, drawn: Drawn, secrets: AttemptSecrets) -> SiloSession:
        identity = self._party.identity
        record = ModelRecord(drawn.model, lambda: self._journal.open_vector(drawn), drawn.agreed or None, drawn.ledger)
        return SiloSession(self._terms, identity.name, identity.sign, opening, record, secrets=secrets)

    async def _go_through(
        self, opening: Opening, session: SiloSession, saved: Mapping[Stage, Step], old: AdapterState
    ) -> None:
        stages = Stages(self._party, session, self._link, self._journal, number=opening.ad.attempt, saved=saved)
        try:
            outcome = await stages.run(old)
        except ProtocolError as error:
            if error.code in _PATIENT_CODES:
                raise LeftOutError(str(error)) from error
            raise
        self._model = outcome.model
        validation = f"; the model before it had {outcome.correct} of {outcome.total} right" if outcome.total else ""
        self._tell(f"{self._name(opening)}: averaged {', '.join(outcome.survivors)}{validation}")
        if self._terms.moved_nothing(opening.ad.round, opening.ad.model, outcome.model.digest):
            self._tell(f"{self._name(opening)} changed no parameter, and is the last one: nothing is left to learn")

    def _drawn(self, ad: ServerAd) -> Drawn | None:
        return self._journal.drawn(ad.model, trains=self._terms.trains(ad.round))

    def _usable(self, ad: ServerAd, drawn: Drawn) -> bool:
        """Whether what was drawn can go out in this round: it is of this run, of the same kind, and there."""
        same = (drawn.plan, drawn.roster, drawn.trains) == (ad.plan, ad.roster, self._terms.trains(ad.round))
        return same and self._journal.vector(drawn) is not None

    def _why_sit_out(self, opening: Opening) -> str:
        """Empty where this silo can take part."""
        if self._must_sit_out(opening):
            return (
                "this silo has helped to open a sum over this very model, or sent an update over it that it cannot "
                "send again; another sum could disclose the update"
            )
        drawn, number = self._drawn(opening.ad), opening.ad.round
        trains = self._terms.trains(number) and (drawn is None or not self._usable(opening.ad, drawn))
        if trains and self._budget is not None and not self._budget.may_train(number):
            why = _unpaid(self._budget, "this silo stopped while it trained, and ")
            if not self._terms.absent_tolerated:
                larger = "" if self._budget.ended else ", with a larger max_retrains"
                raise PolicyError(
                    f"{self._name(opening)}: {why}; no silo may be absent from a round of this federation, so the run "
                    f"cannot go on: tell the coordinator, who needs a new federation{larger}"
                )
            return why
        return ""

    def _must_sit_out(self, opening: Opening) -> bool:
        """Once shares are out the sum may be known, and colluders could choose what they add to another one.

        Before that the same vector may go out again; where it is lost, or another run's, nothing may.
        """
        drawn = self._drawn(opening.ad)
        if drawn is None or drawn.stage < Stage.UPLOADED:
            return False
        return drawn.stage >= Stage.RELEASED or not self._usable(opening.ad, drawn)

    def _abandon(self, opening: Opening, number: int) -> None:
        drawn = self._drawn(opening.ad)
        if opening.ad.round != number:
            raise ConfigError(f"round {number} is not the one going on, which is round {opening.ad.round}")
        if drawn is None or not (drawn.agreed or self._must_sit_out(opening)):
            raise ConfigError(f"there is nothing to give up in round {number}; leave out --abandon-round")
        if self._budget is not None and not self._budget.may_train(number):
            raise PolicyError(
                f"round {number} cannot be given up: a new update would be trained and charged once more, and "
                f"{_unpaid(self._budget)}; wait for the others, or for the next round"
            )
        self._journal.abandon(drawn)
        self._tell(f"{self._name(opening)}: given up; starting on it again with a new update")

    async def _draw(self, ad: ServerAd, old: AdapterState) -> Drawn:
        """Train, and round the weighted update to the grid, once for this model."""
        drawn = self._drawn(ad)
        if drawn is not None and self._usable(ad, drawn):
            return drawn
        async with present(self._link, ad.attempt):
            vector = await asyncio.to_thread(self._make_vector, ad.round, old, counts=self._counts(ad))
        head = b"" if self._budget is None else self._budget.head
        return self._journal.draw(ad, vector, trains=self._terms.trains(ad.round), ledger=head)

    def _counts(self, ad: ServerAd) -> bool:
        """Whether validation counts go out. A second time over one model, two cohorts' difference would show them."""
        closing = self._journal.drawn(ad.model, trains=False)
        before = closing is not None and closing.stage >= Stage.UPLOADED
        return self._terms.vector.counts and ad.round >= self._terms.counted_from and not before

    def _make_vector(self, round_number: int, old: AdapterState, *, counts: bool) -> Words:
        terms, weight = self._terms, self._party.weight(self._trainer.records)
        counted = Counts(0, 0)
        if counts:
            counted = self._trainer.validate(old)
            if counted.total > terms.grid.bound:
                raise DataError(
                    f"{counted.total} validation records are more than the {terms.grid.bound} that a sum over "
                    f"{terms.grid.silos} silos can hold; ask for a smaller `splits.validation`"
                )
        update = self._update(round_number, old)
        vector = terms.vector.quantize(terms.grid, update, weight, counted.correct, counted.total)
        if update.any() and not vector[: terms.layout.size].any():
            self._say(
                f"{terms.round_name(round_number)}: this silo's update is not zero, and rounded to nothing: of weight "
                f"{weight} nothing below {terms.grid.step * terms.grid.max_weight / weight:.1e} shows. The plan needs "
                "a larger training.optimizer.lr, or a smaller secure_aggregation.coordinate_clip"
            )
        return vector

    def _update(self, round_number: int, old: AdapterState) -> npt.NDArray[np.floating[Any]]:
        if self._terms.trains(round_number):
            return self._train(round_number, old)
        return np.broadcast_to(np.float32(0), (self._terms.layout.size,))

    def _train(self, round_number: int, old: AdapterState) -> npt.NDArray[np.float64]:
        if self._budget is None:
            return self._trainer.train(old)
        self._trainer.check(old)
        with self._budget.charged(round_number):
            update = self._trainer.train(old)
        return self._terms.grid.cut(update)

    async def _model_of(self, ad: ServerAd) -> AdapterState:
        if self._model is None or self._model.digest != ad.model:
            self._model = None  # before another one comes into memory
            try:
                self._model = await self._link.model(ad.model, self._terms)
            except TransportError as error:
                if error.status != HTTPStatus.NOT_FOUND:
                    raise
                raise await self._without_model(ad, error) from error
        return self._model

    async def _without_model(self, ad: ServerAd, error: TransportError) -> Exception:
        """The model of an attempt that is over may be gone; that of one that can still be joined never is."""
        answer = await self._link.opening(ad.attempt - 1, idle=False)
        if answer.state != "open" or answer.attempt != ad.attempt:
            return LeftOutError("the server does not have this attempt's model any more")
        return TransportError(
            f"{self._terms.round_name(ad.round)}: the server has lost the model of the round that it opens ({error}); "
            "ask the coordinator to restore `state/` as the server last left it, then start this again",
            status=error.status,
            code=error.code,
        )

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
