"""From an unmasked sum to the next model: the same arithmetic at the aggregator and at every silo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedclip_secure.errors import ProtocolError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.secagg.messages import Result, ServerAd, vector_hash
from fedclip_secure.secagg.ring import Total, Words, read_total
from fedclip_secure.secagg.terms import Terms


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A round's result. `correct` of `total` are validation records under the model it started from."""

    model: AdapterState
    survivors: tuple[str, ...]
    weight: int
    correct: int
    total: int


def compute_outcome(
    terms: Terms, round_number: int, old: AdapterState, words: Words, survivors: Sequence[str]
) -> Outcome:
    """Check the sum `words` over `survivors` and step from `old` by its weighted mean.

    float64 in the order of the coordinates, rounded to float32 once, so that every party gets the
    same bits.

    Raises:
        ProtocolError: `sum-bounds`, `unmoved`.
    """
    total = read_total(words, terms.vector, terms.grid, len(survivors))
    _check_weights(terms, total, survivors)
    if not terms.trains(round_number) and total.update.any():
        raise ProtocolError("sum-bounds", "the closing validation round moved the model: a silo sent garbage")
    mean = terms.grid.mean(total.update, total.weight)
    vector = (old.vector.astype(np.float64) + mean).astype(np.float32)
    if terms.trains(round_number) and np.array_equal(vector, old.vector):
        # The next round would start from the same model, over which every silo adds its vector only once.
        raise ProtocolError("unmoved", "the round moved no parameter; the plan's training.optimizer.lr is too small")
    return Outcome(AdapterState(old.layout, vector), tuple(survivors), total.weight, total.correct, total.total)


def result_of(ad: ServerAd, transcript2: bytes, survivors: bytes, words: Words, outcome: Outcome) -> Result:
    """What every party must sign, or expect to be signed, of the same sum."""
    return Result(
        plan=ad.plan,
        roster=ad.roster,
        round=ad.round,
        start=ad.model,
        transcript=transcript2,
        survivors=survivors,
        sum=vector_hash(words),
        model=outcome.model.digest,
        correct=outcome.correct,
        total=outcome.total,
    )


def _check_weights(terms: Terms, total: Total, survivors: Sequence[str]) -> None:
    if terms.public_weights is None:
        return
    expected = sum(terms.public_weights[name] for name in survivors)
    if total.weight != expected:
        raise ProtocolError("sum-bounds", f"the weights add up to {total.weight}, the plan's to {expected}")
