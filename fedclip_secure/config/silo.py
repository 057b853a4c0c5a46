"""`silo.yaml`: one silo's private settings, and what its policy will never go below or above."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from fedclip_secure.config.fields import Name, Number, Pin, Strict, Text, read_model
from fedclip_secure.errors import ConfigError
from fedclip_secure.files import is_of_windows, write_atomically
from fedclip_secure.names import MAX_SILOS, MIN_SILOS, Column, Normalisation

Precision = Literal["fp32", "bf16", "fp16"]  # of the encoder; changes the features a little, so the cache keeps each


def _named(value: object) -> object:
    if value is None:
        return {}
    if value in ("dicom", "none"):
        return {"dicom": value == "dicom"}
    return {"file": value} if isinstance(value, str) else value


class Patients(Strict):
    """Who says whose an image is, and which ids are the same patient. In silo.yaml `dicom` or `none` alone will do."""

    dicom: bool | None = None  # PatientID; None: where all images are DICOM and nothing else names their patients
    normalise: list[Normalisation] = Field(default_factory=list)  # none: ids are taken as they are

    @field_validator("normalise")
    @classmethod
    def _in_order(cls, names: list[Normalisation]) -> list[Normalisation]:
        return [name for name in get_args(Normalisation) if name in names]


class FolderPatients(Patients):
    """As above, or by a CSV file of path and patient, whose name alone will do too."""

    file: Text | None = None
    columns: dict[Column, Text] = Field(default_factory=dict)  # what they are called there, if otherwise

    @model_validator(mode="after")
    def _one_source(self) -> FolderPatients:
        if self.file is not None and self.dicom is not None:
            raise ValueError("patients are named by `file` or by `dicom`, not by both; leave out one")
        return self


class FolderData(Strict):
    """Images in one folder per class."""

    format: Literal["folder"]
    path: Text
    patients: Annotated[FolderPatients, BeforeValidator(_named)] = FolderPatients()
    absent_classes: list[str] = Field(default_factory=list)  # classes of the plan that this silo knows it lacks
    strict: bool = False  # what the data report finds wrong stops the run; else it is told


class ManifestData(Strict):
    """Images listed in a CSV file of path, label and, where there, patient."""

    format: Literal["manifest"]
    path: Text
    root: Text | None = None  # where the paths begin; None: the folder of the CSV file
    columns: dict[Column, Text] = Field(default_factory=dict)  # what they are called in the file, if otherwise
    patients: Annotated[Patients, BeforeValidator(_named)] = Patients()
    absent_classes: list[str] = Field(default_factory=list)
    strict: bool = False


class EmbeddingsData(Strict):
    """Features made elsewhere: one safetensors or npz file."""

    format: Literal["embeddings"]
    path: Text
    ids: Literal["record", "patient"] | None = None  # what the file's `ids` stand for; needed with privacy
    per_record: bool = (
        False  # this silo's word: each feature was made of its record alone, by an encoder not tuned on it
    )


Data = FolderData | ManifestData | EmbeddingsData


class Policy(Strict):
    """The silo's own floors. No plan can lower them."""

    min_silos: int = Field(default=MIN_SILOS, ge=MIN_SILOS, le=MAX_SILOS)
    threshold: Literal["malicious", "honest_but_curious"] = "malicious"  # the weakest that it takes part under
    require_privacy: bool = False
    max_epsilon: Annotated[Number, Field(gt=0)] | None = None  # lifetime of any unit, over all plans; None: no cap
    delta: Annotated[Number, Field(gt=0, lt=1)] = 1e-5  # that goes with max_epsilon; no plan may have a larger one
    methods: list[str] | None = None  # None: any method that this version knows

    @model_validator(mode="after")
    def _capped(self) -> Policy:
        if self.require_privacy and self.max_epsilon is None:
            raise ValueError("`require_privacy` needs `max_epsilon`: privacy without a limit is none")
        return self


class SiloConfig(Strict):
    """The whole of `silo.yaml`."""

    name: Name
    data: Annotated[Data, Field(discriminator="format")]
    identity: Text = "identity"  # folder of key, certificate and authority
    workdir: Text = "work"  # folder of feature cache, accepted contract, journal and adapters
    ledger: Text = "ledger"  # folder of what privacy was spent: one for all identities of an organisation
    units_at_least: int | None = Field(default=None, ge=1)  # a coarse bound that the report may tell
    weights: Text | None = None  # a local copy of the encoder's checkpoint
    tokenizer: Text | None = None  # a local copy of the folder of its tokenizer, where that is one of Hugging Face
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Precision = "fp32"
    plan: Pin | None = None  # pinned by `fedclip-silo accept`
    roster: Pin | None = None
    policy: Policy = Policy()

    @model_validator(mode="after")
    def _with_a_ledger(self) -> SiloConfig:
        if self.policy.max_epsilon is not None and "ledger" not in self.model_fields_set:
            raise ValueError(
                "`policy.max_epsilon` needs `ledger`: a limit holds over all runs only where all are written into one "
                "ledger; name one folder for the whole organisation, outside of this federation's own"
            )
        return self


def read_silo(path: Path) -> SiloConfig:
    """Read `silo.yaml`; relative paths in it count from its own folder.

    Raises:
        ConfigError: missing, or with faults; all are listed.
    """
    if not path.exists():
        raise ConfigError(f"{path}: is missing; `fedclip-silo enroll` writes one to start from")
    return _located_at(path, read_model(path, SiloConfig))


def first_silo(path: Path, name: str, images: str, weights: str | None) -> SiloConfig:
    """What `read_silo` would give after `write_silo` with the same arguments; nothing is written."""
    data = FolderData(format="folder", path=images)
    return _located_at(path, SiloConfig(name=name, data=data, weights=weights))


def check_given(path: Path, config: SiloConfig, images: str | None, weights: str | None) -> None:
    """Refuse what a person gives beside a `silo.yaml` at `path` that says otherwise.

    Raises:
        ConfigError: names the key and both values.
    """
    home = path.resolve().parent
    for key, given, there in (("data.path", images, config.data.path), ("weights", weights, config.weights)):
        if given is not None and _absolute(home, given) != there:
            raise ConfigError(
                f"'{path}': is there already, and `{key}` in it is {there!r}, not {given!r}; change it there, or leave "
                f"out --{'images' if key == 'data.path' else key}"
            )


def _located_at(path: Path, config: SiloConfig) -> SiloConfig:
    home = path.resolve().parent
    paths = {
        "data": _located(config.data, home),
        "identity": _absolute(home, config.identity),
        "workdir": _absolute(home, config.workdir),
        "ledger": _absolute(home, config.ledger),
        "weights": None if config.weights is None else _absolute(home, config.weights),
        "tokenizer": None if config.tokenizer is None else _absolute(home, config.tokenizer),
    }
    return config.model_copy(update=paths)


def _absolute(home: Path, path: str) -> str:
    if is_of_windows(path) and not os.path.lexists(home / path):
        raise ConfigError(
            f"silo.yaml: {path!r} is a path of Windows, and this is none; say where the folder is mounted here "
            "(in WSL, drive C: is /mnt/c)"
        )
    return os.path.normpath(home / os.path.expanduser(path))  # noqa: PTH111 - never raises; without `..`, for messages


def for_extraction(config: SiloConfig, precision: Precision | None, strict: bool) -> SiloConfig:
    """`config` with another precision, where one is given, and with `data.strict`, where that is asked for."""
    data = config.data
    if strict and not isinstance(data, EmbeddingsData):  # a feature file is refused for any fault as it is
        data = data.model_copy(update={"strict": True})
    return config.model_copy(update={"data": data, "precision": precision or config.precision})


def _located(data: Data, home: Path) -> Data:
    given = {key: getattr(data, key, None) for key in ("path", "root")}
    paths: dict[str, object] = {key: _absolute(home, value) for key, value in given.items() if value is not None}
    if isinstance(data, FolderData) and data.patients.file is not None:
        paths["patients"] = data.patients.model_copy(update={"file": _absolute(home, data.patients.file)})
    return data.model_copy(update=paths)


def write_config(path: Path, config: SiloConfig) -> None:
    """Write all of `config` as a `silo.yaml`, without comments.

    Raises:
        DataError: the file cannot be written.
    """
    values = config.model_dump(mode="json", exclude_none=True)
    write_atomically(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())


def write_silo(path: Path, name: str, images: str, weights: str | None) -> None:
    """Write a `silo.yaml` to start from, with comments that say what can be set.

    Raises:
        DataError: the file cannot be written.
    """
    text = resources.files("fedclip_secure.config").joinpath("templates/silo.yaml").read_text("utf-8")
    text = text.replace("{name}", name).replace("{images}", json.dumps(images, ensure_ascii=False))
    if weights is not None:
        text = text.replace("# weights: ViT-B-32.pt ", f"weights: {json.dumps(weights, ensure_ascii=False)} ")
    write_atomically(path, text.encode())
