from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclip_secure import canonical
from fedclip_secure.errors import TrustError
from fedclip_secure.pki.keys import SigningKey
from fedclip_secure.privacy.ledger.receipts import Receipt, open_receipt

KEY, OTHER = (SigningKey(Ed25519PrivateKey.generate()) for _ in range(2))
RECEIPT = Receipt(plan=b"p" * 32, roster=b"r" * 32, silo="lab-a", round=3, attempt=4, head=b"h" * 32)


def test_a_receipt_opens_to_what_was_signed_and_a_repeat_is_the_same_bytes() -> None:
    wire = RECEIPT.signed(KEY.sign)
    assert open_receipt(wire, KEY.public_bytes) == RECEIPT
    assert RECEIPT.signed(KEY.sign) == wire


def test_no_byte_of_a_receipt_can_be_changed() -> None:
    wire = RECEIPT.signed(KEY.sign)
    for place in range(len(wire)):
        edited = wire[:place] + bytes([wire[place] ^ 1]) + wire[place + 1 :]
        with pytest.raises(TrustError, match="not one that the coordinator of this roster signed"):
            open_receipt(edited, KEY.public_bytes)


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"garbage",
        canonical.encode([b"", b""]),
        canonical.encode([1, 2]),
        canonical.encode([b"x", b"y", b"z"]),
        RECEIPT.signed(OTHER.sign),
        canonical.encode([b"\xa0", KEY.sign(b"fedclip/v1/receipt\x00\xa0")]),
    ],
    ids=["nothing", "garbage", "empty", "numbers", "three parts", "by another key", "no receipt, but signed"],
)
def test_what_is_no_receipt_of_the_coordinator_is_refused(wire: bytes) -> None:
    with pytest.raises(TrustError):
        open_receipt(wire, KEY.public_bytes)
