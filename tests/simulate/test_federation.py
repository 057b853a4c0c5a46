"""A simulated round is a real one without network and masks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest

from fedclip_secure.errors import ProtocolError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.secagg.silo_session import ModelRecord
from fedclip_secure.simulate.federation import average, contribute, run_federated
from tests.fakes import Attempt, Federation

PARAMETERS = 50


@dataclass
class Fixed:
    """A trainer whose update is always the same."""

    update: npt.NDArray[np.float64]
    records: int

    def train(self, received: AdapterState) -> npt.NDArray[np.float64]:
        assert received.layout.size == self.update.size
        return self.update


def trainers_of(federation: Federation, largest: float = 0.09) -> dict[str, Fixed]:
    random = np.random.default_rng(3)
    return {
        name: Fixed(random.uniform(-largest, largest, PARAMETERS), 10 + 7 * place)
        for place, name in enumerate(federation.silos)
    }


def test_a_simulated_round_makes_the_model_of_a_real_masked_round_to_the_bit() -> None:
    federation = Federation(4, parameters=PARAMETERS)
    trainers = trainers_of(federation)
    vectors = {name: contribute(federation.terms, name, one, federation.model)[0] for name, one in trainers.items()}
    simulated = average(federation.terms, 1, federation.model, vectors)
    start = federation.model.digest
    records = {name: ModelRecord(start, lambda words=words: words) for name, words in vectors.items()}  # type: ignore[misc]
    assert Attempt(federation, records=records).run().model.digest == simulated.digest


def test_the_model_moves_by_the_mean_weighted_with_records() -> None:
    federation = Federation(3, parameters=PARAMETERS, rounds=1)
    trainers, seen = trainers_of(federation), []
    run_federated(federation.terms, trainers, federation.model, lambda number, models, _: seen.append((number, models)))
    ((number, models),) = seen
    total = sum(one.records for one in trainers.values())
    mean = sum(one.records * one.update for one in trainers.values()) / total
    moved = models["silo-000"].vector - federation.model.vector
    allowed = federation.terms.grid.error_bound(3, total) + 1e-7  # and one rounding to float32
    assert number == 1
    assert np.abs(moved - mean).max() <= allowed


def test_updates_beyond_the_clip_end_a_cell_and_are_cut_where_privacy_was_paid_for() -> None:
    federation = Federation(3, parameters=PARAMETERS)
    name, far = federation.silos[0], Fixed(np.full(PARAMETERS, 0.3), 10)
    with pytest.raises(ProtocolError, match="coordinate_clip"):
        contribute(federation.terms, name, far, federation.model)
    private = replace(federation.terms, private=True)
    words, _ = contribute(private, name, far, federation.model)
    grid = federation.terms.grid
    assert np.abs(words[:PARAMETERS].view(np.int32) - 10 * grid.bound / grid.max_weight).max() <= 1


def test_after_a_round_that_moves_nothing_nobody_trains_and_the_model_stays_for_the_rounds_that_were_planned() -> None:
    federation, asked, seen = (
        Federation(3, parameters=PARAMETERS, rounds=4),
        list[bytes](),
        list[tuple[int, str, bool]](),
    )

    @dataclass
    class Sated(Fixed):
        def train(self, received: AdapterState) -> npt.NDArray[np.float64]:
            asked.append(received.digest)
            return self.update if received.digest == federation.model.digest else np.zeros(PARAMETERS)

    trainers = {name: Sated(np.full(PARAMETERS, 0.05), 10) for name in federation.silos}
    run_federated(
        federation.terms, trainers, federation.model,
        lambda number, models, seconds: seen.append((number, models["silo-000"].digest.hex(), seconds is not None)),
    )  # fmt: skip
    assert len(asked) == 2 * 3
    assert [(number, trained) for number, _, trained in seen] == [(1, True), (2, True), (3, False), (4, False)]
    assert len({digest for _, digest, _ in seen}) == 1
