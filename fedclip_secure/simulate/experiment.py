"""An experiment's YAML file: what is compared, on which data, how often."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from fedclip_secure.config.fields import Name, Number, Strict, Text, read_model
from fedclip_secure.config.plan import (
    KNOWS,
    SHIPPED,
    ExternalModel,
    MethodPlan,
    Model,
    OpenClipModel,
    Optimizer,
    Positive,
    PrivacyPlan,
    Splits,
    TimmModel,
)
from fedclip_secure.errors import ConfigError
from fedclip_secure.methods.registry import find_method
from fedclip_secure.names import MAX_SILOS, MIN_SILOS

Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Baseline = Literal["zero_shot", "local_only", "centralised"]
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_LONGEST_NAME = 50  # characters: `-<seed>` follows it in the name of a federation
_NAME_ENCODER = (
    "name the encoder of your images, as `model: {name: ViT-B-32-quickgelu, pretrained: openai}`, where `pretrained` "
    f"may be a checkpoint beside this file; {SHIPPED}, which is installed, {KNOWS}: to try the program with it set "
    f"`model: {{name: {SHIPPED}, pretrained: shipped}}`"
)
_NAME_FEATURES = (
    "for features that another model made set `model: {name: external, dim: 512, text_features: FILE}`, else name that "
    "encoder"
)


def _expanded(value: object) -> object:
    """`${NAME}` and `${NAME:-default}` as a shell reads them: an empty variable takes the default too."""

    def found(match: re.Match[str]) -> str:
        text = os.environ.get(match[1]) or match[2]
        if text is None:
            raise ValueError(f"the environment has no {match[1]}; set it, or write ${{{match[1]}:-DEFAULT}}")
        return text

    return _VARIABLE.sub(found, value) if isinstance(value, str) else value


def _different(values: list[Any]) -> list[Any]:
    if any(value in values[:place] for place, value in enumerate(values)):
        raise ValueError("holds the same twice; remove one")
    return values


Location = Annotated[Text, BeforeValidator(_expanded)]


class DemoSites(Strict):
    """The labs that the demo draws."""

    format: Literal["demo"]
    seed: Seed = 0  # decides every pixel


class FolderSites(Strict):
    """Images as `path/<site>/<class>/*`."""

    format: Literal["folder"]
    path: Location


class EmbeddingSites(Strict):
    """Features made elsewhere, one file for each site, as silo.yaml's `format: embeddings` takes it."""

    format: Literal["embeddings"]
    files: dict[Text, Location] = Field(min_length=1)
    ids: Literal["record", "patient"] | None = None  # what the files' `ids` stand for; needed with privacy
    per_record: bool = False  # your word that each feature was made of its record alone; needed with privacy


class BySites(Strict):
    """Each site is a silo, but for the one that is left out to measure generalisation."""

    by: Literal["sites"]
    leave_out: Text = "none"  # each: every site in turn; none; or a site's name
    shots: int | None = Field(default=None, ge=1)  # training records of a class at a silo; None: all


class ByDirichlet(Strict):
    """All records in one pool, dealt out with label skew (Hsu et al. 2019, arXiv:1909.06335)."""

    by: Literal["dirichlet"]
    alpha: Annotated[Number, Field(ge=0.001, le=1e6)]  # small: each silo has few classes; large: all have all alike
    silos: int = Field(ge=MIN_SILOS, le=MAX_SILOS)
    shots: int | None = Field(default=None, ge=1)


class Schedule(Strict):
    """`training` of federation.yaml, as far as it is given here."""

    rounds: int | None = Field(default=None, ge=1, le=100_000)
    local_epochs: int | None = Field(default=None, ge=1, le=1000)
    batch_size: int | None = Field(default=None, ge=1, le=65536)  # records; left out where a cell has privacy
    optimizer: Optimizer | None = None


class PrivateSettings(Strict):
    """What a method has in place of its own where a cell has privacy: there noise is in every step."""

    optimizer: Optimizer | None = None
    coordinate_clip: Positive | None = None


class Settings(Strict):
    """How a method is trained; what is not given comes from `defaults`, and then from BASE."""

    training: Schedule = Schedule()
    coordinate_clip: Positive | None = None
    weights: Literal["masked", "equal"] | None = None  # with privacy always equal
    private: PrivateSettings = PrivateSettings()


BASE = Settings(
    training=Schedule(rounds=20, local_epochs=1, batch_size=32, optimizer=Optimizer(name="adam", lr=1e-3)),
    coordinate_clip=0.1,
    weights="masked",
)


class Arm(Settings):
    """One method that is compared."""

    label: Text
    method: MethodPlan

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        """Without a label, the method's name."""
        if isinstance(value, dict) and "label" not in value and isinstance(value.get("method"), dict):
            return {"label": value["method"].get("name"), **value}
        return value

    @field_validator("method")
    @classmethod
    def _known(cls, value: MethodPlan) -> MethodPlan:
        try:
            find_method(value)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("federation.yaml: ")) from error
        return value


class Experiment(Strict):
    """The whole file. Paths in it count from its own folder."""

    name: Annotated[Name, Field(max_length=_LONGEST_NAME)]
    model: Model = OpenClipModel(name=SHIPPED, pretrained="shipped")  # left out with drawn labs alone
    classes: dict[str, Text] | None = None  # folder: phrase; None: as the data's folders are called
    templates: list[Text] | None = Field(default=None, min_length=1, max_length=1000)
    data: Annotated[DemoSites | FolderSites | EmbeddingSites, Field(discriminator="format")]
    split: Annotated[BySites | ByDirichlet, Field(discriminator="by")]
    splits: Splits = Splits(train=0.6, validation=0.2, test=0.2)
    defaults: Settings = Settings()
    methods: list[Arm] = Field(min_length=1)
    baselines: Annotated[list[Baseline], AfterValidator(_different)] = Field(default_factory=list)
    seeds: Annotated[list[Seed], AfterValidator(_different)] = Field(default=[0], min_length=1)
    privacy: Annotated[list[PrivacyPlan | None], AfterValidator(_different)] = Field(default=[None], min_length=1)
    every: int = Field(default=1, ge=1)  # rounds between two evaluations
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    @field_validator("methods")
    @classmethod
    def _told_apart(cls, value: list[Arm]) -> list[Arm]:
        labels = [arm.label for arm in value]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"the label {twice[0]!r} stands twice; give each method a `label` of its own")
        return value

    @model_validator(mode="after")
    def _together(self) -> Experiment:
        faults = list(_contradictions(self))
        if faults:
            raise ValueError("\n  ".join(faults))
        return self

    def settings(self, arm: Arm) -> Settings:
        """What holds for `arm`, with nothing left open but what only privacy needs."""
        return _filled([arm, self.defaults, BASE])


def _contradictions(experiment: Experiment) -> Sequence[str]:
    """What no field shows by itself."""
    faults, embeddings = [], isinstance(experiment.data, EmbeddingSites)
    if "model" not in experiment.model_fields_set and not isinstance(experiment.data, DemoSites):
        # Figures of an encoder that nobody chose would be taken for those of the methods.
        faults.append(f"model is missing; {_NAME_FEATURES if embeddings else _NAME_ENCODER}")
    if isinstance(experiment.model, ExternalModel) and not embeddings:
        faults.append("data.format must be `embeddings`: the model is external, and no encoder for images runs here")
    if isinstance(experiment.model, TimmModel) and "zero_shot" in experiment.baselines:
        faults.append(f"baselines: zero_shot: {experiment.model.name} reads no text; leave it out")
    if embeddings and experiment.classes is None:
        faults.append("classes is missing; files of features need it: add `folder: phrase` for each class")
    if any(experiment.privacy) and experiment.splits.validation > 0:
        faults.append(
            "with `privacy`, splits.validation must be 0: its counts would travel without noise; "
            "set `splits: {train: 0.8, validation: 0, test: 0.2}`"
        )
    if experiment.splits.test == 0:
        faults.append("splits.test must be above 0: accuracy is measured on it")
    return faults


def encoder_of(experiment: Experiment) -> str:
    """What made the features, for whoever reads the figures."""
    strange = experiment.model.name == SHIPPED and not isinstance(experiment.data, DemoSites)
    return encoder_name(experiment) + (f", which {KNOWS}: figures are near chance" if strange else "")


def encoder_name(experiment: Experiment) -> str:
    """As `encoder_of`, without what it does not know."""
    model = experiment.model
    if isinstance(model, ExternalModel):
        return f"none here: {model.dim} features from files"
    return f"{model.name} ({model.pretrained})"


def _filled(given: Sequence[Settings]) -> Settings:
    """Key by key, the first of `given` that says something."""

    def first(blocks: Sequence[Strict], names: Sequence[str]) -> dict[str, Any]:
        values = {name: [getattr(block, name) for block in blocks] for name in names}
        return {name: next((value for value in found if value is not None), None) for name, found in values.items()}

    return Settings(
        training=Schedule(**first([block.training for block in given], list(Schedule.model_fields))),
        private=PrivateSettings(**first([block.private for block in given], list(PrivateSettings.model_fields))),
        **first(given, ["coordinate_clip", "weights"]),
    )


def read_experiment(path: Path) -> Experiment:
    """Read an experiment's file; its paths are made absolute, from its own folder.

    Raises:
        ConfigError: missing, or with faults; all are listed, each with its key and what would be right.
    """
    experiment, home = read_model(path, Experiment), path.resolve().parent
    data = experiment.data
    if isinstance(data, FolderSites):
        data = data.model_copy(update={"path": os.path.normpath(home / data.path)})
    elif isinstance(data, EmbeddingSites):
        data = data.model_copy(update={"files": {site: os.path.normpath(home / at) for site, at in data.files.items()}})
    return experiment.model_copy(update={"data": data})
