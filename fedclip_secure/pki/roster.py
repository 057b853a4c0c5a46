"""Who takes part: names and public keys that people have compared. The protocol's root of trust."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedclip_secure import canonical
from fedclip_secure.errors import TrustError
from fedclip_secure.names import AGGREGATOR, MAX_SILOS, MIN_SILOS, NAME_PATTERN
from fedclip_secure.pki.keys import spki_sha256

_KEY_BYTES = 32
# 128 bits. To find another key with the same fingerprint takes 2^128 keys, as much work as Ed25519 itself
# withstands, so reading out more digits would add nothing. Two keys with one fingerprint can be found with
# 2^64 work, but only by whoever makes both; that silo gains nothing, since the pin covers its key in full.
_FINGERPRINT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Roster:
    """`members`: (name, raw Ed25519 public key of 32 bytes), bytewise by name; the aggregator's own key is one.

    Raises:
        TrustError: names or keys repeated, unsorted or impossible; no aggregator; fewer than 3 or more than 255 silos.
    """

    members: tuple[tuple[str, bytes], ...]

    def __post_init__(self) -> None:
        names, keys = [name for name, _ in self.members], [key for _, key in self.members]
        for name, key in self.members:
            if not re.fullmatch(NAME_PATTERN, name):
                raise TrustError(f"the roster holds the name {name!r}; a name has a-z, 0-9 and -, at most 63")
            if len(key) != _KEY_BYTES:
                raise TrustError(f"the roster's key of {name} has {len(key)} bytes, an Ed25519 key {_KEY_BYTES}")
        if names != sorted(set(names)):
            raise TrustError("the roster repeats a name or is not in the order of names; ask for a new one")
        if len(set(keys)) != len(keys):
            twins = [name for name, key in self.members if keys.count(key) > 1]
            raise TrustError(f"the roster gives {' and '.join(twins)} the same key; each must enrol with its own")
        self._check_parties(names)

    def _check_parties(self, names: list[str]) -> None:
        if AGGREGATOR not in names:
            raise TrustError("the roster lacks the aggregator's own key; freeze it again")
        silos = len(names) - 1
        if silos < MIN_SILOS:
            raise TrustError(f"the roster has {silos} silo(s), secure aggregation needs {MIN_SILOS}; invite more")
        if silos > MAX_SILOS:
            raise TrustError(f"the roster has {silos} silos, {MAX_SILOS} is the most; make two federations")

    @classmethod
    def of(cls, keys: Mapping[str, bytes]) -> Roster:
        """A roster of these public keys by name, in any order.

        Raises:
            TrustError: as the class.
        """
        return cls(tuple(sorted(keys.items())))

    @classmethod
    def decode(cls, data: bytes) -> Roster:
        """Read what `encode` wrote.

        Raises:
            ProtocolError: not canonical CBOR.
            TrustError: not a roster, or an impossible one.
        """
        value = canonical.decode(data)
        members = [_member(item) for item in value] if isinstance(value, list) else [None]
        if None in members:
            raise TrustError("what was sent is not a roster; is the server a fedclip-agg?")
        return cls(tuple(member for member in members if member is not None))

    def encode(self) -> bytes:
        """Canonical bytes: `[[name, public key], ...]`."""
        return canonical.encode([[name, key] for name, key in self.members])

    @property
    def silos(self) -> tuple[str, ...]:
        """The silos' names in order, without the aggregator."""
        return tuple(name for name, _ in self.members if name != AGGREGATOR)

    @property
    def digest(self) -> bytes:
        """`roster_digest = H(CBOR([[name, spki_sha256], ...]))`; 32 bytes."""
        return hashlib.sha256(canonical.encode([[name, self.spki_sha256(name)] for name, _ in self.members])).digest()

    @property
    def pin(self) -> str:
        """The digest as silo.yaml holds it."""
        return f"sha256:{self.digest.hex()}"

    def index(self, silo: str) -> int:
        """The silo's evaluation point in Shamir's scheme: 1 + its place among the sorted silos, 1..255.

        Raises:
            TrustError: not a silo of the roster.
        """
        if silo not in self.silos:
            raise TrustError(f"{silo!r} is not a silo of the pinned roster")
        return 1 + self.silos.index(silo)

    def spki_sha256(self, name: str) -> bytes:
        """SHA-256 of the member's SubjectPublicKeyInfo; 32 bytes. A certificate's must be equal.

        Raises:
            TrustError: not a member.
        """
        return spki_sha256(self._key(name))

    def fingerprint(self, name: str) -> str:
        """The start of `spki_sha256` as people read it to each other: 8 groups of 4 hexadecimal digits.

        Raises:
            TrustError: not a member.
        """
        return readable_fingerprint(self.spki_sha256(name))

    def verify(self, name: str, signature: bytes, data: bytes) -> None:
        """Check an Ed25519 signature (RFC 8032) by the key that is pinned for `name`.

        Raises:
            TrustError: not a member, or not its signature.
        """
        try:
            self._key(name).verify(signature, data)
        except InvalidSignature as error:
            raise TrustError(f"the signature is not by the key that the pinned roster has for {name}") from error

    def _key(self, name: str) -> Ed25519PublicKey:
        for member, key in self.members:
            if member == name:
                return Ed25519PublicKey.from_public_bytes(key)
        raise TrustError(f"{name!r} is not in the pinned roster")


def readable_fingerprint(spki_hash: bytes) -> str:
    """Format the first 16 bytes of a key's `spki_sha256` for reading out: `1a2b 3c4d ...`, 8 groups."""
    digits = spki_hash[:_FINGERPRINT_BYTES].hex()
    return " ".join(digits[i : i + 4] for i in range(0, len(digits), 4))


def _member(item: object) -> tuple[str, bytes] | None:
    match item:
        case [str(name), bytes(key)]:
            return name, key
        case _:
            return None
