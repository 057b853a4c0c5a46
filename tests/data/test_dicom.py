from __future__ import annotations

import io
import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from pydicom import dcmread, uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import convert_color_space
from pydicom.uid import (
    MPEG2MPML,
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from fedclip_secure.data import dicom as dicom_reader
from fedclip_secure.data.folder import read_folder
from fedclip_secure.data.image import FileKind, decode_image, file_kinds, load_image
from fedclip_secure.errors import ConfigError, DataError

Pixels = npt.NDArray[Any]


def dicom(path: Path, pixels: Pixels, syntax: UID = ExplicitVRLittleEndian, **tags: Any) -> Path:
    """Write `pixels` (H, W) or (H, W, 3) as they are; `tags` replace what the pixels say, None leaves out."""
    bits = pixels.dtype.itemsize * 8
    data = pixels.tobytes()
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = syntax
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = CTImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = generate_uid()
    file.PatientName, file.PatientID = "Doe^Jane", "123"
    settings = {
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": pixels.shape[2] if pixels.ndim == 3 else 1,
        "PhotometricInterpretation": "RGB" if pixels.ndim == 3 else "MONOCHROME2",
        "PlanarConfiguration": 0 if pixels.ndim == 3 else None,
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": data + b"\0" * (len(data) % 2),
        **tags,
    }
    for name, value in settings.items():
        if value is not None:
            setattr(file, name, value)
    if "PixelData" in file:
        file["PixelData"].VR = "OW" if bits > 8 else "OB"
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


def grey(path: Path, window: tuple[int, int] | None) -> list[int]:
    image = load_image(path, window)
    assert image.mode == "RGB"
    values = np.asarray(image)
    assert (values == values[..., :1]).all()
    return [int(value) for value in values[0, :, 0]]


def test_window_is_in_rescaled_units(tmp_path: Path) -> None:
    stored = np.array([[0, 24, 524, 1024, 4000]], np.uint16)
    path = dicom(tmp_path / "ct.dcm", stored, RescaleSlope="2", RescaleIntercept="-1048")
    assert grey(path, (-1000, 1000)) == [0, 0, 128, 255, 255]


def test_signed_pixels_are_signed(tmp_path: Path) -> None:
    path = dicom(tmp_path / "ct.dcm", np.array([[-1000, 0, 1000]], np.int16))
    assert grey(path, (-1000, 1000)) == [0, 128, 255]


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    path = dicom(tmp_path / "x.dcm", np.array([[0, 255]], np.uint8), PhotometricInterpretation="MONOCHROME1")
    assert grey(path, (0, 255)) == [255, 0]


def test_grey_without_the_plans_window_is_refused(tmp_path: Path) -> None:
    path = dicom(tmp_path / "ct.dcm", np.array([[-1000, 3000]], np.int16))
    with pytest.raises(ConfigError, match=r"ct\.dcm': holds grey values from -1000 to 3000.*model\.image_window"):
        load_image(path, None)


COLOUR = np.array([[[255, 0, 0], [0, 255, 0], [10, 20, 200], [90, 90, 90]]], np.uint8)


def test_colour_needs_no_window(tmp_path: Path) -> None:
    assert (np.asarray(load_image(dicom(tmp_path / "a.dcm", COLOUR), None)) == COLOUR).all()


def test_colour_in_planes_is_read(tmp_path: Path) -> None:
    planes = np.ascontiguousarray(COLOUR.transpose(2, 0, 1)).tobytes()
    path = dicom(tmp_path / "a.dcm", COLOUR, PlanarConfiguration=1, PixelData=planes)
    assert (np.asarray(load_image(path, None)) == COLOUR).all()


def test_ybr_becomes_rgb(tmp_path: Path) -> None:
    ybr = convert_color_space(COLOUR, "RGB", "YBR_FULL")
    path = dicom(tmp_path / "a.dcm", ybr, PhotometricInterpretation="YBR_FULL")
    assert np.abs(np.asarray(load_image(path, None)).astype(int) - COLOUR).max() <= 2


def test_jpeg_inside_is_decoded(tmp_path: Path) -> None:
    inside = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 40)).save(inside, "JPEG")
    path = dicom(
        tmp_path / "a.dcm",
        np.zeros((16, 16, 3), np.uint8),
        JPEGBaseline8Bit,
        PhotometricInterpretation="YBR_FULL_422",
        PixelData=encapsulate([inside.getvalue()]),
    )
    assert np.abs(np.asarray(load_image(path, None)).astype(int) - (200, 30, 40)).max() <= 3


@pytest.mark.parametrize(
    ("tags", "match"),
    [
        ({"PixelData": None}, "has no pixels of integers, or is cut off before their end; copy it again"),
        ({"PixelData": bytes(2)}, r"its pixels cannot be decoded .*; copy or export it again"),
        ({"Rows": None}, "lacks Rows; export it again"),
        ({"BitsStored": 12, "HighBit": 15}, r"lie in the bits below 16, 12 of them \(HighBit, BitsStored\)"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR is not supported"),
        ({"Rows": 60000, "Columns": 60000}, "has 3600000000 pixels, more than"),
        ({"RescaleSlope": "0", "RescaleIntercept": "1e400"}, "NaN or infinite|cannot be read"),
    ],
)
def test_file_that_cannot_be_used_is_named(tmp_path: Path, tags: dict[str, Any], match: str) -> None:
    path = dicom(tmp_path / "a.dcm", np.array([[1, 2]], np.uint16), **tags)
    with pytest.raises(DataError, match=rf"a\.dcm': .*({match})"):
        load_image(path, (0, 255))


def test_deep_colour_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is colour of 16 bits"):
        load_image(dicom(tmp_path / "a.dcm", COLOUR.astype(np.uint16)), (0, 255))


def test_compression_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    path = dicom(
        tmp_path / "a.dcm", np.zeros((2, 2), np.uint16), JPEGLossless, PixelData=encapsulate([b"\xff\xd8junk"])
    )
    with pytest.raises(DataError, match=r"transfer syntax JPEG Lossless.*export it uncompressed"):
        load_image(path, (0, 255))


def test_middle_frame_of_several_counts(tmp_path: Path) -> None:
    for values, middle in (((10, 20, 30), 20), ((10, 20, 30, 40), 30)):
        frames = np.stack([np.full((2, 2), value, np.uint8) for value in values])
        path = dicom(tmp_path / "a.dcm", frames[0], NumberOfFrames=len(values), PixelData=frames.tobytes())
        assert grey(path, None) == [middle, middle]
        with ExitStack() as memory:
            assert decode_image(path.read_bytes(), path, None, memory).facts.frames == len(values)


def test_grey_of_8_bits_is_as_bright_as_a_picture_whatever_the_window(tmp_path: Path) -> None:
    shallow = np.array([[0, 20, 221, 255]], np.uint8)
    assert grey(dicom(tmp_path / "a.dcm", shallow), (0, 4095)) == [0, 20, 221, 255]
    assert grey(dicom(tmp_path / "a.dcm", shallow.astype(np.uint16), BitsStored=8, HighBit=7), None) == [
        0,
        20,
        221,
        255,
    ]
    inverted = dicom(tmp_path / "a.dcm", shallow, PhotometricInterpretation="MONOCHROME1")
    assert grey(inverted, (0, 4095)) == [255, 235, 34, 0]
    rescaled = dicom(tmp_path / "a.dcm", shallow, RescaleSlope="16", RescaleIntercept="0")
    assert grey(rescaled, (0, 4095)) == [0, 20, 220, 254], "in the units of the window"


@pytest.mark.parametrize("tag", ["RescaleSlope", "RescaleIntercept"])
def test_empty_slope_or_intercept_is_none(tmp_path: Path, tag: str) -> None:
    tags: dict[str, Any] = {"RescaleSlope": "1", "RescaleIntercept": "0", tag: ""}
    assert grey(dicom(tmp_path / "a.dcm", np.array([[0, 4095]], np.uint16), **tags), (0, 4095)) == [0, 255]


def test_slope_of_an_enhanced_file_is_that_of_its_frame_or_of_all(tmp_path: Path) -> None:
    frames = np.stack([np.full((2, 2), value, np.uint16) for value in (0, 1000, 2000)])
    per, shared = Dataset(), Dataset()
    for group, slope, intercept in ((per, "1", "-1000"), (shared, "1", "-500")):
        change = Dataset()
        change.RescaleSlope, change.RescaleIntercept = slope, intercept
        group.PixelValueTransformationSequence = [change]
    stored: dict[str, Any] = {"NumberOfFrames": 3, "PixelData": frames.tobytes()}
    window = (-1000, 1000)
    assert grey(dicom(tmp_path / "a.dcm", frames[0], **stored), window) == [255, 255]
    one = dicom(tmp_path / "b.dcm", frames[0], SharedFunctionalGroupsSequence=[shared], **stored)
    assert grey(one, window) == [191, 191]
    every: dict[str, Any] = {
        "SharedFunctionalGroupsSequence": [shared],
        "PerFrameFunctionalGroupsSequence": [Dataset(), per, Dataset()],
    }
    assert grey(dicom(tmp_path / "c.dcm", frames[0], **every, **stored), window) == [128, 128]


def test_empty_lut_and_signed_bytes_are_no_reason_for_the_window(tmp_path: Path) -> None:
    shallow = np.array([[0, 20, 221, 255]], np.uint8)
    assert grey(dicom(tmp_path / "a.dcm", shallow, ModalityLUTSequence=[]), (0, 4095)) == [0, 20, 221, 255]
    signed = np.array([[-128, 0, 127]], np.int8)
    assert grey(dicom(tmp_path / "b.dcm", signed), (0, 4095)) == [0, 128, 255]


def test_file_without_a_preamble_is_read(tmp_path: Path) -> None:
    path = dicom(tmp_path / "a.dcm", np.array([[0, 4095]], np.uint16))
    path.write_bytes(path.read_bytes()[132:])
    assert grey(path, (0, 4095)) == [0, 255]


@pytest.mark.parametrize("name", ["IM000001", "1.2.840.113619.2.55", "scan.IMA", "scan.dicom", "x.DCM"])
def test_file_is_dicom_by_what_it_begins_with(tmp_path: Path, name: str) -> None:
    path = dicom(tmp_path / name, np.array([[0, 255]], np.uint8))
    assert file_kinds([str(path)]) == [FileKind.DICOM]
    assert grey(path, None) == [0, 255]


DEEP = np.random.default_rng(1).integers(0, 4096, (32, 32), dtype=np.uint16)
LOSSLESS = [JPEGLSLossless, JPEG2000Lossless, RLELossless]


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.name)
def test_lossless_compression_is_read_bit_for_bit(tmp_path: Path, syntax: UID) -> None:
    plain = dicom(tmp_path / "plain.dcm", DEEP, BitsStored=12, HighBit=11)
    file = dcmread(plain)
    file.compress(syntax)
    file.save_as(tmp_path / "small.dcm")
    images = [np.asarray(load_image(tmp_path / name, (0, 4095))) for name in ("plain.dcm", "small.dcm")]
    assert (images[0] == images[1]).all()


def test_decoders_of_every_compression_in_common_use_are_there() -> None:
    """Those of the extra `dicom`."""
    for name in (
        "JPEGBaseline8Bit", "JPEGExtended12Bit", "JPEGLossless", "JPEGLosslessSV1", "JPEGLSLossless",
        "JPEGLSNearLossless", "JPEG2000Lossless", "JPEG2000", "HTJ2KLossless", "RLELossless",
    ):  # fmt: skip
        assert get_decoder(getattr(uid, name)).is_available, name


def test_compression_that_a_package_would_read_is_told_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    junk = encapsulate([b"\xff\xd8junk"])
    path = dicom(tmp_path / "a.dcm", np.zeros((2, 2), np.uint16), JPEGLossless, PixelData=junk)
    monkeypatch.setattr(get_decoder(JPEGLossless), "_available", {})
    with pytest.raises(
        ConfigError,
        match=r"as JPEG Lossless.*no decoder for that is installed \(gdcm.*run `.* -m pip install \"pydicom>=3\" ",
    ):
        load_image(path, (0, 255))


def test_film_is_refused_by_the_name_of_its_compression(tmp_path: Path) -> None:
    path = dicom(
        tmp_path / "a.dcm", COLOUR, MPEG2MPML, PhotometricInterpretation="YBR_FULL_422", PixelData=encapsulate([b"x"])
    )
    with pytest.raises(DataError, match=r"is compressed as MPEG2 Main Profile / Main Level .*, which is not read"):
        load_image(path, None)


def test_decoders_that_fail_leave_no_traceback_in_the_log(tmp_path: Path) -> None:
    kept = io.StringIO()
    handler = logging.StreamHandler(kept)
    logging.getLogger().addHandler(handler)
    path = dicom(tmp_path / "a.dcm", np.zeros((2, 2), np.uint16), JPEGLSLossless, PixelData=encapsulate([b"junk"]))
    with pytest.raises(DataError) as caught:
        load_image(path, (0, 255))
    assert "\n" not in str(caught.value)
    logging.getLogger().removeHandler(handler)
    assert not kept.getvalue()


@pytest.mark.parametrize("data", [b"", b"no dicom", b"\0" * 128 + b"DICM", b"\0" * 128 + b"DICM" + b"\xff" * 60])
def test_file_that_is_no_dicom_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.dcm"):
        load_image(path, (0, 255))


def test_truncated_file_is_named(tmp_path: Path) -> None:
    path = dicom(tmp_path / "a.dcm", np.ones((64, 64), np.uint16))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"a\.dcm"):
        load_image(path, (0, 255))


def test_missing_package_is_told_and_is_not_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dicom(tmp_path / "a.dcm", np.ones((2, 2), np.uint16))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(
        ConfigError, match=r"is DICOM: the package 'pydicom' is not .* -m pip install \"pydicom>=3\" .*`$"
    ):
        load_image(path, (0, 255))


def test_nothing_about_the_patient_is_parsed(tmp_path: Path) -> None:
    path = dicom(tmp_path / "a.dcm", np.ones((2, 2), np.uint16))
    found = dicom_reader._parse(io.BytesIO(path.read_bytes()), path, dicom_reader._TAGS)
    assert "PatientName" in dcmread(path)
    assert "PixelData" in found
    assert "PatientName" not in found
    assert "PatientID" not in found


def test_folders_list_dicom_files(tmp_path: Path) -> None:
    for name in ("cat/a.DCM", "dog/b.dcm"):
        dicom(tmp_path / name, np.ones((2, 2), np.uint16))
    assert [file.path.name for file in read_folder(tmp_path, ("cat", "dog")).files] == ["a.DCM", "b.dcm"]
