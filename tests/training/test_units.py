from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedclip_secure.config.silo import EmbeddingsData, FolderData
from fedclip_secure.data.dataset import FeatureSet
from fedclip_secure.errors import ConfigError, DataError
from fedclip_secure.training.private.units import unit_ids

FOLDER = FolderData(format="folder", path="x")
STATED = EmbeddingsData(format="embeddings", path="x", ids="record", per_record=True)
RECORDS = np.random.default_rng(0).integers(0, 256, (6, 32)).astype(np.uint8)
PATIENTS = np.random.default_rng(1).integers(0, 256, (3, 32)).astype(np.uint8)[[0, 0, 1, 1, 2, 2]]


def features(units: Any = RECORDS, records: Any = RECORDS) -> FeatureSet:
    return FeatureSet(np.zeros((6, 4), np.float32), np.zeros(6, np.int64), units, "here", records)


def test_a_record_goes_by_the_bytes_of_its_file_even_where_its_patient_is_known() -> None:
    assert unit_ids(features(PATIENTS), "record", FOLDER) is RECORDS


def test_a_patient_goes_by_the_patients_id() -> None:
    assert unit_ids(features(PATIENTS), "patient", FOLDER) is PATIENTS


def test_images_without_a_patient_are_refused_where_patients_count() -> None:
    some = PATIENTS.copy()
    some[[1, 4]] = RECORDS[[1, 4]]
    with pytest.raises(DataError, match="here: 2 of 6 training images have no patient"):
        unit_ids(features(some), "patient", FOLDER)


@pytest.mark.parametrize(
    ("change", "unit", "said"),
    [
        ({"per_record": False}, "record", "data.per_record: with privacy, features from a file need this silo's word"),
        ({"ids": None}, "record", "data.ids: the plan's privacy.unit is `record`; set `ids: record`"),
        ({"ids": "record"}, "patient", "set `ids: patient`"),
        ({"ids": "patient"}, "record", "set `ids: record`"),
    ],
)
def test_features_from_a_file_need_the_silos_word(change: dict[str, Any], unit: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        unit_ids(features(), unit, STATED.model_copy(update=change))


def test_features_without_ids_are_refused_for_their_hash_would_not_last() -> None:
    with pytest.raises(DataError, match="here: has no array `ids`"):
        unit_ids(features(records=None), "record", STATED)


def test_ids_of_a_file_are_taken_as_stated() -> None:
    assert unit_ids(features(), "record", STATED) is RECORDS
