from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedclip_secure.errors import DataError
from fedclip_secure.files import write_atomically, write_output, writing_atomically
from tests.disk import file_limit


def test_file_is_written_whole_with_its_folders_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "key"
    write_atomically(path, b"secret", mode=0o600)
    assert path.read_bytes() == b"secret"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_file_that_is_there_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"long old content")
    write_atomically(path, memoryview(b"new"))
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("path", ["file/x", "file/deep/er/x", "folder"])
def test_target_that_cannot_be_is_refused_by_name_and_leaves_nothing(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_bytes(b"here first")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(DataError, match=f"{path}': cannot be written"):
        write_atomically(tmp_path / path, b"data")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", tmp_path / "folder"]
    assert (tmp_path / "file").read_bytes() == b"here first"


def test_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    name = "n" * 254  # with the temporary name's additions too long for the file system
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(DataError, match="cannot be written"):
        write_atomically(tmp_path / name, b"new")
    assert (tmp_path / name).read_bytes() == b"old"


def test_error_between_two_writes_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half of the new"
        raise KeyError

    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(KeyError), writing_atomically(tmp_path / "x") as file:
        file.writelines(pieces())
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with file_limit(2**20), pytest.raises(DataError, match=r"x': cannot be written \(File too large\); free space"):
        write_atomically(tmp_path / "x", bytes(2**20 + 1))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_output_goes_through_links_and_into_what_is_no_file_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "target.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "target.csv")
    write_output(tmp_path / "link.csv", b"new")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "target.csv").read_text() == "new"
    write_output(Path("/dev/null"), b"gone")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(DataError, match="cannot be written"):
        write_output(tmp_path, b"a folder")
