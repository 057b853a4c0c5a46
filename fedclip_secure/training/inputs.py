"""From a silo's settings and the contract to the task and the three splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedclip_secure.config.lock import Contract, ExternalEncoder
from fedclip_secure.config.plan import OpenClipModel
from fedclip_secure.config.silo import EmbeddingsData, SiloConfig
from fedclip_secure.data.dataset import FeatureSet, Task, split
from fedclip_secure.data.embeddings import read_embeddings, read_text_features
from fedclip_secure.data.folder import read_folder
from fedclip_secure.errors import ConfigError, ModelError
from fedclip_secure.features.cache import FeatureCache
from fedclip_secure.features.checkpoint import sha256_of
from fedclip_secure.features.encoder import Encoder, load_encoder
from fedclip_secure.features.extract import Progress, extract

_ENCODER_BATCH = 64  # images; a ViT-L/14 at 336 pixels stays below 4 GB


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What training and evaluation need: the task, and `splits` train, validation and test."""

    task: Task
    splits: dict[str, FeatureSet]


def load_inputs(silo: SiloConfig, contract: Contract, progress: Progress, text_features: Path | None = None) -> Inputs:
    """Load this silo's features, extracting those that its cache lacks, and cut them as the plan says.

    `progress(done, total)` counts distinct images. `text_features` is the file of an external model.

    Raises:
        ConfigError: the silo's data format or device does not go with the plan's model.
        DataError: images or feature files are at fault.
        ModelError: the weights or text features are not those of the lock.
    """
    if isinstance(contract.plan.model, OpenClipModel):
        encoder = _open_clip(silo, contract)
        prompts = contract.plan.text_prompts()
        task = Task(tuple(contract.plan.classes), encoder.text_features(prompts), encoder.lock.logit_scale)
        features = _features(silo, task, encoder, progress)
    else:
        task = _external_task(contract, text_features)
        features = _features(silo, task, None, progress)
    shares = contract.plan.splits.model_dump()
    return Inputs(task, split(features, contract.plan.federation, shares))


def _open_clip(silo: SiloConfig, contract: Contract) -> Encoder:
    lock, model = contract.lock.encoder, contract.plan.model
    if isinstance(lock, ExternalEncoder) or not isinstance(model, OpenClipModel):
        raise ConfigError("federation.lock: its encoder is not the plan's; ask the coordinator to run `prepare` again")
    return load_encoder(lock, model, None if silo.weights is None else Path(silo.weights), silo.device)


def _external_task(contract: Contract, path: Path | None) -> Task:
    lock, classes = contract.lock.encoder, tuple(contract.plan.classes)
    if not isinstance(lock, ExternalEncoder):
        raise ConfigError("federation.lock: its encoder is not the plan's; ask the coordinator to run `prepare` again")
    if path is None or not path.is_file():
        raise ConfigError(
            f"{path or 'text features'}: is missing, and the plan's model is external; `fedclip-silo accept` fetches it"
        )
    digest = sha256_of(path)
    if digest != lock.text_features_sha256:
        raise ModelError(
            f"{path}: is not the file that the coordinator locked\n"
            f"  SHA-256 here: {digest}\n  SHA-256 lock: {lock.text_features_sha256}\n"
            "fetch it from the coordinator again"
        )
    features, scale = read_text_features(path, classes, lock.dim)
    return Task(classes, features, scale)


def _features(silo: SiloConfig, task: Task, encoder: Encoder | None, progress: Progress) -> FeatureSet:
    root, dim = Path(silo.data.path), task.text_features.shape[1]
    if isinstance(silo.data, EmbeddingsData):
        return read_embeddings(root, task.classes, dim)
    if encoder is None:
        raise ConfigError(
            "silo.yaml: data.format: the plan's model is external and no encoder runs here; set `embeddings`"
        )
    files = read_folder(root, task.classes, silo.data.absent_classes)
    cache = FeatureCache(Path(silo.workdir, "features"), encoder.digest, dim)
    return extract(files, encoder, cache, _ENCODER_BATCH, progress)
