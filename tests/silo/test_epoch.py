from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedclip_secure.errors import DataError, TrustError
from fedclip_secure.pki.epoch_file import Epoch
from fedclip_secure.secagg.keys import AttemptSecrets
from fedclip_secure.secagg.silo_session import Stage
from fedclip_secure.silo.run.journal import Journal
from fedclip_secure.silo.run.recovery import look, recover
from tests.fakes import Federation
from tests.silo.desk import AGREED, STAGES, Desk, up_to
from tests.silo.memory import Hold, Hub, Leaves, Silo, run_with_kills, silos

A, B, C = (letter * 32 for letter in (b"a", b"b", b"c"))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk.enrolled(tmp_path / "desk")


def _number(desk: Desk) -> int:
    epoch = Epoch.load(desk.epoch)
    assert epoch is not None
    return epoch.number


def _models(desk: Desk) -> tuple[tuple[bytes, bool], ...]:
    epoch = Epoch.load(desk.epoch)
    assert epoch is not None
    return epoch.models


def _refused(desk: Desk) -> None:
    with pytest.raises(TrustError, match=r"journal\.sqlite': does not match .*epoch: .*run `fedclip-silo recover`"):
        desk.open()


# The file


def test_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    for epoch in (Epoch(), Epoch(12, b"j" * 16, ((A, True), (B, False), (B, True)))):
        epoch.save(tmp_path / "epoch")
        assert Epoch.load(tmp_path / "epoch") == epoch
        assert (tmp_path / "epoch").stat().st_mode & 0o777 == 0o600
    assert Epoch.load(tmp_path / "none") is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"epoch",
        b"epoch 3\n",
        b"epoch one -\n",
        b"number 3 -\n",
        b"epoch 3 - 4\n",
        b"epoch 3 00ff\n",
        b"epoch 3 zz\n",
        b"\xff\xfe",
        b"epoch 3 -\n" + A.hex().encode(),
        b"epoch 3 -\n" + A.hex().encode()[:-2] + b" 1\n",
        b"epoch 3 -\n" + A.hex().encode() + b" 1 1\n",
        b"epoch 3 -\nzz 1\n",
    ],
)
def test_damaged_file_is_refused_and_its_remedy_helps(desk: Desk, text: bytes) -> None:
    journal = desk.open()
    desk.begin(journal)
    desk.go(journal, *up_to(Stage.UPLOADED))
    journal.close()
    desk.epoch.write_bytes(text)
    said = r"epoch': .*remove it and run `fedclip-silo recover`"
    with pytest.raises(DataError, match=said):
        desk.open()
    with pytest.raises(DataError, match=said):
        recover(desk.workdir, desk.epoch)
    desk.epoch.unlink()
    _refused(desk)
    recover(desk.workdir, desk.epoch)
    desk.open().close()


# The number


def test_each_step_raises_the_number_by_one_in_both_places(desk: Desk) -> None:
    journal, opening = desk.open(), desk.opening()
    assert _number(desk) == 0
    steps: list[Callable[[], object]] = [
        lambda: journal.draw(opening[0].ad, desk.vector(), trains=True),
        lambda: journal.start(*opening, AttemptSecrets.fresh(opening[0].base), trains=True),
        *(lambda stage=stage: desk.go(journal, stage) for stage in STAGES),
        journal.leave,
        lambda: journal.abandon(journal.models()[0]),
        journal.recover,
    ]
    for taken, step in enumerate(steps, start=1):
        step()
        assert _number(desk) == taken
        assert journal.matches_epoch()
    journal.close()


def test_file_names_the_models_over_which_a_vector_may_have_left(desk: Desk) -> None:
    journal = desk.open()
    desk.begin(journal, 1, model=A)
    for stage in up_to(Stage.SHARED):
        desk.go(journal, stage)
        assert _models(desk) == ()
    desk.go(journal, Stage.UPLOADED)
    assert _models(desk) == ((A, True),)
    desk.begin(journal, 2, model=B, trains=False)
    desk.go(journal, *up_to(Stage.DONE))
    assert _models(desk) == ((A, True), (B, False))
    journal.abandon(journal.models()[0])
    assert len(_models(desk)) == 1
    journal.close()


@pytest.mark.parametrize("step", [*range(len(STAGES) + 2), "leave", "abandon", "recover"])
def test_kill_between_database_and_file_is_healed_after_every_step(desk: Desk, step: int | str) -> None:
    journal, opening = desk.open(), desk.opening()
    ways: list[Callable[[], object]] = [
        lambda: journal.draw(opening[0].ad, desk.vector(), trains=True),
        lambda: journal.start(*opening, AttemptSecrets.fresh(opening[0].base), trains=True),
        *(lambda stage=stage: desk.go(journal, stage) for stage in STAGES),
    ]
    taken = step if isinstance(step, int) else 6
    for way in ways[:taken]:
        way()
    before = desk.epoch.read_bytes()
    if isinstance(step, int):
        ways[step]()
    elif step == "abandon":
        journal.abandon(journal.models()[0])
    else:
        getattr(journal, step)()
    models, newest = journal.models(), desk.epoch.read_bytes()
    journal.close()
    desk.epoch.write_bytes(before)
    again = desk.open()
    assert again.models() == models
    assert desk.epoch.read_bytes() == newest
    again.close()


def test_disk_that_refuses_the_file_stops_the_step_and_is_healed_later(desk: Desk) -> None:
    journal = desk.open()
    desk.begin(journal)
    desk.go(journal, Stage.JOINED)
    before = desk.epoch.read_bytes()
    desk.epoch.unlink()
    desk.epoch.mkdir()
    with pytest.raises(DataError, match="epoch': cannot be written"):
        desk.go(journal, Stage.SHARED)
    journal.close()
    desk.epoch.rmdir()
    desk.epoch.write_bytes(before)
    again = desk.open()
    assert Stage.SHARED in desk.saved(again).steps
    assert _number(desk) == 4
    again.close()


# A journal that is not the newest


def _used(desk: Desk, stage: Stage = Stage.RELEASED) -> None:
    journal = desk.open()
    desk.begin(journal)
    desk.go(journal, *up_to(stage))
    journal.close()


@pytest.mark.parametrize("behind", [1, 2, 5])
def test_restored_backup_is_refused_however_few_steps_it_lacks(desk: Desk, tmp_path: Path, behind: int) -> None:
    journal = desk.open()
    desk.begin(journal)
    stages = up_to(Stage.RELEASED)
    desk.go(journal, *stages[:-behind])
    backup = desk.copy(tmp_path / "backup")
    desk.go(journal, *stages[-behind:])
    journal.close()
    desk.restore(backup)
    before = desk.epoch.read_bytes(), desk.database.read_bytes()
    _refused(desk)
    _refused(desk)
    assert (desk.epoch.read_bytes(), desk.database.read_bytes()) == before


@pytest.mark.parametrize("behind", [2, 3, 5])
def test_file_that_is_more_than_one_step_behind_is_refused(desk: Desk, behind: int) -> None:
    journal = desk.open()
    desk.begin(journal)
    stages = up_to(Stage.RELEASED)
    desk.go(journal, *stages[:-behind])
    older = desk.epoch.read_bytes()
    desk.go(journal, *stages[-behind:])
    journal.close()
    desk.epoch.write_bytes(older)
    _refused(desk)


def test_missing_file_is_refused_and_so_is_a_missing_journal(desk: Desk, tmp_path: Path) -> None:
    _used(desk)
    lost = desk.copy(tmp_path / "lost")
    desk.epoch.unlink()
    _refused(desk)
    lost.database.unlink()
    _refused(lost)


def test_file_that_lacks_a_model_is_refused_though_its_number_is_right(desk: Desk) -> None:
    _used(desk)
    desk.epoch.write_text(desk.epoch.read_text().splitlines()[0] + "\n")
    _refused(desk)


def test_another_journal_under_the_same_identity_is_refused_though_it_has_taken_as_many_steps(
    desk: Desk, tmp_path: Path
) -> None:
    _used(desk)
    other = Desk.enrolled(tmp_path / "other")
    _used(other)
    for theirs in (other.epoch.read_bytes(), _one_less(other)):
        assert _number(desk) - 1 <= int(theirs.split()[1]) <= _number(desk)
        other.epoch.write_bytes(desk.epoch.read_bytes())
        _refused(other)
        desk.epoch.write_bytes(theirs)
        _refused(desk)
        desk.epoch.write_bytes(other.epoch.read_bytes())


def _one_less(desk: Desk) -> bytes:
    epoch = Epoch.load(desk.epoch)
    assert epoch is not None
    replace(epoch, number=epoch.number - 1).save(desk.epoch)
    return desk.epoch.read_bytes()


def test_second_workdir_under_one_identity_is_refused_while_the_first_is_open(desk: Desk) -> None:
    journal = desk.open()
    with pytest.raises(DataError, match="another fedclip-silo works under this identity; wait for it, or stop it"):
        Journal(desk.folder / "second", desk.epoch)
    assert not (desk.folder / "second").exists()
    journal.close()


@pytest.mark.parametrize("lost", ["workdir", "journal"])
def test_journal_that_never_took_a_step_may_be_lost(desk: Desk, lost: str) -> None:
    desk.open().close()
    if lost == "workdir":
        shutil.rmtree(desk.workdir)
    else:
        desk.database.unlink()
    journal = desk.open()
    desk.begin(journal)
    desk.go(journal, *up_to(Stage.DONE))
    journal.close()
    desk.open().close()


def test_silo_that_has_lost_both_does_not_go_on(desk: Desk) -> None:
    _used(desk)
    shutil.rmtree(desk.workdir)
    desk.epoch.unlink()
    _refused(desk)
    with pytest.raises(TrustError, match=r"neither the journal nor the epoch file is left.*restore one of them"):
        recover(desk.workdir, desk.epoch)
    _refused(desk)


# Recovery


def _recovered(desk: Desk) -> Journal:
    journal = desk.open(recovering=True)
    assert not journal.matches_epoch()
    journal.recover()
    journal.close()
    return desk.open()


def test_after_recovery_no_model_known_to_journal_or_file_is_drawn_for_again_and_a_new_one_is(
    desk: Desk, tmp_path: Path
) -> None:
    journal = desk.open()
    desk.begin(journal, 1, model=A)
    desk.go(journal, *up_to(Stage.JOINED))
    backup = desk.copy(tmp_path / "backup")
    desk.begin(journal, 2, model=B)  # the backup knows nothing of it
    desk.go(journal, *up_to(Stage.UPLOADED))
    journal.close()
    desk.restore(backup)
    _refused(desk)
    again = _recovered(desk)
    for model in (A, B):
        drawn = again.drawn(model, trains=True)
        assert drawn is not None
        assert (drawn.vector, drawn.stage) == (None, Stage.UPLOADED)
        assert again.vector(drawn) is None
        with pytest.raises(ValueError, match="a second one"):
            again.draw(desk.opening(3, model=model)[0].ad, desk.vector(), trains=True)
    assert again.drawn(C, trains=True) is None
    again.draw(desk.opening(3, model=C)[0].ad, desk.vector(), trains=True)
    assert _models(desk) == ((A, True), (B, True))
    again.close()


def test_recovery_of_a_lost_journal_knows_the_models_of_the_file_and_whether_updates_travelled(desk: Desk) -> None:
    journal = desk.open()
    desk.begin(journal, 1, model=A)
    desk.go(journal, *up_to(Stage.DONE))
    desk.begin(journal, 2, model=B, trains=False)
    desk.go(journal, *up_to(Stage.DONE))
    journal.close()
    desk.database.unlink()
    again = _recovered(desk)
    assert {(drawn.model, drawn.trains) for drawn in again.models()} == {(A, True), (B, False)}
    assert again.drawn(B, trains=True) is None
    again.close()


def test_recovery_drops_the_stale_attempt_and_its_secrets(desk: Desk, tmp_path: Path) -> None:
    journal = desk.open()
    secrets = desk.begin(journal)
    desk.go(journal, *up_to(Stage.SHARED))
    backup = desk.copy(tmp_path / "backup")
    desk.go(journal, Stage.UPLOADED)
    journal.close()
    desk.restore(backup)
    assert secrets.b in desk.bytes_of_workdir()
    again = _recovered(desk)
    assert again.attempt(desk.federation.terms.roster.digest) is None
    left = desk.bytes_of_workdir()
    assert not any(secret in left for secret in (secrets.keys.seed, secrets.b, secrets.share_seal.private))
    assert b"sent at " not in left
    again.close()


def test_names_agreed_to_before_stay_after_a_recovery(desk: Desk) -> None:
    _used(desk, Stage.AGREED)
    desk.epoch.unlink()
    again = _recovered(desk)
    assert again.models()[0].agreed == AGREED
    assert again.models()[0].stage is Stage.AGREED
    again.close()


def test_newest_journal_that_turns_up_after_a_recovery_is_refused(desk: Desk, tmp_path: Path) -> None:
    journal = desk.open()
    desk.begin(journal)
    backup = desk.copy(tmp_path / "backup")
    desk.go(journal, *up_to(Stage.RELEASED))
    journal.close()
    newest = desk.copy(tmp_path / "newest")
    desk.restore(backup)
    _recovered(desk).close()
    for stale in (newest, backup):
        desk.restore(stale)
        _refused(desk)


def test_number_goes_on_from_the_higher_of_the_two(desk: Desk, tmp_path: Path) -> None:
    journal = desk.open()
    desk.begin(journal)
    backup = desk.copy(tmp_path / "backup")
    desk.go(journal, *up_to(Stage.RELEASED))
    journal.close()
    file_ahead = desk.copy(tmp_path / "file-ahead")
    file_ahead.restore(backup)
    desk.epoch.write_bytes(backup.epoch.read_bytes())
    for case in (desk, file_ahead):
        _recovered(case).close()
        assert _number(case) == 8


def test_look_puts_a_damaged_journal_aside_and_recover_goes_on_without_it(desk: Desk) -> None:
    _used(desk)
    desk.database.write_bytes(b"garbage" * 1000)
    standing = look(desk.workdir, desk.epoch)
    assert not standing.matches
    assert standing.damaged is not None
    assert standing.damaged.read_bytes() == b"garbage" * 1000
    _refused(desk)
    assert recover(desk.workdir, desk.epoch) == 1
    again = desk.open()
    assert [drawn.vector for drawn in again.models()] == [None]
    again.close()


def test_looking_changes_nothing(desk: Desk, tmp_path: Path) -> None:
    _used(desk)
    for matches in (True, False):
        if not matches:
            desk.epoch.write_text("epoch 99 -\n")
        before = desk.epoch.read_bytes(), desk.database.read_bytes()
        standing = look(desk.workdir, desk.epoch)
        assert (standing.matches, standing.damaged) == (matches, None)
        assert (desk.epoch.read_bytes(), desk.database.read_bytes()) == before


# In a run


def _restored(party: Silo, backup: Path | None) -> None:
    """Put the workdir back as it was, or lose it; see that it is refused; recover."""
    party.journal.close()
    shutil.rmtree(party.workdir)
    if backup is not None:
        shutil.copytree(backup, party.workdir)
    with pytest.raises(TrustError, match="does not match"):
        party.open_journal()
    recover(party.workdir, party.epoch)


@pytest.mark.parametrize("stage", ["bundles", "uploads", "agrees", "unmasks"])
def test_restored_journal_sends_nothing_more_into_the_attempt_that_is_open_and_takes_part_in_the_next_round(
    tmp_path: Path, stage: str
) -> None:
    hub = Hub(Federation(4, rounds=2))
    parties = silos(hub, tmp_path)
    victim, backup = parties["silo-000"], tmp_path / "backup"
    left: list[tuple[int, str, bytes]] = []

    async def back_up(attempt: int, name: str) -> None:
        if (attempt, name) == (1, "key-ads"):
            shutil.copytree(victim.workdir, backup)

    def meanwhile() -> None:
        assert hub.attempt == 1
        left.extend(victim.link.sent)
        _restored(victim, backup)
        hub.gone.add(victim.name)
        hub.advance()

    victim.link.before = back_up
    run_with_kills(parties.values(), victim, [(Hold(1, stage), "after")], meanwhile)
    assert [sent for sent in victim.link.sent if sent[0] == 1] == left
    assert victim.sent("uploads", 2), "it took no part in the next round"
    assert len(victim.trainer.trained) == len(set(victim.trainer.trained)) == 2


@pytest.mark.parametrize(("stage", "lost"), [("bundles", False), ("uploads", False), ("uploads", True)])
def test_model_that_may_have_been_signed_over_is_sat_out_in_every_later_attempt(
    tmp_path: Path, stage: str, lost: bool
) -> None:
    hub = Hub(Federation(4, rounds=2))
    parties = silos(hub, tmp_path)
    victim, backup = parties["silo-000"], tmp_path / "backup"

    async def back_up(attempt: int, name: str) -> None:
        if (attempt, name) == (1, "key-ads"):
            shutil.copytree(victim.workdir, backup)

    def meanwhile() -> None:
        _restored(victim, None if lost else backup)
        hub.waits_for, hub.sits_out = {1: set(parties) - {victim.name}}, {2: {victim.name}}
        hub.open(1)

    victim.link.before = back_up
    for name in set(parties) - {victim.name}:
        parties[name].link.after = Leaves(1, stage)
    run_with_kills(parties.values(), victim, [(Hold(1, stage), "after")], meanwhile)
    assert {attempt for attempt, _, _ in victim.link.sent} == {1, 3}
    assert victim.link.idle.count(True) == 1
    assert [line for line in victim.said if "sitting out until the model has moved on" in line]
    assert victim.trainer.trained.count(hub.federation.model.digest) == 1
    assert victim.sent("uploads", 3)


def test_lost_journal_of_a_silo_that_had_sent_no_vector_draws_anew(tmp_path: Path) -> None:
    hub = Hub(Federation(4, rounds=1))
    parties = silos(hub, tmp_path)
    victim = parties["silo-000"]

    def meanwhile() -> None:
        _restored(victim, None)
        hub.open(1)

    run_with_kills(parties.values(), victim, [(Hold(1, "bundles"), "after")], meanwhile)
    assert victim.trainer.trained == [hub.federation.model.digest] * 2
    assert victim.sent("uploads", 2)
