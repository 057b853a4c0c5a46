"""The folder of an exported adapter."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from fedclip_secure.config.lock import Contract, ExternalEncoder
from fedclip_secure.config.plan import SHIPPED, OpenClipModel
from fedclip_secure.data.embeddings import read_text_features
from fedclip_secure.disk import telling
from fedclip_secure.errors import DataError
from fedclip_secure.export.adapter_facts import Facts, write_card
from fedclip_secure.export.card import model_card
from fedclip_secure.export.load_script import encoder_config, weights_name
from fedclip_secure.files import write_atomically
from fedclip_secure.model.state import AdapterState
from fedclip_secure.pki.roster import Roster


def write_export(
    folder: Path, state: AdapterState, facts: Facts, contract: Contract, roster: Roster, *, text_features: Path | None
) -> list[Path]:
    """Write adapter.safetensors, adapter.json, README.md and what the program in it needs; the files.

    `text_features` is where an external model's file lies.

    Raises:
        DataError: `text_features` is missing or not the locked one, or the disk refuses.
    """
    held = _text_features(contract, text_features)  # first: nothing is written where something is missing
    path = folder / "adapter.safetensors"
    state.to_file(path, {"model": facts.model.hex(), **facts.warning()})
    write_card(folder / "adapter.json", facts, contract, roster)
    files = {"README.md": model_card(facts, contract, roster).encode()}
    config, model = encoder_config(contract), contract.plan.model
    if config is not None:
        files["encoder.json"] = f"{config}\n".encode()
    if isinstance(model, OpenClipModel) and model.name == SHIPPED:
        name = weights_name(model)
        files[name] = resources.files("fedclip_secure").joinpath("assets", SHIPPED, name).read_bytes()
    if held is not None:
        files["text_features.safetensors"] = held
    for name, data in files.items():
        write_atomically(folder / name, data)
    return [path, folder / "adapter.json", *(folder / name for name in files)]


def _sha256(path: Path) -> str:
    with telling(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def _text_features(contract: Contract, path: Path | None) -> bytes | None:
    """An external model's text features in the order of the plan's classes, each of norm 1."""
    lock = contract.lock.encoder
    if not isinstance(lock, ExternalEncoder):
        return None
    if path is None or not path.is_file() or _sha256(path) != lock.text_features_sha256:
        raise DataError(
            f"'{path}': is not the file of text features that the lock names (SHA-256 {lock.text_features_sha256}); "
            "copy it here again"
        )
    features, scale = read_text_features(path, tuple(contract.plan.classes), lock.dim)
    return save({"text_features": features, "logit_scale": np.array(scale, dtype=np.float32)})
