from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedclip_secure.data.folder import read_folder
from fedclip_secure.data.image import load_image
from fedclip_secure.data.listing import LeftOut, Reason, kinds_of
from fedclip_secure.errors import ConfigError, DataError
from tests.waiting import BOUND

CLASSES = ("cat", "dog")


def save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (8, 8), "red")).save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name in ("cat/b.png", "cat/deep/er/a.JPG", "dog/c.png"):
        save(folder / name)
    return folder


def grey16(values: list[list[int]]) -> Image.Image:
    return Image.fromarray(np.array(values, dtype=np.uint16))


def test_images_are_listed_by_class_and_path_at_any_depth(root: Path) -> None:
    save(root / "cat/.hidden.png")
    save(root / "cat/.trash/x.png")
    found = [(file.path.relative_to(root).as_posix(), file.label) for file in read_folder(root, CLASSES).files]
    assert found == [("cat/b.png", 0), ("cat/deep/er/a.JPG", 0), ("dog/c.png", 1)]
    assert [file.label for file in read_folder(root, ("dog", "cat")).files] == [0, 1, 1]


def test_missing_root_is_named() -> None:
    with pytest.raises(DataError, match=r"/nowhere.*No such file.*data\.path"):
        read_folder(Path("/nowhere"), CLASSES)


def test_missing_class_folder_is_named_with_its_remedy(root: Path) -> None:
    with pytest.raises(DataError, match=r"cow.*create it.*data\.absent_classes"):
        read_folder(root, (*CLASSES, "cow"))
    assert len(read_folder(root, (*CLASSES, "cow"), ["cow"]).files) == 3


def test_absent_class_that_the_plan_lacks_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match=r"absent_classes.*'Dog' -> 'dog'"):
        read_folder(root, CLASSES, ["Dog"])


def test_empty_class_folder_is_named(root: Path) -> None:
    (root / "cow").mkdir()
    with pytest.raises(DataError, match=r"cow': is empty; .*absent_classes"):
        read_folder(root, (*CLASSES, "cow"))


def test_class_folder_without_images_says_what_it_holds(root: Path) -> None:
    (root / "cow").mkdir()
    (root / "cow/scan.nii").write_bytes(b"NIfTI")
    with pytest.raises(DataError, match=r"holds no image, but 1 x \.nii"):
        read_folder(root, (*CLASSES, "cow"))


def test_folder_that_is_no_class_is_named_with_near_spelling(root: Path) -> None:
    (root / "dog").rename(root / "Dogs")
    with pytest.raises(
        DataError, match=r"no class of the plan: 'Dogs' \('Dogs' -> 'dog'\?\); the plan's classes are 'cat', 'dog'"
    ):
        read_folder(root, CLASSES)


def test_stray_file_beside_class_folders_is_named(root: Path) -> None:
    save(root / "stray.png")
    with pytest.raises(DataError, match=r"1 file\(s\) lie beside the class folders \('stray\.png'\)"):
        read_folder(root, CLASSES)


def test_other_files_in_a_class_folder_are_left_out(root: Path) -> None:
    (root / "cat/notes.txt").write_text("x")
    (root / "cat/png").write_text("x")
    found = read_folder(root, CLASSES)
    assert len(found.files) == 3
    assert found.left_out == [LeftOut(str(root / "cat" / name), Reason.NO_IMAGE) for name in ("notes.txt", "png")]
    assert kinds_of([one.path for one in found.left_out]) == "1 x .txt, 1 x without a known extension"


@pytest.mark.parametrize("target", ["../dog", "..", "../dog/far"])
def test_folder_that_a_link_puts_under_two_classes_is_refused(root: Path, target: str) -> None:
    save(root / "dog/far/d.png")
    (root / "cat/more").symlink_to(target)
    with pytest.raises(
        DataError, match=r"are one folder, by a link, and its images would count under two classes; remo"
    ):
        read_folder(root, CLASSES)


def test_folder_of_a_system_is_a_class_where_the_plan_says_so_and_its_case_is_told(root: Path) -> None:
    save(root / "recycled/a.png")
    assert len(read_folder(root, (*CLASSES, "recycled")).files) == 4
    (root / "recycled").rename(root / "Recycled")
    with pytest.raises(DataError, match=r"'Recycled' \('Recycled' -> 'recycled'\?\)"):
        read_folder(root, (*CLASSES, "recycled"))


def test_folder_by_the_name_of_a_mediums_list_is_read_and_the_list_is_not(root: Path) -> None:
    save(root / "cat/DICOMDIR/a.png")
    save(root / "dog/a.png").rename(root / "dog/DICOMDIR")
    found = read_folder(root, CLASSES)
    assert [file.path.name for file in found.files].count("a.png") == 1
    assert found.left_out == [LeftOut(str(root / "dog/DICOMDIR"), Reason.PASSED_OVER)]


def test_linked_folder_is_read_and_a_loop_ends(root: Path) -> None:
    (root / "dog/loop").symlink_to(root / "dog", target_is_directory=True)
    save(root.parent / "elsewhere/d.png")
    (root / "dog/more").symlink_to(root.parent / "elsewhere", target_is_directory=True)
    assert len(read_folder(root, CLASSES).files) == 4


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2), "black")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert load_image(save(tmp_path / "turned.jpg", image, exif=exif), None).size == (2, 4)


def test_16_bit_image_needs_the_plans_window(tmp_path: Path) -> None:
    path = save(tmp_path / "deep.png", grey16([[1000, 3000], [5000, 65535]]))
    with pytest.raises(ConfigError, match=r"deep\.png': holds grey values from 1000 to 65535.*model\.image_window"):
        load_image(path, None)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_window_maps_low_to_0_and_high_to_255(tmp_path: Path, mode: str) -> None:
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    path = save(tmp_path / "deep.tif", Image.fromarray(np.array([[0, 1000, 2000, 3000, 9000]], dtype=kind)))
    with Image.open(path) as stored:
        assert stored.mode == mode
    image = load_image(path, (1000, 3000))
    assert image.mode == "RGB"
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_nan_pixels_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "nan.tif", Image.fromarray(np.array([[np.nan, 1.0]], dtype=np.float32)))
    with pytest.raises(DataError, match=r"nan\.tif': holds NaN"):
        load_image(path, (0, 1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_8_bit_mode_becomes_rgb_without_warnings(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode in ("CMYK", "YCbCr") else "png"
    path = save(tmp_path / f"image.{suffix}", Image.new("RGB", (4, 4), "white").convert(mode))
    image = load_image(path, None)
    assert image.mode == "RGB"
    assert np.asarray(image).min() >= 254


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    clear = save(tmp_path / "clear.png", Image.new("RGBA", (2, 2), (0, 0, 0, 0)))
    palette = save(tmp_path / "palette.png", Image.new("P", (2, 2), 0), transparency=b"\x00\xff")
    for path in (clear, palette):
        assert np.asarray(load_image(path, None)).min() == 255


def test_truncated_image_is_named(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "JPEG")
    path = tmp_path / "cut.jpg"
    path.write_bytes(whole.getvalue()[:500])
    with pytest.raises(DataError, match=r"cut\.jpg': cannot be read as an image \(.*truncated"):
        load_image(path, None)


def test_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("not an image")
    with pytest.raises(DataError, match=r"text\.png': cannot be read as an image \(not an image\)"):
        load_image(path, None)


@pytest.mark.parametrize(
    ("begins", "fetch"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:ab", "git lfs pull"),
        ("/annex/objects/X", "git annex get"),
    ],
)
def test_file_that_stands_for_one_that_was_not_fetched_is_named_with_what_fetches_it(
    tmp_path: Path, begins: str, fetch: str
) -> None:
    (tmp_path / "scan.png").write_text(f"{begins}\n")
    with pytest.raises(
        DataError, match=rf"scan\.png': stands for an image that was not downloaded; get it with `{fetch}`"
    ):
        load_image(tmp_path / "scan.png", None)


def test_picture_of_several_views_is_an_image_by_its_own_name_too(root: Path) -> None:
    views = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    save(root / "cat/two.mpo", views[0], save_all=True, append_images=views[1:])
    assert [file.path.name for file in read_folder(root, CLASSES).files].count("two.mpo") == 1
    assert load_image(root / "cat/two.mpo", None).getpixel((0, 0))[0] > 200  # type: ignore[index]


def test_pictures_are_known_by_their_names_before_any_was_opened(root: Path) -> None:
    """Pillow learns of its formats when it first needs one."""
    code = (
        "from pathlib import Path; from fedclip_secure.data.folder import read_folder; "
        f"print(len(read_folder(Path({str(root)!r}), {CLASSES!r}).files))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=BOUND, check=False)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png': cannot be read \(No such file"):
        load_image(tmp_path / "gone.png", None)


def test_decompression_bomb_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "bomb.png", Image.new("1", (20_000, 20_000)))
    with pytest.raises(DataError, match=r"bomb\.png': has more pixels"):
        load_image(path, None)
