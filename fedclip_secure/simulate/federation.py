"""The rounds of one cell: as a federation does them, without network and masks; and without a federation."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedclip_secure.config.lock import Contract
from fedclip_secure.model.state import AdapterState
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.roster import Roster
from fedclip_secure.secagg.next_model import compute_outcome
from fedclip_secure.secagg.ring import Words
from fedclip_secure.secagg.terms import Terms


class Trainer(Protocol):
    """A silo's share of a round: `LocalTrainer` or `PrivateTrainer`."""

    records: int

    def train(self, received: AdapterState) -> npt.NDArray[np.float64]:
        """The update (received.layout.size,)."""


# What is told after each round: its number, each silo's model, and the seconds that the slowest silo trained; None
# where the run had ended before, as nothing was left to learn.
Watch = Callable[[int, Mapping[str, AdapterState], float | None], None]


def terms_of(contract: Contract, silos: Sequence[str]) -> Terms:
    """The terms of a federation of `silos`. The roster's keys stand for none: nothing is signed here.

    Raises:
        ConfigError, TrustError: no federation can be of these silos.
    """
    return Terms.of(
        contract, Roster.of({name: hashlib.sha256(name.encode()).digest() for name in (*silos, AGGREGATOR)})
    )


def contribute(terms: Terms, silo: str, trainer: Trainer, received: AdapterState) -> tuple[Words, float]:
    """The vector (terms.vector.words,) that `silo` would mask, and the seconds it trained.

    Raises:
        ProtocolError: the update goes beyond the plan's `coordinate_clip`.
    """
    began = time.perf_counter()
    update = trainer.train(received)
    seconds = time.perf_counter() - began
    if terms.private:
        update = terms.grid.cut(update)
    return terms.vector.quantize(terms.grid, update, terms.weight(silo, trainer.records)), seconds


def average(terms: Terms, number: int, received: AdapterState, vectors: Mapping[str, Words]) -> AdapterState:
    """The model after round `number`: masks cancel, so the sum of the `vectors` is all that they leave.

    Raises:
        ProtocolError: the sum is out of bounds.
    """
    total = np.zeros(terms.vector.words, dtype=np.uint32)
    for words in vectors.values():
        total += words
    return compute_outcome(terms, number, received, total, tuple(vectors)).model


def run_federated(terms: Terms, trainers: Mapping[str, Trainer], start: AdapterState, watch: Watch) -> None:
    """All training rounds of a federation in which nobody drops out.

    Raises:
        ModelError, ProtocolError: as `contribute` and `average`.
    """
    model, ended = start, False
    for number in range(1, terms.training_rounds + 1):
        if ended:
            watch(number, dict.fromkeys(trainers, model), None)
            continue
        given = {silo: contribute(terms, silo, trainer, model) for silo, trainer in trainers.items()}
        before, model = model, average(terms, number, model, {silo: words for silo, (words, _) in given.items()})
        watch(number, dict.fromkeys(trainers, model), max(seconds for _, seconds in given.values()))
        ended = terms.moved_nothing(number, before.digest, model.digest)


def run_alone(rounds: int, trainers: Mapping[str, Trainer], start: AdapterState, watch: Watch) -> None:
    """Each silo by itself, for as many rounds: nothing is rounded or averaged.

    Raises:
        ModelError: training ran to NaN or infinity.
    """
    models = dict.fromkeys(trainers, start)
    for number in range(1, rounds + 1):
        slowest = 0.0
        for silo, trainer in trainers.items():
            began = time.perf_counter()
            vector = models[silo].vector.astype(np.float64) + trainer.train(models[silo])
            slowest = max(slowest, time.perf_counter() - began)
            models[silo] = AdapterState(start.layout, vector.astype(np.float32))
        watch(number, models, slowest)
