"""Whose presence a plan with privacy hides: the units of a silo's training records, by ids that last."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from fedclip_secure.config.silo import Data, EmbeddingsData
from fedclip_secure.data.dataset import FeatureSet
from fedclip_secure.errors import ConfigError, DataError


def unit_ids(features: FeatureSet, unit: Literal["record", "patient"], data: Data) -> npt.NDArray[np.uint8]:
    """The unit of each record, (N, 32) uint8: by the patient, or by the bytes of the image's file.

    Two equal files are one unit. An id is never made of features: another encoder, or another precision,
    would give the same record another id, and with it a fresh budget.

    Raises:
        ConfigError: `data` does not say what the plan needs to know.
        DataError: records without a patient, or a file without ids.
    """
    if isinstance(data, EmbeddingsData):
        return _stated(features, unit, data)
    if unit == "record":
        assert features.record_ids is not None  # noqa: S101 - features of images have them
        return features.record_ids
    nobodys = np.flatnonzero((features.unit_ids == features.record_ids).all(axis=1))
    if len(nobodys):
        raise DataError(
            f"{features.source}: {len(nobodys)} of {len(features)} training images have no patient, and the plan's "
            "privacy.unit is `patient`; name their patients in data.patients (or the manifest), or leave them out"
        )
    return features.unit_ids


def _stated(features: FeatureSet, unit: str, data: EmbeddingsData) -> npt.NDArray[np.uint8]:
    """Nobody but this silo can say what its own features were made of."""
    if not data.per_record:
        raise ConfigError(
            "silo.yaml: data.per_record: with privacy, features from a file need this silo's word that each was made "
            "of its record alone, by an encoder and a normalisation that were not fitted to these data; set `true` "
            "if that is so: it is signed into the ledger and the report"
        )
    if data.ids != unit:
        raise ConfigError(
            f"silo.yaml: data.ids: the plan's privacy.unit is `{unit}`; set `ids: {unit}` if the file's `ids` stand "
            f"for {unit}s, else export it with ids that do"
        )
    if features.record_ids is None:
        raise DataError(f"{features.source}: has no array `ids`, which privacy needs; export it with 32 bytes a record")
    return features.unit_ids
