"""How many noisy sums one step of each method releases: a fact of the method, never taken from a lock.

A silo that accepts and a stranger who verifies load no torch, and so no method. A test holds this table to the
methods themselves.
"""

from __future__ import annotations

from fedclip_secure.config.lock import Contract
from fedclip_secure.errors import ConfigError

RELEASES = {  # one for each phase, whatever the method's options
    "fedclip": 1,
    "linear_probe": 1,
    "private_prototypes": 1,
    "discriminant": 1,
    "fedtune:text_context": 1,
    "fedtune:text_bias": 1,
    "fedtune:visual_prompt": 1,
    "fedtune:visual_prompt_deep": 1,
    "fedtune:adapter": 1,
    "fedtune:visual_bias": 1,
    "fedtune:layernorm": 1,
    "fedtune:lora": 1,
    "fedtune:head": 1,
    "fedtune:full": 1,
    "fedavg_full": 1,
    "fedprox_full": 1,
    "fedapt": 1,
    "feddat": 2,  # its private adapter decides gradients of the shared one
}


def check_releases(contract: Contract) -> None:
    """Refuse a lock whose `releases` are not the method's: every further one would go uncharged.

    Raises:
        ConfigError: says both numbers; or this version knows no such method, and so not what it releases.
    """
    name, locked = contract.plan.method.name, contract.lock.releases
    if name not in RELEASES:
        raise ConfigError(
            f"federation.yaml: method.name: what a step of {name!r} releases is unknown to this version, so nothing "
            "can be charged for it; use a newer version"
        )
    if locked != RELEASES[name]:
        raise ConfigError(
            f"federation.lock: releases: says that a step of {name} releases {locked} noisy sum(s), and it releases "
            f"{RELEASES[name]}; the coordinator must run `fedclip-agg prepare` again"
        )
