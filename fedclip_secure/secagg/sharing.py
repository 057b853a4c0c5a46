"""Stage 1 between two silos: shares and a salt, committed to and sealed by one, opened and checked by the other."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from fedclip_secure.errors import ProtocolError
from fedclip_secure.secagg import sealing
from fedclip_secure.secagg.keys import AttemptSecrets, salt_info, share_commitment, share_info
from fedclip_secure.secagg.messages import Bundle, Ciphertexts, KeyAd

_SHARE = 32  # bytes of one share


@dataclass(frozen=True, slots=True)
class Way:
    """From whom to whom, in the attempt that T (`transcript`) stands for."""

    transcript: bytes
    sender: str
    receiver: str


@dataclass(frozen=True, slots=True)
class Sent:
    """What one silo gives to another: shares of its seed and of its b, and its salt; 32 bytes each."""

    seed: bytes = field(repr=False)
    b: bytes = field(repr=False)
    salt: bytes = field(repr=False)


def seal_to(ad: KeyAd, way: Way, sent: Sent) -> tuple[Bundle, Ciphertexts]:
    """Commit to `sent` and seal it to the receiver's keys; shares and salt under different ones."""
    where = (way.transcript, way.sender, way.receiver)
    ciphertexts = (
        sealing.seal(sent.seed + sent.b, ad.share_seal, *share_info(*where)),
        sealing.seal(sent.salt, ad.salt_seal, *salt_info(*where)),
    )
    bundle = Bundle(
        ct_share=hashlib.sha256(ciphertexts[0]).digest(),
        ct_salt=hashlib.sha256(ciphertexts[1]).digest(),
        share_seed=share_commitment(*where, "seed", sent.seed),
        share_b=share_commitment(*where, "b", sent.b),
    )
    return bundle, ciphertexts


def open_from(secrets: AttemptSecrets, way: Way, bundle: Bundle, ciphertexts: Ciphertexts) -> Sent:
    """Open what arrived and hold it against what its sender signed.

    Raises:
        ProtocolError: `inbox`: the aggregator's fault; `bundle`: the sender's, who is named.
    """
    where, peer = (way.transcript, way.sender, way.receiver), way.sender
    if tuple(hashlib.sha256(text).digest() for text in ciphertexts) != (bundle.ct_share, bundle.ct_salt):
        raise ProtocolError("inbox", f"the server altered or withheld what {peer} sent to this silo")
    try:
        shares = secrets.share_seal.open(ciphertexts[0], *share_info(*where))
        salt = secrets.keys.salt_seal.open(ciphertexts[1], *salt_info(*where))
    except ProtocolError as error:
        raise ProtocolError("bundle", f"what {peer} sealed to this silo does not open", silo=peer) from error
    sent = Sent(shares[:_SHARE], shares[_SHARE:], salt)
    commitments = share_commitment(*where, "seed", sent.seed), share_commitment(*where, "b", sent.b)
    if {len(sent.seed), len(sent.b), len(salt)} != {_SHARE} or commitments != (bundle.share_seed, bundle.share_b):
        raise ProtocolError("bundle", f"the shares of {peer} are not those it committed to", silo=peer)
    return sent
