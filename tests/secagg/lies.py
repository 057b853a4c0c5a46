"""What hostile parties do: rounds stopped half-way, messages signed anew, and a silo that shares falsely."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedclip_secure.secagg import sealing, shamir
from fedclip_secure.secagg.keys import salt_info, share_commitment, share_info
from fedclip_secure.secagg.messages import Body, Bundle, Bundles, sign_message
from fedclip_secure.secagg.silo_session import Ciphertexts, Shares, SiloSession
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

    def share(self, ads: Sequence[bytes]) -> Shares:
        super().share(ads)
        entries, ciphertexts = [], {}
        points = {name: self._terms.roster.index(name) for name in self._ads}
        secrets, t = self._secrets, self._terms.threshold
        seeds = shamir.split(secrets.keys.seed, t, list(points.values()))
        bs = shamir.split(secrets.b, t, list(points.values()))
        for peer in (name for name in self._ads if name != self._silo):
            seed, b = seeds[points[peer]], bs[points[peer]]
            sent = self.lie(peer, Sent(seed, b, secrets.keys.salt_for(self._silo, peer), seed + b))
            ciphertexts[peer] = self._seal(peer, sent)
            entries.append(self._commit(peer, sent, ciphertexts[peer]))
        self._own_bundles = Bundles(transcript=self._transcript, entries=entries)
        return Shares(self._sign_body(self._own_bundles), ciphertexts)

    def _seal(self, peer: str, sent: Sent) -> Ciphertexts:
        ad = self._ads[peer].body
        return (
            sealing.seal(sent.sealed, ad.share_seal, *share_info(self._transcript, self._silo, peer)),
            sealing.seal(sent.salt, ad.salt_seal, *salt_info(self._transcript, self._silo, peer)),
        )

    def _commit(self, peer: str, sent: Sent, ciphertexts: Ciphertexts) -> Bundle:
        return Bundle(
            peer=peer,
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
