"""One DICOM frame as an RGB image. Needs pydicom (`fedclip-secure[dicom]`).

Of a file's data set only the tags in `_TAGS` are parsed, so nothing about a patient is ever held.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedclip_secure.data.window import to_grey
from fedclip_secure.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pydicom import Dataset

DICOM_SUFFIX = ".dcm"
_TAGS = (  # PS3.3: image pixel module (C.7.6.3), multi-frame (C.7.6.6), modality LUT (C.11.1)
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "NumberOfFrames",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "PixelData",
)
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom turns all of these into RGB


def read_dicom(data: bytes, path: Path, window: tuple[int, int] | None) -> Image.Image:
    """Decode a single-frame DICOM file to 8-bit RGB.

    Grey pixels are rescaled by the file's slope and intercept (or its modality LUT) and mapped from
    `window` [low, high], in rescaled units, to 0..255; MONOCHROME1 is inverted. Colour must have 8 bits.

    Raises:
        DataError: names `path`; no DICOM, no pixels, several frames, too large, or pixels that cannot be decoded.
        ConfigError: the plan has no window, or pydicom is not installed.
    """
    file = _parse(data, path)
    _check(file, path)
    pixels = _pixels(file, path)
    kind = str(file.PhotometricInterpretation)
    if kind in _COLOUR:
        return Image.fromarray(pixels.astype(np.uint8, casting="safe"))
    grey = to_grey(_rescaled(pixels, file), path, window)
    return Image.fromarray(255 - grey if kind == "MONOCHROME1" else grey).convert("RGB")


def _parse(data: bytes, path: Path) -> Dataset:
    try:
        from pydicom import dcmread  # noqa: PLC0415 - an extra: most silos have no DICOM
        from pydicom.errors import InvalidDicomError  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"{path}: is DICOM, which needs pydicom; run `pip install 'fedclip-secure[dicom]'`"
        ) from error
    try:
        return dcmread(io.BytesIO(data), specific_tags=list(_TAGS))
    except InvalidDicomError as error:
        raise DataError(f"{path}: is no DICOM file; replace it or move it away") from error


def _check(file: Dataset, path: Path) -> None:
    """Refuse by name what `read_dicom` does not cover, before anything large is decoded."""
    if "PixelData" not in file:
        raise DataError(f"{path}: has no pixel data; move it away")
    frames = int(file.get("NumberOfFrames") or 1)
    if frames != 1:
        raise DataError(
            f"{path}: has {frames} frames, and only single-frame files are read; export the frame that counts"
        )
    kind, bits = str(file.PhotometricInterpretation), int(file.BitsAllocated)
    if kind not in _GREY + _COLOUR:
        raise DataError(f"{path}: photometric interpretation {kind} is not supported; export it as grey or RGB")
    if kind in _COLOUR and bits != 8:
        raise DataError(f"{path}: is colour of {bits} bits a sample, and only 8 are read; export it with 8")
    pixels = int(file.Rows) * int(file.Columns)
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        raise DataError(f"{path}: has {pixels} pixels, more than {Image.MAX_IMAGE_PIXELS}; scale it down")


def _pixels(file: Dataset, path: Path) -> npt.NDArray[np.generic]:
    """(H, W) of stored values, or (H, W, 3) RGB."""
    from pydicom.pixels.utils import pixel_array  # noqa: PLC0415 - as in _parse

    syntax = getattr(file.file_meta, "TransferSyntaxUID", None)
    try:
        return pixel_array(file)
    except Exception as error:  # each of pydicom's decoders raises its own kinds
        raise DataError(
            f"{path}: its pixels cannot be decoded (transfer syntax {getattr(syntax, 'name', 'missing')}: "
            f"{str(error).splitlines()[0] if str(error) else repr(error)}); export it uncompressed"
        ) from error


def _rescaled(pixels: npt.NDArray[np.generic], file: Dataset) -> npt.NDArray[np.generic]:
    from pydicom.pixels.processing import apply_modality_lut  # noqa: PLC0415 - as in _parse

    values: Any = apply_modality_lut(pixels, file)
    return np.asarray(values)
