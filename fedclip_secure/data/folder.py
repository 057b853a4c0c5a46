"""A folder per class: which images there are, and how one is read."""

from __future__ import annotations

import difflib
import io
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fedclip_secure.data.dataset import ImageFile
from fedclip_secure.errors import DataError

_log = logging.getLogger(__name__)
_DEEP_MODES = ("I", "F")  # and I;16, I;16B, ...: more than 8 bits per pixel
_NAME_ABSENT = "name the class under `data.absent_classes` in silo.yaml"


def read_folder(root: Path, classes: Sequence[str], absent_classes: Sequence[str] = ()) -> list[ImageFile]:
    """List the images under `root/<class>/`, at any depth, by class and then by path.

    An image is what Pillow reads by its extension. Hidden files and folders are skipped; other files
    are skipped with a warning in the log. `absent_classes` are the plan's classes that need no folder.

    Raises:
        DataError: no such root; a class folder is missing, empty or unknown to the plan; files lie
            beside the class folders.
    """
    folders = _class_folders(root)
    _check_names(root, set(folders), classes, absent_classes)
    extensions = _readable_extensions()
    files: list[ImageFile] = []
    for label, name in enumerate(classes):
        if name in folders:
            files += [ImageFile(path, label) for path in _images(root / name, extensions)]
    return files


def load_image(path: Path, window: tuple[int, int] | None) -> Image.Image:
    """Read an image as RGB; see `decode_image`.

    Raises:
        DataError: as `decode_image`, and where the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error
    return decode_image(data, path, window)


def decode_image(data: bytes, path: Path, window: tuple[int, int] | None) -> Image.Image:
    """Decode an image file's bytes to 8-bit RGB, turned upright by its EXIF orientation.

    Images of more than 8 bits (16-bit, 32-bit and float grey) are mapped from `window` [low, high] to
    0..255. Transparent pixels become white. Of several frames or pages the first counts.

    Raises:
        DataError: names `path`; not an image, truncated, too large, or deeper than 8 bits without a window.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _as_rgb(ImageOps.exif_transpose(image), path, window)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: has more pixels than Pillow reads safely ({error}); scale it down") from error
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them raise
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or repr(error)
        raise DataError(f"{path}: cannot be read as an image ({reason}); replace it or move it away") from error


def _as_rgb(image: Image.Image, path: Path, window: tuple[int, int] | None) -> Image.Image:
    if image.mode in _DEEP_MODES or image.mode.startswith("I;"):
        return _windowed(image, path, window).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


def _windowed(image: Image.Image, path: Path, window: tuple[int, int] | None) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"{path}: holds NaN or infinite pixels; replace it or move it away")
    if window is None:
        raise DataError(
            f"{path}: has more than 8 bits per pixel (mode {image.mode}, values {values.min():g} to {values.max():g}); "
            "the plan must say which range counts: ask the coordinator to set `model.image_window: [low, high]`"
        )
    low, high = window
    grey = np.clip((values - low) * (255.0 / (high - low)), 0.0, 255.0)
    return Image.fromarray(np.rint(grey).astype(np.uint8))


def _class_folders(root: Path) -> list[str]:
    try:
        entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{root}: cannot be opened ({error.strerror}); check `data.path` in silo.yaml") from error
    strays = [entry.name for entry in entries if not entry.is_dir()]
    if strays:
        raise DataError(
            f"{root}: {len(strays)} file(s) lie beside the class folders ({_some(strays)}); "
            "move each into the folder of its class, or out of here"
        )
    return [entry.name for entry in entries]


def _check_names(root: Path, folders: set[str], classes: Sequence[str], absent: Sequence[str]) -> None:
    unknown = sorted(folders - set(classes))
    if unknown:
        raise DataError(
            f"{root}: folder(s) that are no class of the plan: {_some(unknown)}{_near(unknown, classes)}; "
            f"the plan's classes are {', '.join(classes)}; rename the folder or move it away"
        )
    strangers = sorted(set(absent) - set(classes))
    if strangers:
        raise DataError(
            f"`data.absent_classes` in silo.yaml names {_some(strangers)}, no class of the plan"
            f"{_near(strangers, classes)}; the plan's classes are {', '.join(classes)}"
        )
    missing = [name for name in classes if name not in folders and name not in absent]
    if missing:
        raise DataError(f"{root}: no folder for class(es) {_some(missing)}; create it, or {_NAME_ABSENT}")


def _images(folder: Path, extensions: frozenset[str]) -> list[Path]:
    found, others = [], Counter[str]()
    for path in sorted(_visible_files(folder), key=lambda path: path.relative_to(folder).as_posix()):
        suffix = path.suffix.lower()
        if suffix in extensions:
            found.append(path)
        else:
            others[suffix or "no extension"] += 1
    listed = ", ".join(f"{count} x {suffix}" for suffix, count in others.items())
    if not found:
        held = f"holds no image, but {listed}" if others else "is empty"
        raise DataError(f"{folder}: {held}; put images there, or remove the folder and {_NAME_ABSENT}")
    if others:
        _log.warning("%s: skipped files that are no images by their extension: %s", folder, listed)
    return found


def _visible_files(folder: Path) -> Iterator[Path]:
    """Every file that is not hidden; links to folders are followed, each folder once."""
    seen: set[tuple[int, int]] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        status = Path(here).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in names if not name.startswith("."))


def _readable_extensions() -> frozenset[str]:
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def _near(names: Sequence[str], classes: Sequence[str]) -> str:
    lowered = {name.lower(): name for name in classes}
    pairs = [(name, difflib.get_close_matches(name.lower(), lowered, n=1)) for name in names]
    hints = [f"{name} -> {lowered[close[0]]}?" for name, close in pairs if close]
    return f" ({', '.join(hints[:3])})" if hints else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
