"""The store by itself, and the rules of the state machine that need no network."""

from __future__ import annotations

import fcntl
import hashlib
import re
import sqlite3
import stat
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedclip_secure import canonical
from fedclip_secure.aggregator.attempt import LiveAttempt
from fedclip_secure.aggregator.complaints import excluded
from fedclip_secure.aggregator.rounds import Rounds
from fedclip_secure.aggregator.store import Event, Member, RoundRow, Store
from fedclip_secure.config.plan import Deadlines
from fedclip_secure.errors import DataError, ProtocolError
from fedclip_secure.files import write_atomically
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.keys import SigningKey
from fedclip_secure.secagg.aggregator_session import Phase
from fedclip_secure.transport.messages import EnrolAnswer, OpeningAnswer, SharesRequest, WireList, parse
from tests.fakes import Federation
from tests.waiting import BOUND

SEAL = bytes(range(96))


def opened(folder: Path) -> Store:
    store = Store(folder)
    store.open_attempt(1, 1, b"opening", SEAL, 0.0)
    return store


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_the_state_is_for_its_owner_alone(tmp_path: Path) -> None:
    opened(tmp_path / "state").close()
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


@pytest.mark.parametrize("version", [0, 2])
def test_the_state_of_another_version_is_refused_and_left_as_it_is(tmp_path: Path, version: int) -> None:
    opened(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "aggregator.sqlite")) as sql:
        sql.execute(f"PRAGMA user_version = {version}")
        before = list(sql.iterdump())
        with pytest.raises(DataError, match=r"written by another version of fedclip-agg; .* or start in a new folder"):
            Store(tmp_path)
        assert list(sql.iterdump()) == before


def test_who_reads_beside_a_server_that_starts_meanwhile_sees_a_sound_state_and_leaves_nothing(tmp_path: Path) -> None:
    opened(tmp_path).close()
    before = sorted(tmp_path.rglob("*"))
    with closing(Store(tmp_path, reading=True)) as reader:
        assert sorted(tmp_path.rglob("*")) == before
        with closing(Store(tmp_path)) as server:
            for number in range(200):
                server.add_event(Event(0.0, "dropped", 1, 1, "lab-a", "join", f"{number} {'x' * 1000}"))
            server._rows("PRAGMA wal_checkpoint(TRUNCATE)")
            assert reader.events() == []
            assert [row.number for row in [reader.last_attempt()] if row] == [1]
            with closing(Store(tmp_path, reading=True)) as later:
                assert len(later.events()) == len(server.events()) > 10


def test_the_secrets_of_an_attempt_that_is_over_stand_in_no_file_not_even_in_the_log(tmp_path: Path) -> None:
    store, unmask = opened(tmp_path), bytes(range(100, 196))
    store.add_message(1, Phase.UNMASK, "lab-a", unmask, b"r" * 32)
    assert SEAL in everything(tmp_path)
    assert unmask in everything(tmp_path)
    store.end_attempt(1, "done")
    assert SEAL not in everything(tmp_path)
    assert unmask not in everything(tmp_path)
    store.close()


def test_vectors_that_a_crash_left_behind_are_removed_and_those_in_use_are_kept(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for part in (b"kept", b"sum", b"left"):
        store.blobs.save_vector(hashlib.sha256(part).digest(), memoryview(part))
    store.blobs.new_vector_path().write_bytes(b"half")
    (tmp_path / "vectors" / "lost+found").mkdir()
    store.add_message(1, Phase.UPLOAD, "lab-a", hashlib.sha256(b"kept").digest() + b"header", b"r" * 32)
    store.end_round(RoundRow(1, 1, ("lab-a",), 1, 0, 0, b"", b"", hashlib.sha256(b"sum").digest(), 0.0))
    store.blobs.keep_vectors(store.vectors_wanted())
    assert {path.read_bytes() for path in (tmp_path / "vectors").glob("*.*")} == {b"kept", b"sum"}
    assert (tmp_path / "vectors" / "lost+found").is_dir()
    store.close()


def test_of_older_models_only_files_of_its_own_are_removed(tmp_path: Path) -> None:
    store, folder = opened(tmp_path), tmp_path / "models"
    (folder / "lost+found").mkdir()
    others = (".nfs000000000012a4", "readme.txt", f"{bytes(32).hex()}.bak")
    half = f".{bytes(32).hex()}.safetensors.01234567.part"
    for path in (*others, half, store.blobs.model_path(b"m" * 32), store.blobs.model_path(b"o" * 32)):
        (folder / path).write_bytes(b"model")
    assert store.blobs.keep_models([b"m" * 32]) == []
    kept = {"lost+found", *others, store.blobs.model_path(b"m" * 32).name}
    assert {path.name for path in folder.iterdir()} == kept
    store.close()


def test_an_older_model_that_cannot_be_removed_is_told_and_the_others_go(tmp_path: Path) -> None:
    store = opened(tmp_path)
    stuck, older = store.blobs.model_path(b"a" * 32), store.blobs.model_path(b"b" * 32)
    stuck.mkdir()
    older.write_bytes(b"model")
    said = rf"^'{stuck}': cannot be removed \(.*\); nothing needs it: remove it by hand$"
    (told,) = store.blobs.keep_models([])
    assert re.match(said, told)
    assert not older.exists()
    store.blobs.folder.joinpath("models").rename(tmp_path / "away")
    (told,) = store.blobs.keep_models([])
    assert told.startswith(f"'{tmp_path / 'models'}': cannot be read (No such file or directory)")
    store.close()


def test_a_status_that_looks_just_then_does_not_keep_a_server_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, path = opened(tmp_path), tmp_path / "serve.lock"
    path.touch()
    looking = path.open("rb")
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda _: looking.close())
    store.lock().close()
    assert looking.closed
    store.close()


def test_a_use_of_a_closed_database_is_no_damage_and_not_hidden(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
        store.end_attempt(1, "done")


def test_a_vector_is_mapped_and_a_file_that_the_lock_names_becomes_a_model(tmp_path: Path) -> None:
    store, model = opened(tmp_path), Federation(4).model
    words = np.arange(5, dtype="<u4")
    store.blobs.save_vector(b"v" * 32, words.data)
    kept = store.blobs.vector(b"v" * 32)
    assert (kept.tolist(), kept.flags.writeable) == (words.tolist(), False)
    data = model.to_safetensors({"made": "by hand"})
    store.blobs.save_file(data)
    store.blobs.copy_model(model.digest, hashlib.sha256(data).digest())
    assert store.blobs.model_path(model.digest).read_bytes() == data
    store.blobs.save_model(model.digest, model)
    assert store.blobs.model_path(model.digest).read_bytes() == model.to_safetensors()
    store.close()


def test_the_sum_of_two_rounds_that_add_up_alike_is_kept(tmp_path: Path) -> None:
    store, digest = opened(tmp_path), hashlib.sha256(b"sum").digest()
    store.blobs.save_vector(digest, memoryview(b"sum"))
    for number in (1, 2):
        store.end_round(RoundRow(number, number, ("lab-a",), 1, 0, 0, b"", b"", digest, 0.0))
    assert store.blobs.vector_path(digest).read_bytes() == b"sum"
    store.close()


def test_a_transaction_that_fails_leaves_nothing_behind_and_the_next_one_works(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add_message(1, Phase.JOIN, "lab-a", b"one", b"r" * 32)
    with pytest.raises(sqlite3.IntegrityError):
        store.add_message(1, Phase.JOIN, "lab-a", b"two", b"s" * 32)
    store.add_message(1, Phase.JOIN, "lab-b", b"three", b"t" * 32)
    assert store.messages(1, Phase.JOIN) == [("lab-a", b"one"), ("lab-b", b"three")]
    store.close()


def test_a_database_that_cannot_be_written_is_an_error_for_a_person(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store._sql.execute("PRAGMA query_only=ON")
    with pytest.raises(DataError, match="cannot be used as the aggregator's state"):
        store.close_phase(1)
    store._sql.execute("PRAGMA query_only=OFF")
    store.close_phase(1)
    last = store.last_attempt()
    assert last is not None
    assert last.closed == 1
    store.close()


def test_what_the_disk_refuses_does_not_count_until_it_is_sent_again(tmp_path: Path) -> None:
    federation = Federation(4)
    attempt, store = federation.attempt(), Store(tmp_path)
    wire, key = federation.opening()
    store.open_attempt(1, 1, wire, key.private, 0.0)
    row = store.last_attempt()
    assert row is not None
    live = LiveAttempt.restore(federation.terms, store, row)
    attempt.opening = live.opening
    body = attempt.session("silo-000").join()
    store._sql.execute("PRAGMA query_only=ON")
    with pytest.raises(DataError):
        live.accept(Phase.JOIN, "silo-000", body)
    assert live.session.ads == {}
    store._sql.execute("PRAGMA query_only=OFF")
    live.accept(Phase.JOIN, "silo-000", body)
    assert set(live.session.ads) == {name for name, _ in store.messages(1, Phase.JOIN)} == {"silo-000"}
    store.close()


def test_a_differing_repeat_names_the_hash_of_the_first(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add_message(1, Phase.JOIN, "lab-a", b"one", b"r" * 32)
    assert store.known(1, Phase.JOIN, "lab-a", b"r" * 32)
    assert not store.known(1, Phase.JOIN, "lab-b", b"r" * 32)
    with pytest.raises(ProtocolError, match=(b"r" * 32).hex()) as refusal:
        store.known(1, Phase.JOIN, "lab-a", b"s" * 32)
    assert (refusal.value.code, refusal.value.silo) == ("differs", "lab-a")
    store.close()


def test_what_255_silos_are_waited_for_fits_into_an_answer(tmp_path: Path) -> None:
    federation, store = Federation(255), Store(tmp_path / "state")
    wire, key = federation.opening()
    store.open_attempt(1, 1, wire, key.private, 0.0)
    row = store.last_attempt()
    assert row is not None
    rounds = Rounds(store, federation.terms, SigningKey.create(tmp_path / "key.pem"), Deadlines(), lambda _text: None)
    rounds.live = LiveAttempt.restore(federation.terms, store, row)
    ads: dict[str, Any] = dict.fromkeys(federation.silos)
    rounds.live.session.ads = ads
    rounds.live.session.phase = Phase.SHARE
    assert "silo-009 and 245 more" in OpeningAnswer(state="waiting", reason=rounds.describe()).reason
    store.close()


@pytest.mark.parametrize(
    ("complaints", "out"),
    [
        ([], set()),
        (["ab"], {"a", "b"}),
        (["ab", "ac"], {"a"}),  # an honest silo is at odds with one liar at most
        (["ab", "ab"], {"a", "b"}),
        (["ab", "cd"], {"a", "c"}),  # both sides of both would leave fewer than the floor
        (["aa"], {"a"}),
        (["ab", "cb"], {"b"}),  # of two accusers at most one lies
        (["ab", "cb", "de"], {"b", "d", "e"}),
        (["ba", "bc"], {"b"}),  # as accuser or as accused
    ],
)
def test_complaints_leave_out_as_the_protocol_says(complaints: list[str], out: set[str]) -> None:
    assert left_out(Federation(7), complaints, floor=4) == out


@pytest.mark.parametrize(
    ("complaints", "out"),
    [
        (["ab", "ac"], {"a", "b"}),  # a further complaint counts against the accuser alone
        (["ab", "cb"], {"a", "b", "c"}),  # two may lie together
        (["ab", "cb", "db"], {"b"}),
        (["ab", "cd", "ef"], {"a", "c", "e"}),
    ],
)
def test_where_two_may_lie_together_it_takes_three_opponents_to_be_out_alone(
    complaints: list[str], out: set[str]
) -> None:
    assert left_out(Federation(9, colluding=2), complaints, floor=6) == out


@pytest.mark.parametrize(("silos", "colluding"), [(4, 0), (4, 1), (5, 1), (6, 2), (6, 1)])
def test_one_side_of_a_complaint_is_out_where_both_would_be_too_many(silos: int, colluding: int) -> None:
    federation = Federation(silos, colluding=colluding)
    assert left_out(federation, ["ba"]) == {"b"}
    assert left_out(federation, ["ba", "ca"]) == {"a"}


@given(st.data(), st.integers(4, 16), st.integers(0, 4))
@settings(max_examples=200, deadline=None)
def test_liars_that_are_no_more_than_may_be_absent_never_empty_a_round(
    data: st.DataObject, silos: int, colluding: int
) -> None:
    federation = Federation(silos, colluding=colluding)
    most = min(max(colluding, 1), 3, silos - federation.terms.floor)
    assume(most >= 1)
    liars = data.draw(st.sets(st.sampled_from(federation.silos), min_size=1, max_size=most))
    complaints: list[tuple[str, str]] = []
    while liars - (out := excluded(complaints, federation.terms)):
        assert silos - len(out) >= federation.terms.floor
        liar = data.draw(st.sampled_from(sorted(liars - out)))
        other = data.draw(st.sampled_from(sorted(set(federation.silos) - out - {liar})))
        complaints.append((liar, other) if data.draw(st.booleans()) else (other, liar))
        assert len(complaints) <= most * (colluding + 2)  # each attempt that they spoil is evidence
    assert silos - len(out) >= federation.terms.floor


def left_out(federation: Federation, complaints: list[str], floor: int | None = None) -> set[str]:
    """Whom complaints, each an accuser's and an accused's letter, leave out."""
    letters = dict(zip("abcdefghi", federation.silos, strict=False))
    named = [(letters[pair[0]], letters[pair[1]]) for pair in complaints]
    terms = replace(federation.terms, floor=floor or federation.terms.floor)
    return {letter for letter, name in letters.items() if name in excluded(named, terms)}


def test_a_second_server_on_one_state_folder_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.lock(), pytest.raises(DataError, match="another `fedclip-agg serve` runs"):
        Store(tmp_path).lock()
    store.lock().close()
    store.close()


def test_a_later_enrolment_replaces_the_earlier(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for certificate in (b"one", b"two"):
        store.enrol(b"", b"", Member("lab-a", certificate, b"k" * 32, 0.0))
    assert [member.certificate for member in store.members()] == [b"two"]
    store.close()


def test_writing_a_file_gives_all_of_it_or_leaves_it_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_atomically(path, b"one", mode=0o600)
    write_atomically(path, memoryview(b"two"), mode=0o600)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [item.name for item in path.parent.iterdir()] == ["file"]
    with pytest.raises(DataError, match="cannot be written"):
        write_atomically(path / "below", b"three")
    assert path.read_bytes() == b"two"


def test_two_threads_that_write_one_file_leave_one_of_the_two_whole(tmp_path: Path) -> None:
    texts = [bytes([letter]) * 2**18 for letter in b"ab"]
    failed: list[BaseException] = []

    def write(text: bytes) -> None:
        try:
            for _ in range(10):
                write_atomically(tmp_path / "file", text)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
    assert failed == []
    assert (tmp_path / "file").read_bytes() in texts


@pytest.mark.parametrize(
    "data",
    [
        canonical.encode({"messages": [b""]}),
        canonical.encode({"messages": ["text"]}),
        canonical.encode({"messages": [b"x"], "more": 1}),
        canonical.encode({}),
        canonical.encode([b"x"]),
        canonical.encode({"messages": [b"x"]}) + b"\x00",
        b"\xa1\x68messages\x9f\x41x\xff",  # indefinite length
    ],
)
def test_messages_that_are_not_as_they_should_be_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError) as refusal:
        parse(WireList, data)
    assert refusal.value.code in ("message", "encoding")


def test_the_text_of_a_refusal_is_short_and_shows_no_value() -> None:
    data = canonical.encode({f"{i:05}": b"secret" for i in range(20_000)})
    with pytest.raises(ProtocolError) as refusal:
        parse(SharesRequest, data)
    assert len(str(refusal.value)) < 600
    with pytest.raises(ProtocolError) as refusal:
        parse(EnrolAnswer, canonical.encode({"certificate": "hush", "federation": "x"}))
    assert "hush" not in str(refusal.value)


def test_the_aggregator_is_no_silo_s_name() -> None:
    assert AGGREGATOR not in Federation(4).silos
