"""Masks: uniform words expanded from a key that is used once, added and taken away modulo 2^32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from fedclip_secure.secagg.ring import WORD, Words

_CHUNK = 1 << 19  # words, 2 MiB: the buffers of one chunk stay in a core's cache
_BLOCK = 16  # bytes of an AES block; update_into wants room for one more


def expand(key: bytes, length: int) -> Words:
    """Expand a single-use 32-byte key into `length` uniform uint32 words (AES-256-CTR, zero IV)."""
    words = np.zeros(length, dtype=np.uint32)
    apply(words, add=[key], subtract=[])
    return words


def apply(words: Words, add: Sequence[bytes], subtract: Sequence[bytes]) -> None:
    """Add and subtract the masks of the given 32-byte keys, in place, modulo 2^32.

    The zero IV is sound because no key is used twice: each is derived for one pair in one attempt.
    """
    streams = [(_keystream(key), np.add) for key in add] + [(_keystream(key), np.subtract) for key in subtract]
    zeros = bytes(_CHUNK * 4)
    buffer = bytearray(_CHUNK * 4 + _BLOCK - 1)
    for start in range(0, words.size, _CHUNK):
        part = words[start : start + _CHUNK]
        size = part.size * 4
        for stream, operation in streams:
            stream.update_into(memoryview(zeros)[:size], buffer)
            operation(part, np.frombuffer(buffer, dtype=WORD, count=part.size), out=part)


def _keystream(key: bytes) -> CipherContext:
    return Cipher(AES256(key), CTR(bytes(16))).encryptor()
