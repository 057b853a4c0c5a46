"""What a silo releases over a whole run with one record, and without it: with equal coins, the same.

A trained run of two rounds, its ledger and its report, with the silo's coins and everybody else's from a stream that
repeats itself. HPKE draws its own randomness: here equal texts to equal keys under equal info are sealed once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import Contract, ExternalEncoder, FederationLock, Parameter
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.config.silo import EmbeddingsData, Policy, SiloConfig
from fedclip_secure.data.dataset import FeatureSet, Task
from fedclip_secure.model.state import AdapterState, Layout
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.roster import Roster
from fedclip_secure.privacy.ledger.ledger import Ledger
from fedclip_secure.privacy.ledger.receipts import Receipt
from fedclip_secure.privacy.report.document import sign_report
from fedclip_secure.privacy.report.silo_report import SiloFacts, report_body
from fedclip_secure.secagg import sealing
from fedclip_secure.secagg.aggregator_session import AggregatorSession
from fedclip_secure.secagg.messages import ServerAd, sign_message
from fedclip_secure.secagg.opening_checks import Opening, Position, check_opening
from fedclip_secure.secagg.sealing import SealKey
from fedclip_secure.secagg.silo_session import ModelRecord, SiloSession
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.accepted import Accepted
from fedclip_secure.silo.run.privacy_account import Account, cap_of, run_terms
from fedclip_secure.training.private.dp_sgd import PrivateTrainer
from tests.fakes import Federation

WATCHED, OTHERS = "silo-000", ("silo-001", "silo-002")
ROUNDS, RECORDS, DIM = 2, 12, 4
PLAN = {
    "federation": "test",
    "server": "https://localhost",
    "model": {"name": "external", "dim": DIM, "text_features": "text.safetensors"},
    "classes": {"cat": "cat", "dog": "dog"},
    "templates": ["{}"],
    "splits": {"train": 0.8, "validation": 0.0, "test": 0.2},
    "method": {"name": "fedclip"},
    "training": {"rounds": ROUNDS, "optimizer": {"name": "adam", "lr": 0.01}},
    "secure_aggregation": {"weights": "equal", "colluding": 1, "verify_sum": "always"},
    "privacy": {
        "unit": "record",
        "sample_rate": 0.25,
        "steps_per_round": 2,
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "update_divisor": 4.0,
        "delta": 1e-5,
    },
}
LAYOUT = Layout(
    (("hidden.weight", (DIM, DIM)), ("hidden.bias", (DIM,)), ("gate.weight", (DIM, DIM)), ("gate.bias", (DIM,)))
)
TASK = Task(("cat", "dog"), np.eye(2, DIM, dtype=np.float32), 10.0)
KEYS = Federation(3).keys


@dataclass
class Coins:
    """In the place of `os.urandom`: repeats itself for the same label."""

    label: str
    given: int = 0

    def __call__(self, size: int) -> bytes:
        self.given += 1
        return hashlib.shake_256(f"{self.label} {self.given}".encode()).digest(size)


@dataclass
class Seals:
    """In the place of `sealing.seal`: the real one, and the same text again for the same question."""

    known: dict[bytes, bytes] = field(default_factory=dict)

    def __call__(self, plaintext: bytes, public: bytes, *info: object) -> bytes:
        asked = hashlib.sha256(repr((plaintext, public, info)).encode()).digest()
        if asked not in self.known:
            self.known[asked] = SEAL(plaintext, public, *info)
        return self.known[asked]


SEAL = sealing.seal
ROSTER = Roster.of({name: key.public_key().public_bytes_raw() for name, key in KEYS.items()})
START = AdapterState(LAYOUT, np.linspace(-1, 1, LAYOUT.size, dtype=np.float32))


def accepted() -> Accepted:
    plan = check(PLAN, FederationPlan, "plan")
    lock = FederationLock(
        plan=plan.digest.hex(),
        encoder=ExternalEncoder(dim=DIM, text_features_sha256="0" * 64, logit_scale=10.0),
        layout=[Parameter(name=name, shape=list(shape)) for name, shape in LAYOUT.entries],
        initial_model=START.digest.hex(),
        initial_file="0" * 64,
        noise_multiplier=1.0,
    )
    return Accepted(Contract(plan, lock), ROSTER)


def records(name: str, *, without_last: bool = False) -> FeatureSet:
    """Twelve records in the order of their ids, or all but the last of them: whose coins would come last."""
    generator = np.random.default_rng(int(name[-1]))
    features = generator.normal(size=(RECORDS, DIM)).astype(np.float32)
    ids = np.zeros((RECORDS, 32), np.uint8)
    ids[:, 0] = np.arange(RECORDS)
    labels = generator.integers(0, 2, RECORDS)
    everything = FeatureSet(features, labels, ids, name, ids)
    return everything.select(np.arange(RECORDS) < RECORDS - without_last)


@dataclass
class Run:
    """What the watched silo releases, in order, and the updates it drew."""

    released: list[tuple[str, bytes]] = field(default_factory=list)
    updates: list[bytes] = field(default_factory=list)
    report: bytes = b""

    def fields(self, *stages: str) -> list[bytes]:
        return [body for stage, body in self.released if stage in stages]


def whole_run(folder: Path, label: str, seals: Seals, *, without_last: bool) -> Run:
    with mock.patch.object(os, "urandom", Coins(label)), mock.patch.object(sealing, "seal", seals):
        torch.manual_seed(0)
        return _run(folder, without_last=without_last)


def _run(folder: Path, *, without_last: bool) -> Run:
    agreed, found = accepted(), Run()
    terms = Terms.of(agreed.contract, agreed.roster)
    policy = Policy(max_epsilon=100.0)
    data = EmbeddingsData(format="embeddings", path="x", per_record=True)
    config = SiloConfig(name=WATCHED, data=data, policy=policy, ledger=str(folder))
    ledger = Ledger(folder, WATCHED, KEYS[WATCHED].sign, _public(WATCHED), clock=lambda: 1_700_000_000.0)
    account = Account(ledger, run_terms(config, agreed), cap_of(policy), _public(AGGREGATOR), folder / "head")
    mine = records(WATCHED, without_last=without_last)
    admitted = account.begin(mine.unit_ids, changed_data=False)
    trainers = {name: _trainer(agreed, records(name)) for name in OTHERS}
    trainers[WATCHED] = _trainer(agreed, mine.select(admitted))
    model, results, receipts, position = START, list[bytes](), list[bytes](), Position()
    for number in range(1, ROUNDS + 1):
        with account.charged(number):
            update = trainers[WATCHED].train(model)
        found.updates.append(update.tobytes())
        updates = {name: trainers[name].train(model) for name in OTHERS} | {WATCHED: update}
        heads = dict.fromkeys(OTHERS, bytes(32)) | {WATCHED: account.head}
        vectors = {name: terms.vector.quantize(terms.grid, value, 1, 0, 0) for name, value in updates.items()}
        vault = {name: ModelRecord(model.digest, vector.copy, ledger=heads[name]) for name, vector in vectors.items()}
        key, opening = _opening(terms, number, position, model, results)
        model, results = _round(terms, key, opening, (model, vault), found)
        position = Position(number, number, opening.ad.model)
        receipt = Receipt(
            plan=terms.plan, roster=ROSTER.digest, silo=WATCHED, round=number, attempt=number, head=heads[WATCHED]
        )
        receipts.append(receipt.signed(KEYS[AGGREGATOR].sign))
    facts = SiloFacts(
        agreed.contract, ROSTER, WATCHED, 1_700_000_000, entries=ledger.entries(), receipts=receipts, units_at_least=10
    )
    found.report = sign_report(report_body(facts), WATCHED, KEYS[WATCHED].sign, _public(WATCHED))
    account.close()
    return found


def _public(name: str) -> bytes:
    return KEYS[name].public_key().public_bytes_raw()


def _trainer(agreed: Accepted, data: FeatureSet) -> PrivateTrainer:
    return PrivateTrainer(
        agreed.contract.plan, 1.0, TASK, data, data.unit_ids, torch.device("cpu"), coins=lambda: os.urandom(32)
    )


def _opening(
    terms: Terms, number: int, position: Position, model: AdapterState, results: list[bytes]
) -> tuple[SealKey, Opening]:
    key = SealKey.generate()
    ad = ServerAd(
        plan=terms.plan, roster=ROSTER.digest, round=number, attempt=number, model=model.digest, nonce=bytes(32),
        seal_public=key.public,
    )  # fmt: skip
    wire = sign_message(ad, terms.federation, AGGREGATOR, KEYS[AGGREGATOR].sign)
    return key, check_opening(terms, position, wire, results)


def _round(
    terms: Terms, key: SealKey, opening: Opening, start: tuple[AdapterState, dict[str, ModelRecord]], found: Run
) -> tuple[AdapterState, list[bytes]]:
    """One secure round; what the watched silo hands out is noted stage by stage."""
    model, vault = start
    server = AggregatorSession(terms, opening, key)
    silos = {name: SiloSession(terms, name, KEYS[name].sign, opening, vault[name]) for name in sorted(vault)}

    def note(stage: str, name: str, body: bytes) -> bytes:
        if name == WATCHED:
            found.released.append((stage, body))
        return body

    for name, silo in silos.items():
        server.receive_key_ad(name, note("key-ad", name, silo.join()))
    server.close()
    ads = _wires(server, "ads")
    for name, silo in silos.items():
        shares = silo.share(ads)
        note("ciphertexts", name, b"".join(b"".join(pair) for _, pair in sorted(shares.ciphertexts.items())))
        server.receive_bundles(name, note("bundles", name, shares.bundles), shares.ciphertexts)
    server.close()
    masked = {}
    for name, silo in silos.items():
        upload = silo.upload(_wires(server, "bundles"), server.inbox(name))
        masked[name] = upload.words
        body = b"".join(silo.seal_upload(upload).pieces(upload.body))
        note("upload", name, body)
        server.receive_upload(name, upload.header, hashlib.sha256(upload.body).digest())
    server.close()
    for name, silo in silos.items():
        server.receive_agree(name, note("agree", name, silo.agree(_wires(server, "uploads"))))
    server.close()
    for name, silo in silos.items():
        sealed = note("unmask", name, silo.unmask(_wires(server, "agrees")))
        server.receive_unmask(name, server.open_unmask(name, sealed))
    server.close()
    total = server.unmask_sum(masked[name] for name in server.uploads)
    outcome = server.compute_result(total, model)
    signed = []
    for name, silo in silos.items():
        signed.append(note("result", name, silo.result(total, model)[0]))
    return outcome.model, signed


def _wires(server: AggregatorSession, kind: str) -> list[bytes]:
    messages = getattr(server, kind)
    return [messages[name].wire for name in sorted(messages)]


def pairs_of_runs(folder: Path) -> Iterator[tuple[Run, Run]]:
    """Runs with and without the last record, under one coin stream after the other."""
    for number in range(40):
        seals, label = Seals(), f"coins {number}"
        yield (
            whole_run(folder / f"with {number}", label, seals, without_last=False),
            whole_run(folder / f"without {number}", label, seals, without_last=True),
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[Run, Run], tuple[Run, Run]]:
    """A pair in which no step drew the record, and a pair in which the first round did."""
    never, drawn, folder = None, None, tmp_path_factory.mktemp("runs")
    whole_run(folder / "first", "first", Seals(), without_last=False)  # torch, loading more of itself, draws too
    for one, other in pairs_of_runs(folder):
        if one.updates == other.updates:
            never = never or (one, other)
        elif one.updates[0] != other.updates[0]:
            drawn = drawn or (one, other)
        if never and drawn:
            return never, drawn
    pytest.fail("no stream of coins left the record out of all steps")


Pairs = tuple[tuple[Run, Run], tuple[Run, Run]]


def test_where_no_step_draws_the_record_everything_released_is_the_same_to_the_last_byte(runs: Pairs) -> None:
    one, other = runs[0]
    assert len(one.released) == ROUNDS * 7
    assert one.released == other.released
    assert one.report == other.report


def test_where_a_step_draws_the_record_only_the_masked_vector_and_what_is_made_of_it_differs(runs: Pairs) -> None:
    one, other = runs[1]
    # Of the first round, all that leaves before the vector; of every round, kinds, order and lengths.
    assert one.fields("key-ad", "bundles", "ciphertexts")[:3] == other.fields("key-ad", "bundles", "ciphertexts")[:3]
    assert [(stage, len(body)) for stage, body in one.released] == [(s, len(b)) for s, b in other.released]
    assert one.fields("upload")[0] != other.fields("upload")[0]
    assert one.report == other.report, "no entry, receipt or figure follows from the records"


def test_the_comparison_would_show_a_count_of_records(runs: Pairs, tmp_path: Path) -> None:
    told = replace(runs[0][0], released=[*runs[0][0].released, ("log", str(RECORDS).encode())])
    other = replace(runs[0][1], released=[*runs[0][1].released, ("log", str(RECORDS - 1).encode())])
    assert told.released != other.released
