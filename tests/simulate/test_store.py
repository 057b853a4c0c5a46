from __future__ import annotations

from pathlib import Path

import pytest

from fedclip_secure.simulate.figures import Figures, Point, Right, Spent
from fedclip_secure.simulate.store import load, path_of, save

DIGEST = "ab" * 32


def figures() -> Figures:
    start = Point(round=0, silos={"a": Right(correct=3, total=9), "b": Right(correct=0, total=0)}, left_out=None)
    end = Point(round=5, silos={"a": Right(correct=7, total=9), "b": Right(correct=0, total=0)}, left_out=None)
    return Figures(
        records={"a": 20, "b": 2}, zero_shot=start, points=[start, end], parameters=5, upload_bytes=7,
        seconds_per_round=0.1 + 0.2, privacy=Spent(epsilon=4.3472, delta=1e-5, noise_multiplier=2.0),
    )  # fmt: skip


def test_what_was_saved_is_loaded_to_the_last_digit(tmp_path: Path) -> None:
    save(tmp_path, DIGEST, {"method": "any"}, figures())
    assert load(tmp_path, DIGEST) == figures()
    assert load(tmp_path, "cd" * 32) is None


@pytest.mark.parametrize(
    ("whole", "damaged"),
    [
        ('"correct": 7', '"correct": 8'),
        ('"total": 9', '"total": -9'),
        ('"figures"', '"figure"'),
        ("{", ""),
        ("0", "\xff"),
    ],
)
def test_a_damaged_file_is_told_of_and_counts_as_none(
    tmp_path: Path, whole: str, damaged: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, DIGEST, {}, figures())
    path = path_of(tmp_path, DIGEST)
    path.write_bytes(path.read_text().replace(whole, damaged, 1).encode("latin-1"))
    assert load(tmp_path, DIGEST) is None
    assert f"'{path}': is damaged; its cell is run again" in caplog.text


def test_a_file_under_another_cells_name_counts_as_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, DIGEST, {}, figures())
    path_of(tmp_path, DIGEST).rename(path_of(tmp_path, "cd" * 32))
    assert load(tmp_path, "cd" * 32) is None
    assert "is damaged" in caplog.text


def test_accuracies_leave_out_who_has_no_records() -> None:
    last = figures().last
    assert (last.weighted, last.mean, last.away) == (7 / 9, 7 / 9, None)
