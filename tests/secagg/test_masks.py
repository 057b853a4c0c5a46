from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR, ECB

from fedclip_secure.secagg import masks
from fedclip_secure.secagg.ring import WORD, Words
from fedclip_secure.secagg.unmasking import MasksLeft, unmask_sum

CHUNK = 1 << 16  # words that are masked at a time; a thread gets at least two of them
WORK = 1 << 22  # words of keystream that are worth a thread
BORDERS = [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 3 * CHUNK + 5, 4 * CHUNK - 1, 4 * CHUNK, 9 * CHUNK + 17]

# SP 800-38A, appendix F: AES-256 key and first two blocks of plaintext.
KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
PLAIN = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")


def blocks(key: bytes, count: int) -> bytes:
    """The stream by its definition: the cipher over 0, 1, 2, ... as 16 bytes, big-endian."""
    return Cipher(AES256(key), ECB()).encryptor().update(b"".join(i.to_bytes(16, "big") for i in range(count)))  # noqa: S305


def in_one_go(source: Words, add: list[bytes], subtract: list[bytes]) -> Words:
    """What masking means, whole streams at a time."""
    words = source.copy()
    for keys, operation in ((add, np.add), (subtract, np.subtract)):
        for key in keys:
            stream = Cipher(AES256(key), CTR(bytes(16))).encryptor().update(bytes(4 * words.size))
            operation(words, np.frombuffer(stream, dtype="<u4"), out=words)
    return words


def random_words(length: int) -> Words:
    return np.frombuffer(os.urandom(4 * length), dtype=np.uint32)  # read-only


def keys_of(count: int) -> list[bytes]:
    return [os.urandom(32) for _ in range(count)]


def with_cores(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)


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


@pytest.mark.parametrize("cores", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("length", BORDERS)
def test_chunks_and_threads_leave_no_trace(length: int, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, cores)
    words, add, subtract = random_words(length), keys_of(30), keys_of(10)
    expected = in_one_go(words, add, subtract)
    assert np.array_equal(masks.masked(words, add, subtract), expected)
    inplace = words.copy()
    masks.apply(inplace, add, subtract)
    assert np.array_equal(inplace, expected)


@pytest.mark.parametrize("cores", [2, 3, 7])
@pytest.mark.parametrize("extra", [1, 15, 16, 37])
def test_threads_share_any_length(cores: int, extra: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, cores)
    words, keys = random_words(cores * 2 * CHUNK + extra), keys_of(WORK // (2 * CHUNK))
    assert np.array_equal(masks.masked(words, keys, []), in_one_go(words, keys, []))


@pytest.mark.parametrize("count", [63, 64, 65, 300])
@pytest.mark.parametrize("length", [21, CHUNK + 21])
def test_hundreds_of_keys_are_all_applied(count: int, length: int) -> None:
    words, add, subtract = random_words(length), keys_of(count // 2), keys_of(count - count // 2)
    assert np.array_equal(masks.masked(words, add, subtract), in_one_go(words, add, subtract))


@pytest.mark.parametrize("length", [0, 5, 4 * CHUNK + 1])
def test_without_a_key_the_copy_is_the_source(length: int) -> None:
    words = random_words(length)
    assert np.array_equal(masks.masked(words, [], []), words)


def test_a_file_that_is_only_mapped_is_masked_into_a_copy(tmp_path: Path) -> None:
    length, file, key = 4 * CHUNK + 3, tmp_path / "vector", os.urandom(32)
    before = os.urandom(4 * length)
    file.write_bytes(before)
    source = np.memmap(file, dtype=WORD, mode="r")
    masked = masks.masked(source, [key], [])
    assert masked.tolist() == in_one_go(np.frombuffer(before, dtype=np.uint32), [key], []).tolist()
    assert type(masked) is np.ndarray
    assert masked.flags.writeable
    assert file.read_bytes() == before


def test_masking_takes_the_memory_of_the_copy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, 2)
    source, keys = np.zeros(4_000_000, dtype=np.uint32), keys_of(70)
    tracemalloc.start()
    try:
        masked = masks.masked(source, keys, [])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < masked.nbytes + 3_000_000


def test_masked_vectors_that_lie_in_files_are_added_and_unmasked_without_copies(tmp_path: Path) -> None:
    length, keys, plain = 1_000_003, keys_of(3), [random_words(1_000_003) for _ in range(3)]
    for index, (key, words) in enumerate(zip(keys, plain, strict=True)):
        masks.masked(words, [key], []).astype(WORD).tofile(tmp_path / str(index))
    vectors = [np.memmap(tmp_path / str(index), dtype=WORD, mode="r") for index in range(3)]
    tracemalloc.start()
    try:
        total = unmask_sum(iter(vectors), length, MasksLeft(subtract=keys, add=[]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(total, plain[0] + plain[1] + plain[2])
    assert type(total) is np.ndarray
    assert peak < total.nbytes + 8 * 700_000  # eight threads at most, with zeros, keystream and streams each


@pytest.mark.parametrize("length", [CHUNK, CHUNK + 2])
def test_a_vector_of_another_length_is_never_added(length: int) -> None:
    with pytest.raises(ValueError, match="broadcast"):
        unmask_sum([random_words(length)], CHUNK + 1, MasksLeft(subtract=[], add=[]))


@pytest.mark.parametrize("length", [7, CHUNK + 3])
def test_masks_added_and_taken_away_again_leave_nothing(length: int) -> None:
    before, keys = random_words(length), keys_of(3)
    words = before.copy()
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


@pytest.mark.parametrize("length", [4, 2 * WORK])
@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(size: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, 2)
    with pytest.raises(ValueError, match=r"[Kk]ey"):
        masks.expand(bytes(size), length)
