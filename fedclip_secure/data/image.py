"""One image file's bytes to 8-bit RGB."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from fedclip_secure.data.decoding_memory import DECODING
from fedclip_secure.data.deep_pictures import is_deep, is_deep_colour, read_deep
from fedclip_secure.data.dicom import DICOM_SUFFIXES, PREAMBLE, Frame, is_dicom, read_dicom
from fedclip_secure.data.grey_window import to_grey
from fedclip_secure.data.image_facts import ImageFacts, facts_of
from fedclip_secure.data.walk import in_threads, looked_at, patiently
from fedclip_secure.disk import OF_ONE_FILE, refused
from fedclip_secure.errors import ConfigError, DataError
from fedclip_secure.files import open_regular

_ORIENTATION = 0x0112  # in EXIF
_UPRIGHT = {  # by orientation: what turns such an image upright (EXIF 2.32, 4.6.4)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What stands in a repository for a large file until it is fetched, and what fetches it.
_POINTERS = {b"version https://git-lfs.github.com/spec/": "git lfs pull", b"/annex/objects/": "git annex get"}
_DEEP_BYTES, _PLAIN_BYTES, _CLEAR_BYTES = 24, 12, 20  # of a pixel at most, as measured: float64, RGB, transparency


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """8-bit RGB, upright; and what is known of it."""

    image: Image.Image
    facts: ImageFacts


class FileKind(Enum):
    """What a file is, as far as its name and its first bytes tell."""

    PICTURE = auto()
    DICOM = auto()
    CLOSED = auto()  # cannot be looked at, for a reason of its own: reading it will say why
    OTHER = auto()


def file_kinds(paths: Sequence[str]) -> list[FileKind]:
    """Of each file: by its extension, or DICOM by what it begins with.

    Scanners name DICOM files IM000001, or by a UID with dots in it.

    Raises:
        DataError: the disk fails.
    """
    nameless = [path for path in paths if _extension(path) not in _extensions()]
    begun = dict(zip(nameless, in_threads(_begun, nameless), strict=True))
    return [begun[path] if path in begun else _named(path) for path in paths]


def named_as_picture(path: str) -> bool:
    """Whether its name is that of a picture in a format other than DICOM."""
    return _extension(path) in _extensions() and _named(path) is FileKind.PICTURE


def _named(path: str) -> FileKind:
    return FileKind.DICOM if _extension(path) in DICOM_SUFFIXES else FileKind.PICTURE


def _begun(path: str) -> FileKind:
    def begins() -> bytes:
        with open_regular(Path(path)) as file:
            return file.read(PREAMBLE)

    try:
        return FileKind.DICOM if is_dicom(patiently(begins)) else FileKind.OTHER
    except OSError as error:
        if error.errno not in OF_ONE_FILE:
            raise DataError(refused(error, path)) from error
        return FileKind.CLOSED


def _extension(path: str) -> str:
    """Lower-case, with its dot; empty without one."""
    _, dot, end = path.rpartition("/")[2].rpartition(".")
    return dot and f".{end.lower()}"


@cache
def _extensions() -> frozenset[str]:
    """Lower-case suffixes of Pillow's formats and of DICOM."""
    Image.init()  # before it, Pillow knows no formats
    readers = {*Image.OPEN, "MPO"}  # the last is opened by JPEG's reader
    pillow = (suffix for suffix, kind in Image.registered_extensions().items() if kind in readers)
    return frozenset((*pillow, *DICOM_SUFFIXES))


def load_image(path: Path, window: tuple[int, int] | None) -> Image.Image:
    """Read an image as RGB; see `decode_image`.

    Raises:
        ConfigError, DataError: as `decode_image`; DataError also where the file cannot be read.
    """
    with ExitStack() as memory:
        return decode_image(looked_at(path.read_bytes, path), path, window, memory).image


def decode_image(data: bytes, path: Path, window: tuple[int, int] | None, memory: ExitStack) -> Decoded:
    """Decode an image file's bytes to 8-bit RGB, turned upright by its EXIF orientation.

    Grey of more than 8 bits (16-bit, 32-bit, float; in DICOM as stored) is mapped from `window` [low, high] to 0..255.
    Transparent pixels become white. Of several frames or pages the first counts, of DICOM's the middle one. DICOM is
    known by its first bytes, or by its name. EXIF that cannot be read leaves an image as it is stored. Waits where
    other threads hold so much that there is no memory for this one; it is held until `memory` is closed.

    Raises:
        DataError: names `path`; not an image, truncated, or too large.
        ConfigError: the plan lacks the window that this image needs, or a package is missing. No file's
            fault: all images like it would fail.
    """
    try:
        if is_dicom(data) or path.suffix.lower() in DICOM_SUFFIXES:
            return _of_dicom(read_dicom(data, path, window, memory))
        with Image.open(io.BytesIO(data)) as stored:
            return _decoded(stored, data, path, window, memory)
    except (ConfigError, DataError, ImportError, MemoryError):  # the last two are no file's fault
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"'{path}': has more pixels than Pillow reads safely ({error}); scale it down") from error
    except Exception as error:  # Pillow's and pydicom's decoders raise whatever a broken file makes them raise
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or repr(error)
        fetch = next((get for begin, get in _POINTERS.items() if data.startswith(begin)), None)
        if fetch is not None:
            raise DataError(f"'{path}': stands for an image that was not downloaded; get it with `{fetch}`") from error
        raise DataError(f"'{path}': cannot be read as an image ({reason}); replace it or move it away") from error


def _of_dicom(frame: Frame) -> Decoded:
    return Decoded(frame.image, facts_of(frame.image, frame.frames, frame.below, frame.above, dicom=True))


def _decoded(
    stored: Image.Image, data: bytes, path: Path, window: tuple[int, int] | None, memory: ExitStack
) -> Decoded:
    deep, deep_colour = is_deep(stored), is_deep_colour(stored, data)
    each = _DEEP_BYTES if deep else _CLEAR_BYTES if stored.has_transparency_data else _PLAIN_BYTES
    memory.enter_context(DECODING.taken(each * stored.width * stored.height))
    if not deep:
        image = _upright(stored, _as_rgb(stored))
        return Decoded(image, facts_of(image, _frames(stored), deep_colour=deep_colour))
    read = read_deep(stored, data)
    windowed = to_grey(read.values, path, window)
    shown = windowed.inverted() if read.inverted else windowed
    image = _upright(stored, Image.fromarray(shown.values).convert("RGB"))
    return Decoded(image, facts_of(image, _frames(stored), shown.below, shown.above))


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


def _frames(stored: Image.Image) -> int:
    """How many there are, as far as they can be read: the first, which counts, was."""
    try:
        return int(getattr(stored, "n_frames", 1))
    except Exception:  # Pillow's decoders raise whatever a broken file makes them raise
        return 1


def _upright(stored: Image.Image, image: Image.Image) -> Image.Image:
    """`image` turned as the EXIF of `stored` says; as it is where that cannot be read, for the pixels are sound."""
    try:
        orientation = stored.getexif().get(_ORIENTATION)
    except Exception:  # Pillow raises whatever a broken block makes it raise
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)
