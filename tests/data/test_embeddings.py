from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedclip_secure.data.embeddings import read_embeddings, read_text_features
from fedclip_secure.errors import DataError

CLASSES = ("dog", "cat", "cow")
FEATURES = np.arange(12, dtype=np.float32).reshape(3, 4) + 1
LABELS = np.array([0, 1, 0])


def write(path: Path, arrays: dict[str, Any], classes: list[str] | None) -> Path:
    if path.suffix == ".npz":
        named = arrays if classes is None else {**arrays, "classes": np.array(classes)}
        np.savez(path, **named)
    else:
        save_file(arrays, path, None if classes is None else {"classes": json.dumps(classes)})
    return path


@pytest.fixture(params=["set.safetensors", "set.npz"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def refused(path: Path, match: str, classes: list[str] | None, **arrays: Any) -> None:
    write(path, {"features": FEATURES, "labels": LABELS, **arrays}, classes)
    with pytest.raises(DataError, match=rf"{path.name}.*{match}"):
        read_embeddings(path, CLASSES, 4)


def test_labels_are_carried_over_by_class_name(path: Path) -> None:
    write(path, {"features": FEATURES.astype(np.float64), "labels": LABELS}, ["cow", "dog"])
    found = read_embeddings(path, CLASSES, 4)
    assert found.labels.tolist() == [2, 0, 2]
    assert (found.image_features == FEATURES).all()
    assert found.unit_ids[1].tobytes() == hashlib.sha256(FEATURES[1].tobytes()).digest()


def test_ids_of_the_file_are_kept(path: Path) -> None:
    ids = np.arange(96, dtype=np.uint8).reshape(3, 32)
    write(path, {"features": FEATURES, "labels": LABELS, "ids": ids}, ["dog", "cat"])
    assert (read_embeddings(path, CLASSES, 4).unit_ids == ids).all()


def test_class_unknown_to_the_plan_is_named(path: Path) -> None:
    refused(path, "unknown to the plan: horse; the plan's classes are dog, cat, cow", ["dog", "horse"])


@pytest.mark.parametrize("classes", [None, ["dog", "dog"]])
def test_file_must_name_its_classes_each_once(path: Path, classes: list[str] | None) -> None:
    refused(path, "does not name its classes, each once", classes)


def test_nan_is_named_by_row(path: Path) -> None:
    bad = FEATURES.copy()
    bad[2, 0] = np.nan
    refused(path, r"NaN.*first row 2", ["dog", "cat"], features=bad)


def test_feature_beyond_float32_is_named_by_row(path: Path) -> None:
    bad = FEATURES.astype(np.float64)
    bad[1, 0] = 1e300
    refused(path, r"infinity.*first row 1", ["dog", "cat"], features=bad)


def test_wrong_dim_dtype_and_emptiness_are_named(path: Path) -> None:
    refused(path, r"`features` is \(3, 5\).*\(any, 4\)", ["dog", "cat"], features=np.ones((3, 5), np.float32))
    refused(path, "`features` is .* int64, must be", ["dog", "cat"], features=np.ones((3, 4), np.int64))
    refused(path, "`labels` is .* float32", ["dog", "cat"], labels=np.ones(3, np.float32))
    refused(path, r"`labels` is \(2,\)", ["dog", "cat"], labels=np.ones(2, np.int64))
    refused(path, "`ids` is uint16", ["dog", "cat"], ids=np.ones((3, 32), np.uint16))
    none = {"features": np.ones((0, 4), np.float32), "labels": np.ones(0, np.int64)}
    refused(path, "`features` has no rows", ["dog", "cat"], **none)


def test_label_outside_the_files_classes_is_named_by_row(path: Path) -> None:
    refused(path, r"`labels`, row 1: 2 is not in 0\.\.1", ["dog", "cat"], labels=np.array([0, 2, 1]))


def test_missing_array_is_named_with_those_there(path: Path) -> None:
    write(path, {"labels": LABELS}, ["dog", "cat"])
    with pytest.raises(DataError, match="no array `features`, but labels"):
        read_embeddings(path, CLASSES, 4)


def test_damaged_file_is_named(path: Path) -> None:
    path.write_bytes(b"not what the name says")
    with pytest.raises(DataError, match=f"{path.name}': is damaged"):
        read_embeddings(path, CLASSES, 4)


def test_python_objects_are_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, features=FEATURES, labels=LABELS, classes=np.array(["dog", "cat"], dtype=object))
    with pytest.raises(DataError, match="no plain array"):
        read_embeddings(path, CLASSES, 4)


def test_missing_file_and_other_suffix_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_embeddings(tmp_path / "gone.npz", CLASSES, 4)
    with pytest.raises(DataError, match=r"gone\.safetensors"):
        read_embeddings(tmp_path / "gone.safetensors", CLASSES, 4)
    with pytest.raises(DataError, match=r"must be a \.safetensors or \.npz"):
        read_embeddings(tmp_path / "set.csv", CLASSES, 4)


def test_text_features_are_ordered_by_name_and_normalised(path: Path) -> None:
    raw = np.diag([2.0, 3.0, 4.0]).astype(np.float32)
    write(path, {"text_features": raw, "logit_scale": np.array(100.0, dtype=np.float32)}, ["cow", "dog", "cat"])
    features, scale = read_text_features(path, CLASSES, 3)
    assert features.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert features.dtype == np.float32
    assert scale == 100.0


def test_text_features_at_fault_are_named(path: Path) -> None:
    scale = np.array(100.0, dtype=np.float32)
    zero = np.diag([2.0, 0.0, 4.0]).astype(np.float32)
    write(path, {"text_features": zero, "logit_scale": scale}, list(CLASSES))
    with pytest.raises(DataError, match="class 'cat': is zero"):
        read_text_features(path, CLASSES, 3)
    write(path, {"text_features": zero[:2], "logit_scale": scale}, ["dog", "cow"])
    with pytest.raises(DataError, match="no text feature for cat"):
        read_text_features(path, CLASSES, 3)
    write(
        path,
        {"text_features": np.eye(3, dtype=np.float32), "logit_scale": np.negative(scale, out=scale)},
        list(CLASSES),
    )
    with pytest.raises(DataError, match="`logit_scale` is -100"):
        read_text_features(path, CLASSES, 3)
