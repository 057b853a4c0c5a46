from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fedclip_secure.errors import ModelError
from fedclip_secure.model.state import AdapterState, Floats
from fedclip_secure.secagg.next_model import compute_outcome
from fedclip_secure.secagg.ring import Words
from tests.fakes import Federation

CHUNK = 1 << 15  # coordinates that are stepped at a time
WEIGHT = 1234


def sum_of(federation: Federation, update: np.typing.NDArray[np.int64]) -> Words:
    words = federation.terms.vector.pack(update.astype(np.uint32), WEIGHT, 2, 9)
    words.flags.writeable = False
    return words


def stepped_in_one_go(federation: Federation, update: np.typing.NDArray[np.int64]) -> Floats:
    """The protocol's line: float32(old + (s * sum) * max_weight / W), in float64."""
    grid, old = federation.terms.grid, federation.model.vector
    return (old.astype(np.float64) + (grid.step * update.astype(np.float64)) * grid.max_weight / WEIGHT).astype("<f4")


@pytest.mark.parametrize("parameters", [1, 8, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_the_next_model_has_the_bits_of_the_protocols_equation(parameters: int) -> None:
    federation = Federation(3, parameters=parameters)
    update = np.random.default_rng(6).integers(-(2**26), 2**26, parameters)
    outcome = compute_outcome(federation.terms, 1, federation.model, sum_of(federation, update), federation.silos)
    assert outcome.model.vector.tobytes() == stepped_in_one_go(federation, update).tobytes()
    assert (outcome.weight, outcome.correct, outcome.total) == (WEIGHT, 2, 9)


def test_one_coordinate_that_moves_in_the_first_or_last_chunk_is_a_move() -> None:
    federation = Federation(3, parameters=2 * CHUNK + 1)
    for where in (0, 2 * CHUNK):
        update = np.zeros(2 * CHUNK + 1, dtype=np.int64)
        update[where] = 2**26
        outcome = compute_outcome(federation.terms, 1, federation.model, sum_of(federation, update), federation.silos)
        assert np.flatnonzero(outcome.model.vector != federation.model.vector).tolist() == [where]


@pytest.mark.parametrize("integer", [0, 1], ids=["zero", "too small for float32"])
def test_a_round_that_moves_nothing_leaves_the_model_however_long_it_is(integer: int) -> None:
    size = 2 * CHUNK + 1
    federation = Federation(3, parameters=size)
    old = AdapterState(federation.model.layout, np.full(size, 0.5, dtype=np.float32))
    still = sum_of(federation, np.full(size, integer, dtype=np.int64))
    outcome = compute_outcome(federation.terms, 1, old, still, federation.silos)
    assert outcome.model.digest == old.digest
    assert federation.terms.moved_nothing(1, old.digest, outcome.model.digest)
    assert federation.terms.ends_with(1, old.digest, outcome.model.digest)


def test_a_zero_keeps_its_sign_where_nothing_moves() -> None:
    federation = Federation(3)
    old = AdapterState(federation.model.layout, np.full(8, -0.0, dtype=np.float32))
    outcome = compute_outcome(federation.terms, 1, old, sum_of(federation, np.zeros(8, np.int64)), federation.silos)
    assert outcome.model.digest == old.digest


@pytest.mark.parametrize("parameters", [CHUNK - 1, CHUNK + 1])
def test_an_old_model_of_another_length_is_never_stepped_from(parameters: int) -> None:
    federation, other = Federation(3, parameters=CHUNK), Federation(3, parameters=parameters)
    words = sum_of(federation, np.full(CHUNK, 2**20))
    with pytest.raises((ValueError, ModelError), match=r"broadcast|the plan's layout"):
        compute_outcome(federation.terms, 1, other.model, words, federation.silos)


def test_a_step_takes_the_memory_of_the_new_model_and_a_check_of_it() -> None:
    federation = Federation(3, parameters=4_000_000)
    words = sum_of(federation, np.full(4_000_000, 2**20))
    tracemalloc.start()
    try:
        outcome = compute_outcome(federation.terms, 1, federation.model, words, federation.silos)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(outcome.model, AdapterState)
    assert peak < outcome.model.vector.nbytes + outcome.model.vector.size + 3_000_000
