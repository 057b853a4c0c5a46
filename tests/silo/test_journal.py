from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fedclip_secure.disk import user_name
from fedclip_secure.errors import DataError
from fedclip_secure.pki.epoch_file import Epoch
from fedclip_secure.secagg.keys import AttemptSecrets
from fedclip_secure.secagg.opening_checks import Position
from fedclip_secure.secagg.silo_session import Stage
from fedclip_secure.silo.run.journal import DamagedJournalError, Journal
from tests.disk import file_limit
from tests.fakes import Federation
from tests.silo.desk import AGREED, STAGES, Desk, step_of, up_to
from tests.users import give_away, without_privileges
from tests.waiting import BOUND

OTHER_MODEL = b"m" * 32


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk.enrolled(tmp_path / "desk")


def _same(desk: Desk, killed: Desk, journal: Journal, again: Journal) -> None:
    """Both journals say the same."""
    roster = desk.federation.terms.roster.digest
    assert again.models() == journal.models()
    assert again.position(roster) == journal.position(roster)
    assert again.attempt(roster) == journal.attempt(roster)
    for mine, theirs in zip(journal.models(), again.models(), strict=True):
        if mine.vector is not None:
            assert np.array_equal(again.open_vector(theirs), journal.open_vector(mine))
    assert killed.epoch.read_bytes() == desk.epoch.read_bytes()


def test_what_was_written_is_there_after_a_kill_at_any_step(desk: Desk, tmp_path: Path) -> None:
    journal, model = desk.open(), desk.federation.model.digest
    opening, wire = desk.opening()
    secrets = AttemptSecrets.fresh(opening.base)
    steps: list[Callable[[], object]] = [
        lambda: journal.draw(opening.ad, desk.vector(), trains=True),
        lambda: journal.start(opening, wire, secrets, trains=True),
        *(lambda stage=stage: desk.go(journal, stage) for stage in STAGES),
        journal.leave,
        lambda: desk.begin(journal, 2, model=OTHER_MODEL),
        lambda: journal.abandon(journal.models()[-1]),
    ]
    for index, step in enumerate(steps):
        step()
        killed = desk.copy(tmp_path / f"killed-{index}")
        again = killed.open()
        _same(desk, killed, journal, again)
        again.close()
    assert index == 10
    assert journal.drawn(model, trains=True) is not None
    journal.close()


def test_attempt_is_read_back_with_its_secrets_and_the_bytes_of_all_stages(desk: Desk) -> None:
    journal = desk.open()
    secrets = desk.begin(journal, 3)
    desk.go(journal, *up_to(Stage.RELEASED))
    journal.close()
    again = desk.open()
    saved = desk.saved(again)
    assert saved.secrets == secrets
    assert saved.secrets.share_seal.public == secrets.share_seal.public
    assert saved.trains
    assert saved.steps == {stage: step_of(stage) for stage in up_to(Stage.RELEASED)}
    assert again.position(desk.federation.terms.roster.digest) == Position(1, 3, desk.federation.model.digest)
    assert again.attempt(b"another roster".ljust(32)) is None
    assert again.position(b"another roster".ljust(32)) == Position()
    again.close()


@pytest.mark.parametrize("reached", STAGES)
def test_no_step_backward_or_twice_is_taken(desk: Desk, reached: Stage) -> None:
    journal = desk.open()
    desk.begin(journal)
    desk.go(journal, *up_to(reached))
    before, epoch = journal.models(), desk.epoch.read_bytes()
    for stage in up_to(reached):
        with pytest.raises(ValueError, match=f"{stage.name} is a step backward"):
            desk.go(journal, stage)
    assert journal.models() == before
    assert desk.epoch.read_bytes() == epoch
    assert max(desk.saved(journal).steps) is reached
    journal.close()


def test_step_of_no_attempt_is_refused(desk: Desk) -> None:
    journal = desk.open()
    desk.begin(journal)
    journal.leave()
    with pytest.raises(ValueError, match=r"UPLOADED is .* a step of no attempt"):
        desk.go(journal, Stage.UPLOADED)
    assert journal.models()[0].stage is Stage.OPENED
    journal.close()


def test_model_stays_at_the_farthest_stage_of_all_its_attempts(desk: Desk) -> None:
    journal = desk.open()
    desk.begin(journal, 1)
    desk.go(journal, *up_to(Stage.UPLOADED))
    desk.begin(journal, 2)
    desk.go(journal, Stage.JOINED)
    assert journal.models()[0].stage is Stage.UPLOADED
    assert list(desk.saved(journal).steps) == [Stage.JOINED]
    journal.close()


# One vector for one model


def test_vector_that_has_not_left_is_replaced_and_its_file_goes(desk: Desk) -> None:
    journal, ad = desk.open(), desk.opening()[0].ad
    first = journal.draw(ad, desk.vector(), trains=True)
    second = journal.draw(ad, desk.vector(100), trains=True)
    assert journal.models() == [second]
    assert np.array_equal(journal.open_vector(second), desk.vector(100))
    assert journal.vector(first) is None
    assert len(list((desk.workdir / "vectors").iterdir())) == 1
    journal.close()


@pytest.mark.parametrize("reached", [stage for stage in STAGES if stage >= Stage.UPLOADED])
def test_no_second_vector_is_drawn_over_a_model_once_the_first_may_have_left(desk: Desk, reached: Stage) -> None:
    journal = desk.open()
    desk.begin(journal)
    desk.go(journal, *up_to(reached))
    before = desk.bytes_of_workdir()
    for trains in (True, False):
        with pytest.raises(ValueError, match="a second one could disclose it"):
            journal.draw(desk.opening(2)[0].ad, desk.vector(100), trains=trains)
    assert desk.bytes_of_workdir() == before
    journal.close()


def test_counts_over_a_model_keep_no_later_run_from_training_on_it_but_from_counting_again(desk: Desk) -> None:
    journal, ad = desk.open(), desk.opening()[0].ad
    desk.begin(journal, trains=False)
    desk.go(journal, *up_to(Stage.DONE))
    assert journal.drawn(ad.model, trains=True) is None
    with pytest.raises(ValueError, match="a second one"):
        journal.draw(ad, desk.vector(), trains=False)
    journal.draw(ad, desk.vector(100), trains=True)
    journal.close()


def test_closing_round_that_sent_nothing_does_not_hide_the_update_that_another_run_sent(desk: Desk) -> None:
    journal, model = desk.open(), desk.federation.model.digest
    desk.begin(journal, 1, trains=False)
    desk.go(journal, Stage.JOINED)
    desk.begin(journal, 2, trains=True)
    desk.go(journal, *up_to(Stage.UPLOADED))
    drawn = journal.drawn(model, trains=False)
    assert drawn is not None
    assert drawn.trains
    assert drawn.stage is Stage.UPLOADED
    journal.close()


def test_drawing_for_another_model_removes_the_vector_and_keeps_the_record(desk: Desk) -> None:
    journal = desk.open()
    desk.begin(journal)
    desk.go(journal, *up_to(Stage.UPLOADED))
    second = journal.draw(desk.opening(model=OTHER_MODEL)[0].ad, desk.vector(100), trains=True)
    first = journal.drawn(desk.federation.model.digest, trains=True)
    assert first is not None
    assert first.stage is Stage.UPLOADED
    assert journal.vector(first) is None
    assert second.vector is not None
    assert [path.name for path in (desk.workdir / "vectors").iterdir()] == [f"{second.vector.hex()}.words"]
    journal.close()


def test_vector_stays_until_the_result_is_noted_and_its_file_goes_then(desk: Desk) -> None:
    journal = desk.open()
    desk.begin(journal)
    for stage in up_to(Stage.RELEASED):
        desk.go(journal, stage)
        assert np.array_equal(journal.open_vector(journal.models()[0]), desk.vector())
    desk.go(journal, Stage.DONE)
    (drawn,) = journal.models()
    assert (drawn.vector, drawn.stage) == (None, Stage.DONE)
    assert list((desk.workdir / "vectors").iterdir()) == []
    journal.close()


def test_vector_file_belongs_to_its_owner_alone(desk: Desk) -> None:
    journal = desk.open()
    desk.begin(journal)
    assert (desk.workdir / "vectors").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (desk.workdir / "vectors").iterdir()} == {0o600}
    journal.close()


@pytest.mark.parametrize("damage", ["gone", "empty", "a word short", "cut within a word", "longer", "one bit"])
def test_vector_that_is_not_as_it_was_drawn_is_lost(desk: Desk, damage: str) -> None:
    journal = desk.open()
    drawn = journal.draw(desk.opening()[0].ad, desk.vector(), trains=True)
    (path,) = (desk.workdir / "vectors").iterdir()
    body = path.read_bytes()
    changed = {
        "empty": b"",
        "a word short": body[:-4],
        "cut within a word": body[:-2],
        "longer": body + bytes(4),
        "one bit": bytes([body[0] ^ 1]) + body[1:],
    }
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    assert journal.vector(drawn) is None
    with pytest.raises(DataError, match=r"vectors': the vector of round 1 is lost"):
        journal.open_vector(drawn)
    journal.close()


# Agreed names


def test_agreed_names_outlive_restarts_and_later_attempts(desk: Desk) -> None:
    journal = desk.open()
    desk.begin(journal, 1)
    desk.go(journal, *up_to(Stage.AGREED))
    assert journal.models()[0].agreed == AGREED
    journal.leave()
    desk.begin(journal, 2)
    desk.go(journal, *up_to(Stage.UPLOADED))
    journal.close()
    again = desk.open()
    assert again.models()[0].agreed == AGREED
    assert again.models()[0].stage is Stage.AGREED
    again.close()


# Secrets


def _secrets(secrets: AttemptSecrets) -> list[bytes]:
    return [secrets.keys.seed, secrets.b, secrets.share_seal.private]


def test_secrets_and_stored_bytes_stay_until_the_result_is_noted_and_are_gone_from_the_disk_then(desk: Desk) -> None:
    journal = desk.open()
    secrets = desk.begin(journal)
    for stage in up_to(Stage.RELEASED):
        desk.go(journal, stage)
        assert all(secret in desk.database.read_bytes() for secret in _secrets(secrets)), stage
    desk.go(journal, Stage.DONE)
    left = desk.bytes_of_workdir()
    assert not any(secret in left for secret in _secrets(secrets))
    assert not any(f"at {stage.name} ".encode() in left for stage in up_to(Stage.RELEASED))
    assert desk.saved(journal).steps == {Stage.DONE: step_of(Stage.DONE)}
    journal.close()


@pytest.mark.parametrize("reached", up_to(Stage.RELEASED))
@pytest.mark.parametrize("end", ["leave", "start", "abandon"])
def test_secrets_and_stored_bytes_of_an_attempt_that_is_over_are_gone_from_the_disk(
    desk: Desk, reached: Stage, end: str
) -> None:
    journal = desk.open()
    secrets = desk.begin(journal)
    desk.go(journal, *up_to(reached))
    if end == "start":
        kept = desk.begin(journal, 2)
    elif end == "leave":
        journal.leave()
    else:
        journal.abandon(journal.models()[0])
    left = desk.bytes_of_workdir()
    assert not any(secret in left for secret in _secrets(secrets))
    assert b"sent at " not in left
    assert b"received at " not in left
    if end == "start":
        assert desk.saved(journal).secrets == kept
    else:
        assert journal.attempt(desk.federation.terms.roster.digest) is None
    journal.close()


def test_secrets_are_not_shown_where_an_attempt_is_printed(desk: Desk) -> None:
    journal = desk.open()
    secrets = desk.begin(journal)
    desk.go(journal, Stage.JOINED)
    shown = repr(desk.saved(journal))
    assert "sent at" not in shown
    assert not any(repr(secret)[2:-1] in shown for secret in _secrets(secrets))
    journal.close()


# What a person gave up


def test_abandoned_model_can_be_drawn_for_again_and_a_row_says_so(desk: Desk) -> None:
    journal = desk.open()
    desk.begin(journal)
    desk.go(journal, *up_to(Stage.AGREED))
    journal.abandon(journal.models()[0])
    assert journal.models() == []
    journal.draw(desk.opening(2)[0].ad, desk.vector(100), trains=True)
    assert journal.models()[0].agreed == ()
    journal.close()
    sql = sqlite3.connect(desk.database)
    rows = sql.execute("SELECT round, model, agreed FROM abandoned").fetchall()
    sql.close()
    assert rows == [(1, desk.federation.model.digest, " ".join(AGREED))]


# Damage


def _used(desk: Desk) -> None:
    journal = desk.open()
    desk.begin(journal)
    desk.go(journal, *up_to(Stage.SHARED))
    journal.close()


@pytest.mark.parametrize("part", [0.01, 0.3, 0.5, 0.9, 0.99])
def test_cut_journal_is_refused_with_the_remedy(desk: Desk, part: float) -> None:
    _used(desk)
    whole = desk.database.read_bytes()
    desk.database.write_bytes(whole[: int(part * len(whole))])
    for _ in range(2):  # and the refusal leaves no lock behind
        with pytest.raises(DamagedJournalError, match=r"journal\.sqlite': is damaged.*run `fedclip-silo recover`"):
            desk.open()
    assert len(desk.database.read_bytes()) == int(part * len(whole))


def _garbage(path: Path) -> None:
    path.write_bytes(b"garbage" * 1000)


def _foreign(path: Path) -> None:
    sql = sqlite3.connect(path)
    sql.execute("CREATE TABLE other (x)")
    sql.close()


def _newer(path: Path) -> None:
    sql = sqlite3.connect(path)
    sql.execute("PRAGMA user_version = 3")
    sql.close()


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (_garbage, DamagedJournalError, "is damaged .*run `fedclip-silo recover`"),
        (_foreign, DamagedJournalError, "is damaged .*it is no journal.*run `fedclip-silo recover`"),
        (_newer, DataError, "was written by a newer fedclip-silo; use that one"),
        (Path.mkdir, DataError, "cannot be used as the silo's journal .*set another `workdir`"),
    ],
)
def test_file_that_is_no_journal_is_refused_with_the_remedy_and_left_as_it_is(
    desk: Desk, damage: Callable[[Path], None], error: type[DataError], said: str
) -> None:
    desk.workdir.mkdir(parents=True)
    damage(desk.database)
    before = desk.database.read_bytes() if desk.database.is_file() else None
    with pytest.raises(error, match=rf"journal\.sqlite'?: {said}") as caught:
        desk.open()
    assert caught.value.exit_code == 1
    assert before is None or desk.database.read_bytes() == before
    assert Epoch.load(desk.epoch) == Epoch()


def test_newer_journal_is_not_put_down_as_damaged(desk: Desk) -> None:
    _used(desk)
    _newer(desk.database)
    with pytest.raises(DataError) as caught:
        desk.open(recovering=True)
    assert not isinstance(caught.value, DamagedJournalError)


@pytest.fixture
def shared_desk() -> Iterator[Desk]:
    """Of a silo whose identity is another user's; pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk.enrolled(Path(folder) / "desk")
        _used(desk)
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o777)
            give_away(path)
        yield desk
        for path in (desk.workdir, *desk.workdir.rglob("*")):
            path.chmod(0o777)


@pytest.mark.parametrize("mine", [False, True])
def test_journal_that_may_not_be_written_stops_before_anything_is_drawn(shared_desk: Desk, mine: bool) -> None:
    desk, before = shared_desk, shared_desk.database.read_bytes()
    for path in (*desk.workdir.rglob("*"), desk.workdir):
        path.chmod(0o555)
        if os.geteuid() == 0 and not mine:
            os.chown(path, 0, -1)
    ad, vector = desk.opening(model=OTHER_MODEL)[0].ad, desk.vector()
    with without_privileges(), pytest.raises(DataError) as caught:
        desk.open().draw(ad, vector, trains=True)
    who = "nobody" if os.geteuid() == 0 else user_name(os.geteuid())
    said = rf"': cannot be (used|written|locked).*let the user that runs this program, '{who}', write it"
    assert re.search(said, str(caught.value))
    assert desk.database.read_bytes() == before


def test_epoch_file_that_may_not_be_read_is_not_called_damaged(shared_desk: Desk) -> None:
    shared_desk.epoch.chmod(0)
    with (
        without_privileges(),
        pytest.raises(DataError, match=r"epoch': cannot be read \(.*\); let the user .* read it"),
    ):
        shared_desk.open()


@pytest.mark.parametrize("size", [0, 4096, 20480, 65536])
def test_full_disk_stops_a_step_and_nothing_of_it_is_kept(desk: Desk, size: int) -> None:
    journal = desk.open()
    desk.begin(journal)
    desk.go(journal, Stage.JOINED)
    before, epoch = desk.saved(journal), desk.epoch.read_bytes()
    large = step_of(Stage.SHARED)
    with (
        file_limit(size),
        pytest.raises(DataError, match=r"cannot be used .*\((disk I/O error|database or disk is full)\); free space"),
    ):
        journal.step(Stage.SHARED, type(large)(large.received * 20, large.sent * 20))
    journal.close()
    again = desk.open()
    assert desk.saved(again) == before
    assert desk.epoch.read_bytes() == epoch
    desk.go(again, Stage.SHARED)
    again.close()


def test_full_disk_stops_a_draw_and_the_vector_before_it_stays(desk: Desk) -> None:
    journal, ad = desk.open(), desk.opening()[0].ad
    drawn = journal.draw(ad, desk.vector(), trains=True)
    with file_limit(8), pytest.raises(DataError, match=r"\.words': cannot be written .*free space"):
        journal.draw(ad, desk.vector(100), trains=True)
    assert journal.models() == [drawn]
    assert np.array_equal(journal.open_vector(drawn), desk.vector())
    journal.close()


_SECOND = """
import sys
from pathlib import Path
from fedclip_secure.errors import DataError
from fedclip_secure.silo.run.journal import Journal
try:
    Journal(Path(sys.argv[1]), Path(sys.argv[2]))
except DataError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    ("workdir", "identity", "said"),
    [
        ("work", "", "another fedclip-silo works under this identity; wait for it, or stop it"),
        ("elsewhere", "", "another fedclip-silo works under this identity; wait for it, or stop it"),
        ("work", "copied", "another fedclip-silo uses this workdir; wait for it, or stop it"),
    ],
)
def test_second_process_is_refused_as_long_as_the_first_is_there(
    desk: Desk, workdir: str, identity: str, said: str
) -> None:
    (desk.folder / "copied").mkdir()
    journal = desk.open()
    command = [sys.executable, "-c", _SECOND, str(desk.folder / workdir), str(desk.folder / identity / "epoch")]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BOUND)
    assert second.returncode == 1
    assert said in second.stderr
    desk.begin(journal)
    journal.close()
    command = [sys.executable, "-c", _SECOND, str(desk.workdir), str(desk.epoch)]
    assert subprocess.run(command, capture_output=True, text=True, check=False, timeout=BOUND).stderr == ""


# Creation


def test_creation_that_broke_off_leaves_a_journal_that_can_be_used(desk: Desk, tmp_path: Path) -> None:
    desk.workdir.mkdir(parents=True)
    writing = sqlite3.connect(desk.database, isolation_level=None)
    writing.executescript("PRAGMA cache_spill=1; PRAGMA cache_size=1; BEGIN; CREATE TABLE epoch (one, number);")
    for _ in range(50):  # more than the cache holds, so that some of it is in the file
        writing.execute("INSERT INTO epoch VALUES (1, randomblob(4000))")
    killed = desk.copy(tmp_path / "killed")
    writing.close()
    assert killed.database.stat().st_size > 0
    journal = killed.open()
    killed.begin(journal)
    killed.go(journal, *up_to(Stage.DONE))
    journal.close()
    killed.open().close()


def test_empty_file_is_a_journal_that_was_never_used(desk: Desk) -> None:
    desk.workdir.mkdir(parents=True)
    desk.database.touch()
    journal = desk.open()
    assert journal.models() == []
    assert journal.position(Federation(3).terms.roster.digest) == Position()
    journal.close()
