from __future__ import annotations

import os
import struct

import pytest

from fedclip_secure.errors import ProtocolError
from fedclip_secure.secagg import sealing
from fedclip_secure.secagg.sealing import FRAME, MAX_HEADER, OVERHEAD, BodyOpener, SealedBody, SealKey, seal

KEY = SealKey.generate()
P = 2**255 - 19
TAG = 16

# The points of order 1, 2, 4 and 8 (RFC 7748 section 6.1 and errata; the list of libsodium and of Cremers and
# Jackson, "Prime, Order Please!", CSF 2019).
LOW_ORDER = {
    "0": bytes(32),
    "1": (1).to_bytes(32, "little"),
    "order 8, first": bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    "order 8, second": bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    "p - 1": (P - 1).to_bytes(32, "little"),
}
NOT_CANONICAL = {
    "p": P.to_bytes(32, "little"),
    "p + 1": (P + 1).to_bytes(32, "little"),
    "p + 9": (P + 9).to_bytes(32, "little"),
    "2^255 - 1": (2**255 - 1).to_bytes(32, "little"),
    "bit 255": (9 | 1 << 255).to_bytes(32, "little"),
    "all ones": b"\xff" * 32,
}


def opened(sealed: bytes, size: int, *info: object, key: SealKey = KEY, piece: int = 1 << 16) -> tuple[bytes, bytes]:
    """Header and body of a sealed body that arrives in pieces."""
    opener, body = BodyOpener(key, size, *info), b""
    for start in range(0, len(sealed), piece):
        body += b"".join(opener.feed(sealed[start : start + piece]))
    opener.finish()
    assert opener.header is not None
    return opener.header, body


def sealed_body(body: bytes, header: bytes = b"header", *info: object) -> bytes:
    return b"".join(SealedBody.start(header, KEY.public, *info).pieces(memoryview(body)))


def frames_of(sealed: bytes) -> tuple[bytes, list[bytes]]:
    """What stands before the frames, and the frames."""
    head = 4 + struct.unpack(">I", sealed[:4])[0]
    return sealed[:head], [sealed[i : i + FRAME + TAG] for i in range(head, len(sealed), FRAME + TAG)]


def test_what_is_sealed_opens_under_the_same_info() -> None:
    sealed = seal(b"secret", KEY.public, "label", b"T", "a")
    assert KEY.open(sealed, "label", b"T", "a") == b"secret"
    assert len(sealed) == len(b"secret") + OVERHEAD


@pytest.mark.parametrize("info", [(), ("label",), ("label", b"T", "b"), ("label", b"Ta"), ("label", b"T", "a", "")])
def test_another_info_does_not_open(info: tuple[object, ...]) -> None:
    sealed = seal(b"secret", KEY.public, "label", b"T", "a")
    with pytest.raises(ProtocolError) as refused:
        KEY.open(sealed, *info)
    assert refused.value.code == "seal"


def test_another_key_does_not_open() -> None:
    with pytest.raises(ProtocolError, match="does not open"):
        SealKey.generate().open(seal(b"secret", KEY.public, "i"), "i")


def test_half_the_private_key_does_not_open() -> None:
    sealed, other = seal(b"secret", KEY.public, "i"), SealKey.generate()
    for private in (KEY.private[:64] + other.private[64:], other.private[:64] + KEY.private[64:]):
        with pytest.raises(ProtocolError, match="does not open"):
            SealKey(private).open(sealed, "i")


def test_every_flipped_byte_of_a_sealed_text_is_refused() -> None:
    sealed = bytearray(seal(b"secret", KEY.public, "i"))
    for index in range(len(sealed)):
        sealed[index] ^= 1 << index % 8
        with pytest.raises(ProtocolError, match="does not open"):
            KEY.open(bytes(sealed), "i")
        sealed[index] ^= 1 << index % 8
    assert KEY.open(bytes(sealed), "i") == b"secret"


def test_every_shorter_and_a_longer_sealed_text_is_refused() -> None:
    sealed = seal(b"secret", KEY.public, "i")
    for damaged in [sealed + b"\x00", *(sealed[:size] for size in range(0, len(sealed), 7)), sealed[:-1]]:
        with pytest.raises(ProtocolError, match="does not open"):
            KEY.open(damaged, "i")


def test_sealing_twice_gives_two_texts() -> None:
    assert seal(b"secret", KEY.public, "i") != seal(b"secret", KEY.public, "i")


def test_a_private_key_does_not_show_when_printed() -> None:
    assert repr(KEY) == "SealKey()"


def test_a_fresh_public_key_is_accepted() -> None:
    sealing.check_seal_public(SealKey.generate().public)
    sealing.check_x25519_public((9).to_bytes(32, "little"))


@pytest.mark.parametrize("point", LOW_ORDER.values(), ids=LOW_ORDER)
def test_x25519_keys_of_low_order_are_refused(point: bytes) -> None:
    with pytest.raises(ProtocolError, match="low order"):
        sealing.check_x25519_public(point)
    with pytest.raises(ProtocolError, match="low order"):
        sealing.check_seal_public(KEY.public[:1184] + point)


@pytest.mark.parametrize("point", NOT_CANONICAL.values(), ids=NOT_CANONICAL)
def test_x25519_keys_that_are_not_canonical_are_refused(point: bytes) -> None:
    with pytest.raises(ProtocolError, match="canonical form"):
        sealing.check_x25519_public(point)
    with pytest.raises(ProtocolError, match="canonical form"):
        sealing.check_seal_public(KEY.public[:1184] + point)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_x25519_keys_of_another_length_are_refused(size: int) -> None:
    with pytest.raises(ProtocolError, match="32 bytes"):
        sealing.check_x25519_public(b"\x09" * size)


@pytest.mark.parametrize("coefficient", [0, 255])
def test_an_mlkem_key_with_a_coefficient_of_q_or_more_is_refused(coefficient: int) -> None:
    # FIPS 203 section 7.2: 12-bit coefficients, two in three bytes, must be below q = 3329 = 0xd01.
    bad = bytearray(KEY.public)
    bad[3 * coefficient], bad[3 * coefficient + 1] = 0x01, bad[3 * coefficient + 1] & 0xF0 | 0x0D
    with pytest.raises(ProtocolError, match="not a valid ML-KEM-768 key"):
        sealing.check_seal_public(bytes(bad))


@pytest.mark.parametrize("size", [0, 1184, 1215, 1217])
def test_sealing_keys_of_another_length_are_refused(size: int) -> None:
    with pytest.raises(ProtocolError, match=f"has {size} bytes, expected 1216"):
        sealing.check_seal_public((KEY.public + b"\x00")[:size])


@pytest.mark.parametrize("size", [0, 1, 4, FRAME - 1, FRAME, FRAME + 1, 2 * FRAME, 2 * FRAME + 77])
def test_a_body_of_any_size_opens_and_keeps_to_its_limit(size: int) -> None:
    body = os.urandom(size)
    sealed = sealed_body(body, b"h", "label", 7)
    assert opened(sealed, size, "label", 7) == (b"h", body)
    assert len(sealed) <= sealing.sealed_body_limit(size)
    assert len(sealed_body(body, bytes(MAX_HEADER), "i")) == sealing.sealed_body_limit(size)


def test_a_body_may_arrive_byte_by_byte() -> None:
    assert opened(sealed_body(b"body", b"header", "i"), 4, "i", piece=1) == (b"header", b"body")


def test_the_opener_holds_no_more_than_a_frame() -> None:
    opener = BodyOpener(KEY, 3 * FRAME, "i")
    head, frames = frames_of(sealed_body(bytes(3 * FRAME), b"h", "i"))
    assert [len(b"".join(opener.feed(piece))) for piece in (head, *frames)] == [0, FRAME, FRAME, FRAME]


def test_a_body_under_another_info_or_key_does_not_open() -> None:
    sealed = sealed_body(b"body", b"h", "label", "a")
    with pytest.raises(ProtocolError, match="does not open"):
        opened(sealed, 4, "label", "b")
    with pytest.raises(ProtocolError, match="does not open"):
        opened(sealed, 4, "label", "a", key=SealKey.generate())


def test_every_flipped_byte_of_a_small_body_is_refused() -> None:
    sealed = bytearray(sealed_body(b"body", b"h", "i"))
    for index in range(len(sealed)):
        sealed[index] ^= 1 << index % 8
        with pytest.raises(ProtocolError):
            opened(bytes(sealed), 4, "i")
        sealed[index] ^= 1 << index % 8


def damaged_bodies() -> dict[str, bytes]:
    head, (a, b, c) = frames_of(sealed_body(os.urandom(2 * FRAME + 50), b"h", "i"))
    return {
        "frames swapped": head + b + a + c,
        "frame repeated": head + a + a + c,
        "first frame missing": head + b + c,
        "middle frame missing": head + a + c,
        "last frame missing": head + a + b,
        "last frame cut": head + a + b + c[:-1],
        "last frame twice": head + a + b + c + c,
        "one byte more": head + a + b + c + b"\x00",
        "bit in the first frame": head + bytes([a[0] ^ 1]) + a[1:] + b + c,
        "bit in the last tag": head + a + b + c[:-1] + bytes([c[-1] ^ 0x80]),
        "nothing but the head": head,
        "nothing": b"",
    }


DAMAGED = damaged_bodies()


@pytest.mark.parametrize("sealed", DAMAGED.values(), ids=DAMAGED)
def test_frames_cannot_be_cut_swapped_repeated_or_changed(sealed: bytes) -> None:
    with pytest.raises(ProtocolError) as refused:
        opened(sealed, 2 * FRAME + 50, "i")
    assert refused.value.code in ("seal", "length")


@pytest.mark.parametrize("announced", [FRAME, 2 * FRAME - 1, 2 * FRAME + 1, 3 * FRAME])
def test_a_body_of_another_size_than_the_plans_is_refused(announced: int) -> None:
    sealed = sealed_body(bytes(2 * FRAME), b"h", "i")
    with pytest.raises(ProtocolError) as refused:
        opened(sealed, announced, "i")
    assert refused.value.code in ("seal", "length")


@pytest.mark.parametrize("size", [0, 32 + OVERHEAD, 32 + OVERHEAD + MAX_HEADER + 1, 2**32 - 1])
def test_a_header_of_an_impossible_length_is_refused_before_it_is_read(size: int) -> None:
    with pytest.raises(ProtocolError, match="sealed header has an impossible length"):
        list(BodyOpener(KEY, 4, "i").feed(struct.pack(">I", size)))


@pytest.mark.parametrize("size", [1, MAX_HEADER])
def test_the_shortest_and_the_longest_header_open(size: int) -> None:
    assert opened(sealed_body(b"body", b"h" * size, "i"), 4, "i") == (b"h" * size, b"body")
