"""Receipts for what silos have spent: given for every upload under privacy, the same for a repeat, and checked."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedclip_secure.errors import ProtocolError, TransportError, TrustError
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.privacy.ledger.receipts import Receipt, open_receipt
from fedclip_secure.secagg.silo_session import ModelRecord
from fedclip_secure.silo.run.journal import Journal
from fedclip_secure.silo.run.link import Link
from fedclip_secure.silo.run.party import Party
from fedclip_secure.silo.run.runner import Runner
from fedclip_secure.transport.client import Client
from tests.aggregator.site import NAMES, QUICK, Hand, HookedLink, Site, SteadyTrainer, hands_of, move, nothing
from tests.waiting import BOUND

PRIVACY = {
    "unit": "record",
    "sample_rate": 0.1,
    "steps_per_round": 2,
    "noise_multiplier": 1.0,
    "max_grad_norm": 1.0,
    "update_divisor": 8.0,
    "delta": 1e-5,
}
SILOS = NAMES[:4]


def private_site(folder: Path, **training: Any) -> Site:
    return Site.frozen(
        folder,
        privacy=PRIVACY,
        splits={"train": 0.8, "validation": 0.0, "test": 0.2},
        training={"batch_size": None, **training},
        secure_aggregation={"weights": "equal"},
    )


def head_of(name: str, entry: int = 1) -> bytes:
    return hashlib.sha256(f"{name} {entry}".encode()).digest()


def records(site: Site, **heads: bytes) -> dict[str, ModelRecord]:
    """What each silo adds, with the head of its ledger."""
    found = {}
    for name in SILOS:
        integers = SteadyTrainer.of(name).integers.view(np.uint32)
        vector = site.terms.vector.pack(integers, 1, 0, 0)
        found[name] = ModelRecord(site.terms.initial_model, vector.copy, ledger=heads.get(name, head_of(name)))
    return found


def opened(site: Site, wire: bytes | None) -> Receipt:
    assert wire is not None
    return open_receipt(wire, dict(site.terms.roster.members)[AGGREGATOR])


async def upload(hand: Hand, body: bytes) -> bytes:
    return await hand.link.send_upload(hand.attempt, lambda: [body], len(body))


def test_every_upload_gets_a_receipt_of_where_the_ledger_stood_and_a_repeat_the_same(tmp_path: Path) -> None:
    async def main() -> None:
        site = private_site(tmp_path)
        async with site.serving(), hands_of(site, records=records(site)) as hands:
            await move(hands, "key-ads", "bundles")
            first = hands[0]
            assert await first.link.receipt() is None
            body = await first.make("uploads")
            wire = await upload(first, body)
            assert opened(site, wire) == Receipt(
                plan=site.terms.plan,
                roster=site.terms.roster.digest,
                silo=first.name,
                round=1,
                attempt=1,
                head=head_of(first.name),
            )
            assert await upload(first, body) == wire
            await move(hands[1:], "uploads")
            assert await upload(first, body) == wire, "also after the stage has closed"
            assert await first.link.receipt() == wire
            assert opened(site, await hands[1].link.receipt()).silo == hands[1].name, "each sees its own alone"

    asyncio.run(main())


def test_the_newest_receipt_outlives_a_restart_of_the_server(tmp_path: Path) -> None:
    async def main() -> None:
        site = private_site(tmp_path)
        async with site.serving(), hands_of(site, records=records(site)) as hands:
            await move(hands, "key-ads", "bundles", "uploads")
            kept = await hands[0].link.receipt()
        async with site.serving(), site.client(SILOS[0]) as client:
            assert await Link(client, tmp_path).receipt() == kept

    asyncio.run(main())


@pytest.mark.parametrize("head", [b"", b"short", bytes(31)])
def test_an_upload_without_the_head_of_a_ledger_is_refused(tmp_path: Path, head: bytes) -> None:
    async def main() -> None:
        site = private_site(tmp_path)
        async with site.serving(), hands_of(site, records=records(site, **{SILOS[0]: head})) as hands:
            await move(hands, "key-ads", "bundles")
            assert await hands[0].refused("uploads", await hands[0].make("uploads")) == (400, "ledger")
            assert site.kept("uploads") == 0

    asyncio.run(main())


def test_an_upload_with_a_head_is_refused_where_the_plan_has_no_privacy(tmp_path: Path) -> None:
    async def main() -> None:
        site = Site.frozen(tmp_path)
        record = site.record(SILOS[0])
        record.ledger = head_of(SILOS[0])
        async with site.serving(), hands_of(site, records={SILOS[0]: record}) as hands:
            await move(hands, "key-ads", "bundles")
            assert await hands[0].refused("uploads", await hands[0].make("uploads")) == (400, "ledger")

    asyncio.run(main())


class Counted:
    """An account that only counts: one entry to reserve a round, and one to settle it."""

    def __init__(self, name: str, again: int = 0) -> None:
        self.name, self.entries, self.rounds, self.again = name, 0, list[int](), again

    @property
    def head(self) -> bytes:
        return head_of(self.name, self.entries)

    ended = False

    def may_train(self, round_number: int) -> bool:
        return round_number not in self.rounds or self.again > 0

    @contextmanager
    def charged(self, round_number: int) -> Iterator[None]:
        self.again -= round_number in self.rounds
        self.rounds.append(round_number)
        self.entries += 1
        yield
        self.entries += 1


async def take_part(site: Site, account: Counted, link: type[HookedLink] = HookedLink, **kinds: Any) -> list[str]:
    """One silo's run; what it was told."""
    identity, heard = site.identities[account.name], list[str]()
    journal = Journal(identity.folder / "work", identity.epoch_path)
    trainer = kinds.get("trainer", SteadyTrainer.of)(account.name)
    try:
        async with Client.of(identity, lambda *_: None, QUICK) as client:
            connection = link(client, identity.folder, before=nothing)
            party = Party(identity, site.terms)
            await Runner(party, trainer, connection, journal, heard.append, budget=account).run()
        return heard
    finally:
        journal.close()


def receipts_of(site: Site, name: str) -> list[Receipt]:
    identity = site.identities[name]
    journal = Journal(identity.folder / "work", identity.epoch_path)
    try:
        return [opened(site, wire) for wire in journal.receipts(site.terms.roster.digest)]
    finally:
        journal.close()


def test_a_run_charges_each_round_once_and_keeps_a_receipt_for_each(tmp_path: Path) -> None:
    async def main() -> None:
        site = private_site(tmp_path, rounds=3)
        accounts = [Counted(name) for name in SILOS]
        async with site.serving(), asyncio.timeout(BOUND):
            await asyncio.gather(*(take_part(site, account) for account in accounts))
        for account in accounts:
            assert account.rounds == [1, 2, 3]
            heads = [head_of(account.name, 2 * number) for number in (1, 2, 3)]
            found = receipts_of(site, account.name)
            assert [(receipt.round, receipt.head) for receipt in found] == list(enumerate(heads, 1))

    asyncio.run(main())


class Dies(SteadyTrainer):
    """Is killed while it trains, the first time."""

    died = False

    def train(self, received: Any) -> Any:
        if not Dies.died:
            Dies.died = True
            raise KeyboardInterrupt
        return super().train(received)


@pytest.mark.parametrize("again", [0, 1])
def test_a_silo_that_died_while_it_trained_trains_again_only_where_the_plan_has_paid_for_it(
    tmp_path: Path, again: int
) -> None:
    async def main() -> None:
        site = private_site(tmp_path, rounds=2)
        accounts = [Counted(name, again) for name in SILOS]
        Dies.died = False
        async with site.serving(), asyncio.timeout(BOUND):
            with pytest.raises(KeyboardInterrupt):
                await take_part(site, accounts[0], trainer=Dies.of)
            heard = (await asyncio.gather(*(take_part(site, account) for account in accounts)))[0]
        assert accounts[0].rounds == ([1, 1, 2] if again else [1, 2])
        assert [receipt.round for receipt in receipts_of(site, SILOS[0])] == ([1, 2] if again else [2])
        assert any("privacy.max_retrains are used up" in line for line in heard) is not again

    asyncio.run(main())


class FalseReceipts(HookedLink):
    """The server gives `wire` for every upload."""

    wire = b""

    async def send_upload(self, attempt: int, pieces: Any, length: int) -> bytes:
        await super().send_upload(attempt, pieces, length)
        return type(self).wire


@pytest.mark.parametrize("change", [{"head": bytes(32)}, {"round": 2}, {"attempt": 2}, {"silo": "lab-b"}, None])
def test_a_silo_stops_at_a_receipt_that_is_not_for_its_upload(tmp_path: Path, change: dict[str, Any] | None) -> None:
    async def main() -> None:
        site = private_site(tmp_path)
        receipt = Receipt(
            plan=site.terms.plan, roster=site.terms.roster.digest, silo=SILOS[0], round=1, attempt=1,
            head=head_of(SILOS[0], 2),
        )  # fmt: skip
        signers = site.home.signing_key, site.identities[SILOS[1]].key
        from fedclip_secure.pki.keys import SigningKey

        key = SigningKey.load(signers[0]) if change is not None else signers[1]
        FalseReceipts.wire = receipt.model_copy(update=change or {}).signed(key.sign)
        async with site.serving(), asyncio.timeout(BOUND):
            others = [asyncio.create_task(take_part(site, Counted(name))) for name in SILOS[1:]]
            with pytest.raises((ProtocolError, TrustError)) as stopped:
                await take_part(site, Counted(SILOS[0]), FalseReceipts)
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        assert isinstance(stopped.value, ProtocolError if change is not None else TrustError)
        assert receipts_of(site, SILOS[0]) == []

    asyncio.run(main())


def test_a_receipt_is_for_silos_with_a_certificate_alone(tmp_path: Path) -> None:
    async def main() -> None:
        site = private_site(tmp_path)
        async with site.serving(), site.client(SILOS[0]) as client:
            assert await Link(client, tmp_path).receipt() is None
            with pytest.raises(TransportError) as refused:
                await client.get("/v1/receipt/lab-b")
            assert refused.value.status == 404

    asyncio.run(main())
