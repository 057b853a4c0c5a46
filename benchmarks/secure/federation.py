"""What a federation agrees on before a round, with real keys."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import Contract, ExternalEncoder, FederationLock, Parameter
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.model.state import AdapterState, Floats, Layout
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.roster import Roster
from fedclip_secure.secagg.messages import ServerAd, sign_message
from fedclip_secure.secagg.opening_checks import Opening, Position, check_opening
from fedclip_secure.secagg.sealing import SealKey
from fedclip_secure.secagg.terms import Terms

CLIP, WEIGHT, MAX_WEIGHT = 0.1, 100, 1000
_LARGEST = 2**24  # coordinates of one array


def draw(parameters: int, seed: int) -> Floats:
    """A vector (parameters,) float32 within the clip."""
    values = np.random.default_rng(seed).random(parameters, dtype=np.float32)
    values -= np.float32(0.5)
    values *= np.float32(1.9 * CLIP)
    return values


def layout_of(parameters: int) -> Layout:
    """So many coordinates in arrays that are no larger than those of a large model."""
    starts = range(0, parameters, _LARGEST)
    return Layout(tuple((f"w{start}", (min(_LARGEST, parameters - start),)) for start in starts))


def make_plan(rounds: int, verify_sum: str, server: str) -> FederationPlan:
    """A plan without validation, so that nothing but the update and its weight travels."""
    plan = {
        "federation": "bench",
        "server": server,
        "model": {"name": "external", "dim": 4, "text_features": "prompts.safetensors"},
        "classes": {"normal": "normal", "ill": "ill"},
        "templates": ["{}"],
        "splits": {"train": 0.8, "validation": 0.0, "test": 0.2},
        "method": {"name": "fedclip"},
        "training": {"rounds": rounds, "batch_size": 8, "optimizer": {"name": "adam", "lr": 0.001}},
        "secure_aggregation": {"coordinate_clip": CLIP, "max_weight": MAX_WEIGHT, "verify_sum": verify_sum},
    }
    return check(plan, FederationPlan, "benchmark's plan")


def make_contract(plan: FederationPlan, initial: AdapterState, prompts: bytes, initial_file: bytes) -> Contract:
    """The plan with a lock for this initial adapter; files are given by their SHA-256."""
    lock = FederationLock(
        plan=plan.digest.hex(),
        encoder=ExternalEncoder(dim=4, text_features_sha256=prompts.hex(), logit_scale=1),
        layout=[Parameter(name=name, shape=list(shape)) for name, shape in initial.layout.entries],
        initial_model=initial.digest.hex(),
        initial_file=initial_file.hex(),
    )
    return Contract(plan, lock)


@dataclass(frozen=True)
class Federation:
    """n silos with keys, the terms that they agreed on, and the model of the first round."""

    terms: Terms
    keys: Mapping[str, Ed25519PrivateKey]
    model: AdapterState

    @classmethod
    def create(cls, silos: int, parameters: int) -> Federation:
        """n silos over a model of so many parameters."""
        names = [f"silo-{number:03}" for number in range(silos)]
        keys = {name: Ed25519PrivateKey.generate() for name in [*names, AGGREGATOR]}
        model = AdapterState(layout_of(parameters), draw(parameters, seed=0))
        contract = make_contract(make_plan(1, "never", "https://localhost"), model, bytes(32), bytes(32))
        roster = Roster.of({name: key.public_key().public_bytes_raw() for name, key in keys.items()})
        return cls(Terms.of(contract, roster), keys, model)

    def key(self, silo: str) -> bytes:
        """The private key that a silo signs with."""
        return self.keys[silo].private_bytes_raw()

    def open(self, attempt: int) -> tuple[Opening, SealKey]:
        """The opening of an attempt, as the silos accept it, and the aggregator's key for it."""
        seal, terms = SealKey.generate(), self.terms
        ad = ServerAd(
            plan=terms.plan,
            roster=terms.roster.digest,
            round=1,
            attempt=attempt,
            model=terms.initial_model,
            nonce=os.urandom(32),
            seal_public=seal.public,
        )
        wire = sign_message(ad, terms.federation, AGGREGATOR, self.keys[AGGREGATOR].sign)
        return check_opening(terms, Position(), wire, []), seal
