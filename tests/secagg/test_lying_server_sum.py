"""A wrong sum, and everything with which a server could pass it off as right; `verify_sum` finds each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from fedclip_secure.errors import ProtocolError
from fedclip_secure.secagg.keys import pair_commitment
from fedclip_secure.secagg.messages import SumProof, SurvivorPairs, vector_hash
from fedclip_secure.secagg.opening_checks import Position, check_opening
from fedclip_secure.secagg.ring import Words
from fedclip_secure.secagg.unmasking import Revealed, masks_left, unmask_sum
from tests.fakes import Attempt, Federation
from tests.secagg.lies import before, with_closing_round

ME, PEER, OTHER, DROPPED = "silo-000", "silo-001", "silo-002", "silo-004"
Vectors = dict[str, Words]
Lie = Callable[[Attempt, SumProof, Vectors], tuple[SumProof, Mapping[str, Words]]]


def unmasked(drop: dict[str, set[str]] | None = None, federation: Federation | None = None) -> Attempt:
    attempt = before("result", federation, drop=drop or {})
    attempt.total = attempt.server.unmask_sum(attempt.vectors[name] for name in attempt.server.uploads)
    return attempt


def audit(attempt: Attempt, proof: SumProof, vectors: Mapping[str, Words]) -> Words:
    """As a silo does it, after it has released its shares."""
    check = attempt.sessions[ME].check_sum(proof)
    for name in check.survivors:
        check.add(name, vectors[name])
    return check.total()


def proven(drop: dict[str, set[str]] | None = None) -> tuple[Attempt, SumProof, Vectors]:
    attempt = unmasked(drop)
    attempt.server.compute_result(attempt.total, attempt.federation.model)
    return attempt, attempt.server.sum_proof(), dict(attempt.vectors)


def test_an_honest_proof_gives_the_sum_of_the_survivors_vectors() -> None:
    for drop in ({}, {"upload": {DROPPED}}, {"share": {DROPPED}}):
        attempt, proof, vectors = proven(drop)
        plain = [attempt.records[name].open_vector() for name in attempt.server.uploads]
        assert audit(attempt, proof, vectors).tolist() == np.sum(plain, axis=0, dtype=np.uint32).tolist()


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def changed(items: list[bytes], index: int = 1) -> list[bytes]:
    return [*items[:index], flip(items[index]), *items[index + 1 :]]


def swapped(items: list[bytes]) -> list[bytes]:
    return [items[1], items[0], *items[2:]]


def of_proof(**change: Callable[[SumProof], object]) -> Lie:
    return lambda attempt, proof, vectors: (
        proof.model_copy(update={field: make(proof) for field, make in change.items()}),
        vectors,
    )


def of_pairs(change: Callable[[SurvivorPairs], dict[str, object]], survivor: int = 1) -> Lie:
    """What is published of one survivor's pair keys."""

    def lie(_: Attempt, proof: SumProof, vectors: Vectors) -> tuple[SumProof, Vectors]:
        pairs = list(proof.pairs)
        pairs[survivor] = pairs[survivor].model_copy(update=change(pairs[survivor]))
        return proof.model_copy(update={"pairs": pairs}), vectors

    return lie


def of_vectors(change: Callable[[Attempt, Vectors], Vectors]) -> Lie:
    return lambda attempt, proof, vectors: (proof, {**vectors, **change(attempt, vectors)})


def one_off(words: Words) -> Words:
    other = words.copy()
    other[0] += 1
    return other


def shifted(attempt: Attempt, proof: SumProof, vectors: Vectors) -> tuple[SumProof, Vectors]:
    """One survivor's vector is another, and the sum is the one that it gives."""
    return (
        proof.model_copy(update={"sum": vector_hash(one_off(attempt.total))}),
        {**vectors, PEER: one_off(vectors[PEER])},
    )


def with_a_key_of_its_own(attempt: Attempt, proof: SumProof, vectors: Vectors) -> tuple[SumProof, Vectors]:
    """The server makes up a pair key, and the commitment to it."""
    key, pairs = bytes(32), list(proof.pairs)
    peers = [name for name in attempt.server.bundles if name != PEER]
    commitments = list(pairs[1].commitments)
    commitments[peers.index(DROPPED)] = pair_commitment(attempt.server.transcript2, PEER, DROPPED, key)
    pairs[1] = pairs[1].model_copy(update={"commitments": commitments, "dropped": [key]})
    return proof.model_copy(update={"pairs": pairs}), vectors


def and_its_sum(lie: Lie) -> Lie:
    """The same lie, with the sum that these vectors and secrets give."""

    def consistent(attempt: Attempt, proof: SumProof, vectors: Vectors) -> tuple[SumProof, Mapping[str, Words]]:
        lied, shown = lie(attempt, proof, vectors)
        survivors = list(attempt.server.uploads)
        pairs = {name: {DROPPED: each.dropped[0]} for name, each in zip(survivors, lied.pairs, strict=True)}
        left = masks_left(attempt.server.transcript2, Revealed(dict(zip(survivors, lied.secrets, strict=True)), pairs))
        total = unmask_sum((shown[name] for name in survivors), attempt.total.size, left)
        return lied.model_copy(update={"sum": vector_hash(total)}), shown

    return consistent


def of_another_attempt(attempt: Attempt, proof: SumProof, vectors: Vectors) -> tuple[SumProof, Vectors]:
    del attempt, proof, vectors
    _, other, theirs = proven({"upload": {DROPPED}})
    return other, theirs


LIES: dict[str, Lie] = {
    "wrong sum": of_proof(sum=lambda proof: flip(proof.sum)),
    "wrong vector of one silo": of_vectors(lambda _, vectors: {PEER: one_off(vectors[PEER])}),
    "wrong vector of one silo and the sum that it gives": shifted,
    "vector without its last word": of_vectors(lambda _, vectors: {PEER: vectors[PEER][:-1]}),
    "vector with a word more": of_vectors(lambda _, vectors: {PEER: np.append(vectors[PEER], np.uint32(0))}),
    "unmasked vector": of_vectors(lambda attempt, _: {PEER: attempt.records[PEER].open_vector()}),
    "zeros for a vector": of_vectors(lambda _, vectors: {PEER: np.zeros_like(vectors[PEER])}),
    "my own vector changed": of_vectors(lambda _, vectors: {ME: one_off(vectors[ME])}),
    "vectors swapped between silos": of_vectors(lambda _, vectors: {PEER: vectors[OTHER], OTHER: vectors[PEER]}),
    "wrong b": of_proof(secrets=lambda proof: changed(proof.secrets)),
    "wrong b of mine": of_proof(secrets=lambda proof: changed(proof.secrets, 0)),
    "two b swapped": of_proof(secrets=lambda proof: swapped(proof.secrets)),
    "b missing": of_proof(secrets=lambda proof: proof.secrets[:-1]),
    "no b": of_proof(secrets=lambda _: []),
    "b too many": of_proof(secrets=lambda proof: [*proof.secrets, bytes(32)]),
    "b of a drop-out besides": of_proof(secrets=lambda proof: [*proof.secrets, proof.secrets[-1]]),
    "wrong pair key of a drop-out": of_pairs(lambda pairs: {"dropped": changed(pairs.dropped, 0)}),
    "a pair key and a commitment made up": with_a_key_of_its_own,
    "pair key missing": of_pairs(lambda _: {"dropped": []}),
    "pair key too many": of_pairs(lambda pairs: {"dropped": pairs.dropped * 2}),
    "wrong commitments": of_pairs(lambda pairs: {"commitments": changed(pairs.commitments)}),
    "two commitments swapped": of_pairs(lambda pairs: {"commitments": swapped(pairs.commitments)}),
    "commitment missing": of_pairs(lambda pairs: {"commitments": pairs.commitments[:-1]}),
    "commitment too many": of_pairs(lambda pairs: {"commitments": [*pairs.commitments, bytes(32)]}),
    "pair keys of two survivors swapped": of_proof(
        pairs=lambda proof: [proof.pairs[1], proof.pairs[0], *proof.pairs[2:]]
    ),
    "pair keys of a survivor missing": of_proof(pairs=lambda proof: proof.pairs[:-1]),
    "no pair keys": of_proof(pairs=lambda _: []),
    "pair keys of a survivor too many": of_proof(pairs=lambda proof: [*proof.pairs, proof.pairs[-1]]),
    "another attempt's proof and vectors": of_another_attempt,
    "wrong vector and the sum that the pair keys give": and_its_sum(
        of_vectors(lambda _, vectors: {PEER: one_off(vectors[PEER])})
    ),
    "wrong b and the sum that the pair keys give": and_its_sum(of_proof(secrets=lambda proof: changed(proof.secrets))),
    "wrong pair key and the sum that it gives": and_its_sum(of_pairs(lambda p: {"dropped": changed(p.dropped, 0)})),
    "a pair key and a commitment made up, and the sum": and_its_sum(with_a_key_of_its_own),
    "pair keys of two survivors swapped, and the sum": and_its_sum(
        of_proof(pairs=lambda proof: [proof.pairs[1], proof.pairs[0], *proof.pairs[2:]])
    ),
}


@pytest.mark.parametrize("fault", LIES)
def test_verify_sum_finds_every_lie_about_a_sum_with_a_drop_out(fault: str) -> None:
    attempt, proof, vectors = proven({"upload": {DROPPED}})
    lied, shown = LIES[fault](attempt, proof, vectors)
    with pytest.raises(ProtocolError) as refused:
        audit(attempt, lied, shown)
    assert refused.value.code == "sum"


WITHOUT_PAIRS = [fault for fault in LIES if "pair key" not in fault and "commitment" not in fault]


@pytest.mark.parametrize("fault", WITHOUT_PAIRS)
def test_verify_sum_finds_every_lie_about_a_sum_without_drop_outs(fault: str) -> None:
    attempt, proof, vectors = proven()
    lied, shown = LIES[fault](attempt, proof, vectors)
    with pytest.raises(ProtocolError) as refused:
        audit(attempt, lied, shown)
    assert refused.value.code == "sum"


def test_pair_keys_of_a_drop_out_are_refused_where_nobody_dropped_out() -> None:
    attempt, proof, vectors = proven()
    made_up = [SurvivorPairs(commitments=[bytes(32)] * 4, dropped=[bytes(32)])] * 5
    with pytest.raises(ProtocolError) as refused:
        audit(attempt, proof.model_copy(update={"pairs": made_up}), vectors)
    assert refused.value.code == "sum"


def test_a_drop_outs_vector_cannot_be_slipped_into_the_sum() -> None:
    # The server kept it back, and adds it with the masks that it can take off by now.
    attempt = before("upload", drop={"upload": {DROPPED}})
    late = attempt.sessions[DROPPED].upload(attempt.wires("bundles"), attempt.server.inbox(DROPPED)).words
    for stage in ("upload", "agree", "unmask"):
        getattr(attempt, stage)()
    attempt.total = attempt.server.unmask_sum(attempt.vectors.values())
    attempt.server.compute_result(attempt.total, attempt.federation.model)
    attempt.total += late
    proof = attempt.server.sum_proof().model_copy(update={"sum": vector_hash(attempt.total)})
    with pytest.raises(ProtocolError) as refused:
        audit(attempt, proof, attempt.vectors)
    assert refused.value.code == "sum"
    assert DROPPED not in attempt.sessions[ME].check_sum(proof).survivors


def test_a_sum_over_fewer_vectors_than_survived_is_refused() -> None:
    attempt, proof, vectors = proven()
    check = attempt.sessions[ME].check_sum(proof)
    for name in check.survivors[:-1]:
        check.add(name, vectors[name])
    with pytest.raises(ProtocolError) as refused:
        check.total()
    assert refused.value.code == "sum"


def wrong_commitment(survivor: int, index: int) -> Lie:
    return of_pairs(lambda pairs: {"commitments": changed(pairs.commitments, index)}, survivor)


def test_every_b_and_every_commitment_of_a_proof_is_checked() -> None:
    attempt, proof, vectors = proven({"upload": {DROPPED}})
    wrong_b = [proof.model_copy(update={"secrets": changed(proof.secrets, i)}) for i in range(4)]
    faults = [wrong_commitment(survivor, index) for survivor in range(4) for index in range(4)]
    for lied in [*wrong_b, *(fault(attempt, proof, vectors)[0] for fault in faults)]:
        with pytest.raises(ProtocolError) as refused:
            audit(attempt, lied, vectors)
        assert refused.value.code == "sum"


# Without verify_sum: what no honest silos can add up to


BOUNDS = {
    "W = 0": (-3, 0),
    "W negative": (-3, 2**32 - 50),
    "W below one for each silo": (-3, 4),
    "W above the most that all can have": (-3, 5001),
    "a coordinate beyond the clip": (0, 2**28),
    "a coordinate wrapped to the least integer": (0, 2**31),
    "a coordinate wrapped below zero": (0, 2**32 - 2**28),
    "more right than counted": (-2, 26),
    "counts below zero": (-2, 2**32 - 1),
    "counts beyond all records": (-1, 2**31 + 5),
}


@pytest.mark.parametrize("fault", BOUNDS)
def test_without_verify_sum_a_sum_out_of_bounds_is_not_signed(fault: str) -> None:
    attempt = unmasked()
    word, value = BOUNDS[fault]
    attempt.total[word] = value
    with pytest.raises(ProtocolError) as refused:
        attempt.sessions[ME].result(attempt.total, attempt.federation.model)
    assert refused.value.code == "sum-bounds"


@pytest.mark.parametrize("weight", [49, 51])
def test_a_weight_forged_to_shift_the_mean_is_refused_where_weights_are_public(weight: int) -> None:
    federation = Federation(5)
    federation.terms = replace(federation.terms, public_weights=dict.fromkeys(federation.silos, 10))
    attempt = unmasked(federation=federation)
    assert attempt.total[-3] == 50
    attempt.total[-3] = weight
    with pytest.raises(ProtocolError) as refused:
        attempt.sessions[ME].result(attempt.total, federation.model)
    assert refused.value.code == "sum-bounds"


def test_a_weight_forged_to_shift_the_mean_is_found_by_verify_sum() -> None:
    attempt, proof, vectors = proven()
    attempt.total[-3] += 1
    with pytest.raises(ProtocolError) as refused:
        audit(attempt, proof.model_copy(update={"sum": vector_hash(attempt.total)}), vectors)
    assert refused.value.code == "sum"


def test_a_forged_sum_that_moves_nothing_ends_the_run_and_opens_no_second_round_over_the_model() -> None:
    attempt = unmasked()
    attempt.total[:-3] = 0
    federation = attempt.federation
    attempt.server.compute_result(attempt.total, federation.model)
    signed = [session.result(attempt.total, federation.model)[0] for session in attempt.sessions.values()]
    again, _ = federation.opening(round_number=2, attempt=2)
    with pytest.raises(ProtocolError, match="round 1 changed no parameter") as refused:
        check_opening(federation.terms, Position(1, 1, federation.model.digest), again, signed)
    assert refused.value.code == "chain"


def test_a_closing_round_that_moves_the_model_by_one_unit_is_not_signed() -> None:
    federation = with_closing_round(Federation(5))
    still = np.zeros(federation.parameters, dtype=np.uint32)
    attempt = before("result", federation, records={name: federation.record(update=still) for name in federation.silos})
    attempt.total = attempt.server.unmask_sum(attempt.vectors.values())
    attempt.total[0] = 1
    with pytest.raises(ProtocolError) as refused:
        attempt.sessions[ME].result(attempt.total, federation.model)
    assert refused.value.code == "sum-bounds"
