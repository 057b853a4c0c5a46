"""Whoever vanishes, and whenever: the sum is exact over the survivors, or there is none.

For any drop-outs of any federation, test_properties.py says so.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from fedclip_secure.errors import ProtocolError
from fedclip_secure.secagg.next_model import Outcome
from tests.fakes import Attempt, Federation
from tests.secagg.lies import advance, before


def plain_sum(attempt: Attempt, names: set[str]) -> list[int]:
    rows = np.stack([attempt.records[name].open_vector().view(np.int32) for name in sorted(names)])
    return [int(value) for value in rows.astype(np.int64).sum(axis=0)]


def test_silos_may_vanish_at_every_stage_in_one_round() -> None:
    names = Federation(8, mode="honest_but_curious").silos
    drop = {"join": {names[0]}, "upload": {names[3]}, "unmask": {names[6]}}
    attempt = Federation(8, mode="honest_but_curious").attempt(drop=drop)
    attempt.run()
    assert attempt.total.view(np.int32).tolist() == plain_sum(attempt, set(names) - {names[0], names[3]})


def test_one_answer_fewer_than_t_never_unmasks() -> None:
    attempt = before("unmask")
    for name in attempt.federation.silos[:3]:
        sealed = attempt.sessions[name].unmask(attempt.wires("agrees"))
        attempt.server.receive_unmask(name, attempt.server.open_unmask(name, sealed))
    with pytest.raises(ProtocolError, match="3 silos at stage 'unmask', 4 must answer"):
        attempt.server.close()
    with pytest.raises(ProtocolError, match="3 shares of silo-003's secret, 4 are needed") as error:
        attempt.server.unmask_sum(attempt.vectors.values())
    assert error.value.code == "secret"


def test_one_agreement_fewer_than_t_does_not_close_the_stage() -> None:
    attempt = before("agree")
    for name in attempt.federation.silos[:3]:
        attempt.server.receive_agree(name, attempt.sessions[name].agree(attempt.wires("uploads")))
    with pytest.raises(ProtocolError, match="3 silos at stage 'agree', 4 must answer"):
        attempt.server.close()


def test_one_result_fewer_than_t_does_not_end_the_round() -> None:
    attempt = Federation(5).attempt(drop={"result": {"silo-000", "silo-001"}})
    with pytest.raises(ProtocolError, match="3 silos at stage 'result', 4 must answer"):
        attempt.run()


@pytest.mark.parametrize("stage", ["join", "share", "upload"])
def test_a_list_below_the_floor_ends_the_attempt(stage: str) -> None:
    attempt = Federation(5).attempt(drop={stage: {"silo-000", "silo-001"}})
    with pytest.raises(ProtocolError, match=f"3 silos at stage '{stage}', the plan needs 4"):
        attempt.run()


def test_a_pair_is_never_summed() -> None:
    # Three silos under `honest_but_curious` without colluders: t is 2, the floor 3.
    federation = Federation(3, mode="honest_but_curious", colluding=0)
    assert (federation.terms.threshold, federation.terms.floor) == (2, 3)
    with pytest.raises(ProtocolError, match="2 silos at stage 'upload', the plan needs 3"):
        federation.attempt(drop={"upload": {"silo-002"}}).run()


def test_an_agreement_may_still_come_while_others_unmask() -> None:
    attempt = before("unmask", drop={"agree": {"silo-000"}})
    late = attempt.sessions["silo-000"].agree(attempt.wires("uploads"))
    attempt.server.receive_agree("silo-000", late)
    sealed = attempt.sessions["silo-000"].unmask(attempt.wires("agrees"))
    attempt.server.receive_unmask("silo-000", attempt.server.open_unmask("silo-000", sealed))
    assert set(attempt.server.unmasks) == {"silo-000"}


def test_a_mask_longer_than_a_chunk_cancels() -> None:
    federation = Federation(3, parameters=(1 << 19) + 7, counts=False)
    update = np.arange(federation.parameters, dtype=np.uint32)
    outcome_of(federation, dict.fromkeys(federation.silos, (update, 1000)))


def outcome_of(federation: Federation, packed: dict[str, tuple[npt.NDArray[np.uint32], int]]) -> Outcome:
    """Run a round over these integers and weights, and check the sum."""
    records = {name: federation.record(weight, update) for name, (update, weight) in packed.items()}
    attempt = federation.attempt(records=records)
    advance(attempt, "result")
    outcome = attempt.result()
    assert attempt.total.view(np.int32).tolist() == plain_sum(attempt, set(packed))
    return outcome


def run_means(federation: Federation, weights: dict[str, int]) -> None:
    """The new model is the float64 weighted mean within the bound that the grid states."""
    rng, grid = np.random.default_rng(5), federation.terms.grid
    updates = {name: rng.uniform(-grid.clip, grid.clip, federation.parameters) for name in weights}
    updates[next(iter(weights))][0] = grid.clip
    outcome = outcome_of(federation, {name: (grid.quantize(updates[name], w), w) for name, w in weights.items()})
    total = sum(weights.values())
    mean = sum(weights[name] * updates[name] for name in weights) / total
    assert outcome.weight == total
    exact = federation.model.vector.astype(np.float64) + mean
    error = np.abs(outcome.model.vector - exact).max()
    # Half a unit in the last place for the one rounding to float32 of values below 2.
    assert error <= grid.error_bound(len(weights), total) + 2.0**-24


@pytest.mark.parametrize("size", [3, 5, 8])
def test_the_mean_by_masked_weights_is_exact_to_the_stated_bound(size: int) -> None:
    federation = Federation(size, parameters=500)
    run_means(federation, {name: 1 + 111 * i for i, name in enumerate(federation.silos)})


def test_the_mean_by_equal_weights_is_exact_to_the_stated_bound() -> None:
    federation = Federation(5, parameters=500, max_weight=1)
    run_means(federation, dict.fromkeys(federation.silos, 1))


def with_public_weights(weights: list[int]) -> tuple[Federation, dict[str, int]]:
    federation = Federation(len(weights), parameters=500)
    public = dict(zip(federation.silos, weights, strict=True))
    federation.terms = replace(federation.terms, public_weights=public)
    return federation, public


def test_the_mean_by_public_weights_is_exact_to_the_stated_bound() -> None:
    federation, public = with_public_weights([5, 900, 31, 1])
    run_means(federation, public)


def test_a_silo_cannot_weigh_more_than_its_public_weight() -> None:
    federation, public = with_public_weights([5, 900, 31, 1])
    still = np.zeros(500, dtype=np.uint32)
    heavier = {name: (still, weight + (name == "silo-000")) for name, weight in public.items()}
    with pytest.raises(ProtocolError, match="the weights add up to 938, the plan's to 937") as error:
        outcome_of(federation, heavier)
    assert error.value.code == "sum-bounds"


def test_with_equal_weights_nobody_weighs_twice() -> None:
    federation = Federation(5, max_weight=1)
    still = np.zeros(federation.parameters, dtype=np.uint32)
    weights = {name: (still, 2 if name == "silo-000" else 1) for name in federation.silos}
    with pytest.raises(ProtocolError, match="the weights of 5 silos add up to 6"):
        outcome_of(federation, weights)
