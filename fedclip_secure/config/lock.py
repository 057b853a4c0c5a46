"""`federation.lock`: what `prepare` resolved, and the one digest over plan and lock."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fedclip_secure import canonical
from fedclip_secure.config.fields import LATER, LEAST_NOISE, MOST_NOISE, Number, Sha256, Strict, Text, check
from fedclip_secure.config.plan import FederationPlan, TimmName
from fedclip_secure.disk import refused
from fedclip_secure.errors import ConfigError, TrustError
from fedclip_secure.files import write_atomically


class Preprocessing(Strict):
    """How an image becomes the encoder's input."""

    size: int = Field(ge=1, le=4096)  # pixels, square
    mean: list[Number] = Field(min_length=3, max_length=3)
    std: list[Number] = Field(min_length=3, max_length=3)
    interpolation: Literal["bicubic", "bilinear"]
    resize_mode: Literal["shortest", "longest", "squash"]


class OpenClipEncoder(Strict):
    """An open_clip model, resolved: nothing is left to a version of open_clip to decide."""

    kind: Literal["open_clip"] = "open_clip"
    name: Text
    config: str  # open_clip's model config as canonical JSON
    weights_sha256: Sha256  # of the checkpoint file
    # Of the tokens of the plan's prompts and of fixed texts (features/tokenizer.py); version 0.1 pinned none.
    tokens_sha256: Annotated[Sha256 | None, LATER] = None
    preprocessing: Preprocessing
    dim: int = Field(ge=2)
    logit_scale: Number = Field(gt=0)  # CLIP's learned temperature, after exp

    @property
    def network(self) -> str:
        """What decides the network, beside its weights."""
        return self.config


class TimmEncoder(Strict):
    """A vision transformer of timm, resolved: nothing but its architecture's name is left to a version of timm."""

    kind: Literal["timm"] = "timm"
    name: TimmName
    weights_sha256: Sha256  # of the checkpoint file
    preprocessing: Preprocessing
    pool: Literal["token", "avg", "avgmax", "max", "map"]  # how the tokens become one feature
    dim: int = Field(ge=2)

    @property
    def network(self) -> str:
        """What decides the network, beside its weights and the size of its images."""
        return f"{self.name} {self.pool}"

    @property
    def logit_scale(self) -> float:
        """A head's logits are as they are."""
        return 1.0


class ExternalEncoder(Strict):
    """Features that come in files, and the text features that go with them."""

    kind: Literal["external"] = "external"
    dim: int = Field(ge=2)
    text_features_sha256: Sha256  # of the file
    logit_scale: Number = Field(gt=0)


ImageEncoder = OpenClipEncoder | TimmEncoder


class Parameter(Strict):
    """One shared array."""

    name: Text
    shape: list[int]


class FederationLock(Strict):
    """The whole of `federation.lock`."""

    version: Literal[1] = 1
    plan: Sha256  # digest of the plan that was prepared
    encoder: OpenClipEncoder | TimmEncoder | ExternalEncoder = Field(discriminator="kind")
    layout: list[Parameter]  # the shared parameters, in the order of the flat vector
    initial_model: Sha256  # digest of the adapter that round 1 starts from
    initial_file: Sha256  # of initial.safetensors
    method_state: dict[str, Any] = Field(default_factory=dict)
    # With `privacy`: sigma, for all rounds.
    noise_multiplier: Annotated[Number, Field(ge=LEAST_NOISE, le=MOST_NOISE)] | None = None
    releases: int = Field(default=1, ge=1)  # noisy sums of one step: one for each phase of the method


@dataclass(frozen=True, slots=True)
class Contract:
    """Plan and lock together; `digest` is what a silo pins."""

    plan: FederationPlan
    lock: FederationLock

    def encode(self) -> bytes:
        """Canonical bytes, as sent to the silos."""
        return canonical.encode([self.plan.model_dump(mode="json"), self.lock.model_dump(mode="json")])

    @property
    def digest(self) -> bytes:
        """32 bytes; covers every value of plan and lock, the order of the classes included."""
        return canonical.digest(
            "fedclip/v1/contract", self.plan.model_dump(mode="json"), self.lock.model_dump(mode="json")
        )

    @property
    def pin(self) -> str:
        """The digest as silo.yaml holds it."""
        return f"sha256:{self.digest.hex()}"

    @classmethod
    def decode(cls, data: bytes, source: str) -> Contract:
        """Parse canonical bytes that a server sent.

        Raises:
            ConfigError: a value of plan or lock is impossible.
            ProtocolError: not canonical CBOR.
        """
        value = canonical.decode(data)
        if not isinstance(value, list) or len(value) != 2:
            raise TrustError(f"{source}: sent something that is not a plan with its lock; is it a fedclip-agg?")
        return cls(
            check(value[0], FederationPlan, f"plan from {source}"),
            check(value[1], FederationLock, f"lock from {source}"),
        )


def write_lock(path: Path, lock: FederationLock) -> None:
    """Write `lock` as JSON that a person can read and compare, atomically."""
    text = json.dumps(lock.model_dump(mode="json"), indent=2, ensure_ascii=False)
    write_atomically(path, f"{text}\n".encode())


def read_lock(path: Path) -> FederationLock:
    """Read what `prepare` wrote.

    Raises:
        ConfigError: missing, or not as `prepare` writes it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: is missing; run `fedclip-agg prepare`") from error
    except OSError as error:
        raise ConfigError(refused(error, path)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); run `fedclip-agg prepare` again") from error
    return check(data, FederationLock, str(path))


def differences(mine: Contract, theirs: Contract) -> list[tuple[str, str, str]]:
    """Every key on which two contracts differ: (key path, mine, theirs)."""
    left, right = _flat(mine), _flat(theirs)
    keys = [*left, *(key for key in right if key not in left)]
    return [
        (key, left.get(key, "(absent)"), right.get(key, "(absent)")) for key in keys if left.get(key) != right.get(key)
    ]


def _flat(contract: Contract) -> dict[str, str]:
    flat: dict[str, str] = {}
    for part in (contract.plan.model_dump(mode="json"), contract.lock.model_dump(mode="json")):
        _flatten("", part, flat)
    return flat


def _flatten(prefix: str, value: Any, into: dict[str, str]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(f"{prefix}.{key}".lstrip("."), item, into)
    elif prefix == "classes" and isinstance(value, list):
        into["classes (order counts)"] = ", ".join(f"{folder}: {phrase}" for folder, phrase in value)
    else:
        into[prefix] = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
