from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fedclip_secure.errors import ProtocolError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.secagg.messages import Result, ServerAd, base_hash
from fedclip_secure.secagg.opening_checks import Opening, Position, check_opening, check_results
from fedclip_secure.secagg.sealing import SealKey
from tests.fakes import Federation
from tests.secagg.lies import signed

FEDERATION = Federation(5)
TERMS = FEDERATION.terms


@dataclass(frozen=True)
class Finished:
    """Round 1, done by all five."""

    results: list[bytes]
    body: Result
    model: AdapterState


def finish() -> Finished:
    attempt = FEDERATION.attempt()
    model = attempt.run().model
    return Finished(attempt.wires("results"), attempt.server.results["silo-000"].body, model)


ROUND_1 = finish()
AFTER_1 = Position(1, 1, FEDERATION.model.digest)


def ad_of(**change: Any) -> ServerAd:
    values: dict[str, Any] = {
        "plan": TERMS.plan,
        "roster": TERMS.roster.digest,
        "round": 1,
        "attempt": 1,
        "model": TERMS.initial_model,
        "nonce": bytes(32),
        "seal_public": SealKey.generate().public,
    }
    return ServerAd(**{**values, **change})


def offer(
    ad: ServerAd, position: Position | None = None, results: Sequence[bytes] = (), signer: str = AGGREGATOR
) -> Opening:
    return check_opening(TERMS, position or Position(), signed(FEDERATION, signer, ad), results)


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(ProtocolError) as refused:
        offer(*args, **options)
    return refused.value.code


def second(**change: Any) -> ServerAd:
    return ad_of(**{"round": 2, "attempt": 2, "model": ROUND_1.body.model, **change})


def test_the_first_round_opens_from_the_plans_model() -> None:
    ad = ad_of()
    assert offer(ad) == Opening(ad, base_hash(ad))


def test_two_openings_never_have_one_base() -> None:
    assert base_hash(ad_of()) != base_hash(ad_of())


@pytest.mark.parametrize("signer", ["silo-000", "silo-004"])
def test_a_silo_cannot_open_an_attempt(signer: str) -> None:
    assert refusal(ad_of(), signer=signer) == "signature"


@pytest.mark.parametrize("pin", ["plan", "roster"])
def test_another_plan_or_roster_than_the_pinned_is_refused(pin: str) -> None:
    assert refusal(ad_of(**{pin: bytes([9]) * 32})) == pin


def test_a_key_to_which_nobody_could_seal_is_refused() -> None:
    good = SealKey.generate().public
    for bad in (good[:1184] + bytes(32), good[:-1] + b"\xff", b"\xff" * 1184 + good[1184:]):
        assert refusal(ad_of(seal_public=bad)) == "key"


def test_the_first_round_from_another_model_is_refused() -> None:
    assert refusal(ad_of(model=bytes(32))) == "chain"


def test_an_opening_that_was_joined_is_not_joined_again() -> None:
    assert refusal(ad_of(), AFTER_1) == "replay"


def test_a_later_attempt_at_the_same_round_is_joined_over_the_same_model_alone() -> None:
    assert offer(ad_of(attempt=2), AFTER_1).ad.attempt == 2
    assert refusal(ad_of(attempt=2), Position(1, 1, bytes(32))) == "chain"


def test_no_earlier_attempt_or_round_and_none_beyond_the_plan() -> None:
    results = ROUND_1.results
    assert refusal(second(attempt=7), Position(2, 7, ROUND_1.body.model), results) == "replay"
    assert refusal(second(attempt=6), Position(2, 7, ROUND_1.body.model), results) == "replay"
    assert refusal(second(attempt=8), Position(3, 7, bytes(32)), results) == "replay"
    assert refusal(second(round=TERMS.rounds + 1), AFTER_1, results) == "replay"


def test_the_second_round_opens_on_the_word_of_t_silos() -> None:
    assert offer(second(), AFTER_1, ROUND_1.results).ad.round == 2
    assert offer(second(), Position(), ROUND_1.results[: TERMS.threshold]).ad.round == 2


def test_one_result_fewer_than_t_opens_nothing() -> None:
    assert refusal(second(), AFTER_1, ROUND_1.results[: TERMS.threshold - 1]) == "chain"
    assert refusal(second(), AFTER_1, []) == "chain"


def test_a_silo_counts_once_and_the_aggregator_not_at_all() -> None:
    few = ROUND_1.results[: TERMS.threshold - 1]
    assert refusal(second(), AFTER_1, [few[0], *few]) == "list"
    assert refusal(second(), AFTER_1, [signed(FEDERATION, AGGREGATOR, ROUND_1.body), *few]) == "list"


def test_a_model_one_unit_away_from_what_t_silos_signed_is_refused() -> None:
    assert refusal(second(model=bytes(32)), AFTER_1, ROUND_1.results) == "chain"


def test_results_of_another_round_do_not_open_this_one() -> None:
    assert refusal(second(round=3), AFTER_1, ROUND_1.results) == "chain"


@pytest.mark.parametrize(
    "change",
    [
        {"model": bytes(32)},
        {"sum": bytes(32)},
        {"survivors": bytes(32)},
        {"transcript": bytes(32)},
        {"round": 2},
        {"correct": 99},
        {"total": 99},
    ],
)
def test_one_result_that_differs_in_any_field_opens_nothing(change: dict[str, Any]) -> None:
    liar = signed(FEDERATION, "silo-000", ROUND_1.body.model_copy(update=change))
    assert refusal(second(), AFTER_1, [liar, *ROUND_1.results[1:]]) == "chain"


def test_t_equal_results_give_the_counts() -> None:
    result = check_results(TERMS, ROUND_1.results)
    assert (result.correct, result.total, result.model) == (15, 25, ROUND_1.body.model)


def test_results_of_another_run_cannot_stand_in_the_chain() -> None:
    for change in ({"plan": b"\x07" * 32}, {"roster": b"\x07" * 32}):
        body = ROUND_1.body.model_copy(update=change)
        foreign = [signed(FEDERATION, name, body) for name in FEDERATION.silos]
        with pytest.raises(ProtocolError, match="another run") as refused:
            check_results(TERMS, foreign)
        assert refused.value.code == "chain"


def test_a_round_that_ended_over_another_model_than_this_silo_joined_is_refused() -> None:
    elsewhere = Position(1, 1, b"\x07" * 32)
    assert refusal(ad_of(round=2, attempt=2, model=ROUND_1.body.model), elsewhere, ROUND_1.results) == "chain"


# In the middle of a run


def nudged() -> bytes:
    """The digest of the model that round 1 ended with, one coordinate moved by one unit in the last place."""
    vector = ROUND_1.model.vector.copy()
    vector[0] = np.nextafter(vector[0], np.float32(9))
    return AdapterState(TERMS.layout, vector).digest


def test_a_model_changed_by_one_ulp_opens_nothing() -> None:
    wrong = nudged()
    assert refusal(second(model=wrong), AFTER_1, ROUND_1.results) == "chain"
    assert refusal(second(model=wrong), Position(), ROUND_1.results) == "chain"
    assert refusal(ad_of(attempt=2, model=wrong), AFTER_1) == "chain"


def test_a_model_changed_by_one_ulp_that_fewer_than_t_vouch_for_opens_nothing() -> None:
    # The colluder's word, and the server's own.
    wrong = ROUND_1.body.model_copy(update={"model": nudged()})
    for results in (
        [signed(FEDERATION, "silo-000", wrong)],
        [*ROUND_1.results[:4], signed(FEDERATION, "silo-004", wrong)],
    ):
        assert refusal(second(model=wrong.model), AFTER_1, results) == "chain"


@pytest.mark.parametrize("number", [2, 3])
def test_the_same_model_under_a_new_round_is_refused(number: int) -> None:
    for results in (ROUND_1.results, []):
        assert refusal(ad_of(round=number, attempt=2), AFTER_1, results) == "chain"


def test_an_old_round_is_not_replayed_under_a_new_attempt() -> None:
    in_round_2 = Position(2, 2, ROUND_1.body.model)
    assert refusal(ad_of(attempt=3), in_round_2) == "replay"
    assert refusal(ad_of(attempt=3, model=ROUND_1.body.model), in_round_2) == "replay"


def test_a_round_is_not_opened_again_over_the_model_that_it_ended_with() -> None:
    assert refusal(ad_of(attempt=2, model=ROUND_1.body.model), AFTER_1, ROUND_1.results) == "chain"


@pytest.mark.parametrize("pin", ["plan", "roster"])
def test_a_plan_or_roster_changed_in_the_middle_of_a_run_is_refused(pin: str) -> None:
    # The plan holds the threshold's mode, colluding and min_silos; the roster holds n.
    assert refusal(second(**{pin: bytes([9]) * 32}), AFTER_1, ROUND_1.results) == pin


def test_a_second_certificate_for_the_aggregator_opens_nothing() -> None:
    wire = signed(Federation(5), AGGREGATOR, ad_of())
    with pytest.raises(ProtocolError) as refused:
        check_opening(TERMS, Position(), wire, [])
    assert refused.value.code == "signature"


def test_results_by_second_certificates_open_nothing() -> None:
    minted = Federation(5)
    results = [signed(minted, name, ROUND_1.body) for name in FEDERATION.silos]
    assert refusal(second(), AFTER_1, results) == "signature"
