"""Sealing: HPKE (RFC 9180) with the hybrid KEM of ML-KEM-768 and X25519 (X-Wing, draft-ietf-hpke-pq).

A sealed text stays secret as long as either part of the KEM holds. Everything that it is bound to
goes into `info`, a CBOR array that begins with a label.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from fedclip_secure import canonical
from fedclip_secure.errors import ProtocolError

PUBLIC_BYTES = 1184 + 32  # ML-KEM-768, X25519
PRIVATE_BYTES = 64 + 32  # ML-KEM seed (d, z), X25519 scalar
OVERHEAD = 1088 + 32 + 16  # encapsulation and tag of one sealed text
FRAME = 1 << 20  # bytes of one frame of a large body, before its tag
MAX_HEADER = 10 * 2**10  # bytes of what travels in front of a large body: an Upload and 254 commitments
_TAG = 16
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_P = 2**255 - 19


@dataclass(frozen=True)
class SealKey:
    """A private key to which others seal; `private` is 96 bytes: ML-KEM seed, X25519 scalar."""

    private: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> SealKey:
        """A key from the operating system's randomness."""
        return cls(os.urandom(PRIVATE_BYTES))

    @property
    def public(self) -> bytes:
        """1,216 bytes: ML-KEM-768 encapsulation key, X25519 public key."""
        mlkem, x25519 = self._parts
        return mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()

    def open(self, sealed: bytes, *info: Any) -> bytes:
        """Open what was sealed to this key under the same `info`.

        Raises:
            ProtocolError: `seal`.
        """
        try:
            return _SUITE.decrypt(sealed, self._key, info=canonical.encode(list(info)))
        except (InvalidTag, ValueError) as error:
            raise ProtocolError("seal", "a sealed text does not open") from error

    @cached_property
    def _key(self) -> MLKEM768X25519PrivateKey:
        return MLKEM768X25519PrivateKey(*self._parts)

    @cached_property
    def _parts(self) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
        return (
            MLKEM768PrivateKey.from_seed_bytes(self.private[:64]),
            X25519PrivateKey.from_private_bytes(self.private[64:]),
        )


def seal(plaintext: bytes, public: bytes, *info: Any) -> bytes:
    """Seal `plaintext` to a `SealKey.public`, bound to `info`; `OVERHEAD` bytes longer."""
    key = MLKEM768X25519PublicKey(
        MLKEM768PublicKey.from_public_bytes(public[:1184]), X25519PublicKey.from_public_bytes(public[1184:])
    )
    return _SUITE.encrypt(plaintext, key, info=canonical.encode(list(info)))


def check_seal_public(public: bytes) -> None:
    """Refuse a public key to which nobody could seal safely.

    Raises:
        ProtocolError: `key`: wrong length, an ML-KEM key that fails its modulus check (FIPS 203
            section 7.2), or an X25519 part that `check_x25519_public` refuses.
    """
    if len(public) != PUBLIC_BYTES:
        raise ProtocolError("key", f"a sealing key has {len(public)} bytes, expected {PUBLIC_BYTES}")
    check_x25519_public(public[1184:])
    try:
        MLKEM768PublicKey.from_public_bytes(public[:1184])
    except ValueError as error:
        raise ProtocolError("key", "a sealing key is not a valid ML-KEM-768 key") from error


def check_x25519_public(public: bytes) -> None:
    """Refuse non-canonical (RFC 7748 section 5) and low-order (section 6.1) X25519 public keys.

    Raises:
        ProtocolError: `key`.
    """
    if len(public) != 32 or int.from_bytes(public, "little") >= _P:
        raise ProtocolError("key", "an X25519 key is not 32 bytes in canonical form")
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise ProtocolError("key", "an X25519 key has low order") from error


def sealed_body_size(header: int, body: int) -> int:
    """Bytes of a sealed body that carries a header of `header` bytes and frames of `body` bytes in all."""
    return 4 + 32 + header + OVERHEAD + body + _frames(body) * _TAG


def sealed_body_limit(body: int) -> int:
    """The most bytes that a sealed body with frames of `body` bytes in all can have."""
    return sealed_body_size(MAX_HEADER, body)


@dataclass(frozen=True, slots=True)
class SealedBody:
    """How a large body is sealed: a fresh key and a header by HPKE, then frames of AES-256-GCM under that key.

    Layout: length of the HPKE text (4 bytes, big-endian), HPKE text of key ‖ header, frames. Each
    frame is 1 MiB of body (the last one less) and its tag; its nonce is an 11-byte big-endian
    counter and a byte that is 1 in the last frame only, so frames cannot be cut off, swapped or
    repeated (the STREAM construction, Hoang et al., CRYPTO 2015).
    """

    head: bytes  # HPKE text
    key: bytes = field(repr=False)  # for one body alone: the frames of another would repeat its nonces

    @classmethod
    def start(cls, header: bytes, public: bytes, *info: Any) -> SealedBody:
        """Draw the key and seal it with `header` to a `SealKey.public`, bound to `info`."""
        key = os.urandom(32)
        return cls(seal(key + header, public, *info), key)

    def length(self, body: memoryview) -> int:
        """Bytes of all pieces."""
        return 4 + len(self.head) + len(body) + _frames(len(body)) * _TAG

    def pieces(self, body: memoryview) -> Iterator[bytes]:
        """The sealed text of `body`, byte for byte the same each time; always the same `body` must be given."""
        yield struct.pack(">I", len(self.head)) + self.head
        cipher, count = AESGCM(self.key), _frames(len(body))
        for index in range(count):
            frame = body[index * FRAME : (index + 1) * FRAME]
            yield cipher.encrypt(_nonce(index, last=index == count - 1), frame, None)


class BodyOpener:
    """Opens a sealed body as it arrives, in pieces of any size, holding at most one frame.

    `header` is known once enough has arrived. `feed` gives the opened bytes; `finish` must follow
    the last piece.
    """

    def __init__(self, key: SealKey, body_size: int, *info: Any) -> None:
        self.header: bytes | None = None
        self._key, self._info, self._left = key, info, body_size
        self._buffer = bytearray()
        self._cipher: AESGCM | None = None
        self._index = 0
        self._done = False

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Take a piece; give what it completes.

        Raises:
            ProtocolError: `seal`: a frame does not open; `length`: more than was announced.
        """
        self._buffer += piece
        if self._cipher is None and not self._read_head():
            return
        while not self._done and len(self._buffer) >= (size := min(self._left, FRAME) + _TAG):
            yield self._open_frame(bytes(self._buffer[:size]))
            del self._buffer[:size]
        if self._done and self._buffer:
            raise ProtocolError("length", "the body is longer than the plan's vector")

    def finish(self) -> None:
        """Check that the whole body came."""
        if not self._done:
            raise ProtocolError("length", "the body ended too early")

    def _read_head(self) -> bool:
        if len(self._buffer) < 4:
            return False
        size = int(struct.unpack(">I", self._buffer[:4])[0])
        if not 32 + OVERHEAD < size <= 32 + OVERHEAD + MAX_HEADER:
            raise ProtocolError("length", "the sealed header has an impossible length")
        if len(self._buffer) < 4 + size:
            return False
        opened = self._key.open(bytes(self._buffer[4 : 4 + size]), *self._info)
        del self._buffer[: 4 + size]
        self._cipher, self.header = AESGCM(opened[:32]), opened[32:]
        return True

    def _open_frame(self, frame: bytes) -> bytes:
        assert self._cipher is not None  # noqa: S101 - set by _read_head
        body = len(frame) - _TAG
        last = body == self._left
        try:
            opened = self._cipher.decrypt(_nonce(self._index, last=last), frame, None)
        except InvalidTag as error:
            raise ProtocolError("seal", "a frame of the body does not open") from error
        self._index, self._left, self._done = self._index + 1, self._left - body, last
        return opened


def _frames(body: int) -> int:
    return max(1, -(-body // FRAME))


def _nonce(index: int, *, last: bool) -> bytes:
    return index.to_bytes(11, "big") + bytes([last])
