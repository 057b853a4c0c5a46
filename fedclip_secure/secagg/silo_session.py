"""One attempt as a silo lives it: six methods, called in the order of the protocol's stages.

Each takes what the aggregator answered and gives what to send next, or raises before anything that
could reveal this silo's update has left.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from fedclip_secure.errors import ProtocolError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.secagg import masks, message_checks, sealing, shamir, sharing
from fedclip_secure.secagg.keys import (
    AttemptSecrets,
    Peer,
    pair_commitment,
    pairs_commitment,
    self_commitment,
    self_key,
    unmask_info,
    upload_info,
)
from fedclip_secure.secagg.messages import (
    Agree,
    B,
    Body,
    Bundles,
    Ciphertexts,
    KeyAd,
    PairKey,
    PeerShare,
    Sign,
    Signed,
    SumProof,
    Unmask,
    Upload,
    UploadHeader,
    by_sender,
    join_transcript,
    open_message,
    places_of,
    share_transcript,
    sign_message,
    survivors_hash,
    vector_hash,
)
from fedclip_secure.secagg.next_model import Outcome, compute_outcome, result_of
from fedclip_secure.secagg.opening_checks import Opening
from fedclip_secure.secagg.ring import WORD, Words
from fedclip_secure.secagg.sealing import SealedBody
from fedclip_secure.secagg.sharing import Sent, Way
from fedclip_secure.secagg.sum_verification import SumCheck
from fedclip_secure.secagg.terms import Terms

P = ParamSpec("P")
R = TypeVar("R")


class Stage(IntEnum):
    """What a silo has done so far in an attempt. There is no step back."""

    OPENED = 0
    JOINED = 1
    SHARED = 2
    UPLOADED = 3
    AGREED = 4
    RELEASED = 5
    DONE = 6


def _stage(
    expected: Stage, to: Stage
) -> Callable[[Callable[Concatenate[SiloSession, P], R]], Callable[Concatenate[SiloSession, P], R]]:
    """A stage that follows `expected` alone. One that was refused is never tried again, nor is any after it."""

    def decorate(method: Callable[Concatenate[SiloSession, P], R]) -> Callable[Concatenate[SiloSession, P], R]:
        @wraps(method)
        def enter(session: SiloSession, /, *args: P.args, **kwargs: P.kwargs) -> R:
            if session.stage is not expected:
                last = "a stage that was refused" if session.stage is None else session.stage.name
                raise ProtocolError("order", f"stage {to.name} does not follow {last}")
            session.stage = None
            result = method(session, *args, **kwargs)
            session.stage = to
            return result

        return enter

    return decorate


@dataclass(slots=True)
class ModelRecord:
    """What a silo must remember about one model over all attempts on it.

    One vector, drawn once; and once it has agreed to a list of names, only that list: two sums over
    one model and different names would disclose what lies between them.
    """

    model: bytes  # digest
    # Integers before masking (words,): update, weight, counts. Opened when they are masked, because
    # they may be a file of hundreds of megabytes.
    open_vector: Callable[[], Words] = field(repr=False)
    agreed: tuple[str, ...] | None = None
    ledger: bytes = b""  # with privacy: the newest entry of this silo's ledger when the vector was drawn; its hash


@dataclass(frozen=True, slots=True)
class Shares:
    """Stage 1: the signed `Bundles`, and two ciphertexts for each peer."""

    bundles: bytes
    ciphertexts: dict[str, Ciphertexts]


@dataclass(frozen=True, slots=True)
class MaskedUpload:
    """Stage 2: an `UploadHeader`, encoded, and the masked vector it commits to."""

    header: bytes
    words: Words

    @property
    def body(self) -> memoryview:
        """The words as they travel: little-endian, 4 bytes each."""
        return self.words.astype(WORD, copy=False).data.cast("B")


class SiloSession:
    """A silo's side of one attempt.

    All that it does follows from its arguments, from what the aggregator answered, and from the
    `Shares` it drew: a restarted silo that gives it the same again is where it was.
    """

    def __init__(
        self,
        terms: Terms,
        silo: str,
        sign: Sign,
        opening: Opening,
        record: ModelRecord,
        *,
        secrets: AttemptSecrets | None = None,  # fresh ones, or those of this very attempt before a restart
    ) -> None:
        if record.model != opening.ad.model:
            raise ValueError("the record belongs to another model")
        self.stage: Stage | None = Stage.OPENED  # None: the last one was refused
        self._terms, self._silo, self._sign = terms, silo, sign
        self._opening, self._record = opening, record
        self.secrets = secrets or AttemptSecrets.fresh(opening.base)
        self._transcript = self._transcript2 = self._survivors = b""  # T, T2, H(U3)
        self._ads: dict[str, Signed[KeyAd]] = {}  # U1
        self._places: dict[str, int] = {}  # in U1
        self._bundles: dict[str, Signed[Bundles]] = {}  # U2
        self._uploads: dict[str, Signed[Upload]] = {}  # U3
        self._held: dict[str, Sent] = {}  # peer: what it gave to this silo
        self._pair_keys: dict[str, bytes] = {}

    @property
    def transcript(self) -> bytes:
        """T, once this silo has shared: what a `Complaint` refers to."""
        return self._transcript

    @property
    def agreed(self) -> tuple[str, ...]:
        """The names that this silo is bound to over this model; none before it agrees."""
        return self._record.agreed or ()

    @property
    def round(self) -> int:
        """The round that this attempt is at."""
        return self._opening.ad.round

    @property
    def ledger(self) -> bytes:
        """With privacy: the head of this silo's ledger that its upload names."""
        return self._record.ledger

    @_stage(Stage.OPENED, Stage.JOINED)
    def join(self) -> bytes:
        """Stage 0: give a signed `KeyAd`."""
        secrets = self.secrets
        self._ad = KeyAd(
            base=self._opening.base,
            mask_public=secrets.keys.mask_public,
            share_seal=secrets.share_seal.public,
            salt_seal=secrets.keys.salt_seal.public,
            self_commit=self_commitment(self._opening.base, self._silo, secrets.b),
            agreed=list(self._record.agreed or ()),
        )
        return self._sign_body(self._ad)

    @_stage(Stage.JOINED, Stage.SHARED)
    def share(self, ads: Sequence[bytes], drawn: Shares | None = None) -> Shares:
        """Stage 1: check U1 and share both secrets among it. `drawn`: with these shares, drawn before a restart.

        Raises:
            ProtocolError: `floor`, `mine`, `base`, `key`, `agreed`, or a fault of encoding or signature.
        """
        self._ads = self._open_list(ads, KeyAd, self._ad)
        for name, ad in self._ads.items():
            message_checks.check_key_ad(ad.body, self._opening.base, name)
        message_checks.check_distinct_keys(self._ads)
        self._check_agreed(self._ads)
        self._transcript, self._places = join_transcript(self._opening.base, self._ads), places_of(self._ads)
        shares = drawn or self._draw_shares()
        self._own_bundles = open_message(shares.bundles, Bundles, self._terms.federation, self._terms.roster).body
        return shares

    @_stage(Stage.SHARED, Stage.UPLOADED)
    def upload(self, bundles: Sequence[bytes], inbox: Mapping[str, Ciphertexts]) -> MaskedUpload:
        """Stage 2: check U2 and all that is addressed to this silo, then mask the vector.

        Raises:
            ProtocolError: `floor`, `mine`, `list`, `transcript`, `agreed`; `bundle` names the silo to complain of.
        """
        self._bundles = self._open_list(bundles, Bundles, self._own_bundles)
        if not set(self._bundles) <= set(self._ads):
            raise ProtocolError("list", "a silo shared that had not joined")
        for name, message in self._bundles.items():
            message_checks.check_bundles(message.body, self._transcript, name, self._ads)
        self._check_agreed(self._bundles)
        self._transcript2 = share_transcript(self._transcript, self._bundles)
        add, subtract = [self_key(self.secrets.b, self._transcript2, self._silo)], list[bytes]()
        for peer in self._peers():
            other = Peer(peer, self._ads[peer].body.mask_public, self._receive(peer, inbox))
            self._pair_keys[peer] = self.secrets.keys.pair_key(self._transcript2, self._silo, other)
            (add if peer > self._silo else subtract).append(self._pair_keys[peer])
        vector = self._record.open_vector()
        if vector.size != self._terms.vector.words:
            raise ValueError("the vector belongs to another plan")
        words = masks.masked(vector, add, subtract)
        return MaskedUpload(self._commit(words), words)

    def seal_upload(self, upload: MaskedUpload) -> SealedBody:
        """How the body of stage 2 is sealed to the aggregator: header and masked words."""
        public = self._opening.ad.seal_public
        return SealedBody.start(upload.header, public, *upload_info(self._transcript2, self._silo))

    @_stage(Stage.UPLOADED, Stage.AGREED)
    def agree(self, uploads: Sequence[bytes]) -> bytes:
        """Stage 3: check U3 and sign it. From here on this silo signs no other names over this model.

        Raises:
            ProtocolError: `floor`, `mine`, `list`, `transcript`, `ledger`, `agreed`.
        """
        self._uploads = self._open_list(uploads, Upload, self._own_upload)
        if not set(self._uploads) <= set(self._bundles):
            raise ProtocolError("list", "a silo uploaded that had not shared")
        for name, message in self._uploads.items():
            message_checks.check_upload(self._terms, message.body, self._transcript2, name)
        names = tuple(self._uploads)
        self._check_agreed(names, final=True)
        self._record.agreed = names
        self._survivors = survivors_hash(self._transcript2, self._uploads)
        return self._sign_body(Agree(transcript=self._transcript2, survivors=self._survivors))

    @_stage(Stage.AGREED, Stage.RELEASED)
    def unmask(self, agrees: Sequence[bytes]) -> bytes:
        """Stage 4: with t `Agree`s over what this silo signed, release exactly one share for each peer.

        Returns the signed `Unmask`, sealed to the aggregator.

        Raises:
            ProtocolError: `agreement`, or a fault of encoding or signature.
        """
        signers = by_sender(agrees, Agree, self._terms.federation, self._terms.roster)
        mine = Agree(transcript=self._transcript2, survivors=self._survivors)
        same = [name for name, message in signers.items() if message.body == mine]
        if len(same) < self._terms.threshold:
            raise ProtocolError(
                "agreement",
                f"{len(same)} silos agree on who survived; {self._terms.threshold} must before shares go out",
            )
        dropped = [peer for peer in self._peers() if peer not in self._uploads]
        body = Unmask(
            transcript=self._transcript2,
            survivors=self._survivors,
            b=self.secrets.b,
            shares=[self._release(peer) for peer in self._peers()],
            pairs=[PairKey(peer=peer, key=self._pair_keys[peer]) for peer in dropped],
        )
        return sealing.seal(
            self._sign_body(body),
            self._opening.ad.seal_public,
            *unmask_info(self._transcript2, self._survivors, self._silo),
        )

    def check_sum(self, proof: SumProof) -> SumCheck:
        """With `verify_sum`: what adds the survivors' masked vectors up again, once the aggregator's proof holds.

        Raises:
            ProtocolError: `sum`: a secret is not the one that its silo committed to.
        """
        words = self._terms.vector.words
        return SumCheck(self._transcript2, self._ads, self._bundles, self._uploads, proof=proof, words=words)

    @_stage(Stage.RELEASED, Stage.DONE)
    def result(self, total: Words, old: AdapterState) -> tuple[bytes, Outcome]:
        """Stage 5: compute the next model from the sum (words,) and the model of the opening; sign it.

        Raises:
            ProtocolError: `sum-bounds`.
        """
        if old.digest != self._opening.ad.model:
            raise ValueError("the round did not start from this model")
        outcome = compute_outcome(self._terms, self._opening.ad.round, old, total, tuple(self._uploads))
        body = result_of(self._opening.ad, self._transcript2, self._survivors, total, outcome)
        return self._sign_body(body), outcome

    def _sign_body(self, body: Body) -> bytes:
        return sign_message(body, self._terms.federation, self._silo, self._sign)

    def _open_list(self, wires: Sequence[bytes], model: type[B], mine: B) -> dict[str, Signed[B]]:
        """Open a list; it must reach the floor and hold this silo's own message unchanged."""
        opened = by_sender(wires, model, self._terms.federation, self._terms.roster)
        message_checks.check_floor(self._terms, opened, model.type)
        if self._silo not in opened or opened[self._silo].body != mine:
            raise ProtocolError("mine", f"the server's list of {model.type} messages lacks or alters this silo's own")
        return opened

    def _check_agreed(self, names: Collection[str], *, final: bool = False) -> None:
        """Two sums over one model and different names would disclose what lies between them."""
        agreed = set(self._record.agreed or ())
        if agreed and (agreed != set(names) if final else not agreed <= set(names)):
            raise ProtocolError(
                "agreed",
                f"this silo agreed to the sum over {', '.join(sorted(agreed))} for this model, and to no other; "
                f"this attempt is among {', '.join(sorted(names))}",
            )

    def _commit(self, words: Words) -> bytes:
        """The header of stage 2: signed, over the masked words and all pair keys."""
        commitments = [
            pair_commitment(self._transcript2, self._silo, peer, key) for peer, key in self._pair_keys.items()
        ]
        self._own_upload = Upload(
            transcript=self._transcript2,
            vector=vector_hash(words),
            pairs=pairs_commitment(self._transcript2, self._silo, commitments),
            ledger=self._record.ledger,
        )
        return UploadHeader(upload=self._sign_body(self._own_upload), pairs=commitments).encode()

    def _draw_shares(self) -> Shares:
        bundles, ciphertexts = [], {}
        for peer, sent in self._split_secrets().items():
            way = Way(self._transcript, self._silo, peer)
            bundle, ciphertexts[peer] = sharing.seal_to(self._ads[peer].body, way, sent)
            bundles.append(bundle)
        return Shares(self._sign_body(Bundles.of(self._transcript, bundles)), ciphertexts)

    def _peers(self) -> list[str]:
        """U2 without this silo, in the order of names."""
        return [name for name in self._bundles if name != self._silo]

    def _split_secrets(self) -> dict[str, Sent]:
        """Shares of seed and b, and the salt, for each peer in U1; this silo keeps none of its own."""
        points = {name: self._terms.roster.index(name) for name in self._ads}
        keys, t = self.secrets.keys, self._terms.threshold
        seeds = shamir.split(keys.seed, t, list(points.values()))
        bs = shamir.split(self.secrets.b, t, list(points.values()))
        return {
            peer: Sent(seeds[x], bs[x], keys.salt_for(self._silo, peer))
            for peer, x in points.items()
            if peer != self._silo
        }

    def _receive(self, peer: str, inbox: Mapping[str, Ciphertexts]) -> bytes:
        """Open and check what `peer` sent to this silo; keep the shares, return the salt."""
        bundle = self._bundles[peer].body.between(peer, self._silo, self._places)
        way = Way(self._transcript, peer, self._silo)
        self._held[peer] = sharing.open_from(self.secrets, way, bundle, inbox.get(peer, (b"", b"")))
        return self._held[peer].salt

    def _release(self, peer: str) -> PeerShare:
        """Of b if the peer survived, of seed if it dropped out; never both."""
        if peer in self._uploads:
            return PeerShare(peer=peer, kind="b", share=self._held[peer].b)
        return PeerShare(peer=peer, kind="seed", share=self._held[peer].seed)
