"""`verify_sum`: a silo adds the published masked vectors up again and so finds a wrong sum.

The vectors, the b of the survivors and their keys with drop-outs are no news: the aggregator
learned them in unmasking. Each is held against what its silo signed before anything was unmasked.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedclip_secure.errors import ProtocolError
from fedclip_secure.secagg import masks
from fedclip_secure.secagg.keys import pair_commitment, pairs_commitment, self_commitment
from fedclip_secure.secagg.messages import Bundles, KeyAd, Signed, SumProof, Upload, vector_hash
from fedclip_secure.secagg.ring import Words
from fedclip_secure.secagg.unmasking import Revealed, masks_left


class SumCheck:
    """Adds up again, one vector at a time: `add` each of `survivors`, then ask for the `total`."""

    def __init__(
        self,
        transcript2: bytes,
        ads: Mapping[str, Signed[KeyAd]],  # U1
        bundles: Mapping[str, Signed[Bundles]],  # U2
        uploads: Mapping[str, Signed[Upload]],  # U3
        *,
        proof: SumProof,
        words: int,
    ) -> None:
        self.survivors = tuple(uploads)
        self._missing = set(uploads)
        self._uploads, self._proof = uploads, proof
        self._revealed = Revealed(
            secrets=_checked_secrets(ads, self.survivors, proof),
            pairs=_checked_pairs(transcript2, tuple(bundles), uploads, proof),
        )
        self._transcript2 = transcript2
        self._total = np.zeros(words, dtype=np.uint32)

    def add(self, name: str, vector: Words) -> None:
        """Add the masked vector (words,) of a survivor, once.

        Raises:
            ProtocolError: `sum`: it is not the one that its silo signed.
        """
        if vector_hash(vector) != self._uploads[name].body.vector:
            raise ProtocolError("sum", f"the server published another vector of {name} than {name} signed")
        self._missing.remove(name)
        self._total += vector

    def total(self) -> Words:
        """The sum (words,) without masks.

        Raises:
            ProtocolError: `sum`: the aggregator says that it is another.
        """
        if self._missing:
            raise ProtocolError("sum", f"the vectors of {', '.join(sorted(self._missing))} are missing")
        left = masks_left(self._transcript2, self._revealed)
        masks.apply(self._total, left.add, left.subtract)
        if vector_hash(self._total) != self._proof.sum:
            raise ProtocolError("sum", "the server published a wrong sum: the silos' vectors add up to another")
        return self._total


def _checked_secrets(
    ads: Mapping[str, Signed[KeyAd]], survivors: tuple[str, ...], proof: SumProof
) -> Mapping[str, bytes]:
    if len(proof.secrets) != len(survivors):
        raise ProtocolError("sum", f"the server gave {len(proof.secrets)} secrets for {len(survivors)} survivors")
    secrets = dict(zip(survivors, proof.secrets, strict=True))
    for name, b in secrets.items():
        if self_commitment(ads[name].body.base, name, b) != ads[name].body.self_commit:
            raise ProtocolError("sum", f"the server published another b of {name} than {name} committed to")
    return secrets


def _checked_pairs(
    transcript2: bytes, shared: tuple[str, ...], uploads: Mapping[str, Signed[Upload]], proof: SumProof
) -> Mapping[str, Mapping[str, bytes]]:
    dropped = [name for name in shared if name not in uploads]
    if len(proof.pairs) != (len(uploads) if dropped else 0):
        raise ProtocolError("sum", f"the server gave the pair keys of {len(proof.pairs)} survivors")
    checked = {}
    for (survivor, upload), pairs in zip(uploads.items(), proof.pairs, strict=False):
        peers = [name for name in shared if name != survivor]
        signed = pairs_commitment(transcript2, survivor, pairs.commitments) == upload.body.pairs
        if not signed or (len(pairs.commitments), len(pairs.dropped)) != (len(peers), len(dropped)):
            raise ProtocolError("sum", f"the server published other commitments of {survivor} than {survivor} signed")
        committed = dict(zip(peers, pairs.commitments, strict=True))
        checked[survivor] = dict(zip(dropped, pairs.dropped, strict=True))
        for name, key in checked[survivor].items():
            if pair_commitment(transcript2, survivor, name, key) != committed[name]:
                raise ProtocolError("sum", f"the server published a wrong key of {survivor} and {name}")
    return checked
