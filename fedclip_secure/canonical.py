"""One byte string for one value: deterministic CBOR (RFC 8949 section 4.2) and hashes over it.

Everything that is hashed or signed goes through here. A hash input is always a CBOR array that
begins with a label, never a concatenation, so that no two inputs of different meaning can encode
alike. Labels are constants in the code.
"""

from __future__ import annotations

import hashlib
from typing import Any, NoReturn

import cbor2

from fedclip_secure.errors import ProtocolError

_MAX_DEPTH = 12  # nested containers; the deepest document of ours has 7
_KNOWN_TAGS = (0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 100, 256, 258, 260, 261, 1004, 43000, 55799)


def encode(value: Any) -> bytes:
    """Encode plain data: maps with text keys, arrays, text, bytes, integers, floats, booleans, null."""
    return cbor2.dumps(value, canonical=True)


def decode(data: bytes) -> Any:
    """Decode `data`, refusing all that does not encode back to the same bytes.

    That refuses trailing bytes, indefinite lengths, unsorted or repeated keys, and integers in more
    bytes than they need. Tags are refused as well: no document of ours has any, and each would be
    code for a stranger to choose.

    Raises:
        ProtocolError: code `encoding`.
    """
    try:
        value = cbor2.loads(
            data,
            tag_hook=_refuse_tag,
            semantic_decoders=dict.fromkeys(_KNOWN_TAGS, _refuse_tag),
            max_depth=_MAX_DEPTH,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        )
        canonical = encode(value) == data
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise ProtocolError("encoding", f"not valid CBOR: {error}") from error
    if not canonical:
        raise ProtocolError("encoding", "not canonical CBOR (RFC 8949 section 4.2)")
    return value


def digest(label: str, *fields: Any) -> bytes:
    """SHA-256 over the CBOR array `[label, *fields]`; 32 bytes."""
    return hashlib.sha256(encode([label, *fields])).digest()


def _refuse_tag(*_: object) -> NoReturn:
    raise ValueError("tags are not used here")
