"""AES-256-CTR as a source of uniform words, from keys that are used once (NIST SP 800-38A, section 6.5)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

BLOCK = 4  # words of an AES block
_WORD = np.dtype("<u4")  # four bytes of the stream


def keystream(key: bytes, start: int = 0) -> CipherContext:
    """The stream of a single-use 32-byte key under the zero IV, from word `start`, a multiple of BLOCK, on.

    Raises:
        ValueError: a key of another length.
    """
    counter = start // BLOCK
    return Cipher(AES256(key), CTR(counter.to_bytes(16, "big"))).encryptor()


class Drawer:
    """Draws words from streams into one buffer: no draw allocates, and the buffer stays in the core's cache."""

    def __init__(self, most: int) -> None:
        self._zeros = memoryview(bytes(4 * most))
        self._buffer = bytearray(4 * (most + BLOCK))  # update_into wants room for almost a block more
        self._words = np.frombuffer(self._buffer, dtype=_WORD, count=most)

    def draw(self, stream: CipherContext, count: int) -> npt.NDArray[np.uint32]:
        """The next `count` words of `stream`, at most `most`; they stand until the next draw."""
        stream.update_into(self._zeros[: 4 * count], self._buffer)
        return self._words[:count]
