from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclip_secure import canonical
from fedclip_secure.errors import ProtocolError

PLAIN = st.recursive(
    st.integers(-(2**64), 2**64 - 1) | st.binary(max_size=40) | st.text(max_size=20) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(PLAIN)
def test_what_was_encoded_decodes_to_the_same_value(value: object) -> None:
    assert canonical.decode(canonical.encode(value)) == value


@pytest.mark.parametrize(
    ("fault", "data"),
    [
        ("nothing", ""),
        ("trailing byte", "0100"),
        ("integer in more bytes than it needs", "1801"),
        ("length in more bytes than it needs", "580100"),
        ("float that a shorter one equals", "fa3f800000"),
        ("indefinite array", "9f01ff"),
        ("indefinite bytes", "5f4101ff"),
        ("keys out of order", "a261620161610 2".replace(" ", "")),
        ("repeated key", "a2616101616102"),
        ("key that is a number", "a10102"),
        ("date", "c074323032302d30312d30315430303a30303a30305a"),
        ("big integer", "c249010000000000000000"),
        ("shared reference", "d81c80"),
        ("set", "d9010280"),
        ("rational", "d81e820102"),
        ("self-described", "d9d9f701"),
        ("tag that nobody has defined", "d9ffff01"),
        ("text that is not UTF-8", "61ff"),
        ("array longer than the data", "9bffffffffffffffff"),
        ("bytes longer than the data", "5b7fffffffffffffff"),
        ("nested too deep", "81" * 5000 + "01"),
        ("break alone", "ff"),
    ],
)
def test_bytes_that_are_not_canonical_are_refused(fault: str, data: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        canonical.decode(bytes.fromhex(data))
    assert refused.value.code == "encoding", fault


@given(st.binary(max_size=60))
def test_strange_bytes_are_refused_or_canonical_and_raise_nothing_else(data: bytes) -> None:
    try:
        value = canonical.decode(data)
    except ProtocolError:
        return
    assert canonical.encode(value) == data


def test_a_digest_is_sha256_over_one_array() -> None:
    # RFC 8949: array of 3, text "l", bytes 0102, integer 7.
    assert canonical.digest("l", b"\x01\x02", 7) == hashlib.sha256(bytes.fromhex("83616c42010207")).digest()


def test_names_that_concatenate_alike_hash_apart() -> None:
    assert canonical.digest("label", "ab", "c") != canonical.digest("label", "a", "bc")
    assert canonical.digest("labela", "b") != canonical.digest("label", "ab")
