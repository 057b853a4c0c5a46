"""What a walk over folders sees, passes over, and never takes for nothing."""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedclip_secure.data import walk as walking
from fedclip_secure.data.folder import read_folder
from fedclip_secure.data.listing import LeftOut, Reason
from fedclip_secure.data.sites import absent_classes, classes_in, folders_in
from fedclip_secure.data.walk import walk
from fedclip_secure.errors import DataError
from fedclip_secure.training.evaluation.predict import find_images
from tests.data.test_folder import save

CLASSES = ("cat", "dog")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("cat/a.png", "cat/2024/b.png", "dog/c.png"):
        save(tmp_path / "images" / name)
    return tmp_path / "images"


def failing(monkeypatch: pytest.MonkeyPatch, folder: Path, number: int, times: int = 1000) -> list[str]:
    """Have the disk refuse to list `folder` so many times; what was asked of it is noted."""
    listed, asked = os.scandir, list[str]()

    def scandir(path: str) -> Any:
        if Path(path) == folder and len(asked) < times:
            asked.append(path)
            raise OSError(number, os.strerror(number), path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(walking, "PATIENCE", (0.0, 0.0, 0.0))
    return asked


READERS: dict[str, Callable[[Path], object]] = {
    "folder": lambda root: read_folder(root, CLASSES).files,
    "predict": lambda root: find_images([root]),
    "simulate": lambda root: absent_classes(root, CLASSES),
}


@pytest.mark.parametrize("reader", READERS)
def test_folder_that_may_not_be_listed_is_named_and_never_counts_as_empty(
    root: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    asked = failing(monkeypatch, root / "cat/2024", errno.EACCES)
    with pytest.raises(DataError, match=r"cat/2024': cannot be read \(Permission denied\); let the user that runs"):
        READERS[reader](root)
    assert len(asked) == 1, "another try changes nothing"


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_share_that_hiccups_is_asked_again_and_then_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    assert len(failing(monkeypatch, root / "cat/2024", number, times=2)) == 0
    assert len(read_folder(root, CLASSES).files) == 3
    monkeypatch.undo()
    asked = failing(monkeypatch, root / "cat/2024", number)
    with pytest.raises(DataError, match="the disk or the share fails; check it, and run again"):
        read_folder(root, CLASSES)
    assert len(asked) == 4


def test_sites_that_may_not_be_listed_are_no_empty_sites(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, root, errno.EACCES)
    with pytest.raises(DataError, match="images': cannot be read"):
        folders_in(root)


HOUSEKEEPING = [
    "~$a.png",
    "FOUND.000",
    "Network Recycle Bin 1",
    "a.png:Zone.Identifier",
    "trashbox",
    "_vti_cnf",
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "__MACOSX",
    "System Volume Information",
    "lost+found",
    "@Recycle",
]


def test_what_systems_leave_is_neither_an_image_nor_a_class_nor_a_site(root: Path) -> None:
    for name in HOUSEKEEPING:
        save(root / name / "cat/x.png")  # as if it were a site, a class, and a folder in a class
        save(root / "cat" / name / "a.png/SYNOPHOTO_THUMB_XL.png")
    (root / "cat/Thumbs.db").write_bytes(b"x")
    (root / "desktop.ini").write_bytes(b"x")
    found = read_folder(root, CLASSES)
    here = [file.path.relative_to(root).as_posix() for file in found.files]
    assert here == ["cat/2024/b.png", "cat/a.png", "dog/c.png"]
    assert {one.reason for one in found.left_out} == {Reason.PASSED_OVER}
    assert len(found.left_out) == 2 * len(HOUSEKEEPING) + 2, "beside the classes, and in one of them"
    assert [path.name for path in folders_in(root)] == ["cat", "dog"]
    assert sorted(classes_in([root])) == ["cat", "dog"]
    assert len(find_images([root]).files) == 3


def test_class_of_which_a_site_has_housekeeping_alone_is_absent_there(root: Path) -> None:
    save(root / "cow/@eaDir/x.png")
    (root / "cow/.DS_Store").write_bytes(b"x")
    assert absent_classes(root, ("cat", "cow", "dog", "eel")) == ["cow", "eel"]
    assert len(read_folder(root, ("cat", "cow", "dog"), ["cow"]).files) == 3, (
        "an empty folder of an absent class is no fault"
    )


def test_links_that_lead_nowhere_are_left_out_and_said(root: Path) -> None:
    (root / "cat/gone.png").symlink_to(root / "nowhere.png")
    found = read_folder(root, CLASSES)
    assert len(found.files) == 3
    assert found.left_out == [LeftOut(str(root / "cat/gone.png"), Reason.DANGLING)]
    assert walk(root).dangling == [str(root / "cat/gone.png")]


def test_placeholder_of_what_was_not_downloaded_is_missing_data(root: Path) -> None:
    (root / "cat/.scan.png.icloud").write_bytes(b"x")
    assert read_folder(root, CLASSES).left_out == [LeftOut(str(root / "cat/.scan.png.icloud"), Reason.DANGLING)]


def test_class_folder_on_a_share_that_is_not_mounted_is_named(root: Path) -> None:
    (root / "cow").symlink_to(root / "mnt/gone")
    with pytest.raises(DataError, match="cow': is a link to what is not there; mount or restore what it names"):
        read_folder(root, (*CLASSES, "cow"))


def test_class_folder_copied_from_a_mac_is_the_plans_class(tmp_path: Path) -> None:
    name = "Lungenentzündung"
    save(tmp_path / unicodedata.normalize("NFD", name) / "a.png")
    save(tmp_path / "normal/b.png")
    found = read_folder(tmp_path, (unicodedata.normalize("NFC", name), "normal")).files
    assert [file.label for file in found] == [0, 1]
    save(tmp_path / unicodedata.normalize("NFC", name) / "c.png")
    with pytest.raises(DataError, match="there are two folders 'Lungenentzündung', whose letters are encoded in two"):
        read_folder(tmp_path, (name, "normal"))


def test_space_at_the_end_of_a_name_is_seen(root: Path) -> None:
    (root / "dog").rename(root / "dog ")
    with pytest.raises(DataError, match=r"no class of the plan: 'dog ' \('dog ' -> 'dog'\?\)"):
        read_folder(root, CLASSES)
