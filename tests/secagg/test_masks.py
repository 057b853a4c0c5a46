from __future__ import annotations

import os

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR, ECB

from fedclip_secure.secagg import masks

CHUNK = 1 << 19  # words between two refills of the stream's buffer

# SP 800-38A, appendix F: AES-256 key and first two blocks of plaintext.
KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
PLAIN = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")


def blocks(key: bytes, count: int) -> bytes:
    """The stream by its definition: the cipher over 0, 1, 2, ... as 16 bytes, big-endian."""
    return Cipher(AES256(key), ECB()).encryptor().update(b"".join(i.to_bytes(16, "big") for i in range(count)))  # noqa: S305


def test_the_cipher_is_that_of_sp_800_38a() -> None:
    # F.1.5 ECB-AES256 and F.5.5 CTR-AES256.
    ecb = Cipher(AES256(KEY), ECB()).encryptor().update(PLAIN)  # noqa: S305
    assert ecb.hex() == "f3eed1bdb5d2a03c064b5a7e3db181f8591ccb10d410ed26dc5ba74a31362870"
    ctr = Cipher(AES256(KEY), CTR(bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"))).encryptor().update(PLAIN)
    assert ctr.hex() == "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"


def test_the_stream_of_the_zero_key_is_that_of_the_gcm_specification() -> None:
    # McGrew and Viega, test cases 13 and 14: H, the tag of nothing, and the ciphertext of a zero block are
    # the zero key's blocks 0, 1 and 2.
    published = "dc95c078a2408989ad48a21492842087 530f8afbc74536b9a963b4f1c4cb738b cea7403d4d606b6e074ec5d3baf39d18"
    assert masks.expand(bytes(32), 12).astype("<u4").tobytes() == bytes.fromhex(published)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 1000])
def test_a_mask_is_the_stream_as_little_endian_words(length: int) -> None:
    stream = blocks(KEY, length // 4 + 1)[: 4 * length]
    assert masks.expand(KEY, length).tolist() == np.frombuffer(stream, dtype="<u4").tolist()


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_the_stream_goes_on_across_chunks(length: int) -> None:
    expected = Cipher(AES256(KEY), CTR(bytes(16))).encryptor().update(bytes(4 * length))
    assert masks.expand(KEY, length).astype("<u4").tobytes() == expected


@pytest.mark.parametrize("length", [7, CHUNK + 3])
def test_masks_added_and_taken_away_again_leave_nothing(length: int) -> None:
    words = np.frombuffer(os.urandom(4 * length), dtype=np.uint32).copy()
    before, keys = words.copy(), [os.urandom(32) for _ in range(3)]
    masks.apply(words, add=keys, subtract=[])
    assert not np.array_equal(words, before)
    masks.apply(words, add=[], subtract=keys)
    assert np.array_equal(words, before)


def test_one_call_that_adds_and_subtracts_is_two_that_do_one_each() -> None:
    plus, minus = os.urandom(32), os.urandom(32)
    words = np.zeros(9, dtype=np.uint32)
    masks.apply(words, add=[plus], subtract=[minus])
    assert words.tolist() == (masks.expand(plus, 9) - masks.expand(minus, 9)).tolist()


def test_all_32_bits_of_a_word_and_all_32_bytes_of_a_key_count() -> None:
    words = masks.expand(os.urandom(32), 4096)
    assert int(np.bitwise_or.reduce(words)) == 2**32 - 1
    assert int(np.bitwise_and.reduce(words)) == 0
    key = os.urandom(32)
    others = {masks.expand(key[:i] + bytes([key[i] ^ 1]) + key[i + 1 :], 4).tobytes() for i in range(32)}
    assert len(others | {masks.expand(key, 4).tobytes()}) == 33


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=r"[Kk]ey"):
        masks.expand(bytes(size), 4)
