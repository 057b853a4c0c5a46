"""One image file's bytes to 8-bit RGB."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from fedclip_secure.data.dicom import DICOM_SUFFIX, read_dicom
from fedclip_secure.data.window import to_grey
from fedclip_secure.errors import ConfigError, DataError

_DEEP_MODES = ("I", "F")  # and I;16, I;16B, ...: more than 8 bits per pixel


def readable_extensions() -> frozenset[str]:
    """Lower-case suffixes of the files that `decode_image` can read: Pillow's formats and DICOM."""
    pillow = (suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)
    return frozenset((*pillow, DICOM_SUFFIX))


def load_image(path: Path, window: tuple[int, int] | None) -> Image.Image:
    """Read an image as RGB; see `decode_image`.

    Raises:
        ConfigError, DataError: as `decode_image`; DataError also where the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error
    return decode_image(data, path, window)


def decode_image(data: bytes, path: Path, window: tuple[int, int] | None) -> Image.Image:
    """Decode an image file's bytes to 8-bit RGB, turned upright by its EXIF orientation.

    Images of more than 8 bits (16-bit, 32-bit and float grey) and grey DICOM are mapped from `window`
    [low, high] to 0..255. Transparent pixels become white. Of several frames or pages the first counts,
    but DICOM must have one. A file named `*.dcm` is read as DICOM.

    Raises:
        DataError: names `path`; not an image, truncated, or too large.
        ConfigError: the plan lacks the window that this image needs, or a package is missing. No file's
            fault: all images like it would fail.
    """
    try:
        if path.suffix.lower() == DICOM_SUFFIX:
            return read_dicom(data, path, window)
        with Image.open(io.BytesIO(data)) as image:
            return _as_rgb(ImageOps.exif_transpose(image), path, window)
    except (ConfigError, DataError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: has more pixels than Pillow reads safely ({error}); scale it down") from error
    except Exception as error:  # Pillow's and pydicom's decoders raise whatever a broken file makes them raise
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or repr(error)
        raise DataError(f"{path}: cannot be read as an image ({reason}); replace it or move it away") from error


def _as_rgb(image: Image.Image, path: Path, window: tuple[int, int] | None) -> Image.Image:
    if image.mode in _DEEP_MODES or image.mode.startswith("I;"):
        values: npt.NDArray[np.generic] = np.asarray(image)
        return Image.fromarray(to_grey(values, path, window)).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")
