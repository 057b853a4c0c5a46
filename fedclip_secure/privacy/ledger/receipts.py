"""What the coordinator signs for an upload: at which entry the silo's ledger stood when the update left.

With it a stranger can tell an account that was shortened or rewritten afterwards, even by the silo itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedclip_secure import canonical
from fedclip_secure.errors import ProtocolError, TrustError
from fedclip_secure.names import NAME_PATTERN

_LABEL = b"fedclip/v1/receipt\x00"
Hash = Annotated[bytes, Field(min_length=32, max_length=32)]
Counter = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Receipt(BaseModel):
    """`head` is the hash of the newest entry of the ledger; `plan` and `roster` are digests."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    v: Literal[1] = 1
    plan: Hash
    roster: Hash
    silo: Annotated[str, Field(pattern=NAME_PATTERN)]
    round: Counter
    attempt: Counter
    head: Hash

    def signed(self, sign: Callable[[bytes], bytes]) -> bytes:
        """Canonical CBOR of [bytes, signature]; `sign` is Ed25519 (RFC 8032) with the aggregator's key."""
        body = canonical.encode(self.model_dump())
        return canonical.encode([body, sign(_LABEL + body)])


def open_receipt(wire: bytes, public: bytes) -> Receipt:
    """Check a receipt against the aggregator's public key (32 bytes).

    Raises:
        TrustError: it is none, or another's.
    """
    try:
        body, signature = canonical.decode(wire)
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _LABEL + body)
        return Receipt.model_validate(canonical.decode(body))
    except (ProtocolError, InvalidSignature, ValidationError, ValueError, TypeError) as error:
        raise TrustError(
            "a receipt for an upload is not one that the coordinator of this roster signed; tell the coordinator"
        ) from error
