from __future__ import annotations

import hashlib
import logging
import os
import stat
import time
from pathlib import Path

import pytest

from fedclip_secure.errors import DataError
from fedclip_secure.features.index import FileIndex, read_contents

OLD = time.time_ns() - 3_600_000_000_000


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(b"pixels")
    os.utime(path, ns=(OLD, OLD))
    return path


def indexed(folder: Path, *paths: Path) -> FileIndex:
    index = FileIndex(folder / "store" / "files.sqlite")
    index.add([read_contents(path)[0] for path in paths])
    return index


def test_unchanged_file_is_known_after_reopening(tmp_path: Path, image: Path) -> None:
    indexed(tmp_path, image).close()
    index = FileIndex(tmp_path / "store/files.sqlite")
    assert index.known([image, tmp_path / "other"]) == [hashlib.sha256(b"pixels").digest(), None]
    index.close()


def test_relative_path_is_the_same_file(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = indexed(tmp_path, image)
    monkeypatch.chdir(tmp_path)
    assert index.known([Path("a.png")]) != [None]
    index.close()


def test_index_is_for_its_owner_alone_also_one_that_an_older_version_made(tmp_path: Path, image: Path) -> None:
    """It holds hashes of patients' ids, which can be guessed."""
    path = tmp_path / "store/files.sqlite"
    indexed(tmp_path, image).close()
    path.chmod(0o644)
    FileIndex(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_other_size_or_time_makes_a_file_unknown(tmp_path: Path, image: Path) -> None:
    index = indexed(tmp_path, image)
    os.utime(image, ns=(OLD, OLD + 1))
    assert index.known([image]) == [None]
    image.write_bytes(b"more pixels")
    os.utime(image, ns=(OLD, OLD))
    assert index.known([image]) == [None]
    image.unlink()
    assert index.known([image]) == [None]
    index.close()


def test_file_modified_a_moment_ago_is_not_indexed(tmp_path: Path, image: Path) -> None:
    """Within one tick of the file system's clock it could change again and look the same."""
    os.utime(image)
    index = indexed(tmp_path, image)
    assert index.known([image]) == [None]
    index.close()


def test_file_from_the_future_is_not_indexed(tmp_path: Path, image: Path) -> None:
    os.utime(image, ns=(OLD, time.time_ns() + 10**12))
    index = indexed(tmp_path, image)
    assert index.known([image]) == [None]
    index.close()


def test_names_that_are_no_utf8_are_kept(tmp_path: Path, image: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    image.rename(odd)
    index = indexed(tmp_path, odd)
    assert index.known([odd]) == [hashlib.sha256(b"pixels").digest()]
    index.close()


@pytest.mark.parametrize("damage", [b"junk" * 1000, b"", None])
def test_damaged_index_is_made_again(
    tmp_path: Path, image: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    indexed(tmp_path, image).close()
    path = tmp_path / "store/files.sqlite"
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096) if damage is None else damage)
    with caplog.at_level(logging.WARNING):
        index = indexed(tmp_path, image)
    assert index.known([image]) != [None]
    assert ("is damaged and was deleted" in caplog.text) == (damage != b"")
    index.close()


def test_index_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file': cannot be made"):
        FileIndex(tmp_path / "file" / "files.sqlite")
    (tmp_path / "store/files.sqlite").mkdir(parents=True)
    with pytest.raises(DataError, match=r"files\.sqlite': cannot be used"):
        FileIndex(tmp_path / "store/files.sqlite")


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="no regular file"):
        read_contents(tmp_path / "pipe.png")
