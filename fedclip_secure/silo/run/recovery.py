"""How a silo's journal stands after a crash or a restored backup, and what a person can do about it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from fedclip_secure.disk import telling
from fedclip_secure.secagg.silo_session import Stage
from fedclip_secure.silo.run.journal import DamagedJournalError, Drawn, Journal

_GIVING_UP = (
    "This silo has agreed to, or may have sent, an update in round {round}. Given up, it trains again and may be "
    "summed over other silos: whoever sees both sums can take their difference, which can be one silo's update. With "
    "differential privacy the new update is charged to the budget once more. It may be the coordinator who wants the "
    "second sum: give a round up only when you know by other means that a silo it waits for is gone for good."
)
_RELEASED = "This silo has even helped to open the sum: the coordinator may know it already, and then has both."


def giving_up(workdir: Path, epoch: Path, number: int) -> str:
    """What a person must know who gives round `number` up.

    Raises:
        DataError, TrustError: the journal cannot be used.
    """
    journal = Journal(workdir, epoch)
    try:
        released = any(drawn.round == number and drawn.stage >= Stage.RELEASED for drawn in journal.models())
    finally:
        journal.close()
    return f"{_GIVING_UP.format(round=number)}{' ' + _RELEASED if released else ''} Give up round {number}?"


@dataclass(frozen=True, slots=True)
class Standing:
    """What `recover` tells: whether the journal is the newest, and the model that this silo worked on last."""

    matches: bool
    damaged: Path | None  # where a journal that could not be read was put aside
    last: Drawn | None

    def lines(self) -> list[str]:
        """As a person reads it."""
        told = (
            []
            if self.damaged is None
            else [
                f"the journal could not be read and was put aside as {self.damaged}: delete that file when all is well "
                "again, for keys of an unfinished round may be in it"
            ]
        )
        if not self.matches:
            return [
                *told,
                "the journal is not the newest that this silo had: it was lost, or restored from a backup. Over a "
                "model for which it may have sent an update it must not send another: the two sums could disclose it",
            ]
        return [*told, "the journal is in order", *_progress(self.last)]


def look(workdir: Path, epoch: Path) -> Standing:
    """Look at the journal; one that cannot be read is put aside for an empty one, which then does not match.

    Raises:
        DataError: another process uses it, or the disk refuses.
    """
    damaged = None
    try:
        journal = Journal(workdir, epoch, recovering=True)
    except DamagedJournalError:
        damaged = workdir / f"journal.sqlite.damaged-{int(time.time())}"
        with telling(workdir / "journal.sqlite", "be put aside"):
            (workdir / "journal.sqlite").replace(damaged)
        journal = Journal(workdir, epoch, recovering=True)
    try:
        models = journal.models()
        return Standing(journal.matches_epoch(), damaged, models[-1] if models else None)
    finally:
        journal.close()


def recover(workdir: Path, epoch: Path) -> int:
    """Go on with a journal that is not the newest; over how many models this silo will not sign again.

    Raises:
        DataError: another process uses it, or the disk refuses.
    """
    journal = Journal(workdir, epoch, recovering=True)
    try:
        journal.recover()
        return len(journal.models())
    finally:
        journal.close()


def _progress(last: Drawn | None) -> list[str]:
    if last is None:
        return ["this silo has taken part in no round yet"]
    where = f"round {last.round}: this silo has come to stage {last.stage.name.lower()}"
    if last.vector is None and last.stage < Stage.DONE:
        return [f"{where}, and its update is lost: it sits out until the model has moved on"]
    if last.agreed and last.stage < Stage.DONE:
        return [
            f"{where}, and agreed to the sum over {', '.join(last.agreed)}: over this model it signs no other names"
        ]
    return [where]
