"""One DICOM frame as an RGB image, and whose it is. Needs pydicom and decoders (the extra `dicom`).

Of a file's data set only the tags in `_TAGS` are parsed for the image, and `PatientID` alone for the patient.
"""

from __future__ import annotations

import io
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedclip_secure.data.decoding_memory import DECODING
from fedclip_secure.data.grey_window import to_grey
from fedclip_secure.data.walk import looked_at
from fedclip_secure.errors import ConfigError, DataError
from fedclip_secure.extras import install_command, lacking
from fedclip_secure.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

    from pydicom import Dataset
    from pydicom.uid import UID

# pydicom logs a traceback for each decoder that it tries; what became of a file is said in one line, by us.
logging.getLogger("pydicom").addHandler(logging.NullHandler())
logging.getLogger("pydicom").propagate = False  # a level would not last: pydicom sets its own when it is loaded
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
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "PixelData",
)
_NEEDED = ("PhotometricInterpretation", "BitsAllocated", "Rows", "Columns")
_BYTES = 24  # of a pixel while it is decoded: through float64, and what decoders hold besides
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom turns all of these into RGB


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """A file's frame that counts, as 8-bit RGB; of how many; what share of it the window made black, and white."""

    image: Image.Image
    frames: int
    below: float = 0.0
    above: float = 0.0


def read_dicom(data: bytes, path: Path, window: tuple[int, int] | None, memory: ExitStack) -> Frame:
    """Decode a DICOM file to 8-bit RGB; of several frames the middle one, of an even number the later of the two.

    A file is one record with one label, however many frames it has; of a volume or a film the ends show least.
    Grey pixels are rescaled by the file's slope and intercept (or its modality LUT) and mapped from
    `window` [low, high], in rescaled units, to 0..255; MONOCHROME1 is inverted. Grey of up to 8 bits that is not
    rescaled is no deeper than a picture, and fills 0..255 by itself. Colour must have 8 bits. What memory it takes is
    held until `memory` is closed.

    Raises:
        DataError: names `path`; no DICOM, no pixels, too large, or pixels that cannot be decoded.
        ConfigError: the plan has no window, or pydicom or a decoder is not installed.
    """
    file = _parse(io.BytesIO(data), path, _TAGS)
    frames = _check(file, path)
    memory.enter_context(DECODING.taken(_BYTES * int(file.Rows) * int(file.Columns)))
    pixels = _pixels(file, path, frames // 2)
    kind = str(file.PhotometricInterpretation)
    if kind in _COLOUR:
        return Frame(Image.fromarray(pixels.astype(np.uint8, casting="safe")), frames)
    said = _transformation(file, frames // 2)
    grey = to_grey(_rescaled(pixels, said), path, _own_range(file, said) or window)
    shown = grey.inverted() if kind == "MONOCHROME1" else grey
    return Frame(Image.fromarray(shown.values).convert("RGB"), frames, shown.below, shown.above)


def patient_of(path: Path) -> str | None:
    """A file's PatientID without spaces around it (PS3.3, C.7.1.1), empty where none can be read; no pixels are.

    None where the file cannot be parsed: such a one is left out where it is decoded.

    Raises:
        DataError: the file cannot be opened or read.
        ConfigError: pydicom is not installed.
    """

    def parsed() -> str | None:
        with open_regular(path) as file:
            try:
                data_set = _parse(file, path, ("PatientID",))
            except (ConfigError, OSError, MemoryError):
                raise
            except Exception:  # pydicom raises whatever a broken file makes it raise
                return None
            try:
                return str(data_set.get("PatientID") or "").strip()
            except Exception:  # and whatever a broken element does
                return ""

    return looked_at(parsed, path)  # opened a moment later after all, its image would count as a patient of its own


def _parse(file: BinaryIO, path: Path, tags: Sequence[str]) -> Dataset:
    try:
        from pydicom import dcmread  # noqa: PLC0415 - an extra: most silos have no DICOM
        from pydicom.errors import InvalidDicomError  # noqa: PLC0415
        from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(f"'{path}': is DICOM: {lacking(error) or error}") from error
    begins = file.read(2)
    file.seek(0)
    try:
        # Files without the preamble are read where they begin as a data set does, with group 0002 or 0008.
        force = begins in (b"\x02\x00", b"\x08\x00")
        parsed = dcmread(file, stop_before_pixels="PixelData" not in tags, force=force, specific_tags=list(tags))
    except InvalidDicomError as error:
        raise DataError(f"'{path}': is no DICOM file; replace it or move it away") from error
    if "TransferSyntaxUID" not in parsed.file_meta:  # what a file without it has (PS3.5, 10.1)
        implicit, little = parsed.original_encoding
        if not little:
            raise DataError(f"'{path}': does not name its transfer syntax; export it again")
        parsed.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return parsed


def _check(file: Dataset, path: Path) -> int:
    """Refuse by name what `read_dicom` does not cover, before anything large is decoded; the number of frames."""
    if "PixelData" not in file:
        raise DataError(
            f"'{path}': has no pixels of integers, or is cut off before their end; copy it again, or move it away"
        )
    lacking = [tag for tag in _NEEDED if file.get(tag) in (None, "")]
    if lacking:
        raise DataError(f"'{path}': lacks {' and '.join(lacking)}; export it again")
    kind, bits = str(file.PhotometricInterpretation), int(file.BitsAllocated)
    if kind not in _GREY + _COLOUR:
        raise DataError(f"'{path}': photometric interpretation {kind} is not supported; export it as grey or RGB")
    if kind in _COLOUR and bits != 8:
        raise DataError(f"'{path}': is colour of {bits} bits a sample, and only 8 are read; export it with 8")
    stored, highest = int(file.get("BitsStored") or bits), file.get("HighBit")
    if highest is not None and int(highest) != stored - 1:  # pydicom takes the lowest bits
        raise DataError(
            f"'{path}': its values lie in the bits below {int(highest) + 1}, {stored} of them (HighBit, BitsStored), "
            "which is not read; export it again"
        )
    pixels = int(file.Rows) * int(file.Columns)
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        raise DataError(f"'{path}': has {pixels} pixels, more than {Image.MAX_IMAGE_PIXELS}; scale it down")
    return max(1, int(file.get("NumberOfFrames") or 1))


def _pixels(file: Dataset, path: Path, frame: int) -> npt.NDArray[np.generic]:
    """(H, W) of stored values, or (H, W, 3) RGB, of the frame with the number `frame`, from 0."""
    from pydicom.pixels.utils import pixel_array  # noqa: PLC0415 - as in _parse

    syntax = file.file_meta.TransferSyntaxUID
    _check_decoder(syntax, path)
    try:
        return pixel_array(file, index=frame)
    except Exception as error:  # each of pydicom's decoders raises its own kinds
        remedy = "export it uncompressed" if syntax.is_compressed else "copy or export it again"
        raise DataError(
            f"'{path}': its pixels cannot be decoded (transfer syntax {syntax.name}: "
            f"{' '.join(str(error).split()) or repr(error)}); {remedy}"
        ) from error


def _check_decoder(syntax: UID, path: Path) -> None:
    """Tell a compression that a package would read from one that nothing reads."""
    from pydicom.pixels.decoders.base import get_decoder  # noqa: PLC0415 - as in _parse

    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise DataError(
            f"'{path}': is compressed as {syntax.name} ({syntax}), which is not read; export it uncompressed"
        ) from error
    if not decoder.is_available:
        needed = ", or ".join(decoder.missing_dependencies)
        raise ConfigError(
            f"'{path}': is compressed as {syntax.name}, and no decoder for that is installed ({needed}); "
            f"run `{install_command('dicom')}`, or export it uncompressed"
        )


def is_dicom(data: bytes) -> bool:
    """Whether a file that begins with `data` is DICOM."""
    return data[PREAMBLE - 4 : PREAMBLE] == b"DICM"


def _transformation(file: Dataset, frame: int) -> Dataset:
    """What holds a frame's slope and intercept: its own group, that of all (PS3.3, C.7.6.16.2.9), or the file."""
    for name, number in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        groups = file.get(name) or ()
        found = groups[number].get("PixelValueTransformationSequence") if number < len(groups) else None
        if found:
            return found[0]  # type: ignore[no-any-return]
    return file


def _own_range(file: Dataset, said: Dataset) -> tuple[int, int] | None:
    """From black to white where the file's bits say it, as those of an 8-bit picture do."""
    bits = int(file.get("BitsStored") or file.BitsAllocated)
    rescaled = (_number(said, "RescaleSlope", 1.0), _number(said, "RescaleIntercept", 0.0)) != (1.0, 0.0)
    if bits > 8 or rescaled or said.get("ModalityLUTSequence"):
        return None
    least = -(2 ** (bits - 1)) if file.get("PixelRepresentation") else 0
    return least, least + 2**bits - 1


def _number(file: Dataset, tag: str, otherwise: float) -> float:
    """The value of a tag, which may be there and empty."""
    value = file.get(tag)
    return otherwise if value is None or value == "" else float(value)


def _rescaled(pixels: npt.NDArray[np.generic], said: Dataset) -> npt.NDArray[np.generic]:
    from pydicom.pixels.processing import apply_modality_lut  # noqa: PLC0415 - as in _parse

    if said.get("ModalityLUTSequence"):
        values: Any = apply_modality_lut(pixels, said)
        return np.asarray(values)
    return pixels.astype(np.float64) * _number(said, "RescaleSlope", 1.0) + _number(said, "RescaleIntercept", 0.0)
