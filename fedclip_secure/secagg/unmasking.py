"""From the survivors' answers to the masks that did not cancel, and to the sum without them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedclip_secure.errors import ProtocolError
from fedclip_secure.secagg import masks, shamir
from fedclip_secure.secagg.keys import (
    Peer,
    SeedKeys,
    pair_commitment,
    salt_info,
    self_commitment,
    self_key,
    share_commitment,
)
from fedclip_secure.secagg.messages import Bundles, Ciphertexts, KeyAd, Signed, Unmask, Upload
from fedclip_secure.secagg.ring import Words
from fedclip_secure.secagg.terms import Terms


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that an attempt has brought to light by the time t survivors have answered."""

    terms: Terms
    base: bytes
    transcript: bytes  # T
    transcript2: bytes  # T2
    ads: Mapping[str, Signed[KeyAd]]  # U1
    places: Mapping[str, int]  # in U1
    bundles: Mapping[str, Signed[Bundles]]  # U2
    ciphertexts: Mapping[str, Mapping[str, Ciphertexts]]  # sender, receiver
    uploads: Mapping[str, Signed[Upload]]  # U3
    commitments: Mapping[str, Mapping[str, bytes]]  # survivor, peer: to the key of the two
    unmasks: Mapping[str, Signed[Unmask]]  # those who answered


@dataclass(frozen=True, slots=True)
class Revealed:
    """What survivors' answers give away, and no more: enough to take the masks off the sum."""

    secrets: Mapping[str, bytes] = field(repr=False)  # b of each survivor
    pairs: Mapping[str, Mapping[str, bytes]] = field(repr=False)  # survivor, drop-out: the mask key of the two


@dataclass(frozen=True, slots=True)
class MasksLeft:
    """Keys of the masks that did not cancel in the sum: to take away, and to put back."""

    subtract: list[bytes] = field(repr=False)
    add: list[bytes] = field(repr=False)


def check_unmask(evidence: Evidence, sender: str, unmask: Unmask, survivors: bytes) -> None:
    """Check an answer on arrival: for the right list, one share for each peer of the right kind, as committed.

    Raises:
        ProtocolError: `agreement`, `self-commit`, `share`; names the sender.
    """
    if (unmask.transcript, unmask.survivors) != (evidence.transcript2, survivors):
        raise ProtocolError("agreement", f"{sender} answered for another list of survivors", silo=sender)
    if self_commitment(evidence.base, sender, unmask.b) != evidence.ads[sender].body.self_commit:
        raise ProtocolError("self-commit", f"{sender} gave another b than it committed to", silo=sender)
    expected = [(u, "b" if u in evidence.uploads else "seed") for u in evidence.bundles if u != sender]
    if [(share.peer, share.kind) for share in unmask.shares] != expected:
        raise ProtocolError("share", f"{sender} gave other shares than one for each peer", silo=sender)
    if [pair.peer for pair in unmask.pairs] != [u for u, kind in expected if kind == "seed"]:
        raise ProtocolError("share", f"{sender} gave other pair keys than one for each drop-out", silo=sender)
    for pair in unmask.pairs:
        commitment = pair_commitment(evidence.transcript2, sender, pair.peer, pair.key)
        if commitment != evidence.commitments[sender][pair.peer]:
            raise ProtocolError("share", f"{sender} gave another pair key than it committed to", silo=sender)
    for share in unmask.shares:
        entry = evidence.bundles[share.peer].body.between(share.peer, sender, evidence.places)
        committed = entry.share_b if share.kind == "b" else entry.share_seed
        if share_commitment(evidence.transcript, share.peer, sender, share.kind, share.share) != committed:
            raise ProtocolError("share", f"{sender} gave a wrong share of {share.peer}'s {share.kind}", silo=sender)


def reveal(evidence: Evidence) -> Revealed:
    """Give back the survivors' b and their pair keys with drop-outs.

    Raises:
        ProtocolError: `secret`: a secret cannot be given back; names whose.
    """
    secrets = {name: _b_of(evidence, name) for name in evidence.uploads}
    seeds = {name: _seed_of(evidence, name) for name in evidence.bundles if name not in evidence.uploads}
    pairs = {
        survivor: {dropped: _pair_key(evidence, dropped, keys, survivor) for dropped, keys in seeds.items()}
        for survivor in evidence.uploads
    }
    return Revealed(secrets, pairs)


def masks_left(transcript2: bytes, revealed: Revealed) -> MasksLeft:
    """The masks that are still in the sum of the survivors' vectors."""
    subtract = [self_key(b, transcript2, name) for name, b in revealed.secrets.items()]
    add: list[bytes] = []
    for survivor, keys in revealed.pairs.items():
        for dropped, key in keys.items():
            # The survivor added the mask if the other name is greater than its own, else subtracted it.
            (subtract if dropped > survivor else add).append(key)
    return MasksLeft(subtract, add)


def unmask_sum(vectors: Iterable[Words], length: int, left: MasksLeft) -> Words:
    """Add up the masked vectors (length,) one after the other and take the remaining masks away.

    A vector may be a read-only map of a file: it is read once and never copied.
    """
    total = np.zeros(length, dtype=np.uint32)
    for vector in vectors:
        total += vector
    masks.apply(total, add=left.add, subtract=left.subtract)
    return total


def _b_of(evidence: Evidence, name: str) -> bytes:
    """b of a survivor: as it sent it itself, else from shares."""
    if name in evidence.unmasks:
        return evidence.unmasks[name].body.b
    b = _combine(evidence, name)
    if self_commitment(evidence.base, name, b) != evidence.ads[name].body.self_commit:
        raise ProtocolError("secret", f"{name} shared another b than it committed to", silo=name)
    return b


def _seed_of(evidence: Evidence, dropped: str) -> SeedKeys | None:
    """The keys of a drop-out; None where it shared something else than its seed."""
    keys = SeedKeys(evidence.base, _combine(evidence, dropped))
    ad = evidence.ads[dropped].body
    honest = keys.mask_public == ad.mask_public and keys.salt_seal.public == ad.salt_seal
    return keys if honest else None


def _pair_key(evidence: Evidence, dropped: str, keys: SeedKeys | None, survivor: str) -> bytes:
    """From the drop-out's seed where that gives the key that the survivor committed to, else from the survivor."""
    derived = None if keys is None else _derived_key(evidence, dropped, keys, survivor)
    committed = evidence.commitments[survivor][dropped]
    if derived is not None and pair_commitment(evidence.transcript2, survivor, dropped, derived) == committed:
        return derived
    if survivor not in evidence.unmasks:
        raise ProtocolError(
            "secret", f"{dropped} or {survivor} shared garbage, and {survivor} has not answered", silo=survivor
        )
    return next(pair.key for pair in evidence.unmasks[survivor].body.pairs if pair.peer == dropped)


def _derived_key(evidence: Evidence, dropped: str, keys: SeedKeys, survivor: str) -> bytes | None:
    try:
        salt = keys.salt_seal.open(
            evidence.ciphertexts[survivor][dropped][1], *salt_info(evidence.transcript, survivor, dropped)
        )
    except ProtocolError:  # the survivor sealed garbage to the drop-out, who could not complain any more
        return None
    if len(salt) != 32:
        return None
    peer = Peer(survivor, evidence.ads[survivor].body.mask_public, salt)
    return keys.pair_key(evidence.transcript2, dropped, peer)


def _combine(evidence: Evidence, owner: str) -> bytes:
    """Shamir's secret of `owner` from the first t answers that hold a share of it."""
    index = evidence.terms.roster.index
    shares = {
        index(sender): share.share
        for sender, message in evidence.unmasks.items()
        for share in message.body.shares
        if share.peer == owner
    }
    t = evidence.terms.threshold
    if len(shares) < t:
        raise ProtocolError("secret", f"{len(shares)} shares of {owner}'s secret, {t} are needed", silo=owner)
    return shamir.combine(dict(list(shares.items())[:t]))
