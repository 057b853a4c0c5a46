"""One DICOM frame as an RGB image. Needs pydicom, the `dicom` extra.

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
from fedclip_secure.extras import lacking

if TYPE_CHECKING:
    from pydicom import Dataset

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
PREAMBLE = 132  # bytes: 128 of anything, and four letters (PS3.10, 7.1)
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
    `window` [low, high], in rescaled units, to 0..255; MONOCHROME1 is inverted. Grey of up to 8 bits that is not
    rescaled is no deeper than a picture, and fills 0..255 by itself. Colour must have 8 bits.

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
    grey = to_grey(_rescaled(pixels, file), path, _own_range(file) or window)
    return Image.fromarray(255 - grey if kind == "MONOCHROME1" else grey).convert("RGB")


def _parse(data: bytes, path: Path) -> Dataset:
    try:
        from pydicom import dcmread  # noqa: PLC0415 - an extra: most silos have no DICOM
        from pydicom.errors import InvalidDicomError  # noqa: PLC0415
        from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(f"{path}: is DICOM: {lacking(error) or error}") from error
    try:
        # Files without the preamble are read where they begin as a data set does, with group 0002 or 0008.
        file = dcmread(io.BytesIO(data), specific_tags=list(_TAGS), force=data[:2] in (b"\x02\x00", b"\x08\x00"))
    except InvalidDicomError as error:
        raise DataError(f"{path}: is no DICOM file; replace it or move it away") from error
    if "TransferSyntaxUID" not in file.file_meta:  # what a file without it has (PS3.5, 10.1)
        implicit, little = file.original_encoding
        if not little:
            raise DataError(f"{path}: does not name its transfer syntax; export it again")
        file.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return file


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


def is_dicom(data: bytes) -> bool:
    """Whether a file that begins with `data` is DICOM."""
    return data[PREAMBLE - 4 : PREAMBLE] == b"DICM"


def _own_range(file: Dataset) -> tuple[int, int] | None:
    """From black to white where the file's bits say it, as those of an 8-bit picture do."""
    bits = int(file.get("BitsStored") or file.BitsAllocated)
    rescaled = (_number(file, "RescaleSlope", 1.0), _number(file, "RescaleIntercept", 0.0)) != (1.0, 0.0)
    if bits > 8 or rescaled or "ModalityLUTSequence" in file or file.get("PixelRepresentation"):
        return None
    return 0, 2**bits - 1


def _number(file: Dataset, tag: str, otherwise: float) -> float:
    """The value of a tag, which may be there and empty."""
    value = file.get(tag)
    return otherwise if value is None or value == "" else float(value)


def _rescaled(pixels: npt.NDArray[np.generic], file: Dataset) -> npt.NDArray[np.generic]:
    from pydicom.pixels.processing import apply_modality_lut  # noqa: PLC0415 - as in _parse

    if "ModalityLUTSequence" in file:
        values: Any = apply_modality_lut(pixels, file)
        return np.asarray(values)
    return pixels.astype(np.float64) * _number(file, "RescaleSlope", 1.0) + _number(file, "RescaleIntercept", 0.0)
