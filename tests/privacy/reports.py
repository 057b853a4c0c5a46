"""Real reports: keys, contract, ledger on the disk, receipts, signatures. Only the images are missing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import Contract, FederationLock
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.roster import Roster
from fedclip_secure.privacy.accounting.privacy_filter import Cap
from fedclip_secure.privacy.accounting.releases import RELEASES
from fedclip_secure.privacy.canonical_json import decode, encode
from fedclip_secure.privacy.ledger.entries import HOUR, SignedEntry
from fedclip_secure.privacy.ledger.ledger import Ledger, OpenRun
from fedclip_secure.privacy.ledger.receipts import Receipt
from fedclip_secure.privacy.ledger.run_terms import RunTerms
from fedclip_secure.privacy.report.document import TESTS, Attack, Audit, Limit, Rates, SelfTest, SiloReport
from fedclip_secure.privacy.report.silo_report import SiloFacts, report_body, sign_report
from fedclip_secure.privacy.verification.federation_report import FederationFacts, combine

SILOS = ("birch", "cedar", "oak")
NOW = 1_790_000_000
PLAN: dict[str, Any] = {
    "federation": "lungs",
    "server": "https://localhost",
    "model": {"name": "ViT-B-32", "pretrained": "openai"},
    "classes": {"a": "a", "b": "b"},
    "templates": ["a picture of {}"],
    "splits": {"train": 0.8, "validation": 0.0, "test": 0.2},
    "method": {"name": "fedclip"},
    "training": {"rounds": 5, "optimizer": {"name": "adam", "lr": 1e-3}},
    "secure_aggregation": {"weights": "equal"},
    "privacy": {
        "unit": "record",
        "sample_rate": 64 / 1200,
        "steps_per_round": 30,
        "noise_multiplier": 1.0,
        "max_grad_norm": 0.5,
        "update_divisor": 64.0,
        "delta": 1e-5,
        "max_retrains": 1,
    },
}
LOCK: dict[str, Any] = {
    "encoder": {
        "kind": "external",
        "dim": 8,
        "text_features_sha256": "2" * 64,
        "logit_scale": 100.0,
    },
    "layout": [{"name": "w", "shape": [2, 3]}],
    "initial_model": "3" * 64,
    "initial_file": "4" * 64,
}
PREPROCESSING = {
    "size": 224,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "external": (PLAN["model"], LOCK["encoder"]),
    "timm": (
        {"name": "timm/vit_small_patch16_224", "pretrained": "dino", "image_window": [0, 4095]},
        {"kind": "timm", "name": "timm/vit_small_patch16_224", "weights_sha256": "2" * 64, "pool": "token", "dim": 384}
        | {"preprocessing": PREPROCESSING},
    ),
}  # a plan's model and a lock's encoder
CODE = "5" * 64
AUDIT = Audit(
    at=NOW // HOUR * HOUR - 3 * 24 * HOUR,
    code=CODE,
    self_tests=[SelfTest(name=name, passed=True, shows="no p-value was below the bound") for name in TESTS],
    attack=Attack(
        canaries=10_000,
        guesses=4_000,
        right=2_310,
        confidence=0.95,
        epsilon_at_least=0.2588,
        curve=[Rates(false_positives=x / 10, true_positives=min(1.0, x / 10 + 0.08)) for x in range(1, 10)],
    ),
)


def contract(privacy: dict[str, Any] | None = None, **plan: Any) -> Contract:
    """The plan above with other values."""
    block = {**PLAN["privacy"], **(privacy or {})}
    made = check({**PLAN, **plan, "privacy": block}, FederationPlan, "plan")
    releases = RELEASES.get(made.method.name, 1)
    lock = {**LOCK, "plan": made.digest.hex(), "noise_multiplier": block["noise_multiplier"], "releases": releases}
    return Contract(made, check(lock, FederationLock, "lock"))


def plain_contract(model: dict[str, Any] | None = None, encoder: dict[str, Any] | None = None) -> Contract:
    """A plan without privacy; `model` and `encoder` in place of the plan's and the lock's above."""
    values = {
        **PLAN,
        "splits": {"train": 0.6, "validation": 0.2, "test": 0.2},
        "training": {"rounds": 2, "batch_size": 32, "optimizer": {"name": "adam", "lr": 1e-3}},
        "secure_aggregation": {},
        "privacy": None,
        "model": model or PLAN["model"],
    }
    made = check(values, FederationPlan, "plan")
    lock = {**LOCK, "plan": made.digest.hex(), "encoder": encoder or LOCK["encoder"]}
    return Contract(made, check(lock, FederationLock, "lock"))


def terms_of(agreed: Contract, roster: Roster) -> RunTerms:
    privacy = agreed.plan.privacy
    assert privacy is not None
    assert agreed.lock.noise_multiplier is not None
    return RunTerms(
        federation=agreed.plan.federation,
        plan=agreed.digest,
        roster=roster.digest,
        unit=privacy.unit,
        noise_multiplier=agreed.lock.noise_multiplier,
        sample_rate=privacy.sample_rate,
        steps_per_round=privacy.steps_per_round,
        releases=agreed.lock.releases,
        rounds=agreed.plan.training.rounds,
        max_retrains=privacy.max_retrains,
        max_grad_norm=privacy.max_grad_norm,
        update_divisor=privacy.update_divisor,
        delta=privacy.delta,
        features="computed here",
        code=CODE,
    )


@dataclass
class Site:
    """A federation's keys, and a folder for its silos' ledgers."""

    folder: Path
    agreed: Contract = field(default_factory=contract)
    silos: Sequence[str] = SILOS
    keys: dict[str, Ed25519PrivateKey] = field(init=False)
    roster: Roster = field(init=False)

    def __post_init__(self) -> None:
        self.keys = {name: Ed25519PrivateKey.generate() for name in [*self.silos, AGGREGATOR]}
        self.roster = Roster.of({name: self.public(name) for name in self.keys})
        self._ticks = itertools.count(NOW)

    def public(self, name: str) -> bytes:
        return self.keys[name].public_key().public_bytes_raw()

    def ledger(self, silo: str = "oak") -> Ledger:
        return Ledger(
            self.folder / silo, silo, self.keys[silo].sign, self.public(silo), clock=lambda: float(next(self._ticks))
        )

    def begin(self, ledger: Ledger, cap: Cap | None = None) -> OpenRun:
        return ledger.open_run(terms_of(self.agreed, self.roster), [bytes([i]) * 32 for i in range(50)], cap)

    def receipt(self, head: bytes, number: int, silo: str = "oak", attempt: int | None = None) -> bytes:
        made = Receipt(
            plan=self.agreed.digest,
            roster=self.roster.digest,
            silo=silo,
            round=number,
            attempt=number if attempt is None else attempt,
            head=head,
        )
        return made.signed(self.keys[AGGREGATOR].sign)

    def trained(
        self, silo: str = "oak", rounds: int = 5, *, crash_in: int | None = None, limit: Limit | None = None
    ) -> SiloFacts:
        """The facts of a silo that has trained and uploaded so many rounds, one of them twice."""
        ledger = self.ledger(silo)
        run = self.begin(ledger, Cap(limit.epsilon, limit.delta) if limit else None)
        receipts = []
        for number in range(1, rounds + 1):
            if number == crash_in:
                run.reserve(number)
            run.settle(run.reserve(number))
            receipts.append(self.receipt(ledger.head, number, silo))
        entries = ledger.entries()
        ledger.close()
        return SiloFacts(
            contract=self.agreed,
            roster=self.roster,
            silo=silo,
            at=NOW + 1_000_000,
            entries=entries,
            receipts=receipts,
            models={number: bytes([number]) * 32 for number in range(1, rounds + 1)},
            limit=limit,
            units_at_least=1000,
            versions={"fedclip-secure": "0.1.0", "code": CODE},
        )

    def signed(self, body: dict[str, Any], signer: str = "oak") -> bytes:
        return sign_report(body, signer, self.keys[signer].sign, self.public(signer))

    def report(self, silo: str = "oak", **options: Any) -> bytes:
        return self.signed(report_body(self.trained(silo, **options)), silo)

    def federation(self, reports: Sequence[bytes], receipts: Sequence[bytes] | None = None) -> bytes:
        """The coordinator's report over these; by default it holds the newest receipt that each of them does."""
        found = [SiloReport.model_validate(decode(data)) for data in reports]
        if receipts is None:
            ledgers = [report.body.ledger for report in found]
            receipts = [bytes.fromhex(ledger.receipts[-1]) for ledger in ledgers if ledger and ledger.receipts]
        facts = FederationFacts(
            contract=self.agreed,
            roster=self.roster,
            at=NOW + 2_000_000,
            reports=found,
            receipts=receipts,
            models={number: bytes([number]) * 32 for number in range(1, self.agreed.plan.training.rounds + 1)},
        )
        return self.signed(combine(facts), AGGREGATOR)


def body_of(data: bytes) -> dict[str, Any]:
    """A copy that a test may edit."""
    body = decode(data)["body"]
    assert isinstance(body, dict)
    return body


def rewrite(body: dict[str, Any], key: Ed25519PrivateKey, edit: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Edit a body's ledger as whoever holds the silo's key can: every entry numbered, hashed and signed anew."""
    given = body["ledger"]["entries"]
    old = [{**item["entry"], "was": SignedEntry(encode(item["entry"]), b"").hash.hex()} for item in given]
    edit(old)
    done, previous, now = [], "0" * 64, dict[str, str]()
    for number, marked in enumerate(old, 1):
        entry = {name: value for name, value in marked.items() if name != "was"}
        entry |= {"number": number, "previous": previous}
        if "reservation" in entry:
            entry["reservation"] = now.get(entry["reservation"], entry["reservation"])
        signed = SignedEntry.signed(entry, key.sign)
        now[marked["was"]] = previous = signed.hash.hex()
        done.append({"entry": entry, "signature": signed.signature.hex()})
    body["ledger"]["entries"] = done


__all__ = [
    "AUDIT",
    "CODE",
    "HOUR",
    "NOW",
    "SILOS",
    "Site",
    "body_of",
    "contract",
    "plain_contract",
    "replace",
    "rewrite",
]
