"""From a silo's settings and the contract to the task and the three splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedclip_secure.config.lock import Contract, ExternalEncoder
from fedclip_secure.config.plan import ExternalModel
from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.data.dataset import FeatureSet, Task, split
from fedclip_secure.data.embeddings import read_text_features
from fedclip_secure.data.report import DataReport
from fedclip_secure.errors import ConfigError, ModelError
from fedclip_secure.features.checkpoint import sha256_of
from fedclip_secure.features.encoder import Encoder, load_encoder
from fedclip_secure.features.extract import ExtractOptions
from fedclip_secure.features.progress import ShowProgress
from fedclip_secure.methods.registry import check_reads, find_method
from fedclip_secure.training.silo_data import read_silo_data


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What training and evaluation need: the task, `splits` train, validation and test, and what encodes images.

    `encoder` is None where the plan's method needs none beside the records' features; `report` where they were not
    read from a silo's own files.
    """

    task: Task
    splits: dict[str, FeatureSet]
    encoder: Encoder | None = None
    report: DataReport | None = None


def load_inputs(
    silo: SiloConfig,
    contract: Contract,
    progress: ShowProgress,
    text_features: Path | None = None,
    *,
    verify: bool = False,
) -> Inputs:
    """Load this silo's features, extracting those that its cache lacks, and cut them as the plan says.

    `text_features` is the file of an external model. `verify` reads every image again. What was left out and what
    is wrong with the images stands in the report.

    Raises:
        ConfigError: the silo's data format or device does not go with the plan's model.
        DataError: images or feature files are at fault.
        ModelError: the weights or text features are not those of the lock.
    """
    spec, encoder = find_method(contract.plan.method).spec, None
    if not isinstance(contract.plan.model, ExternalModel):
        encoder, task = load_with_task(silo, contract)
    else:
        task = _external_task(contract, text_features)
    options = ExtractOptions(verify, stage=spec.stage, apart=contract.plan.privacy is not None)
    data = read_silo_data(silo, contract.plan, task, encoder, progress=progress, options=options)
    splits = split(data.features, contract.plan.federation, contract.plan.splits.model_dump())
    return Inputs(task, splits, encoder if spec.backprop != "none" else None, data.report)


def load_with_task(silo: SiloConfig, contract: Contract) -> tuple[Encoder, Task]:
    """The plan's encoder, and the task with the text features that it makes of the plan's prompts, where it reads text.

    Raises:
        ConfigError: the lock is of another kind than the plan's model, the device is not there, or the method needs
            text, which the encoder does not read.
        ModelError: the weights or the tokenizer are not those of the lock.
    """
    lock, model = contract.lock.encoder, contract.plan.model
    if isinstance(lock, ExternalEncoder) or isinstance(model, ExternalModel):
        raise ConfigError("federation.lock: its encoder is not the plan's; ask the coordinator to run `prepare` again")
    check_reads(contract.plan)
    if find_method(contract.plan.method).spec.backprop != "none" and silo.precision != "fp32":
        raise ConfigError(
            f"silo.yaml: precision: {silo.precision}: the plan's method {contract.plan.method.name} trains inside the "
            "encoder, which all silos must have alike; set `fp32`"
        )
    weights = None if silo.weights is None else Path(silo.weights)
    tokenizer = None if silo.tokenizer is None else Path(silo.tokenizer)
    encoder = load_encoder(lock, model, weights, silo.device, silo.precision, tokenizer=tokenizer)
    prompts = contract.plan.text_prompts()
    phrases, templates = tuple(contract.plan.classes.values()), tuple(contract.plan.templates)
    encoder.check_tokens(contract.plan.texts())
    text = encoder.text_features(prompts)
    return encoder, Task(tuple(contract.plan.classes), text, lock.logit_scale, phrases, templates)


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
            f"'{path}': is not the file that the coordinator locked\n"
            f"  SHA-256 here: {digest}\n  SHA-256 lock: {lock.text_features_sha256}\n"
            "fetch it from the coordinator again"
        )
    features, scale = read_text_features(path, classes, lock.dim)
    return Task(classes, features, scale)
