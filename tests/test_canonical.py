from __future__ import annotations

import contextlib

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclip_secure import canonical
from fedclip_secure.errors import ProtocolError

_LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.binary() | st.floats(width=64)
_PLAIN = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


@given(_PLAIN)
def test_what_is_encoded_decodes_to_bytes_that_encode_alike(value: object) -> None:
    data = canonical.encode(value)
    assert canonical.encode(canonical.decode(data)) == data


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused_by_name(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert canonical.encode(canonical.decode(data)) == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x18\x01",  # 1 in two bytes
        b"\x01\x00",  # a byte behind it
        b"\x9f\x01\xff",  # indefinite length
        b"\xa2\x61b\x01\x61a\x02",  # keys out of order
        b"\xa2\x61a\x01\x61a\x02",  # a key twice
        b"\xc2\x41\x01",  # tag 2, a bignum
        b"\xd9\xd9\xf7\x01",  # the tag of self-described CBOR
        b"\xd8\x1c\x81\xd8\x1d\x00",  # a value that holds itself
        b"\xfb\x3f\xf0\x00\x00\x00\x00\x00\x00",  # 1.0 in eight bytes
        b"\x81" * 100 + b"\x01",
        b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff",  # a list of 2^64 - 1 items
        cbor2.dumps(cbor2.CBORTag(4000, b"x")),
    ],
)
def test_bytes_that_are_not_canonical_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        canonical.decode(data)
    assert caught.value.code == "encoding"


@given(st.lists(st.text()), st.lists(st.text()))
def test_lists_that_concatenate_alike_hash_differently(left: list[str], right: list[str]) -> None:
    assert (canonical.digest("label", *left) == canonical.digest("label", *right)) == (left == right)


def test_equal_fields_under_another_label_hash_differently() -> None:
    assert canonical.digest("a", b"x") != canonical.digest("b", b"x")


def test_order_of_keys_does_not_reach_the_digest() -> None:
    assert canonical.digest("x", {"a": 1, "b": 2}) == canonical.digest("x", {"b": 2, "a": 1})
