"""Doubles of our own interfaces: a whole federation in memory, without network or torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclip_secure.model.state import AdapterState, Layout
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.roster import Roster
from fedclip_secure.secagg.aggregator_session import AggregatorSession, Asked
from fedclip_secure.secagg.messages import ServerAd, sign_message
from fedclip_secure.secagg.next_model import Outcome
from fedclip_secure.secagg.opening_checks import Opening, Position, check_opening
from fedclip_secure.secagg.ring import FixedPoint, VectorLayout, Words
from fedclip_secure.secagg.sealing import SealKey
from fedclip_secure.secagg.silo_session import MaskedUpload, ModelRecord, SiloSession
from fedclip_secure.secagg.terms import Terms, threshold


@dataclass
class Federation:
    """n silos and an aggregator with real keys."""

    size: int
    parameters: int = 8
    rounds: int = 3
    counts: bool = True
    mode: str = "malicious"
    colluding: int = 1
    max_weight: int = 1000
    keys: dict[str, Ed25519PrivateKey] = field(init=False)
    terms: Terms = field(init=False)
    model: AdapterState = field(init=False)

    def __post_init__(self) -> None:
        names = [f"silo-{i:03d}" for i in range(self.size)]
        self.keys = {name: Ed25519PrivateKey.generate() for name in [*names, AGGREGATOR]}
        roster = Roster.of({name: key.public_key().public_bytes_raw() for name, key in self.keys.items()})
        self.model = AdapterState(
            Layout((("w", (self.parameters,)),)), np.linspace(-1, 1, self.parameters, dtype=np.float32)
        )
        t = threshold(self.size, self.mode, self.colluding)
        self.terms = Terms(
            federation="test",
            plan=bytes(32),
            roster=roster,
            threshold=t,
            floor=max(t, self.colluding + 2, 3),
            colluding=self.colluding,
            rounds=self.rounds,
            layout=self.model.layout,
            vector=VectorLayout(self.parameters, self.counts),
            grid=FixedPoint(0.1, self.size, self.max_weight),
            initial_model=self.model.digest,
            training_rounds=self.rounds,
            counted_from=1,
            public_weights=None,
            verify_sum=True,
        )

    @property
    def silos(self) -> tuple[str, ...]:
        return self.terms.roster.silos

    def opening(self, round_number: int = 1, attempt: int = 1, model: bytes | None = None) -> tuple[bytes, SealKey]:
        """A signed ServerAd and the key behind it."""
        key = SealKey.generate()
        ad = ServerAd(
            plan=self.terms.plan,
            roster=self.terms.roster.digest,
            round=round_number,
            attempt=attempt,
            model=model or self.model.digest,
            nonce=bytes(32),
            seal_public=key.public,
        )
        return sign_message(ad, self.terms.federation, AGGREGATOR, self.keys[AGGREGATOR].sign), key

    def record(self, weight: int = 10, update: Words | None = None) -> ModelRecord:
        """A silo's vector for the present model: random unless given."""
        if update is None:
            update = self.terms.grid.quantize(np.random.default_rng().uniform(-0.1, 0.1, self.parameters), weight)
        counts = (3, 5) if self.counts else ()
        vector = self.terms.vector.pack(update, weight, *counts)
        return ModelRecord(self.model.digest, lambda: vector)

    def attempt(self, **options: object) -> Attempt:
        return Attempt(self, **options)  # type: ignore[arg-type]


@dataclass
class Attempt:
    """One attempt, driven stage by stage; `drop` names silos that vanish before the stage of that name."""

    federation: Federation
    number: int = 1
    drop: dict[str, set[str]] = field(default_factory=dict)
    records: dict[str, ModelRecord] = field(default_factory=dict)
    asked: set[tuple[str, ...]] = field(default_factory=set)  # lists that attempts before it asked to agree to
    sessions: dict[str, SiloSession] = field(init=False)
    server: AggregatorSession = field(init=False)
    vectors: dict[str, Words] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wire, key = self.federation.opening(attempt=self.number)
        self.opening: Opening = check_opening(self.federation.terms, Position(), wire, [])
        self.server = AggregatorSession(self.federation.terms, self.opening, key, Asked(self.asked))
        self.records = {name: self.records.get(name) or self.federation.record() for name in self.federation.silos}
        self.sessions = {name: self.session(name) for name in self.federation.silos}
        self.alive = list(self.federation.silos)

    def session(self, name: str) -> SiloSession:
        sign = self.federation.keys[name].sign
        return SiloSession(self.federation.terms, name, sign, self.opening, self.records[name])

    def _enter(self, stage: str) -> list[str]:
        self.alive = [name for name in self.alive if name not in self.drop.get(stage, set())]
        return self.alive

    def join(self) -> None:
        for name in self._enter("join"):
            self.server.receive_key_ad(name, self.sessions[name].join())
        self.server.close()

    def share(self) -> None:
        ads = self.wires("ads")
        for name in self._enter("share"):
            shares = self.sessions[name].share(ads)
            self.server.receive_bundles(name, shares.bundles, shares.ciphertexts)
        self.server.close()

    def upload(self) -> None:
        for name in self._enter("upload"):
            upload = self.sessions[name].upload(self.wires("bundles"), self.server.inbox(name))
            self.receive(name, upload)
        self.server.close()

    def receive(self, name: str, upload: MaskedUpload) -> None:
        """Through the sealed body, as on the wire."""
        opener, words = self.server.open_upload(name), b""
        for piece in self.sessions[name].seal_upload(upload).pieces(upload.body):
            words += b"".join(opener.feed(piece))
        opener.finish()
        assert opener.header is not None
        assert words == upload.words.tobytes()
        import hashlib

        self.server.receive_upload(name, opener.header, hashlib.sha256(words).digest())
        self.vectors[name] = upload.words

    def agree(self) -> None:
        for name in self._enter("agree"):
            self.server.receive_agree(name, self.sessions[name].agree(self.wires("uploads")))
        self.server.close()

    def unmask(self) -> None:
        for name in self._enter("unmask"):
            sealed = self.sessions[name].unmask(self.wires("agrees"))
            self.server.receive_unmask(name, self.server.open_unmask(name, sealed))
        self.server.close()

    def result(self) -> Outcome:
        self.total = self.server.unmask_sum(self.vectors[name] for name in self.server.uploads)
        outcome = self.server.compute_result(self.total, self.federation.model)
        for name in self._enter("result"):
            wire, mine = self.sessions[name].result(self.total, self.federation.model)
            assert mine.model.digest == outcome.model.digest
            self.server.receive_result(name, wire)
        self.server.close()
        return outcome

    def run(self) -> Outcome:
        for stage in (self.join, self.share, self.upload, self.agree, self.unmask):
            stage()
        return self.result()

    def wires(self, kind: str) -> list[bytes]:
        messages = getattr(self.server, kind)
        return [messages[name].wire for name in sorted(messages)]
