"""What is seen of an image that was decoded, and how much memory may be used for that."""

from __future__ import annotations

import io
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedclip_secure.data.decoding_memory import DECODING, Room, memory
from fedclip_secure.data.image import decode_image
from fedclip_secure.data.image_facts import ImageFacts, facts_of
from tests.data.test_dicom import dicom
from tests.waiting import BOUND, wait_for

RANDOM = np.random.default_rng(0)
FULL_RANGE = RANDOM.integers(6000, 60000, (64, 64), dtype=np.uint16)  # of a scanner that uses all 16 bits


def png(pixels: np.ndarray[tuple[int, int], np.dtype[np.generic]]) -> bytes:
    kept = io.BytesIO()
    Image.fromarray(pixels).save(kept, "PNG")
    return kept.getvalue()


def facts(data: bytes, window: tuple[int, int] | None = (0, 4095), name: str = "a.png") -> ImageFacts:
    with ExitStack() as held:
        return decode_image(data, Path(name), window, held).facts


def test_window_that_does_not_fit_is_seen_in_what_came_out() -> None:
    found = facts(png(FULL_RANGE))
    assert (found.above, found.below, found.span, found.dicom) == (1.0, 0.0, 0, False)
    assert found.one_coloured
    assert found.clipped
    assert not found.tiny


def test_floats_from_0_to_1_under_a_window_of_12_bits_are_of_one_colour() -> None:
    kept = io.BytesIO()
    Image.fromarray(RANDOM.random((64, 64), np.float32)).save(kept, "TIFF")
    assert facts(kept.getvalue(), name="a.tif").one_coloured


def test_dicom_with_slope_0_is_of_one_colour(tmp_path: Path) -> None:
    path = dicom(tmp_path / "a.dcm", FULL_RANGE // 16, RescaleSlope="0", RescaleIntercept="7")
    assert facts(path.read_bytes(), name="a.dcm").one_coloured


def test_air_around_a_patient_is_no_fault() -> None:
    pixels = np.zeros((64, 64), np.uint16)
    pixels[20:44, 20:44] = RANDOM.integers(900, 1300, (24, 24))  # a seventh of the image, in a narrow window
    found = facts(png(pixels), (800, 1400))
    assert found.below == pytest.approx(1 - (24 / 64) ** 2)
    assert not found.clipped
    assert not found.one_coloured


def test_window_within_which_nothing_lies_is_seen_though_both_ends_are_hit() -> None:
    pixels = RANDOM.integers(500, 4000, (64, 64), dtype=np.uint16)
    pixels[:28] = 0  # air
    found = facts(png(pixels), (0, 255))
    assert (found.below, found.above, found.span) == (28 / 64, 36 / 64, 255)
    assert found.clipped


def test_window_that_is_far_too_wide_leaves_little_contrast() -> None:
    assert facts(png(FULL_RANGE // 16), (0, 65535)).one_coloured, "16 levels of 255"
    found = facts(png(FULL_RANGE // 60), (0, 4095))
    assert found.of_little_contrast
    assert not found.one_coloured


def test_marker_on_a_black_image_is_no_picture_and_a_coloured_one_is_one() -> None:
    marked = Image.new("RGB", (100, 100))
    marked.putpixel((3, 3), (255, 255, 255))
    assert facts_of(marked, 1).one_coloured
    halves = Image.new("RGB", (100, 100), (200, 30, 30))
    halves.paste((30, 200, 30), (0, 0, 50, 100))
    assert facts_of(halves, 1).span == 170


@pytest.mark.parametrize(("size", "tiny"), [((31, 400), True), ((400, 31), True), ((32, 32), False)])
def test_thumbnail_of_a_thumbnail_is_tiny(size: tuple[int, int], tiny: bool) -> None:
    assert facts_of(Image.new("RGB", size), 1).tiny is tiny


def test_pages_of_a_file_are_counted_and_the_first_is_read() -> None:
    kept = io.BytesIO()
    pages = [Image.new("RGB", (40, 40), (value, 0, 0)) for value in (200, 0, 0)]
    pages[0].save(kept, "TIFF", save_all=True, append_images=pages[1:])
    with ExitStack() as held:
        decoded = decode_image(kept.getvalue(), Path("a.tif"), None, held)
    assert decoded.facts.frames == 3
    assert decoded.image.getpixel((0, 0)) == (200, 0, 0)


def test_images_wait_for_room_and_one_that_is_larger_than_all_of_it_goes_alone() -> None:
    room, inside, go, seen = Room(10), list[int](), threading.Event(), list[int]()

    def work(size: int) -> None:
        with room.taken(size):
            inside.append(size)
            seen.append(sum(min(one, 10) for one in inside))
            assert go.wait(BOUND)
            inside.remove(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in (4, 6, 50, 3)]
    threads[0].start()
    threads[1].start()
    wait_for("two in the room", lambda: len(inside) == 2)
    for thread in threads[2:]:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(BOUND)
    assert max(seen) <= 10
    assert len(seen) == 4


def test_memory_of_an_image_is_held_as_long_as_it_is_used() -> None:
    taken = list[int]()
    with ExitStack() as held:
        decode_image(png(FULL_RANGE), Path("a.png"), (0, 65535), held)
        taken.append(DECODING._taken)
    assert taken == [24 * 64 * 64]
    assert DECODING._taken == 0


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_black_is_black_and_white_is_white_in_both_kinds_of_grey(tmp_path: Path, kind: str) -> None:
    """Air around a patient is stored as the highest values where these are black."""
    pixels = np.full((64, 64), 0 if kind == "MONOCHROME2" else 4095, dtype=np.uint16)
    pixels[:12, :12] = RANDOM.integers(1500, 2500, (12, 12))
    air = dicom(tmp_path / "air.dcm", pixels, PhotometricInterpretation=kind)
    burnt = dicom(tmp_path / "burnt.dcm", 4095 - pixels, PhotometricInterpretation=kind)
    seen = facts(air.read_bytes(), name="air.dcm")
    assert (seen.clipped, seen.below > 0.9, seen.above) == (False, True, 0)
    assert facts(burnt.read_bytes(), name="burnt.dcm").clipped


def test_memory_of_the_machine_is_known() -> None:
    assert 1 << 28 < memory() < 1 << 50
