"""`federation.yaml`: what every silo agrees on before anything is trained."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_serializer,
    field_validator,
    model_validator,
)

from fedclip_secure import canonical
from fedclip_secure.config.fields import CONTROL, LATER, LEAST_NOISE, Name, Number, Seconds, Strict, Text
from fedclip_secure.names import MAX_SILOS, MIN_SILOS

Fraction = Annotated[Number, Field(gt=0, lt=1)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
# Plain values, which a method's own fields check later: this layer does not know the methods.
_Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]
SHIPPED = "fedclip-tiny"  # a small CLIP of our own, whose weights the package brings along: needs no download
KNOWS = "knows drawn micrographs and nothing else"  # that small CLIP: of other images it makes next to nothing
_Plain = bool | _Whole | Number | Text
Option = _Plain | list[_Plain] | dict[Text, _Plain | list[_Plain]]


def _pair(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _rising(value: tuple[int, int]) -> tuple[int, int]:
    if value[0] >= value[1]:
        raise ValueError("must be [low, high] with low < high")
    return value


def _architecture(value: str) -> str:
    if not re.fullmatch(r"timm/[a-z0-9_]+", value):
        raise ValueError("must be timm/ and the name of an architecture; a tag of its weights goes into `pretrained`")
    return value


def _plain_name(value: str) -> str:
    """Not `hf-hub:`, by which open_clip would take config and tokenizer from whoever the plan names."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", value):
        raise ValueError("must have letters, digits, ., _ and - only, as open_clip's own names do")
    return value


Window = Annotated[tuple[int, int], BeforeValidator(_pair), AfterValidator(_rising)]
TimmName = Annotated[Text, AfterValidator(_architecture)]


class OpenClipModel(Strict):
    """A CLIP encoder that open_clip can build, and the weights to load into it."""

    name: Annotated[Text, AfterValidator(_plain_name)]
    # A tag of open_clip, a checkpoint beside federation.yaml, or `shipped` of fedclip-tiny; its SHA-256 is in the lock.
    pretrained: Text
    config: Text | None = None  # open_clip model config (JSON) beside federation.yaml, where `name` is not built in
    image_window: Window | None = None  # [low, high] of 16-bit images, mapped to 0..255
    # A folder beside federation.yaml with the files of a Hugging Face tokenizer; None: as the model's config says.
    tokenizer: Annotated[Text | None, LATER] = None

    @model_validator(mode="before")
    @classmethod
    def _shipped(cls, value: object) -> object:
        if isinstance(value, dict) and value.get("name") == SHIPPED and "pretrained" not in value:
            raise ValueError(f"pretrained is missing; for {SHIPPED}, which is installed, add `pretrained: shipped`")
        return value

    @field_validator("name")
    @classmethod
    def _not_external(cls, value: str) -> str:
        if value == "external":
            raise ValueError("an external encoder needs `dim` and `text_features`, and has no `pretrained`")
        return value


class TimmModel(Strict):
    """A vision transformer of timm, without its classifier, and the weights to load into it. It reads no text."""

    name: TimmName
    pretrained: Text  # a tag of timm, or a checkpoint beside federation.yaml; its SHA-256 is in the lock
    image_window: Window | None = None  # as above


class ExternalModel(Strict):
    """Features that each silo brings in files; no encoder runs here."""

    name: Literal["external"]
    dim: int = Field(ge=2, le=65536)
    text_features: Text  # safetensors beside federation.yaml: `text_features` (classes, dim), `logit_scale` ()


def _kind_of_model(value: object) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    if isinstance(name, str) and name.startswith("timm/"):
        return "timm"
    return "external" if name == "external" else "open_clip"


ImageModel = OpenClipModel | TimmModel
Model = Annotated[
    Annotated[OpenClipModel, Tag("open_clip")]
    | Annotated[TimmModel, Tag("timm")]
    | Annotated[ExternalModel, Tag("external")],
    Discriminator(_kind_of_model),
]


def _is_pair_of_text(item: object) -> bool:
    return isinstance(item, list) and len(item) == 2 and all(isinstance(part, str) for part in item)


class Splits(Strict):
    """Shares of the records, by a hash of the unit's id."""

    train: Fraction
    validation: Annotated[Number, Field(ge=0, lt=1)]
    test: Annotated[Number, Field(ge=0, lt=1)]

    @model_validator(mode="after")
    def _whole(self) -> Splits:
        if not math.isclose(self.train + self.validation + self.test, 1.0, abs_tol=1e-9):
            raise ValueError("train, validation and test must add up to 1")
        return self


class MethodPlan(Strict):
    """Which method trains the shared parameters. Keys beside these are the method's own, which checks them."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Option]

    name: Text
    loss: Literal["cross_entropy", "inbatch"] = "cross_entropy"

    @model_validator(mode="after")
    def _plain_keys(self) -> MethodPlan:
        for key in self.__pydantic_extra__:
            if not re.fullmatch(r"[a-z][a-z0-9_]{0,62}", key):
                raise ValueError(f"{key!r} cannot be an option: options have a-z, 0-9 and _ only, at most 63")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the name."""
        return self.model_dump(exclude={"name"})


class Optimizer(Strict):
    """The optimiser that each silo builds afresh every round."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Positive
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(_pair)] = (0.9, 0.98)
    eps: Positive = 1e-6
    weight_decay: NonNegative = 0.0
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.0


class Training(Strict):
    """A silo's share of one round."""

    rounds: int = Field(ge=1, le=100_000)
    local_epochs: int = Field(default=1, ge=1, le=1000)
    batch_size: int | None = Field(
        default=None, ge=1, le=65536
    )  # records; with `privacy` its sample_rate takes its place
    optimizer: Optimizer
    seed: int = Field(default=0, ge=0, le=2**31 - 1)  # initial weights and splits; never noise, masks or keys


class SecureAggregation(Strict):
    """Parameters of the secure round (docs of `fedclip_secure.secagg`)."""

    min_silos: int = Field(default=MIN_SILOS, ge=MIN_SILOS, le=MAX_SILOS)
    threshold: Literal["malicious", "honest_but_curious"] = "malicious"
    colluding: int = Field(default=1, ge=0, le=MAX_SILOS)
    coordinate_clip: Positive = 0.1  # largest |update| of one coordinate
    weights: Literal["masked", "equal", "public"] = "masked"  # by records, all alike, or as listed
    public_weights: dict[Name, int] | None = None  # silo: weight; with `weights: public` alone
    max_weight: int = Field(default=100_000, ge=1, le=(2**29 - 1) // MIN_SILOS)
    verify_sum: Literal["auto", "always", "never"] = "auto"  # every silo adds the masked vectors up again

    @model_validator(mode="after")
    def _weights_given(self) -> SecureAggregation:
        if (self.weights == "public") != (self.public_weights is not None):
            raise ValueError("`public_weights` and `weights: public` go together")
        for silo, weight in (self.public_weights or {}).items():
            if not 1 <= weight <= self.max_weight:
                raise ValueError(f"public_weights.{silo} must lie in 1..max_weight ({self.max_weight})")
        return self


class Accuracy(Strict):
    """Shares of records that were right, by class, as the coordinator measured them elsewhere; nobody checks them."""

    data: Text  # what it was measured on
    without_noise: dict[Text, Share]
    with_noise: dict[Text, Share]


class PrivacyPlan(Strict):
    """Differential privacy that the updates of every silo satisfy by themselves (docs/privacy.md).

    Nothing here depends on how many records a silo has, so nothing that leaves it does.
    """

    unit: Literal["record", "patient"]  # whose presence stays hidden
    sample_rate: Annotated[Number, Field(gt=0, le=1)]  # q: with what probability a unit is in a step
    steps_per_round: int = Field(ge=1, le=100_000)
    noise_multiplier: Annotated[Number, Field(ge=LEAST_NOISE, le=10_000)] | None = None  # sigma, in max_grad_norm
    target_epsilon: Annotated[Number, Field(gt=0, le=1000)] | None = None  # over all rounds; `prepare` finds sigma
    max_grad_norm: Positive  # C: what the gradient of one unit is clipped to
    update_divisor: Positive  # in place of the batch size
    delta: Annotated[Number, Field(gt=0, le=0.01)]
    max_retrains: int = Field(default=0, ge=0, le=10_000)  # rounds that a silo may train again; paid for from the start
    accuracy: Annotated[Accuracy | None, LATER] = None  # what the noise costs each class

    @model_validator(mode="after")
    def _one_of_two(self) -> PrivacyPlan:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError("needs `noise_multiplier` or `target_epsilon`, and not both")
        return self


class Deadlines(Strict):
    """How long the aggregator waits for each stage."""

    join: Seconds = Field(default=600, ge=1)
    share: Seconds = Field(default=300, ge=1)
    upload: Seconds = Field(default=1800, ge=1)
    agree: Seconds = Field(default=600, ge=1)
    unmask: Seconds = Field(default=600, ge=1)


class FederationPlan(Strict):
    """The whole of `federation.yaml`."""

    federation: Name
    server: Text
    model: Model
    classes: dict[str, Text]  # folder: phrase; the order numbers the classes
    templates: list[Text] = Field(min_length=1, max_length=1000)  # may be left out where no text is read
    splits: Splits
    method: MethodPlan
    training: Training
    secure_aggregation: SecureAggregation = SecureAggregation()
    privacy: PrivacyPlan | None = None
    deadlines: Deadlines = Deadlines()
    initial: Text | None = None  # an adapter to go on from, beside federation.yaml
    purpose: Annotated[Text | None, LATER] = None  # what the model is for
    contact: Annotated[Text | None, LATER] = None  # whom to ask
    retention: Annotated[Text | None, LATER] = None  # what becomes of the model, and when it is deleted

    @model_validator(mode="before")
    @classmethod
    def _without_text(cls, value: object) -> object:
        if isinstance(value, dict) and _kind_of_model(value.get("model")) == "timm":
            return {"templates": ["{}"], **value}
        return value

    @field_validator("server")
    @classmethod
    def _https(cls, value: str) -> str:
        parts = urlsplit(value)
        try:
            usable = parts.scheme == "https" and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is no number, or above 65535
            usable = False
        if not usable or "@" in parts.netloc or parts.path.strip("/") or parts.query or parts.fragment:
            raise ValueError("must be https://HOST or https://HOST:PORT")
        return value.rstrip("/")

    @field_validator("classes", mode="before")
    @classmethod
    def _from_pairs(cls, value: object) -> object:
        """The canonical form has pairs: a CBOR map has no order, and the order is agreed too."""
        if isinstance(value, list) and all(_is_pair_of_text(item) for item in value):
            return dict(value) if len(dict(value)) == len(value) else value
        return value

    @field_serializer("classes")
    def _to_pairs(self, value: dict[str, str]) -> list[list[str]]:
        return [list(pair) for pair in value.items()]

    @field_validator("classes")
    @classmethod
    def _folders(cls, value: dict[str, str]) -> dict[str, str]:
        if len(value) < 2:
            raise ValueError("needs at least 2 classes")
        for folder in value:
            if not re.fullmatch(rf"[^/\\{CONTROL}]{{1,200}}", folder) or folder.startswith("."):
                raise ValueError(f"{folder!r} cannot be a folder's name")
        return value

    @field_validator("templates")
    @classmethod
    def _placeholder(cls, value: list[str]) -> list[str]:
        for template in value:
            if template.count("{}") != 1:
                raise ValueError(f"{template!r} must hold {{}} once, where the class phrase goes")
        return value

    @model_validator(mode="after")
    def _goes_with_privacy(self) -> FederationPlan:
        faults = _unfit_for_privacy(self) if self.privacy else _unfit_without(self)
        if faults:
            raise ValueError("\n  ".join(faults))
        return self

    @property
    def digest(self) -> bytes:
        """32 bytes over every value of the plan."""
        return canonical.digest("fedclip/v1/plan", self.model_dump(mode="json"))

    def text_prompts(self) -> list[list[str]]:
        """Every template filled with every class phrase: one list of prompts for each class, in order."""
        return [[template.replace("{}", phrase) for template in self.templates] for phrase in self.classes.values()]

    def texts(self) -> list[str]:
        """What the tokenizer is pinned on: the classes' phrases, and all prompts."""
        return [*self.classes.values(), *(prompt for prompts in self.text_prompts() for prompt in prompts)]


def _unfit_without(plan: FederationPlan) -> list[str]:
    return [] if plan.training.batch_size else ["training.batch_size is missing; add it"]


def _unfit_for_privacy(plan: FederationPlan) -> list[str]:
    """What would let the number of a silo's records, or un-noised records, out."""
    faults = []
    if plan.splits.validation > 0:
        faults.append("with `privacy`, splits.validation must be 0: its counts would travel without noise")
    if plan.secure_aggregation.weights == "masked":
        faults.append("with `privacy`, secure_aggregation.weights must be `equal` or `public`: records must not count")
    if plan.training.batch_size is not None or plan.training.local_epochs != 1:
        faults.append(
            "with `privacy`, leave out training.batch_size and training.local_epochs: "
            "privacy.sample_rate and privacy.steps_per_round take their place"
        )
    return [*faults, *_unlike_the_classes(plan)]


def _unlike_the_classes(plan: FederationPlan) -> list[str]:
    """Accuracies that are not of each class, once."""
    given = plan.privacy.accuracy if plan.privacy else None
    if given is None:
        return []
    return [
        f"privacy.accuracy.{key} must have a share for each of {', '.join(plan.classes)}, and for nothing else"
        for key, shares in (("without_noise", given.without_noise), ("with_noise", given.with_noise))
        if set(shares) != set(plan.classes)
    ]
