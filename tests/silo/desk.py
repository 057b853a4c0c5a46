"""A silo's journal and epoch file on the disk, and the steps of an attempt, without a run around them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedclip_secure.pki.epoch_file import Epoch
from fedclip_secure.secagg.keys import AttemptSecrets
from fedclip_secure.secagg.opening_checks import Opening, reopen
from fedclip_secure.secagg.ring import Words
from fedclip_secure.secagg.silo_session import Stage
from fedclip_secure.silo.run.journal import Journal, SavedAttempt, Step
from tests.fakes import Federation

STAGES = tuple(Stage)[1:]  # those that are steps
AGREED = ("silo-000", "silo-001", "silo-002")
OPENED: list[Journal] = []  # closed after each test


@dataclass
class Desk:
    """What lies on one silo's disk: `work` and, beside it, `epoch`."""

    folder: Path
    federation: Federation = field(default_factory=lambda: Federation(3))

    @classmethod
    def enrolled(cls, folder: Path) -> Desk:
        """Of a silo that has taken part in nothing yet."""
        desk = cls(folder)
        Epoch().save(desk.epoch)
        return desk

    @property
    def workdir(self) -> Path:
        return self.folder / "work"

    @property
    def database(self) -> Path:
        return self.workdir / "journal.sqlite"

    @property
    def epoch(self) -> Path:
        return self.folder / "epoch"

    def open(self, *, recovering: bool = False) -> Journal:
        OPENED.append(Journal(self.workdir, self.epoch, recovering=recovering))
        return OPENED[-1]

    def copy(self, folder: Path) -> Desk:
        """All files as they are now: what a kill at this moment leaves, or a backup."""
        shutil.copytree(self.folder, folder)
        return Desk(folder, self.federation)

    def restore(self, backup: Desk) -> None:
        """Put the workdir back as it was; the epoch file stays."""
        shutil.rmtree(self.workdir)
        shutil.copytree(backup.workdir, self.workdir)

    def bytes_of_workdir(self) -> bytes:
        """Of all its files, also those that SQLite keeps beside the database."""
        return b"".join(path.read_bytes() for path in sorted(self.workdir.rglob("*")) if path.is_file())

    def opening(self, attempt: int = 1, round_number: int = 1, model: bytes | None = None) -> tuple[Opening, bytes]:
        wire, _ = self.federation.opening(round_number, attempt, model)
        return reopen(self.federation.terms, wire), wire

    def vector(self, first: int = 0) -> Words:
        words = self.federation.terms.vector.words
        return np.arange(first, first + words, dtype=np.uint32)

    def begin(
        self, journal: Journal, attempt: int = 1, *, trains: bool = True, model: bytes | None = None
    ) -> AttemptSecrets:
        """Draw, unless it is drawn, and start an attempt; its secrets."""
        opening, wire = self.opening(attempt, model=model)
        if journal.drawn(opening.ad.model, trains=trains) is None:
            journal.draw(opening.ad, self.vector(), trains=trains)
        secrets = AttemptSecrets.fresh(opening.base)
        journal.start(opening, wire, secrets, trains=trains)
        return secrets

    def go(self, journal: Journal, *stages: Stage) -> None:
        """Take these steps of the attempt."""
        for stage in stages:
            journal.step(stage, step_of(stage), AGREED if stage is Stage.AGREED else ())

    def saved(self, journal: Journal) -> SavedAttempt:
        """The attempt that is going on."""
        saved = journal.attempt(self.federation.terms.roster.digest)
        assert saved is not None
        return saved


def step_of(stage: Stage) -> Step:
    """Larger than one page of the database."""
    return Step(f"received at {stage.name} ".encode() * 300, f"sent at {stage.name} ".encode() * 300)


def up_to(stage: Stage) -> tuple[Stage, ...]:
    """All steps until this one."""
    return tuple(each for each in STAGES if each <= stage)
