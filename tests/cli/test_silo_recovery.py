"""`recover`, `train --abandon-round` and `give-up`: what a person sees whose silo or round is in trouble."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from fedclip_cli import agg, silo

from fedclip_secure.config.silo import read_silo, write_silo
from fedclip_secure.secagg.keys import AttemptSecrets
from fedclip_secure.secagg.opening_checks import reopen
from fedclip_secure.secagg.silo_session import Stage
from fedclip_secure.silo.run.journal import Journal, Step
from tests.aggregator.site import NAMES, Site
from tests.cli.test_agg_mistakes import refused, run
from tests.fakes import Federation


@dataclass
class Bench:
    """A silo.yaml with an enrolled identity, and a journal that a test fills by hand."""

    config: Path
    site: Site

    @property
    def workdir(self) -> Path:
        return Path(read_silo(self.config).workdir)

    @property
    def epoch(self) -> Path:
        return self.site.identities["lab-a"].epoch_path

    def go(self, *stages: Stage, attempt: int = 1) -> None:
        federation = Federation(3)
        wire, _ = federation.opening(attempt=attempt)
        journal = Journal(self.workdir, self.epoch)
        opening = reopen(federation.terms, wire)
        if attempt == 1:
            journal.draw(opening.ad, federation.record().open_vector(), trains=True)
        journal.start(opening, wire, AttemptSecrets.fresh(opening.base), trains=True)
        for stage in stages:
            journal.step(stage, Step(b"in", b"out"), NAMES[:3] if stage is Stage.AGREED else ())
        journal.close()

    def told(self, *arguments: str, answer: str | None = None) -> str:
        result = run(*arguments, "--config", str(self.config), program=silo.main, input=answer)
        assert result.exit_code == 0, result.output
        return result.output

    def refused(self, said: str, *arguments: str) -> str:
        return refused(said, *arguments, "--config", str(self.config), program=silo.main)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    site = Site.frozen(tmp_path, 3)
    config = tmp_path / "lab-a" / "silo.yaml"
    write_silo(config, "lab-a", "images", None)
    config.write_text(config.read_text().replace("identity: identity", "identity: ."))
    return Bench(config, site)


STAGES = tuple(Stage)


def test_recover_of_a_silo_in_order_says_how_far_it_has_come(bench: Bench) -> None:
    assert "has taken part in no round yet" in bench.told("recover")
    bench.go(*STAGES[1:5])
    told = bench.told("recover")
    assert "the journal is in order" in told
    assert "round 1: this silo has come to stage agreed" in told
    assert "agreed to the sum over lab-a, lab-b, lab-c: over this model it signs no other names" in told
    assert "next: `fedclip-silo train`" in told


def test_recover_of_a_restored_journal_explains_asks_and_goes_on(bench: Bench) -> None:
    bench.go(*STAGES[1:3])
    backup = bench.config.parent / "backup"
    shutil.copytree(bench.workdir, backup)
    bench.go(*STAGES[1:5], attempt=2)
    shutil.rmtree(bench.workdir)
    shutil.copytree(backup, bench.workdir)
    bench.refused("run `fedclip-silo recover`", "train", "--abandon-round", "1")
    before = (bench.workdir / "journal.sqlite").read_bytes(), bench.epoch.read_bytes()
    result = run("recover", "--config", str(bench.config), program=silo.main, input="n\n")
    assert result.exit_code == 1
    assert "it was lost, or restored from a backup" in result.output
    assert "nothing was changed" in result.output
    assert ((bench.workdir / "journal.sqlite").read_bytes(), bench.epoch.read_bytes()) == before
    assert "will not sign over 1 model(s) again" in bench.told("recover", "--yes")
    told = bench.told("recover")
    assert "its update is lost: it sits out until the model has moved on" in told


def test_recover_puts_a_damaged_journal_aside_and_keeps_it(bench: Bench) -> None:
    bench.go(*STAGES[1:4])
    database = bench.workdir / "journal.sqlite"
    database.write_bytes(b"no database at all")
    told = bench.told("recover", answer="y\n")
    assert "put aside as" in told
    assert [path.read_bytes() for path in bench.workdir.glob("journal.sqlite.damaged-*")] == [b"no database at all"]
    assert "will not sign over 1 model(s) again" in told


def test_recover_with_nothing_left_refuses_to_guess(bench: Bench) -> None:
    bench.go(*STAGES[1:4])
    (bench.workdir / "journal.sqlite").unlink()
    bench.epoch.unlink()
    bench.refused("neither the journal nor the epoch file is left", "recover", "--yes")


def test_giving_a_round_up_says_what_it_can_disclose_and_asks(bench: Bench) -> None:
    bench.go(*STAGES[1:5])
    result = run("train", "--abandon-round", "1", "--config", str(bench.config), program=silo.main, input="n\n")
    assert result.exit_code == 1
    assert "whoever sees both sums can take their difference" in result.output
    assert "may know it already" not in result.output
    assert "round 1 is not given up" in result.output
    bench.go(*STAGES[1:6], attempt=2)
    result = run("train", "--abandon-round", "1", "--config", str(bench.config), program=silo.main, input="n\n")
    assert "has even helped to open the sum: the coordinator may know it already" in result.output


def test_the_coordinator_gives_up_only_what_waits_for_unmasking(bench: Bench) -> None:
    folder = str(bench.site.home.folder)
    said = "no attempt waits for unmasking answers"
    refused(said, "give-up", "--dir", folder, "--yes", program=agg.main)
    with bench.site.store() as store:
        store.open_attempt(1, 1, b"opening", b"key", 0.0)
        for _ in range(3):
            store.close_phase(1)
    refused(said, "give-up", "--dir", folder, "--yes", program=agg.main)
    with bench.site.store() as store:
        store.close_phase(1)
    assert run("give-up", "--dir", folder, program=agg.main, input="n\n").exit_code == 1
    assert "round 1, attempt 1 is given up" in run("give-up", "--dir", folder, "--yes", program=agg.main).output
    with bench.site.store() as store:
        last = store.last_attempt()
        assert last is not None
        assert last.given_up
