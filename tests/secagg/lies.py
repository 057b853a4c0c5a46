"""What hostile parties do: rounds stopped half-way, messages signed anew, shares that are false, servers that lie."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedclip_secure import canonical
from fedclip_secure.secagg import sealing, shamir
from fedclip_secure.secagg.aggregator_session import AggregatorSession, Phase
from fedclip_secure.secagg.keys import salt_info, share_commitment, share_info, upload_info
from fedclip_secure.secagg.messages import (
    Agree,
    B,
    Body,
    Bundle,
    Bundles,
    Ciphertexts,
    KeyAd,
    Result,
    Signed,
    Unmask,
    Upload,
    UploadHeader,
    decode_body,
    join_transcript,
    open_message,
    share_transcript,
    sign_message,
    survivors_hash,
)
from fedclip_secure.secagg.sealing import BodyOpener
from fedclip_secure.secagg.silo_session import Shares, SiloSession
from tests.fakes import Attempt, Federation

STAGES = ("join", "share", "upload", "agree", "unmask", "result")


def before(stage: str, federation: Federation | None = None, **options: object) -> Attempt:
    """An attempt in which every stage before `stage` has gone well."""
    attempt = (federation or Federation(5)).attempt(**options)
    advance(attempt, stage)
    return attempt


def advance(attempt: Attempt, stage: str) -> None:
    """Go through every stage before `stage`."""
    for name in STAGES[: STAGES.index(stage)]:
        getattr(attempt, name)()


def signed(federation: Federation, sender: str, body: Body) -> bytes:
    """Any message by any party, with its own key."""
    return sign_message(body, federation.terms.federation, sender, federation.keys[sender].sign)


def signed_with(federation: Federation, sender: str, body: Body, **more: Any) -> bytes:
    """A message whose body has fields that no message of its type has."""
    envelope = {"v": 1, "type": body.type, "federation": federation.terms.federation, "sender": sender}
    message = canonical.encode({**envelope, "body": {**body.plain(), **more}})
    label = b"fedclip/v1/" + body.type.encode() + b"\x00"
    return canonical.encode([message, federation.keys[sender].sign(label + message)])


def with_closing_round(federation: Federation) -> Federation:
    """The federation's only round counts validation records and trains nothing."""
    federation.terms = replace(federation.terms, training_rounds=0)
    return federation


def replaced(wires: Sequence[bytes], index: int, wire: bytes) -> list[bytes]:
    return [*wires[:index], wire, *wires[index + 1 :]]


@dataclass(frozen=True)
class Sent:
    """What a silo prepares for one peer. `sealed` is what it seals; it commits to `seed` and `b`."""

    seed: bytes
    b: bytes
    salt: bytes
    sealed: bytes


Lie = Callable[[str, Sent], Sent]


class LyingSilo(SiloSession):
    """Follows the protocol but for what it seals to its peers, which `lie` chooses."""

    lie: Lie

    def _draw_shares(self) -> Shares:
        bundles, ciphertexts = [], {}
        points = {name: self._terms.roster.index(name) for name in self._ads}
        secrets, t = self.secrets, self._terms.threshold
        seeds = shamir.split(secrets.keys.seed, t, list(points.values()))
        bs = shamir.split(secrets.b, t, list(points.values()))
        for peer in (name for name in self._ads if name != self._silo):
            seed, b = seeds[points[peer]], bs[points[peer]]
            sent = self.lie(peer, Sent(seed, b, secrets.keys.salt_for(self._silo, peer), seed + b))
            ciphertexts[peer] = self._seal(peer, sent)
            bundles.append(self._commit_to(peer, sent, ciphertexts[peer]))
        return Shares(self._sign_body(Bundles.of(self._transcript, bundles)), ciphertexts)

    def _seal(self, peer: str, sent: Sent) -> Ciphertexts:
        ad = self._ads[peer].body
        return (
            sealing.seal(sent.sealed, ad.share_seal, *share_info(self._transcript, self._silo, peer)),
            sealing.seal(sent.salt, ad.salt_seal, *salt_info(self._transcript, self._silo, peer)),
        )

    def _commit_to(self, peer: str, sent: Sent, ciphertexts: Ciphertexts) -> Bundle:
        return Bundle(
            ct_share=hashlib.sha256(ciphertexts[0]).digest(),
            ct_salt=hashlib.sha256(ciphertexts[1]).digest(),
            share_seed=share_commitment(self._transcript, self._silo, peer, "seed", sent.seed),
            share_b=share_commitment(self._transcript, self._silo, peer, "b", sent.b),
        )


def let_lie(attempt: Attempt, silo: str, lie: Lie) -> None:
    """Put a `LyingSilo` in the place of an honest one."""
    liar = LyingSilo(
        attempt.federation.terms, silo, attempt.federation.keys[silo].sign, attempt.opening, attempt.records[silo]
    )
    liar.lie = lie
    attempt.sessions[silo] = liar


class LyingServer(AggregatorSession):
    """Keeps all that is signed, and closes its stages when it likes: no floor, no threshold, no rule of any list.

    `shown` are the T2 of silos that it showed another list of bundles than the rest.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.shown: dict[str, bytes] = {}

    def joinable(self) -> list[str]:
        return sorted(self.ads)

    @classmethod
    def of(cls, server: AggregatorSession) -> LyingServer:
        """In the place of an honest one that has received nothing yet."""
        return cls(server._terms, server._opening, server._seal_key)

    def receive_key_ad(self, sender: str, wire: bytes) -> None:
        self.ads[sender] = self._keep(wire, KeyAd)

    def receive_bundles(self, sender: str, wire: bytes, ciphertexts: Mapping[str, Ciphertexts]) -> None:
        self.bundles[sender], self._ciphertexts[sender] = self._keep(wire, Bundles), dict(ciphertexts)

    def open_upload(self, sender: str) -> BodyOpener:
        info = upload_info(self.shown.get(sender, self._transcript2), sender)
        return BodyOpener(self._seal_key, 4 * self._terms.vector.words, *info)

    def receive_upload(self, sender: str, header: bytes, vector: bytes) -> None:
        content = decode_body(UploadHeader, header)
        self.uploads[sender] = self._keep(content.upload, Upload)
        peers = [name for name in self.bundles if name != sender]
        self._commitments[sender] = dict(zip(peers, content.pairs, strict=False))

    def receive_agree(self, sender: str, wire: bytes) -> None:
        self.agrees[sender] = self._keep(wire, Agree)

    def receive_unmask(self, sender: str, wire: bytes) -> None:
        self.unmasks[sender] = self._keep(wire, Unmask)

    def receive_result(self, sender: str, wire: bytes) -> None:
        self.results[sender] = self._keep(wire, Result)

    def close(self) -> None:
        if self.phase is Phase.JOIN:
            self.ads = dict(sorted(self.ads.items()))
            self._transcript = join_transcript(self._opening.base, self.ads)
        elif self.phase is Phase.SHARE:
            self.bundles = dict(sorted(self.bundles.items()))
            self._transcript2 = share_transcript(self._transcript, self.bundles)
        elif self.phase is Phase.UPLOAD:
            self.uploads = dict(sorted(self.uploads.items()))
            self._survivors = survivors_hash(self._transcript2, self.uploads)
        self.phase = Phase(self.phase + 1)

    def _keep(self, wire: bytes, model: type[B]) -> Signed[B]:
        return open_message(wire, model, self._terms.federation, self._terms.roster)


def under_a_lying_server(federation: Federation, **options: Any) -> Attempt:
    """An attempt whose aggregator breaks every rule of its own."""
    attempt = federation.attempt(**options)
    attempt.server = LyingServer.of(attempt.server)
    return attempt
