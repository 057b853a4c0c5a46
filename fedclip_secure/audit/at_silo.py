"""The setting of the silo that this program runs at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedclip_secure.audit.made_up_records import make_scene
from fedclip_secure.audit.setting import Setting
from fedclip_secure.config.lock import Contract, ExternalEncoder, OpenClipEncoder
from fedclip_secure.config.plan import SHIPPED, ExternalModel
from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.features.encoder import Encoder, choose_device, load_encoder
from fedclip_secure.methods.registry import find_method
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.shared_parameters import read_shared

_LARGEST_FILE = 64 * 2**20  # bytes of an encoder that is loaded: each record takes a pass of its own through it


def setting_of(contract: Contract, silo: SiloConfig, received: AdapterState | None) -> Setting:
    """Where `silo` trains: on its device, from the model that it `received` last or, without one, from the first.

    Features are as wide as the plan's. A method inside the encoder is tested inside the plan's own where that is at
    hand and small, and else inside a small random one, where no model of the plan fits.

    Raises:
        ConfigError: the device is not there.
        ModelError: the weights are not those of the lock.
    """
    digest = None if received is None else received.digest.hex()
    setting = Setting(device=choose_device(silo.device), silo=silo.name, received=digest)
    if find_method(contract.plan.method).spec.backprop == "none":
        return _starting(replace(setting, dim=contract.lock.encoder.dim), contract, received)
    encoder = _encoder_at_hand(contract, silo)
    return setting if encoder is None else _starting(replace(setting, encoder=encoder), contract, received)


def _starting(setting: Setting, contract: Contract, received: AdapterState | None) -> Setting:
    if received is not None:
        words = f"the model {received.digest.hex()[:16]} that this silo received last"
        return replace(setting, start=received, came_from=words)
    scene = make_scene(contract.plan, 1, setting)
    drawn = read_shared(scene.module, scene.method.spec).digest.hex()
    same = drawn == contract.lock.initial_model  # not where it came from a file, or follows from the text features
    return replace(setting, came_from="the plan's initial model") if same else setting


def _encoder_at_hand(contract: Contract, silo: SiloConfig) -> Encoder | None:
    """The plan's encoder, where it is small and nothing has to be downloaded."""
    lock, model = contract.lock.encoder, contract.plan.model
    if isinstance(lock, ExternalEncoder) or isinstance(model, ExternalModel):
        return None
    shipped = isinstance(lock, OpenClipEncoder) and lock.name == SHIPPED
    weights = None if silo.weights is None else Path(silo.weights)
    small = weights is not None and weights.is_file() and weights.stat().st_size <= _LARGEST_FILE
    tokenizer = None if silo.tokenizer is None else Path(silo.tokenizer)
    return load_encoder(lock, model, weights, silo.device, tokenizer=tokenizer) if shipped or small else None
