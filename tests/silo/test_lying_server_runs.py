"""Sums, openings and further attempts that are lies, told to whole silos and told again after a restart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedclip_secure.model.state import AdapterState
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.roster import Roster
from fedclip_secure.secagg.aggregator_session import Phase
from fedclip_secure.secagg.messages import KeyAd, Result, ServerAd, SumProof, by_sender, open_message, vector_hash
from fedclip_secure.secagg.ring import Words
from fedclip_secure.silo.run.journal import Drawn
from fedclip_secure.silo.run.link import LeftOutError
from fedclip_secure.transport.messages import OpeningAnswer
from tests.fakes import Federation
from tests.secagg.lies import signed, signed_with
from tests.silo.lying_hub import (
    ALL,
    COLLUDER,
    FOUR,
    MINTED,
    PEER,
    STAGES,
    VICTIM,
    LyingHub,
    LyingLink,
    Victim,
    drops_out,
    endings,
    federation_of,
    played,
    run_until,
    stops_again,
)

Parties = dict[str, Victim]


@pytest.fixture
def hub() -> LyingHub:
    return LyingHub(federation_of())


@pytest.fixture
def parties(hub: LyingHub, tmp_path: Path) -> Iterator[Parties]:
    with played(hub, tmp_path) as victims:
        yield victims


# The sum


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def one_off(words: Words) -> Words:
    other = words.copy()
    other[0] += 1
    return other


def of_first_pairs(field: str) -> Callable[[SumProof], SumProof]:
    def lie(proof: SumProof) -> SumProof:
        first = proof.pairs[0]
        wrong = first.model_copy(update={field: [flip(getattr(first, field)[0]), *getattr(first, field)[1:]]})
        return proof.model_copy(update={"pairs": [wrong, *proof.pairs[1:]]})

    return lie


PROOFS: dict[str, Callable[[SumProof], SumProof]] = {
    "wrong sum": lambda proof: proof.model_copy(update={"sum": flip(proof.sum)}),
    "wrong b": lambda proof: proof.model_copy(update={"secrets": [*proof.secrets[:-1], flip(proof.secrets[-1])]}),
    "b missing": lambda proof: proof.model_copy(update={"secrets": proof.secrets[:-1]}),
    "b too many": lambda proof: proof.model_copy(update={"secrets": [*proof.secrets, bytes(32)]}),
    "wrong pair key of a drop-out": of_first_pairs("dropped"),
    "wrong commitments": of_first_pairs("commitments"),
    "pair keys missing": lambda proof: proof.model_copy(update={"pairs": proof.pairs[:-1]}),
    "pair keys too many": lambda proof: proof.model_copy(update={"pairs": [*proof.pairs, proof.pairs[0]]}),
}


@pytest.mark.parametrize("fault", PROOFS)
def test_a_false_proof_of_the_sum_is_not_signed(hub: LyingHub, parties: Parties, fault: str) -> None:
    victim = parties[VICTIM]
    drops_out(parties[COLLUDER], "uploads")
    victim.link.proof = PROOFS[fault]
    assert endings(parties, [VICTIM]) == ["sum"]
    assert victim.stages(1) == list(STAGES[:5])
    stops_again(victim, "sum")


VECTORS: dict[str, Callable[[LyingHub, str, Words], Words]] = {
    "wrong vector of one silo": lambda _, name, words: one_off(words) if name == PEER else words,
    "wrong vector of mine": lambda _, name, words: one_off(words) if name == VICTIM else words,
    "two vectors swapped": lambda hub, name, words: hub.vectors[{PEER: "silo-002", "silo-002": PEER}.get(name, name)],
    "zeros": lambda _, name, words: np.zeros_like(words),
}


@pytest.mark.parametrize("fault", VECTORS)
def test_false_vectors_under_the_sum_are_not_signed(hub: LyingHub, parties: Parties, fault: str) -> None:
    victim = parties[VICTIM]
    victim.link.vectors = lambda name, words: VECTORS[fault](hub, name, words)
    assert endings(parties, [VICTIM]) == ["sum"]
    assert victim.stages(1) == list(STAGES[:5])
    stops_again(victim, "sum")


def test_a_sum_with_one_vector_exchanged_is_signed_by_no_silo(hub: LyingHub, parties: Parties) -> None:
    # The same lie for all: the sum agrees with the vectors that the server publishes.
    for party in parties.values():
        party.link.vectors = lambda name, words: one_off(words) if name == PEER else words
        party.link.proof = lambda proof: proof.model_copy(update={"sum": vector_hash(one_off(total_of(hub)))})
    assert endings(parties, ALL) == ["sum"] * 5
    assert "results" not in {stage for party in parties.values() for stage in party.stages(1)}


def total_of(hub: LyingHub) -> Words:
    assert hub.total is not None
    return hub.total


BOUNDS = {
    "W = 0": (-3, 0),
    "W negative": (-3, 2**32 - 1),
    "W above all silos' most": (-3, 5001),
    "a coordinate wrapped": (0, 2**31),
    "a coordinate beyond the clip": (1, 2**29),
    "more right than counted": (-2, 36),
}


@pytest.mark.parametrize("fault", BOUNDS)
def test_without_verify_sum_a_sum_out_of_bounds_is_not_signed(tmp_path: Path, fault: str) -> None:
    def lie(words: Words) -> Words:
        forged, (word, value) = words.copy(), BOUNDS[fault]
        forged[word] = value
        return forged

    with played(LyingHub(federation_of(verify=False)), tmp_path) as parties:
        victim = parties[VICTIM]
        victim.link.total = lie
        assert endings(parties, [VICTIM]) == ["sum-bounds"]
        assert victim.stages(1) == list(STAGES[:5])
        stops_again(victim, "sum-bounds")


# The next opening

Openings = Callable[[LyingHub, OpeningAnswer], OpeningAnswer]


def another_ad(**change: object) -> Openings:
    def lie(hub: LyingHub, answer: OpeningAnswer) -> OpeningAnswer:
        assert answer.opening is not None
        ad = open_message(answer.opening, ServerAd, "test", hub.federation.terms.roster).body
        wire = signed(hub.federation, AGGREGATOR, ad.model_copy(update=change))
        return answer.model_copy(update={"opening": wire})

    return lie


def first_again(hub: LyingHub, answer: OpeningAnswer) -> OpeningAnswer:
    """Round 1 over its own model, under the number of this attempt."""
    return another_ad(round=1, model=hub.federation.model.digest)(hub, answer)


def nudged(hub: LyingHub, answer: OpeningAnswer) -> OpeningAnswer:
    """The right sum, and another model: one coordinate moved by one unit in the last place."""
    vector = hub.model.vector.copy()
    vector[0] = np.nextafter(vector[0], np.float32(9))
    return another_ad(model=AdapterState(hub.model.layout, vector).digest)(hub, answer)


def extended(hub: LyingHub, answer: OpeningAnswer) -> OpeningAnswer:
    assert answer.opening is not None
    ad = open_message(answer.opening, ServerAd, "test", hub.federation.terms.roster).body
    return answer.model_copy(update={"opening": signed_with(hub.federation, AGGREGATOR, ad, threshold=1)})


def by_second_keys(hub: LyingHub, answer: OpeningAnswer) -> OpeningAnswer:
    bodies = by_sender(answer.results, Result, "test", hub.federation.terms.roster)
    return answer.model_copy(update={"results": [signed(MINTED, name, each.body) for name, each in bodies.items()]})


OPENINGS: dict[str, tuple[str, Openings]] = {
    "another plan": ("plan", another_ad(plan=bytes([9]) * 32)),
    "another roster": ("roster", another_ad(roster=bytes([9]) * 32)),
    "a threshold in it": ("message", extended),
    "the right sum and a model one ulp away": ("chain", nudged),
    "the first model under a new round": (
        "chain",
        lambda hub, answer: another_ad(model=hub.federation.model.digest)(hub, answer),
    ),
    "the new model under the old round": ("chain", another_ad(round=1)),
    "one result fewer than t": (
        "chain",
        lambda _, answer: answer.model_copy(update={"results": answer.results[:3]}),
    ),
    "results by second certificates": ("signature", by_second_keys),
    "an attempt that was joined": ("replay", another_ad(attempt=1)),
    "a key of low order": ("key", another_ad(seal_public=MINTED.opening()[1].public[:1184] + bytes(32))),
}


@pytest.mark.parametrize("fault", OPENINGS)
def test_a_false_opening_in_the_middle_of_a_run_stops_the_silo_before_it_trains(
    hub: LyingHub, parties: Parties, fault: str
) -> None:
    code, lie = OPENINGS[fault]
    victim = parties[VICTIM]
    victim.link.openings = lambda answer: lie(hub, answer) if answer.attempt == 2 else answer
    assert endings(parties, [VICTIM]) == [code]
    assert (victim.stages(1), victim.stages(2)) == (list(STAGES), [])
    assert victim.trainer.trained == [hub.federation.model.digest]
    stops_again(victim, code)


def test_an_old_round_that_is_replayed_stops_the_silo(hub: LyingHub, parties: Parties) -> None:
    victim = parties[VICTIM]
    victim.link.openings = lambda answer: first_again(hub, answer) if answer.attempt == 3 else answer
    assert endings(parties, [VICTIM]) == ["replay"]
    assert (victim.stages(2), victim.stages(3)) == (list(STAGES), [])
    stops_again(victim, "replay")


# The same model again


def in_journal(party: Victim) -> Drawn:
    drawn = party.journal.drawn(party.hub.federation.model.digest, trains=True)
    assert drawn is not None
    return drawn


def has_left(party: Victim, attempt: int) -> bool:
    """Whether it has left this attempt because it agreed to other names before."""
    bound = any("this silo agreed to the sum over" in line for line in party.said)
    return (
        bound
        and bool(party.stages(attempt))
        and party.journal.attempt(party.hub.federation.terms.roster.digest) is None
    )


def broken_off(hub: LyingHub, parties: Parties, phase: Phase, *, killed: bool) -> None:
    """Attempt 1 comes so far, then the server acts as if it had failed. `killed`: the silos restart on that."""
    hub.breaks_off = {1: phase}
    if killed:
        run_until(parties, lambda: hub.attempt == 2)
        for party in parties.values():
            party.restart()


KILLED = pytest.mark.parametrize("killed", [False, True], ids=["running", "restarted"])


@KILLED
def test_after_withheld_agreements_an_attempt_over_one_silo_fewer_is_left(
    hub: LyingHub, parties: Parties, killed: bool
) -> None:
    drops_out(parties[COLLUDER], "key-ads", attempt=2)
    broken_off(hub, parties, Phase.UNMASK, killed=killed)
    run_until(parties, lambda: all(has_left(parties[name], 2) for name in FOUR))
    for name in FOUR:
        assert (parties[name].stages(1), parties[name].stages(2)) == (list(STAGES[:4]), ["key-ads"])
        assert in_journal(parties[name]).agreed == tuple(ALL)


@KILLED
def test_after_withheld_agreements_an_attempt_over_one_silo_more_is_left(
    hub: LyingHub, parties: Parties, killed: bool
) -> None:
    drops_out(parties[COLLUDER], "uploads")
    broken_off(hub, parties, Phase.UNMASK, killed=killed)
    run_until(parties, lambda: all(has_left(parties[name], 2) for name in FOUR))
    for name in FOUR:
        # The vector is masked anew, under keys that this attempt never gives away.
        assert (parties[name].stages(1), parties[name].stages(2)) == (
            list(STAGES[:4]),
            ["key-ads", "bundles", "uploads"],
        )
        assert in_journal(parties[name]).agreed == tuple(FOUR)


@KILLED
def test_after_withheld_agreements_the_same_names_finish_the_round(
    hub: LyingHub, parties: Parties, killed: bool
) -> None:
    broken_off(hub, parties, Phase.UNMASK, killed=killed)
    run_until(parties, lambda: 1 in hub.results)
    results = by_sender(hub.results[1], Result, "test", hub.federation.terms.roster)
    assert len({result.body for result in results.values()}) == 1
    for party in parties.values():
        assert party.trainer.trained.count(hub.federation.model.digest) == 1


@KILLED
def test_after_a_withheld_result_no_attempt_over_the_model_gets_anything(
    hub: LyingHub, parties: Parties, killed: bool
) -> None:
    # The server knows the sum. Whatever names it has in mind now, it is sent no key.
    broken_off(hub, parties, Phase.RESULT, killed=killed)
    run_until(parties, lambda: all(sits_out(party) for party in parties.values()))
    for party in parties.values():
        assert (party.stages(1), party.stages(2)) == (list(STAGES[:5]), [])
        assert party.link.idle[-1]
        assert in_journal(party).agreed == tuple(ALL)


def test_an_attempt_that_a_false_complaint_ended_begins_again_with_fresh_keys_and_the_same_vector(
    hub: LyingHub, parties: Parties
) -> None:
    # Whoever complains, and of whom: the masked vectors of the ended attempt stay as they are.
    hub.breaks_off = {1: Phase.AGREE}
    drops_out(parties[COLLUDER], "key-ads", attempt=2)
    run_until(parties, lambda: 1 in hub.results)
    for name in FOUR:
        party = parties[name]
        assert party.stages(1) == ["key-ads", "bundles", "uploads"]
        assert party.stages(2) == list(STAGES)
        assert party.trainer.trained.count(hub.federation.model.digest) == 1
        ads = [
            open_message(party.sent("key-ads", attempt)[0], KeyAd, "test", hub.federation.terms.roster).body
            for attempt in (1, 2)
        ]
        for field in ("base", "mask_public", "share_seal", "salt_seal", "self_commit"):
            assert getattr(ads[0], field) != getattr(ads[1], field)


def test_a_silo_that_is_told_it_was_late_though_its_vector_counts_adds_to_no_second_sum(
    hub: LyingHub, parties: Parties
) -> None:
    victim = parties[VICTIM]

    async def refuse_what_was_taken(attempt: int, stage: str) -> None:
        if (attempt, stage) == (1, "uploads"):
            hub.gone.add(VICTIM)
            hub.advance()
            raise LeftOutError("it came too late")

    victim.link.after = refuse_what_was_taken
    hub.breaks_off, hub.waits_for = {1: Phase.RESULT}, {1: set(ALL)}
    run_until(parties, lambda: all(sits_out(parties[name]) for name in ALL[1:]) and victim.stages(2) != [])
    assert hub.kept.keys() >= {(1, "uploads", VICTIM), (2, "key-ads", VICTIM)}
    hub.waits_for = {1: {VICTIM}}
    hub.advance()
    assert endings({VICTIM: victim}, [VICTIM]) == ["floor"]
    assert victim.stages(2) == ["key-ads"]


def sits_out(party: Victim) -> bool:
    return any("sitting out until the model has moved on" in line for line in party.said)


def moved(party: Victim, federation: Federation) -> None:
    """The silo starts again, has accepted another plan or roster, and a server runs it from the same model."""
    hub = LyingHub(federation, attempt=party.hub.attempt + 5)
    party.hub, party.link = hub, LyingLink(hub, party.name)
    party.person.federation = federation
    party.said.clear()
    party.restart()


def with_another_roster(federation: Federation) -> Federation:
    other = copy.copy(federation)
    other.keys = {**federation.keys, COLLUDER: MINTED.keys[COLLUDER]}
    roster = Roster.of({name: key.public_key().public_bytes_raw() for name, key in other.keys.items()})
    other.terms = replace(federation.terms, roster=roster)
    return other


def with_another_plan(federation: Federation) -> Federation:
    other = copy.copy(federation)
    other.terms = replace(federation.terms, plan=bytes([7]) * 32)
    return other


@pytest.mark.parametrize("reached", ["uploads", "agrees", "unmasks"])
@pytest.mark.parametrize("other", [with_another_plan, with_another_roster], ids=["run", "roster"])
def test_the_same_model_under_another_run_or_roster_gets_no_second_vector(
    hub: LyingHub, parties: Parties, reached: str, other: Callable[[Federation], Federation]
) -> None:
    victim = parties[VICTIM]
    run_until(parties, lambda: reached in victim.stages(1))
    moved(victim, other(hub.federation))
    run_until({VICTIM: victim}, lambda: sits_out(victim))
    assert victim.link.sent == []
    assert victim.trainer.trained == [hub.federation.model.digest]


@pytest.mark.parametrize("reached", STAGES[:5])
def test_an_attempt_is_not_gone_on_with_under_a_plan_that_was_accepted_since(
    hub: LyingHub, parties: Parties, reached: str
) -> None:
    # A lower threshold, for one, must not open what was uploaded under a higher one.
    victim = parties[VICTIM]
    run_until(parties, lambda: reached in victim.stages(1))
    before = list(victim.link.sent)
    federation = with_another_plan(hub.federation)
    federation.terms = replace(federation.terms, threshold=3, floor=3)
    victim.hub = copy.copy(hub)  # what it has accepted; its link still leads to the attempt that goes on
    victim.hub.federation = federation
    victim.restart()
    hub.answer = OpeningAnswer(state="open", opening=hub.federation.opening(attempt=2)[0], attempt=2)
    assert endings({VICTIM: victim}, [VICTIM]) == ["plan"]
    assert victim.link.sent == before


# A stage again


def test_a_restarted_silo_asks_for_no_list_again_that_it_has_answered(hub: LyingHub, parties: Parties) -> None:
    victim, asked = parties[VICTIM], list[str]()
    run_until(parties, lambda: "agrees" in victim.stages(1))
    victim.restart()

    def shorter(stage: str) -> Callable[[list[bytes]], list[bytes]]:
        return lambda wires: [*wires[: 4 - len(asked)], *(asked.append(stage) or ())]  # type: ignore[func-returns-value]

    victim.link.lists = {stage: shorter(stage) for stage in ("key-ads", "bundles", "uploads")}
    run_until(parties, lambda: "unmasks" in victim.stages(1))
    assert asked == []
    for stage in STAGES[:5]:
        assert len(set(victim.sent(stage, 1))) == 1, "what was sent twice is the same, byte for byte"
