"""One attempt as the aggregator lives it: takes messages, closes phases, unmasks the sum.

It holds no vectors. All that it knows follows from the opening and the messages in the order they
came, so a restarted server feeds it from its store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from fedclip_secure.errors import ProtocolError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.secagg import message_checks
from fedclip_secure.secagg.keys import pairs_commitment, unmask_info, upload_info
from fedclip_secure.secagg.messages import (
    Agree,
    B,
    Bundles,
    Ciphertexts,
    Complaint,
    KeyAd,
    Result,
    Signed,
    SumProof,
    SurvivorPairs,
    Unmask,
    Upload,
    UploadHeader,
    decode_body,
    join_transcript,
    open_message,
    places_of,
    share_transcript,
    survivors_hash,
)
from fedclip_secure.secagg.next_model import Outcome, compute_outcome, result_of
from fedclip_secure.secagg.opening_checks import Opening
from fedclip_secure.secagg.ring import Words
from fedclip_secure.secagg.sealing import BodyOpener, SealKey
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.secagg.unmasking import Evidence, check_unmask, masks_left, reveal, unmask_sum


class Phase(IntEnum):
    """What the aggregator waits for."""

    JOIN = 0
    SHARE = 1
    UPLOAD = 2
    AGREE = 3
    UNMASK = 4
    RESULT = 5
    DONE = 6


@dataclass(frozen=True, slots=True)
class Asked:
    """What earlier attempts over this model asked silos to agree to."""

    lists: Collection[tuple[str, ...]] = ()
    patient: bool = True  # whether silos that agreed come before a set that could go on without them


class AggregatorSession:
    """The aggregator's side of one attempt.

    Every `receive_*` raises ProtocolError, naming the silo, and then keeps nothing of the message.
    """

    def __init__(self, terms: Terms, opening: Opening, seal_key: SealKey, asked: Asked | None = None) -> None:
        self.phase = Phase.JOIN
        self._terms, self._opening, self._seal_key = terms, opening, seal_key
        self.ads: dict[str, Signed[KeyAd]] = {}
        self.bundles: dict[str, Signed[Bundles]] = {}
        self.uploads: dict[str, Signed[Upload]] = {}
        self.agrees: dict[str, Signed[Agree]] = {}
        self.unmasks: dict[str, Signed[Unmask]] = {}
        self.results: dict[str, Signed[Result]] = {}
        self.conflicts: list[tuple[str, str]] = []  # pairs of silos that committed to different keys
        self._asked = asked or Asked()
        self._places: dict[str, int] = {}  # in U1
        self._ciphertexts: dict[str, dict[str, Ciphertexts]] = {}
        self._commitments: dict[str, dict[str, bytes]] = {}
        self._transcript = self._transcript2 = self._survivors = b""
        self._expected: Result | None = None
        self._proof: SumProof | None = None

    @property
    def transcript2(self) -> bytes:
        """T2, once sharing has closed."""
        return self._transcript2

    def answered(self, phase: Phase) -> Mapping[str, Signed[Any]]:
        """Who has answered in `phase`, with the messages."""
        return (self.ads, self.bundles, self.uploads, self.agrees, self.unmasks, self.results)[phase]

    def missing(self) -> set[str]:
        """Who is expected to answer in the present phase and has not; of joining nobody knows."""
        if self.phase in (Phase.JOIN, Phase.DONE):
            return set()
        return set(self.answered(Phase(self.phase - 1))) - set(self.answered(self.phase))

    def receive_key_ad(self, sender: str, wire: bytes) -> None:
        """Stage 0."""
        ad = self._open((Phase.JOIN,), sender, wire, KeyAd, self._terms.roster.silos)
        message_checks.check_key_ad(ad.body, self._opening.base, sender)
        if ad.body.agreed and tuple(ad.body.agreed) not in self._asked.lists:
            raise ProtocolError("agreed", f"{sender} says that it agreed to names it was never asked for", silo=sender)
        message_checks.check_distinct_keys({**self.ads, sender: ad})
        self.ads[sender] = ad

    def joinable(self) -> list[str]:
        """Who would be in U1 if joining closed now."""
        return message_checks.joinable(self.ads, None if self._asked.patient else self._terms.floor)

    def receive_bundles(self, sender: str, wire: bytes, ciphertexts: Mapping[str, Ciphertexts]) -> None:
        """Stage 1: `ciphertexts` by peer; they must be the ones committed to."""
        bundles = self._open((Phase.SHARE,), sender, wire, Bundles, self.ads)
        message_checks.check_bundles(bundles.body, self._transcript, sender, self.ads)
        entries = {peer: bundles.body.between(sender, peer, self._places) for peer in self.ads if peer != sender}
        committed = {peer: (entry.ct_share, entry.ct_salt) for peer, entry in entries.items()}
        sent = {peer: (hashlib.sha256(a).digest(), hashlib.sha256(b).digest()) for peer, (a, b) in ciphertexts.items()}
        if sent != committed:
            raise ProtocolError("bundle", f"{sender}'s ciphertexts are not those it committed to", silo=sender)
        self.bundles[sender], self._ciphertexts[sender] = bundles, dict(ciphertexts)

    def receive_complaint(self, sender: str, wire: bytes) -> Complaint:
        """Between stages 1 and 2: what a peer sent does not open."""
        complaint = self._open((Phase.UPLOAD,), sender, wire, Complaint, self.bundles).body
        if complaint.transcript != self._transcript or complaint.accused not in self.bundles:
            raise ProtocolError("complaint", f"{sender} complains of another attempt or a stranger", silo=sender)
        return complaint

    def open_upload(self, sender: str) -> BodyOpener:
        """Stage 2: what opens the sealed body of `sender` as it arrives."""
        self._require((Phase.UPLOAD,), sender, self.bundles)
        return BodyOpener(self._seal_key, 4 * self._terms.vector.words, *upload_info(self._transcript2, sender))

    def receive_upload(self, sender: str, header: bytes, vector: bytes) -> None:
        """Stage 2: `header` of the sealed body, and the SHA-256 of the words it carried.

        Where sender and peer committed to different keys, one of the two shared garbage: their
        masks would not cancel. The pair goes to `conflicts`.
        """
        self._require((Phase.UPLOAD,), sender, self.bundles)
        with _named(sender):
            content = decode_body(UploadHeader, header)
        upload = self._open((Phase.UPLOAD,), sender, content.upload, Upload, self.bundles)
        with _named(sender):
            message_checks.check_upload(self._terms, upload.body, self._transcript2, sender)
        if upload.body.vector != vector:
            raise ProtocolError("vector", f"{sender} sent another vector than it signed", silo=sender)
        peers = [name for name in self.bundles if name != sender]
        signed = pairs_commitment(self._transcript2, sender, content.pairs) == upload.body.pairs
        if not signed or len(content.pairs) != len(peers):
            raise ProtocolError("vector", f"{sender} sent other commitments than it signed", silo=sender)
        self.uploads[sender] = upload
        self._commitments[sender] = dict(zip(peers, content.pairs, strict=True))
        self.conflicts += [
            (peer, sender)
            for peer, theirs in self._commitments.items()
            if peer != sender and theirs[sender] != self._commitments[sender][peer]
        ]

    def receive_agree(self, sender: str, wire: bytes) -> None:
        """Stage 3. One more is welcome while others unmask."""
        agree = self._open((Phase.AGREE, Phase.UNMASK), sender, wire, Agree, self.uploads)
        if agree.body != Agree(transcript=self._transcript2, survivors=self._survivors):
            raise ProtocolError("agreement", f"{sender} agreed to another list of survivors", silo=sender)
        self.agrees[sender] = agree

    def open_unmask(self, sender: str, sealed: bytes) -> bytes:
        """Stage 4: open a sealed `Unmask`; the signed message inside goes to `receive_unmask`."""
        self._require((Phase.UNMASK,), sender, self.uploads)
        return self._seal_key.open(sealed, *unmask_info(self._transcript2, self._survivors, sender))

    def receive_unmask(self, sender: str, wire: bytes) -> None:
        """Stage 4: every share is checked against its commitment."""
        unmask = self._open((Phase.UNMASK,), sender, wire, Unmask, self.uploads)
        check_unmask(self._evidence(), sender, unmask.body, self._survivors)
        self.unmasks[sender] = unmask

    def receive_result(self, sender: str, wire: bytes) -> None:
        """Stage 5: must say word for word what the aggregator computed itself."""
        result = self._open((Phase.RESULT, Phase.DONE), sender, wire, Result, self.uploads)
        if result.body != self._expected:
            raise ProtocolError("result", f"{sender} computed another result from the same sum", silo=sender)
        self.results[sender] = result

    def take_back(self, phase: Phase, sender: str) -> None:
        """Forget a message that could not be kept durably."""
        (self.ads, self.bundles, self.uploads, self.agrees, self.unmasks, self.results)[phase].pop(sender, None)
        if phase is Phase.UPLOAD:
            self._commitments.pop(sender, None)
            self.conflicts = [pair for pair in self.conflicts if sender not in pair]

    def close(self) -> None:
        """End the present phase and fix its list.

        Raises:
            ProtocolError: `floor`: too few have answered; `agreed`: a silo cannot go on with just these.
        """
        if self.phase <= Phase.UPLOAD:
            names = self.joinable() if self.phase is Phase.JOIN else list(self.answered(self.phase))
            message_checks.check_floor(self._terms, names, self.phase.name.lower())
        elif len(self.answered(self.phase)) < self._terms.threshold:
            count, stage = len(self.answered(self.phase)), self.phase.name.lower()
            raise ProtocolError("floor", f"{count} silos at stage {stage!r}, {self._terms.threshold} must answer")
        if self.phase is Phase.JOIN:
            self.ads = {name: self.ads[name] for name in names}
            self._transcript, self._places = join_transcript(self._opening.base, self.ads), places_of(self.ads)
        elif self.phase is Phase.SHARE:
            message_checks.check_bound(self.ads, self.bundles, final=False)
            self.bundles = dict(sorted(self.bundles.items()))
            self._transcript2 = share_transcript(self._transcript, self.bundles)
        elif self.phase is Phase.UPLOAD:
            message_checks.check_bound(self.ads, self.uploads, final=True)
            self.uploads = dict(sorted(self.uploads.items()))
            self._survivors = survivors_hash(self._transcript2, self.uploads)
        self.phase = Phase(self.phase + 1)

    def inbox(self, receiver: str) -> dict[str, Ciphertexts]:
        """What the members of U2 sealed to `receiver`."""
        return {sender: self._ciphertexts[sender][receiver] for sender in self.bundles if sender != receiver}

    def unmask_sum(self, vectors: Iterable[Words]) -> Words:
        """The sum (words,) of the survivors' vectors, without masks.

        Raises:
            ProtocolError: `secret`.
        """
        left = masks_left(self._transcript2, reveal(self._evidence()))
        return unmask_sum(vectors, self._terms.vector.words, left)

    def sum_proof(self) -> SumProof:
        """With `verify_sum`: what was taken off the sum of the published vectors, once the result is known.

        Raises:
            ProtocolError: `early`.
        """
        if self._proof is not None:
            return self._proof
        if self._expected is None:
            raise ProtocolError("early", "the sum is not known yet")
        revealed = reveal(self._evidence())
        dropped = len(self.bundles) > len(self.uploads)
        pairs = [
            SurvivorPairs(commitments=list(self._commitments[name].values()), dropped=list(keys.values()))
            for name, keys in revealed.pairs.items()
        ]
        secrets = list(revealed.secrets.values())
        self._proof = SumProof(sum=self._expected.sum, secrets=secrets, pairs=pairs if dropped else [])
        return self._proof

    def compute_result(self, total: Words, old: AdapterState) -> Outcome:
        """The outcome of the unmasked sum; from now on silos are held to it.

        Raises:
            ProtocolError: `sum-bounds`.
        """
        ad = self._opening.ad
        outcome = compute_outcome(self._terms, ad.round, old, total, tuple(self.uploads))
        self._expected = result_of(ad, self._transcript2, self._survivors, total, outcome)
        return outcome

    def _open(
        self, phases: tuple[Phase, ...], sender: str, wire: bytes, model: type[B], members: Collection[str]
    ) -> Signed[B]:
        """Open a message that must come from `sender` itself, a member, in one of `phases`."""
        self._require(phases, sender, members)
        with _named(sender):
            signed = open_message(wire, model, self._terms.federation, self._terms.roster)
        if signed.sender != sender:
            raise ProtocolError("signature", f"{sender} sent a message of {signed.sender}", silo=sender)
        return signed

    def _require(self, phases: tuple[Phase, ...], sender: str, members: Collection[str]) -> None:
        if self.phase not in phases:
            code, fact = ("late", "has closed") if self.phase > phases[-1] else ("early", "is not open yet")
            raise ProtocolError(code, f"stage {phases[0].name.lower()!r} {fact}", silo=sender)
        if sender not in members:
            raise ProtocolError("left-out", f"{sender} is not part of this stage", silo=sender)

    def _evidence(self) -> Evidence:
        return Evidence(
            self._terms,
            self._opening.base,
            self._transcript,
            self._transcript2,
            self.ads,
            self._places,
            self.bundles,
            self._ciphertexts,
            self.uploads,
            self._commitments,
            dict(self.unmasks),  # others may still arrive while this one is used
        )


@contextmanager
def _named(sender: str) -> Iterator[None]:
    """Whose message it was that breaks a rule."""
    try:
        yield
    except ProtocolError as error:
        raise ProtocolError(error.code, f"{sender}: {error}", silo=sender) from error
