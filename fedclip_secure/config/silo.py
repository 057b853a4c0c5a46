"""`silo.yaml`: one silo's private settings, and what its policy will never go below or above."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedclip_secure.config.fields import Name, Pin, Strict, Text, read_model
from fedclip_secure.errors import ConfigError
from fedclip_secure.files import write_atomically
from fedclip_secure.names import MAX_SILOS, MIN_SILOS


class FolderData(Strict):
    """Images in one folder per class."""

    format: Literal["folder"]
    path: Text
    absent_classes: list[str] = Field(default_factory=list)  # classes of the plan that this silo knows it lacks


class EmbeddingsData(Strict):
    """Features made elsewhere: one safetensors or npz file."""

    format: Literal["embeddings"]
    path: Text


class Policy(Strict):
    """The silo's own floors. No plan can lower them."""

    min_silos: int = Field(default=MIN_SILOS, ge=MIN_SILOS, le=MAX_SILOS)
    require_privacy: bool = False
    methods: list[str] | None = None  # None: any method that this version knows


class SiloConfig(Strict):
    """The whole of `silo.yaml`."""

    name: Name
    data: Annotated[FolderData | EmbeddingsData, Field(discriminator="format")]
    identity: Text = "identity"  # folder of key, certificate and authority
    workdir: Text = "work"  # folder of feature cache, accepted contract, journal and adapters
    weights: Text | None = None  # a local copy of the encoder's checkpoint
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    plan: Pin | None = None  # pinned by `fedclip-silo accept`
    roster: Pin | None = None
    policy: Policy = Policy()


def read_silo(path: Path) -> SiloConfig:
    """Read `silo.yaml`; relative paths in it count from its own folder.

    Raises:
        ConfigError: missing, or with faults; all are listed.
    """
    if not path.exists():
        raise ConfigError(f"{path}: is missing; `fedclip-silo enroll` writes one to start from")
    config = read_model(path, SiloConfig)
    home = path.resolve().parent
    paths = {
        "data": config.data.model_copy(update={"path": str(home / config.data.path)}),
        "identity": str(home / config.identity),
        "workdir": str(home / config.workdir),
        "weights": None if config.weights is None else str(home / config.weights),
    }
    return config.model_copy(update=paths)


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
