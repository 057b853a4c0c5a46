from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedclip_secure.errors import DataError, ProtocolError, TransportError, TrustError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.secagg.messages import (
    Bundles,
    Complaint,
    KeyAd,
    Result,
    ServerAd,
    Void,
    open_message,
    sign_message,
)
from fedclip_secure.secagg.ring import read_total
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.transport.messages import OpeningAnswer, SharesRequest, parse
from tests.fakes import Federation
from tests.silo.memory import Hub, MemoryLink, Silo, run_all, silos
from tests.waiting import BOUND


def _federation(size: int = 4, rounds: int = 2) -> Federation:
    """`rounds` training rounds and the closing one."""
    federation = Federation(size, rounds=rounds + 1)
    federation.terms = replace(federation.terms, training_rounds=rounds)
    return federation


@pytest.fixture
def hub() -> Hub:
    return Hub(_federation())


def test_run_ends_with_one_model_at_all_silos(hub: Hub, tmp_path: Path) -> None:
    parties = silos(hub, tmp_path)
    run_all(parties.values())
    assert hub.finished
    moved = hub.model.vector - hub.federation.model.vector
    assert np.allclose(moved, 2 * 0.05, atol=1e-4)
    for party in parties.values():
        assert len(party.trainer.trained) == 2
        assert party.said[-1].startswith("closing validation round: averaged silo-000, silo-001, silo-002, silo-003")


class Losing(MemoryLink):
    """A server that does not have the model of this attempt; `moves_on` when it is asked for."""

    moves_on: bool = False

    async def model(self, digest: bytes, terms: Terms) -> AdapterState:
        if self.hub.attempt > 1:
            return await super().model(digest, terms)
        if self.moves_on:
            self.hub.open(1)
        raise TransportError("agg:8443: there is no such file here", status=404, code="not-found")


def test_a_server_that_lost_the_model_that_all_wait_for_is_told_and_not_waited_for(hub: Hub, tmp_path: Path) -> None:
    party = silos(hub, tmp_path)["silo-000"]
    party.link = Losing(hub, party.name)
    said = (
        r"^round 1 of 2: the server has lost the model of the round that it opens "
        r"\(agg:8443: there is no such file here\); ask the coordinator to restore `state/` as the server last left "
        "it, then start this again$"
    )
    with pytest.raises(TransportError, match=said):
        run_all([party])


def test_the_model_of_an_attempt_that_is_over_is_not_missed(hub: Hub, tmp_path: Path) -> None:
    parties = silos(hub, tmp_path)
    link = Losing(hub, "silo-000")
    link.moves_on, parties["silo-000"].link = True, link
    run_all(parties.values())
    assert hub.finished
    assert any("does not have this attempt's model any more; waiting" in line for line in parties["silo-000"].said)


def test_closing_round_validates_and_sends_zeros(hub: Hub, tmp_path: Path) -> None:
    parties = silos(hub, tmp_path)
    run_all(parties.values())
    terms = hub.federation.terms
    assert hub.sum_of is not None
    total = read_total(hub.sum_of, terms.vector, terms.grid, 4)
    assert not total.update.any()
    assert (total.correct, total.total) == (4 * 3, 4 * 7)
    for party in parties.values():
        assert party.trainer.validated[-1] == hub.model.digest
        assert hub.model.digest not in party.trainer.trained


def test_left_out_silo_comes_back_with_the_same_vector_and_fresh_keys(hub: Hub, tmp_path: Path) -> None:
    parties = silos(hub, tmp_path)
    vectors: list[bytes | None] = []

    async def main() -> None:
        tasks = [asyncio.create_task(party.runner().run()) for party in parties.values()]
        for name in parties:
            parties[name].link.late = {(1, "uploads")}
        while not all(party.sent("uploads", 1) for party in parties.values()):
            await asyncio.sleep(0.002)
        vectors.append(parties["silo-001"].journal.models()[0].vector)
        hub.open(1)
        while not parties["silo-001"].sent("key-ads", 2):
            await asyncio.sleep(0.001)
        vectors.append(parties["silo-001"].journal.models()[0].vector)
        await asyncio.wait_for(asyncio.gather(*tasks), BOUND)

    asyncio.run(main())
    assert vectors[0] == vectors[1]
    party = parties["silo-001"]
    assert party.trainer.trained.count(hub.federation.model.digest) == 1
    ads = [
        open_message(party.sent("key-ads", attempt)[0], KeyAd, "test", hub.federation.terms.roster).body
        for attempt in (1, 2)
    ]
    for name in ("base", "mask_public", "share_seal", "salt_seal", "self_commit"):
        assert getattr(ads[0], name) != getattr(ads[1], name), name


def _ad(hub: Hub, **changes: object) -> bytes:
    terms = hub.federation.terms
    ad = open_message(hub.wire, ServerAd, terms.federation, terms.roster).body
    return sign_message(ad.model_copy(update=changes), "test", AGGREGATOR, hub.federation.keys[AGGREGATOR].sign)


def _results(hub: Hub, count: int, round_number: int = 1, model: bytes = bytes(32)) -> list[bytes]:
    terms = hub.federation.terms
    body = Result(
        plan=terms.plan,
        roster=terms.roster.digest,
        round=round_number,
        start=terms.initial_model,
        transcript=bytes(32),
        survivors=bytes(32),
        sum=bytes(32),
        model=model,
        correct=0,
        total=0,
    )
    return [sign_message(body, "test", name, hub.federation.keys[name].sign) for name in hub.federation.silos[:count]]


HOSTILE: dict[str, tuple[str, Callable[[Hub], tuple[bytes, list[bytes]]]]] = {
    "another plan": ("plan", lambda hub: (_ad(hub, plan=b"x" * 32), [])),
    "another roster": ("roster", lambda hub: (_ad(hub, roster=b"x" * 32), [])),
    "another first model": ("chain", lambda hub: (_ad(hub, model=b"x" * 32), [])),
    "a round without results": ("chain", lambda hub: (_ad(hub, round=2), [])),
    "a round with too few results": ("chain", lambda hub: (_ad(hub, round=2, model=bytes(32)), _results(hub, 2))),
    "another model than the results": ("chain", lambda hub: (_ad(hub, round=2), _results(hub, 4))),
    "results of another round": ("chain", lambda hub: (_ad(hub, round=3, model=bytes(32)), _results(hub, 4))),
    "results twice by one silo": (
        "list",
        lambda hub: (_ad(hub, round=2, model=bytes(32)), _results(hub, 3) + _results(hub, 1)),
    ),
    "a round beyond the last": ("replay", lambda hub: (_ad(hub, round=4), [])),
    "signed by a silo": (
        "signature",
        lambda hub: (
            sign_message(
                open_message(hub.wire, ServerAd, "test", hub.federation.terms.roster).body,
                "test",
                "silo-001",
                hub.federation.keys["silo-001"].sign,
            ),
            [],
        ),
    ),
    "signed by a stranger": (
        "signature",
        lambda hub: (Federation(4).opening(model=hub.model.digest)[0], []),
    ),
    "garbage": ("encoding", lambda hub: (b"\xff", [])),
    "another federation": (
        "message",
        lambda hub: (
            sign_message(
                open_message(hub.wire, ServerAd, "test", hub.federation.terms.roster).body,
                "other",
                AGGREGATOR,
                hub.federation.keys[AGGREGATOR].sign,
            ),
            [],
        ),
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_opening_stops_the_silo_before_it_trains_or_sends(hub: Hub, tmp_path: Path, case: str) -> None:
    code, make = HOSTILE[case]
    wire, results = make(hub)
    hub.answer = OpeningAnswer(state="open", opening=wire, attempt=1, results=results)
    party = Silo(hub, "silo-000", tmp_path)
    with pytest.raises(ProtocolError) as caught:
        run_all([party])
    assert caught.value.code == code
    assert party.link.sent == []
    assert party.trainer.trained == []
    assert party.journal.models() == []


def test_attempt_shown_twice_is_a_replay(hub: Hub, tmp_path: Path) -> None:
    party = Silo(hub, "silo-000", tmp_path)
    party.link.late = {(1, "key-ads")}
    hub.answer = OpeningAnswer(state="open", opening=hub.wire, attempt=1)
    with pytest.raises(ProtocolError) as caught:
        run_all([party])
    assert caught.value.code == "replay"
    assert [stage for _, stage, _ in party.link.sent] == ["key-ads"]


def test_update_beyond_the_clip_stops_the_silo_before_it_joins(hub: Hub, tmp_path: Path) -> None:
    party = Silo(hub, "silo-000", tmp_path)
    party.trainer.update = 0.5
    with pytest.raises(ProtocolError, match=r"coordinate_clip: 0\.5 would fit") as caught:
        run_all([party])
    assert caught.value.code == "clip"
    assert party.link.sent == []
    assert party.journal.models() == []


def test_update_that_is_no_number_stops_the_silo_before_it_joins(hub: Hub, tmp_path: Path) -> None:
    party = Silo(hub, "silo-000", tmp_path)
    party.trainer.update = float("nan")
    with pytest.raises(ProtocolError) as caught:
        run_all([party])
    assert (caught.value.code, party.link.sent) == ("not-finite", [])


def _garbage_for(hub: Hub, sender: str, victim: str, sent: bytes) -> bytes:
    """What `sender` would sign who seals garbage to `victim`, its first peer, and commits to it."""
    shares = parse(SharesRequest, sent)
    body = open_message(shares.bundles, Bundles, "test", hub.federation.terms.roster).body
    pair = [b"garbage", b"garbage"]
    digest = hashlib.sha256(b"garbage").digest()
    entries = digest + digest + body.entries[64:]
    wire = sign_message(body.model_copy(update={"entries": entries}), "test", sender, hub.federation.keys[sender].sign)
    return SharesRequest(bundles=wire, ciphertexts={**shares.ciphertexts, victim: pair}).encode()


def test_silo_complains_of_a_peer_and_uploads_nothing(hub: Hub, tmp_path: Path) -> None:
    parties = silos(hub, tmp_path)
    victim = parties["silo-000"]
    parties["silo-001"].link.alter = lambda sent: _garbage_for(hub, "silo-001", "silo-000", sent)

    async def main() -> None:
        tasks = [asyncio.create_task(party.runner().run()) for party in parties.values()]
        while not any(stage == "complaints" for _, stage, _ in victim.link.sent):
            assert not tasks[0].done()
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.02)
        assert not tasks[0].done(), "the victim waits for the next attempt"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(asyncio.wait_for(main(), BOUND))
    stages = [stage for _, stage, _ in victim.link.sent]
    assert stages == ["key-ads", "bundles", "complaints"]
    complaint = open_message(victim.link.sent[-1][2], Complaint, "test", hub.federation.terms.roster).body
    assert complaint.accused == "silo-001"
    assert any("complained to the coordinator" in line for line in victim.said)


def _withhold(inbox: dict[str, list[bytes]]) -> None:
    del inbox["silo-002"]


def test_inbox_that_the_server_altered_stops_the_silo_without_complaint_or_upload(hub: Hub, tmp_path: Path) -> None:
    parties = silos(hub, tmp_path)
    parties["silo-000"].link.alter_inbox = _withhold
    with pytest.raises(ProtocolError) as caught:
        run_all(parties.values())
    assert caught.value.code == "inbox"
    assert {stage for _, stage, _ in parties["silo-000"].link.sent} == {"key-ads", "bundles"}


@pytest.mark.parametrize(("signer", "said"), [(AGGREGATOR, "declared the sum void: why"), (None, "halted the run: so")])
def test_halted_run_ends_the_silo_with_the_reason(hub: Hub, tmp_path: Path, signer: str | None, said: str) -> None:
    body = Void(transcript=bytes(32), reason="why")
    void = None if signer is None else sign_message(body, "test", signer, hub.federation.keys[signer].sign)
    hub.answer = OpeningAnswer(state="halted", reason="so", void=void)
    with pytest.raises(TrustError, match=f"the aggregator {said}; ask the coordinator how to go on"):
        run_all([Silo(hub, "silo-000", tmp_path)])


def test_void_that_nobody_signed_is_not_believed(hub: Hub, tmp_path: Path) -> None:
    void = sign_message(
        Void(transcript=bytes(32), reason="why"), "test", AGGREGATOR, Federation(3).keys["silo-000"].sign
    )
    hub.answer = OpeningAnswer(state="halted", reason="so", void=void)
    with pytest.raises(ProtocolError) as caught:
        run_all([Silo(hub, "silo-000", tmp_path)])
    assert caught.value.code == "signature"


def test_journal_that_cannot_be_written_stops_the_silo_before_it_sends(hub: Hub, tmp_path: Path) -> None:
    party = Silo(hub, "silo-000", tmp_path)
    runner = party.runner()
    party.journal._sql.execute("PRAGMA query_only=ON")
    with pytest.raises(DataError, match=r"journal\.sqlite"):
        asyncio.run(runner.run())
    assert party.link.sent == []


def test_weight_is_the_records_up_to_the_plans_most(hub: Hub, tmp_path: Path) -> None:
    parties = silos(hub, tmp_path)
    parties["silo-000"].trainer.records = 10**9
    run_all(parties.values())
    terms = hub.federation.terms
    assert hub.sum_of is not None
    assert read_total(hub.sum_of, terms.vector, terms.grid, 4).weight == 1000 + 3 * 10


def test_weight_is_the_plans_where_it_lists_them(hub: Hub, tmp_path: Path) -> None:
    weights = dict(zip(hub.federation.silos, (1, 20, 300, 1000), strict=True))
    hub.federation.terms = replace(hub.federation.terms, public_weights=weights)
    hub.open(1)
    run_all(silos(hub, tmp_path).values())
    terms = hub.federation.terms
    assert hub.sum_of is not None
    assert read_total(hub.sum_of, terms.vector, terms.grid, 4).weight == 1321
