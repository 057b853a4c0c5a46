from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import style

from fedclip_secure.errors import DataError
from fedclip_secure.training.evaluation.evaluate import Confusion, Evaluation
from fedclip_secure.training.evaluation.plots import _BLUES, _WHITE_TEXT_FROM, confusion_svg, save_confusion


def texts(svg: bytes) -> list[str]:
    """Every text in the picture, read as an XML reader does."""
    root = ET.fromstring(svg)  # noqa: S314 - our own output
    return ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


def some_confusion(classes: int) -> Confusion:
    random = np.random.default_rng(classes)
    return np.diag(random.integers(5, 90, classes)) + random.integers(0, 2, (classes, classes))


@pytest.mark.parametrize("classes", [2, 7, 40, 100])
def test_every_class_is_named_on_both_axes_and_every_record_counted(classes: int) -> None:
    confusion, names = some_confusion(classes), [f"class {number}" for number in range(classes)]
    found = texts(confusion_svg(confusion, names, "a title"))
    for name, records in zip(names, confusion.sum(axis=1), strict=True):
        assert found.count(name) == 1
        assert found.count(f"{name} ({records})") == 1
    if classes > 12:  # cells of few classes hold the share too
        assert sum(int(text) for text in found if text.isdigit()) == confusion.sum()


def test_cells_say_count_and_share_of_their_row() -> None:
    found = texts(confusion_svg(np.array([[3, 1], [0, 0]]), ["cat", "dog"], "a title"))
    assert {"3", "75%", "1", "25%", "dog (0)"} <= set(found)
    assert "0" not in found


def test_names_are_escaped_shortened_and_never_read_as_formulas() -> None:
    names = [
        "<script>alert('x')</script>",
        "$\\frac{",
        "&amp;",
        "a very long name of one lobe of the lung, left",
        "肺炎",
    ]
    svg = confusion_svg(some_confusion(5), names, "<b>$ & title")
    assert b"<script" not in svg
    found = texts(svg)
    assert {"<script>alert('x')</script>", "$\\frac{", "&amp;", "肺炎", "<b>$ & title"} <= set(found)
    assert "a very long name o… lung, left" in found


def test_picture_is_light_and_the_same_each_time_whatever_the_persons_style() -> None:
    plain = confusion_svg(some_confusion(3), "abc", "a title")
    with style.context("dark_background"), mpl.rc_context({"font.size": 30.0, "text.usetex": True}):
        assert confusion_svg(some_confusion(3), "abc", "a title") == plain
        assert mpl.rcParams["font.size"] == 30.0
    assert "matplotlib.pyplot" not in sys.modules


def test_counts_stand_out_from_every_colour_of_the_map() -> None:
    for share in np.linspace(0, 1, 101):
        channels = np.array(_BLUES(share)[:3])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        luminance = linear @ [0.2126, 0.7152, 0.0722]
        contrast = 1.05 / (luminance + 0.05) if share >= _WHITE_TEXT_FROM else (luminance + 0.05) / 0.05
        assert contrast >= 4.5, f"WCAG 2.1, 1.4.3, at a share of {share}"


def test_file_holds_the_accuracy_and_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    evaluation = Evaluation(("cat", "dog"), np.array([[3, 1], [0, 4]]), np.array([[4, 0], [4, 0]]))
    path = tmp_path / "evaluation" / "test-best.svg"
    save_confusion(path, evaluation, "best adapter (after round 3), test split")
    found = texts(path.read_bytes())
    assert "best adapter (after round 3), test split" in found
    assert "7 of 8 right, 87.5%" in found
    (tmp_path / "taken").mkdir()
    with pytest.raises(DataError, match="taken': cannot be written"):
        save_confusion(tmp_path / "taken", evaluation, "a title")
