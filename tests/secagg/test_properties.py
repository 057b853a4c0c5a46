"""What holds for any federation, any drop-outs and any order: exact sums, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedclip_secure.errors import ProtocolError, TrustError
from fedclip_secure.secagg import messages, shamir
from fedclip_secure.secagg.aggregator_session import Phase
from fedclip_secure.secagg.keys import Peer, self_commitment
from fedclip_secure.secagg.messages import SumProof, decode_body
from fedclip_secure.secagg.next_model import Outcome
from fedclip_secure.secagg.ring import FixedPoint, VectorLayout, Words, read_total
from fedclip_secure.secagg.silo_session import SiloSession
from fedclip_secure.secagg.unmasking import Revealed, masks_left, unmask_sum
from tests.fakes import Attempt, Federation
from tests.secagg.lies import STAGES, advance
from tests.secagg.scenarios import (
    SEED,
    WHICH,
    Scenario,
    Shuffled,
    flipped,
    random_records,
    scenarios,
    shuffled,
    sum_of,
    unmasked,
)


@settings(max_examples=45, deadline=None)
@given(scenarios())
def test_the_sum_over_the_survivors_is_exact_or_the_attempt_ends(scenario: Scenario) -> None:
    federation = scenario.federation()
    drop, records = scenario.drop(federation.silos), random_records(federation, scenario.seed)
    attempt = federation.attempt(drop={**drop, "result": set()}, records=records)
    if not replace(scenario, vanish={**scenario.vanish, "result": 0}).enough:
        with pytest.raises(ProtocolError) as ended:
            advance(attempt, "result")
        assert ended.value.code == "floor"
        assert len(attempt.server.unmasks) < scenario.t
        return
    advance(attempt, "result")
    gone = drop["join"] | drop["share"] | drop["upload"]
    assert tuple(attempt.server.uploads) == tuple(name for name in federation.silos if name not in gone)
    assert unmasked(attempt) == sum_of(attempt)


@settings(max_examples=30, deadline=None)
@given(scenarios(sizes=range(3, 11)))
def test_a_whole_round_ends_with_the_mean_over_the_survivors_or_with_none(scenario: Scenario) -> None:
    federation = scenario.federation()
    attempt = federation.attempt(drop=scenario.drop(federation.silos))
    if not scenario.enough:
        with pytest.raises(ProtocolError, match=r"must answer|the plan needs"):
            attempt.run()
        return
    outcome = attempt.run()
    signed = np.array(sum_of(attempt), dtype=np.uint32).view(np.int32)
    mean = federation.terms.grid.mean(signed[:5], outcome.weight)
    assert outcome.model.vector.tolist() == (federation.model.vector + mean).astype(np.float32).tolist()
    m = len(attempt.server.uploads)
    assert (outcome.weight, outcome.correct, outcome.total) == (10 * m, 3 * m, 5 * m)


@settings(max_examples=15, deadline=None)
@given(scenarios(sizes=range(3, 11)), SEED)
def test_no_order_of_arrival_changes_sum_or_result(scenario: Scenario, other: int) -> None:
    assume(scenario.enough)
    federation = scenario.federation()
    drop, records = scenario.drop(federation.silos), {name: federation.record() for name in federation.silos}

    def run(seed: int) -> tuple[Outcome, list[int]]:
        fresh = {name: replace(record) for name, record in records.items()}
        attempt = Shuffled(federation, drop=drop, records=fresh, rng=np.random.default_rng(seed))
        return attempt.run(), [int(word) for word in attempt.total]

    (one, total), (two, again) = run(scenario.seed), run(other)
    assert total == again
    assert (one.model.digest, one.survivors) == (two.model.digest, two.survivors)


@st.composite
def pairs_of_attempts(draw: st.DrawFn) -> tuple[Scenario, Scenario]:
    first = draw(scenarios(sizes=range(4, 8), stages=STAGES[2:]))
    return first, draw(scenarios(sizes=[first.size]))


@settings(max_examples=30, deadline=None)
@given(pairs_of_attempts())
def test_no_two_attempts_over_a_model_sum_over_different_names(pair: tuple[Scenario, Scenario]) -> None:
    first, second = pair
    federation = first.federation()
    one = Shuffled(federation, 1, drop=first.drop(federation.silos), rng=np.random.default_rng(first.seed))
    names = survivors_of(one)
    two = Shuffled(
        federation,
        2,
        drop=second.drop(federation.silos),
        records=one.records,
        asked={tuple(one.server.uploads)} if one.server.phase >= Phase.AGREE else set(),
        rng=np.random.default_rng(second.seed),
    )
    again = survivors_of(two)
    assert names is None or again is None or names == again


def survivors_of(attempt: Attempt) -> tuple[str, ...] | None:
    """Run until a sum can be had; whose it is. None if the attempt ends before."""
    try:
        advance(attempt, "result")
    except ProtocolError as ended:
        if ended.code not in ("floor", "agreed"):
            raise
        return None
    assert unmasked(attempt) == sum_of(attempt)
    return tuple(attempt.server.uploads)


@settings(max_examples=20, deadline=None)
@given(scenarios(sizes=range(3, 11), stages=STAGES[:3]))
def test_one_answer_fewer_than_t_neither_unmasks_nor_gives_a_secret(scenario: Scenario) -> None:
    assume(scenario.enough)
    federation = scenario.federation()
    attempt = federation.attempt(
        drop=scenario.drop(federation.silos), records=random_records(federation, scenario.seed)
    )
    advance(attempt, "unmask")
    for name in shuffled(list(attempt.server.uploads), np.random.default_rng(scenario.seed))[: scenario.t - 1]:
        sealed = attempt.sessions[name].unmask(attempt.wires("agrees"))
        attempt.server.receive_unmask(name, attempt.server.open_unmask(name, sealed))
    with pytest.raises(ProtocolError, match="must answer") as ended:
        attempt.server.close()
    assert ended.value.code == "floor"
    with pytest.raises(ProtocolError) as refused:
        unmasked(attempt)
    assert refused.value.code == "secret"
    assert sum_by_guessing(attempt) != sum_of(attempt)


def sum_by_guessing(attempt: Attempt) -> list[int]:
    """With the b of those who answered, and for the rest what t - 1 shares combine to; drop-outs' keys are known."""
    server, secrets = attempt.server, {name: attempt.sessions[name].secrets for name in attempt.server.bundles}
    revealed: dict[str, bytes] = {}
    for name in server.uploads:
        if name in server.unmasks:
            revealed[name] = secrets[name].b
        else:
            revealed[name] = shamir.combine(shares_of(attempt, name))
            assert self_commitment(attempt.opening.base, name, revealed[name]) != server.ads[name].body.self_commit
    pairs = {
        survivor: {
            gone: secrets[survivor].keys.pair_key(server.transcript2, survivor, peer_of(attempt, gone, survivor))
            for gone in server.bundles
            if gone not in server.uploads
        }
        for survivor in server.uploads
    }
    vectors = (attempt.vectors[name] for name in server.uploads)
    left = masks_left(server.transcript2, Revealed(revealed, pairs))
    return [int(word) for word in unmask_sum(vectors, attempt.federation.terms.vector.words, left)]


def shares_of(attempt: Attempt, owner: str) -> dict[int, bytes]:
    index = attempt.federation.terms.roster.index
    return {
        index(holder): share.share
        for holder, message in attempt.server.unmasks.items()
        for share in message.body.shares
        if share.peer == owner
    }


def peer_of(attempt: Attempt, name: str, other: str) -> Peer:
    keys = attempt.sessions[name].secrets.keys
    return Peer(name, keys.mask_public, keys.salt_for(name, other))


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=16, max_size=40), st.integers(1, 255), st.data())
def test_any_t_shares_give_the_secret_back_and_one_fewer_gives_another(
    secret: bytes, silos: int, data: st.DataObject
) -> None:
    t, rng = data.draw(st.integers(1, silos)), np.random.default_rng(data.draw(SEED))
    shares = shamir.split(secret, t, [int(x) for x in rng.permutation(range(1, 256))[:silos]])
    some = [int(x) for x in rng.permutation(list(shares))[: rng.integers(t, silos + 1)]]
    assert shamir.combine({x: shares[x] for x in some}) == secret
    if t > 1:
        assert shamir.combine({x: shares[x] for x in some[: t - 1]}) != secret


@settings(max_examples=20, deadline=None)
@given(scenarios(sizes=range(3, 9)), WHICH, WHICH)
def test_the_proof_gives_exactly_the_servers_sum_and_no_altered_one_does(
    scenario: Scenario, which: int, bit: int
) -> None:
    assume(scenario.enough)
    federation = scenario.federation()
    attempt = federation.attempt(drop=scenario.drop(federation.silos))
    attempt.run()
    proof = attempt.server.sum_proof().encode()
    names = list(attempt.server.uploads)
    auditor = attempt.sessions[list(attempt.server.results)[bit % len(attempt.server.results)]]
    assert audited(auditor, proof, attempt.vectors, names) == [int(word) for word in attempt.total]
    with pytest.raises(ProtocolError) as refused:
        audited(auditor, flipped(proof, bit), attempt.vectors, names)
    assert refused.value.code in {"sum", "encoding", "message"}
    name = names[which % len(names)]
    altered = np.frombuffer(flipped(attempt.vectors[name].tobytes(), bit), dtype=np.uint32)
    with pytest.raises(ProtocolError, match=f"another vector of {name}"):
        audited(auditor, proof, {**attempt.vectors, name: altered}, names)


def audited(auditor: SiloSession, proof: bytes, vectors: Mapping[str, Words], names: Sequence[str]) -> list[int]:
    check = auditor.check_sum(decode_body(SumProof, proof))
    assert check.survivors == tuple(names)
    for name in names:
        check.add(name, vectors[name])
    return [int(word) for word in check.total()]


@st.composite
def grids(draw: st.DrawFn) -> tuple[FixedPoint, list[int]]:
    """A grid, and the weights of those who survive."""
    silos = draw(st.sampled_from([3, 4, 5, 10, 100, 254, 255]) | st.integers(3, 255))
    most = (2**29 - 1) // silos
    grid = FixedPoint(10.0 ** draw(st.floats(-9, 6)), silos, draw(st.sampled_from([1, most]) | st.integers(1, most)))
    survivors, rng = draw(st.sampled_from([3, silos]) | st.integers(3, silos)), np.random.default_rng(draw(SEED))
    one, largest = np.ones(survivors, dtype=np.int64), np.full(survivors, grid.max_weight)
    mixed = np.where(rng.random(survivors) < 0.5, one, largest)
    between = rng.integers(1, grid.max_weight, survivors, endpoint=True)
    return grid, draw(st.sampled_from([one, largest, mixed, between])).tolist()


@settings(max_examples=60, deadline=None)
@given(grids(), SEED)
def test_no_honest_sum_wraps_breaks_a_bound_or_misses_the_mean(case: tuple[FixedPoint, list[int]], seed: int) -> None:
    grid, weights = case
    layout, rng = VectorLayout(1001, counts=True), np.random.default_rng(seed)
    updates = [extreme_update(grid.clip, rng) for _ in weights]
    vectors = [
        layout.pack(grid.quantize(update, weight), weight, grid.bound, grid.bound)
        for update, weight in zip(updates, weights, strict=True)
    ]
    exact = np.sum([vector.view(np.int32).astype(np.int64) for vector in vectors], axis=0)
    assert np.abs(exact).max() < 2**29
    words: Words = np.stack(vectors).sum(axis=0, dtype=np.uint32)
    total = read_total(words, layout, grid, len(weights))
    assert words.view(np.int32).tolist() == exact.tolist()
    assert (total.weight, total.correct) == (sum(weights), len(weights) * grid.bound)
    mean, error = grid.mean(total.update, total.weight), grid.error_bound(len(weights), total.weight)
    wanted = sum(w * np.clip(u, -grid.clip, grid.clip) for w, u in zip(weights, updates, strict=True)) / sum(weights)
    assert np.abs(mean).max() <= (grid.clip + error) * (1 + 1e-12)
    assert np.abs(mean - wanted).max() <= error * (1 + 1e-6)


def extreme_update(clip: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """(1001,): both ends of the clip, zero, next to them, anything between; one coordinate lies beyond."""
    update = rng.uniform(-clip, clip, 1001)
    inside = np.nextafter(clip, 0)
    update[:8] = [clip, -clip, inside, -inside, 0, -0.0, clip / 3, 7 * clip * rng.choice([-1, 1])]
    return update


@pytest.mark.long
def test_255_silos_end_a_round_though_some_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every silo keeps 65,000 opened bundles, 85 MB: in one process all have to hold the same ones.
    monkeypatch.setattr(messages, "open_message", cache(messages.open_message))
    federation = Federation(255, parameters=3)
    names = federation.silos
    drop = {"join": {names[0]}, "share": {names[254]}, "upload": {names[1], names[127]}, "unmask": {names[253]}}
    attempt = federation.attempt(drop=drop)
    outcome = attempt.run()
    assert len(outcome.survivors) == 251
    assert [int(word) for word in attempt.total] == sum_of(attempt)


def test_256_silos_are_refused() -> None:
    with pytest.raises(TrustError, match="256 silos, 255 is the most"):
        Federation(256)
    with pytest.raises(ValueError, match=r"distinct points in 1\.\.255"):
        shamir.split(bytes(32), 171, range(1, 257))
