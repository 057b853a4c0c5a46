"""The secrets of one attempt and everything derived from them, each under a label of its own.

HKDF is HKDF-SHA256 (RFC 5869); every `info` is a CBOR array that begins with a label.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedclip_secure import canonical
from fedclip_secure.secagg.sealing import PRIVATE_BYTES, SealKey


@dataclass(frozen=True)
class SeedKeys:
    """What a 32-byte `seed` stands for, in one attempt (`base`)."""

    base: bytes
    seed: bytes = field(repr=False)

    @property
    def mask_public(self) -> bytes:
        """X25519 public key, 32 bytes."""
        return self._mask_private.public_key().public_bytes_raw()

    @cached_property
    def salt_seal(self) -> SealKey:
        """The key to which peers seal their salts."""
        return SealKey(_hkdf(self.seed, self.base, PRIVATE_BYTES, "fedclip/v1/salt-seal-key"))

    def salt_for(self, owner: str, peer: str) -> bytes:
        """The 32 bytes that `owner` of this seed contributes to its pair key with `peer`."""
        return _hkdf(self.seed, self.base, 32, "fedclip/v1/pair-salt", owner, peer)

    def pair_key(self, transcript2: bytes, owner: str, peer: Peer) -> bytes:
        """The mask key (32 bytes) that `owner` of this seed shares with `peer`.

        The two salts travel under ML-KEM as well, so the key stays secret while either X25519 or
        ML-KEM-768 holds.
        """
        low, high = sorted((owner, peer.name))
        mine = self.salt_for(owner, peer.name)
        salts = mine + peer.salt if owner == low else peer.salt + mine
        shared = self._mask_private.exchange(X25519PublicKey.from_public_bytes(peer.mask_public))
        return _hkdf(shared + salts, transcript2, 32, "fedclip/v1/pair", low, high)

    @cached_property
    def _mask_private(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(_hkdf(self.seed, self.base, 32, "fedclip/v1/mask-key"))


@dataclass(frozen=True, slots=True)
class Peer:
    """The other side of a pair: its name, its X25519 key, and the salt it sent."""

    name: str
    mask_public: bytes
    salt: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class AttemptSecrets:
    """One silo's secrets in one attempt. Nothing of them is used in another."""

    keys: SeedKeys
    b: bytes = field(repr=False)
    share_seal: SealKey  # independent of `seed`: who learns a drop-out's seed cannot open the shares sent to it

    @classmethod
    def fresh(cls, base: bytes) -> AttemptSecrets:
        """New secrets from the operating system."""
        return cls(SeedKeys(base, os.urandom(32)), os.urandom(32), SealKey.generate())


def self_key(b: bytes, transcript2: bytes, owner: str) -> bytes:
    """The key of a silo's own mask, 32 bytes."""
    return _hkdf(b, transcript2, 32, "fedclip/v1/self", owner)


def self_commitment(base: bytes, owner: str, b: bytes) -> bytes:
    """What a silo's `KeyAd` says of its `b`."""
    return canonical.digest("fedclip/v1/self-commit", base, owner, b)


def share_commitment(transcript: bytes, owner: str, holder: str, kind: str, share: bytes) -> bytes:
    """What `owner` says in its `Bundles` of the share of its `b` or `seed` (`kind`) it gave to `holder`."""
    return canonical.digest("fedclip/v1/share", transcript, owner, holder, kind, share)


def pair_commitment(transcript2: bytes, one: str, other: str, key: bytes) -> bytes:
    """What each of two silos says of the mask key that they share: the same 32 bytes, if it is the same key.

    The key has 256 bits of entropy, so its hash says nothing of it (random oracle).
    """
    return canonical.digest("fedclip/v1/pair-commit", transcript2, *sorted((one, other)), key)


def pairs_commitment(transcript2: bytes, owner: str, commitments: Sequence[bytes]) -> bytes:
    """What `owner` signs of its commitments to all its pair keys, in the order of its peers in U2."""
    return canonical.digest("fedclip/v1/pair-commits", transcript2, owner, list(commitments))


def share_info(transcript: bytes, sender: str, receiver: str) -> list[Any]:
    """What the two shares for one peer are sealed under."""
    return ["fedclip/v1/share-seal", transcript, sender, receiver]


def salt_info(transcript: bytes, sender: str, receiver: str) -> list[Any]:
    """What a pair salt is sealed under."""
    return ["fedclip/v1/salt-seal", transcript, sender, receiver]


def upload_info(transcript2: bytes, sender: str) -> list[Any]:
    """What a masked vector is sealed under, to the aggregator."""
    return ["fedclip/v1/upload-seal", transcript2, sender]


def unmask_info(transcript2: bytes, survivors: bytes, sender: str) -> list[Any]:
    """What an `Unmask` is sealed under, to the aggregator."""
    return ["fedclip/v1/unmask-seal", transcript2, survivors, sender]


def _hkdf(secret: bytes, salt: bytes, length: int, *info: Any) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=canonical.encode(list(info))).derive(secret)
