"""Writes secagg-v1.json: one attempt among four silos, one of which drops out after sharing.

    .venv/bin/python -m tests.vectors.make_secagg_v1 tests/vectors/secagg-v1.json

The real sessions run on a fixed stream in the place of the operating system's randomness. HPKE draws
its own, so each run gives other ciphertexts, hence other transcripts: the file in the repository was
written once and is written again only when the version of the protocol changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import Contract, FederationLock
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.model.state import AdapterState, Floats, Layout
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.roster import Roster
from fedclip_secure.secagg import keys, masks
from fedclip_secure.secagg.aggregator_session import AggregatorSession
from fedclip_secure.secagg.keys import Peer
from fedclip_secure.secagg.messages import Bundles, ServerAd, open_message, sign_message, vector_hash
from fedclip_secure.secagg.opening_checks import Opening, Position, check_opening
from fedclip_secure.secagg.ring import Words
from fedclip_secure.secagg.sealing import SealKey
from fedclip_secure.secagg.silo_session import MaskedUpload, ModelRecord, Shares, SiloSession
from fedclip_secure.secagg.terms import Terms

ABOUT = [
    "One attempt of the secure round, version 1 (fedclip_secure/secagg/PROTOCOL.md), with all that happens in between.",
    "Four silos; bn-2 drops out after it has shared and before it uploads. Every key here is for tests alone.",
    "Bytes are hexadecimal. Words (q, y, sum) are unsigned; q and sum stand for two's complement.",
    "HPKE draws its own randomness: sealed texts are checked by opening them. All else follows from what is given.",
    "check_secagg_v1.py derives every value from the given ones with nothing of fedclip_secure.",
]
# In bytewise order `aachen-west` is first and `aggregator` second; by length `zug` would be.
SILOS = ("aachen-west", "bn", "bn-2", "zug")
DROPPED = "bn-2"
WEIGHTS = {"aachen-west": 1000, "bn": 1, "bn-2": 77, "zug": 333}
COUNTS = {"aachen-west": (311, 400), "bn": (0, 1), "bn-2": (20, 31), "zug": (120, 120)}
LAYOUT = Layout((("attention.weight", (2, 3)), ("attention.bias", (2,))))
PLAN = {
    "federation": "vectors",
    "server": "https://aggregator.example",
    "model": {"name": "external", "dim": 4, "text_features": "text.safetensors"},
    "classes": {"cat": "cat", "dog": "dog"},
    "templates": ["a photo of a {}"],
    "splits": {"train": 0.6, "validation": 0.2, "test": 0.2},
    "method": {"name": "fedclip"},
    "training": {"rounds": 3, "batch_size": 8, "optimizer": {"lr": 1e-3}},
    "secure_aggregation": {"coordinate_clip": 0.1, "weights": "masked", "max_weight": 1000, "verify_sum": "always"},
}


@dataclass
class Stream:
    """In the place of `os.urandom`: repeats itself for the same label, and remembers what it gave."""

    label: str
    given: list[bytes] = field(default_factory=list)

    def __call__(self, size: int) -> bytes:
        self.given.append(hashlib.shake_256(f"{self.label} {len(self.given)}".encode()).digest(size))
        return self.given[-1]


@dataclass
class Maker:
    """The attempt so far, and the values of each silo as the file will have them."""

    stream: Stream
    model: AdapterState
    signing: dict[str, Ed25519PrivateKey]
    contract: Contract
    terms: Terms
    seal_key: SealKey
    opening: Opening
    server_ad: bytes
    sessions: dict[str, SiloSession] = field(default_factory=dict)
    shares: dict[str, Shares] = field(default_factory=dict)
    uploads: dict[str, MaskedUpload] = field(default_factory=dict)
    silos: dict[str, dict[str, Any]] = field(default_factory=dict)


def make(label: str) -> dict[str, Any]:
    """All values of one attempt, from the secrets that `label` stands for."""
    stream = Stream(label)
    with mock.patch.object(os, "urandom", stream):
        maker = _prepare(stream)
        server = AggregatorSession(maker.terms, maker.opening, maker.seal_key)
        for step in (_join, _share, _upload, _agree_and_unmask):
            step(maker, server)
        return _document(maker, server)


def _prepare(stream: Stream) -> Maker:
    signing = {name: Ed25519PrivateKey.from_private_bytes(stream(32)) for name in sorted([*SILOS, AGGREGATOR])}
    roster = Roster.of({name: key.public_key().public_bytes_raw() for name, key in signing.items()})
    model = AdapterState(LAYOUT, _floats(stream, LAYOUT.size, 1.0))
    contract = Contract(check(PLAN, FederationPlan, "plan"), _lock(model))
    terms, seal_key = Terms.of(contract, roster), SealKey.generate()
    ad = ServerAd(
        plan=contract.digest,
        roster=roster.digest,
        round=1,
        attempt=7,
        model=model.digest,
        nonce=stream(32),
        seal_public=seal_key.public,
    )
    wire = sign_message(ad, terms.federation, AGGREGATOR, signing[AGGREGATOR].sign)
    opening = check_opening(terms, Position(), wire, [])
    return Maker(stream, model, signing, contract, terms, seal_key, opening, wire)


def _lock(model: AdapterState) -> FederationLock:
    digest = hashlib.sha256(b"").hexdigest()
    return check(
        {
            "plan": digest,
            "encoder": {"kind": "external", "dim": 4, "text_features_sha256": digest, "logit_scale": 100.0},
            "layout": [{"name": name, "shape": list(shape)} for name, shape in model.layout.entries],
            "initial_model": model.digest.hex(),
            "initial_file": digest,
        },
        FederationLock,
        "lock",
    )


def _floats(stream: Stream, size: int, largest: float) -> Floats:
    """(size,) float32 within ±largest, the first and the last of them close to it."""
    values = (np.frombuffer(stream(4 * size), dtype="<i4") * (largest / 2**31)).astype(np.float32)
    values[0], values[-1] = np.nextafter(np.float32(largest), np.float32(0)), -0.999 * largest
    return values


def _join(maker: Maker, server: AggregatorSession) -> None:
    terms, stream = maker.terms, maker.stream
    for name in SILOS:
        update, weight, counts = _floats(stream, LAYOUT.size, terms.grid.clip), WEIGHTS[name], COUNTS[name]
        vector = terms.vector.pack(terms.grid.quantize(update, weight), weight, *counts)
        rounding = masks.expand(stream.given[-1], LAYOUT.size)
        record = _record(maker.model, vector)
        session = SiloSession(terms, name, maker.signing[name].sign, maker.opening, record)
        key_ad = session.join()
        server.receive_key_ad(name, key_ad)
        maker.sessions[name] = session
        maker.silos[name] = _secrets(terms, name, session) | {
            "key_ad": key_ad.hex(),
            "update": update.tolist(),
            "rounding": rounding.tolist(),
            "weight": weight,
            "correct": counts[0],
            "total": counts[1],
            "q": vector.tolist(),
        }
    server.close()


def _record(model: AdapterState, vector: Words) -> ModelRecord:
    return ModelRecord(model.digest, lambda: vector)


def _secrets(terms: Terms, name: str, session: SiloSession) -> dict[str, Any]:
    secrets = session.secrets
    return {
        "x": terms.roster.index(name),
        "seed": secrets.keys.seed.hex(),
        "b": secrets.b.hex(),
        "share_seal": secrets.share_seal.private.hex(),
        "mask_private": secrets.keys._mask_private.private_bytes_raw().hex(),
        "mask_public": secrets.keys.mask_public.hex(),
        "salt_seal": secrets.keys.salt_seal.private.hex(),
        "pair_salts": {peer: secrets.keys.salt_for(name, peer).hex() for peer in SILOS if peer != name},
        "self_commit": keys.self_commitment(secrets.keys.base, name, secrets.b).hex(),
    }


def _share(maker: Maker, server: AggregatorSession) -> None:
    ads = [server.ads[name].wire for name in SILOS]
    for name in SILOS:
        drawn = len(maker.stream.given)
        maker.shares[name] = maker.sessions[name].share(ads)
        for secret, random in zip(("seed", "b"), maker.stream.given[drawn:], strict=True):
            # Drawn from the highest degree down.
            degrees = [random[i : i + 32].hex() for i in range(0, len(random), 32)]
            maker.silos[name][f"{secret}_coefficients"] = degrees[::-1]
        server.receive_bundles(name, maker.shares[name].bundles, maker.shares[name].ciphertexts)
    server.close()
    for name in SILOS:
        transcript = maker.sessions[name].transcript
        body = open_message(maker.shares[name].bundles, Bundles, maker.terms.federation, maker.terms.roster).body
        peers = [peer for peer in SILOS if peer != name]
        maker.silos[name]["bundles"] = maker.shares[name].bundles.hex()
        maker.silos[name]["for"] = {
            peer: {
                **_shares_for(maker, name, peer, transcript),
                "share_seed_commitment": body.entry(place).share_seed.hex(),
                "share_b_commitment": body.entry(place).share_b.hex(),
            }
            for place, peer in enumerate(peers)
        }


def _shares_for(maker: Maker, name: str, peer: str, transcript: bytes) -> dict[str, str]:
    sealed_shares, sealed_salt = maker.shares[name].ciphertexts[peer]
    share_seal = maker.sessions[peer].secrets.share_seal
    opened = share_seal.open(sealed_shares, *keys.share_info(transcript, name, peer))
    return {
        "share_seed": opened[:32].hex(),
        "share_b": opened[32:].hex(),
        "sealed_shares": sealed_shares.hex(),
        "sealed_salt": sealed_salt.hex(),
    }


def _upload(maker: Maker, server: AggregatorSession) -> None:
    bundles = [server.bundles[name].wire for name in SILOS]
    for name in (name for name in SILOS if name != DROPPED):
        session, upload = maker.sessions[name], maker.sessions[name].upload(bundles, server.inbox(name))
        sealed = b"".join(session.seal_upload(upload).pieces(upload.body))
        server.receive_upload(name, upload.header, vector_hash(upload.words))
        maker.uploads[name] = upload
        maker.silos[name] |= _masking(maker, name, server.transcript2) | {
            "y": upload.words.tolist(),
            "y_hash": vector_hash(upload.words).hex(),
            "upload": server.uploads[name].wire.hex(),
            "upload_header": upload.header.hex(),
            "sealed_upload": sealed.hex(),
        }
    server.close()


def _masking(maker: Maker, name: str, transcript2: bytes) -> dict[str, Any]:
    seed_keys, b = maker.sessions[name].secrets.keys, maker.sessions[name].secrets.b
    others = {
        peer: Peer(peer, session.secrets.keys.mask_public, session.secrets.keys.salt_for(peer, name))
        for peer, session in maker.sessions.items()
        if peer != name
    }
    pairs = {peer: seed_keys.pair_key(transcript2, name, other) for peer, other in others.items()}
    commitments = {peer: keys.pair_commitment(transcript2, name, peer, key) for peer, key in pairs.items()}
    own = keys.self_key(b, transcript2, name)
    return {
        "pair_keys": _hexed(pairs),
        "self_key": own.hex(),
        "pair_streams": {peer: _stream_of(maker.terms, key) for peer, key in pairs.items()},
        "self_stream": _stream_of(maker.terms, own),
        "pair_commitments": _hexed(commitments),
        "pairs_commitment": keys.pairs_commitment(transcript2, name, list(commitments.values())).hex(),
    }


def _agree_and_unmask(maker: Maker, server: AggregatorSession) -> None:
    uploads = [message.wire for message in server.uploads.values()]
    for name in server.uploads:
        agree = maker.sessions[name].agree(uploads)
        server.receive_agree(name, agree)
        maker.silos[name]["agree"] = agree.hex()
    server.close()
    for name in server.uploads:
        sealed = maker.sessions[name].unmask([message.wire for message in server.agrees.values()])
        opened = server.open_unmask(name, sealed)
        server.receive_unmask(name, opened)
        maker.silos[name] |= {"unmask": opened.hex(), "sealed_unmask": sealed.hex()}
    server.close()


def _document(maker: Maker, server: AggregatorSession) -> dict[str, Any]:
    total = server.unmask_sum(maker.uploads[name].words for name in server.uploads)
    outcome = server.compute_result(total, maker.model)
    for name in server.uploads:
        wire, _ = maker.sessions[name].result(total, maker.model)
        server.receive_result(name, wire)
        maker.silos[name]["result"] = wire.hex()
    return {
        "about": ABOUT,
        "identities": {name: key.private_bytes_raw().hex() for name, key in maker.signing.items()},
        "roster": {
            "members": [[name, key.hex()] for name, key in maker.terms.roster.members],
            "digest": maker.terms.roster.digest.hex(),
        },
        "plan": {"contract": maker.contract.encode().hex(), "digest": maker.contract.digest.hex()},
        "parameters": _parameters(maker.terms),
        "model": _model(maker.model),
        "opening": {
            "seal_private": maker.seal_key.private.hex(),
            "nonce": maker.opening.ad.nonce.hex(),
            "round": maker.opening.ad.round,
            "attempt": maker.opening.ad.attempt,
            "server_ad": maker.server_ad.hex(),
            "base": maker.opening.base.hex(),
        },
        "U1": list(server.ads),
        "T": maker.sessions[SILOS[0]].transcript.hex(),
        "U2": list(server.bundles),
        "T2": server.transcript2.hex(),
        "U3": list(server.uploads),
        "H_U3": next(iter(server.agrees.values())).body.survivors.hex(),
        "silos": maker.silos,
        "unmasked": {
            "seeds": {DROPPED: maker.silos[DROPPED]["seed"]},
            "sum": total.tolist(),
            "sum_hash": vector_hash(total).hex(),
            "sum_proof": server.sum_proof().encode().hex(),
        },
        "outcome": {
            "weight": outcome.weight,
            "correct": outcome.correct,
            "total": outcome.total,
            **_model(outcome.model),
        },
    }


def _parameters(terms: Terms) -> dict[str, Any]:
    return {
        "federation": terms.federation,
        "n": len(terms.roster.silos),
        "t": terms.threshold,
        "c": terms.colluding,
        "floor": terms.floor,
        "words": terms.vector.words,
        "clip": terms.grid.clip,
        "max_weight": terms.grid.max_weight,
        "Q": terms.grid.bound,
    }


def _model(model: AdapterState) -> dict[str, Any]:
    return {"values": model.vector.tolist(), "digest": model.digest.hex()}


def _hexed(values: Mapping[str, bytes]) -> dict[str, str]:
    return {name: value.hex() for name, value in values.items()}


def _stream_of(terms: Terms, key: bytes) -> str:
    words: Words = masks.expand(key, terms.vector.words)
    return words.astype("<u4").tobytes().hex()


def readable(values: dict[str, Any]) -> str:
    """As JSON with one value in a line; a list of numbers or of texts without blanks is one value."""
    text = json.dumps(values, indent=1)
    return re.sub(
        r"\[[^\[\]{}]+\]", lambda found: re.sub(r"\n +", " ", found[0]) if "  " in found[0] else found[0], text
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(readable(make("secagg-v1")) + "\n", encoding="utf-8")
