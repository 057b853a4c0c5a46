"""From an unmasked sum to the next model: the same arithmetic at the aggregator and at every silo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedclip_secure.errors import ProtocolError
from fedclip_secure.model.state import AdapterState, Floats
from fedclip_secure.secagg.messages import Result, ServerAd, vector_hash
from fedclip_secure.secagg.ring import FixedPoint, Total, Words, chunks, read_total
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
        ProtocolError: `sum-bounds`.
    """
    total = read_total(words, terms.vector, terms.grid, len(survivors))
    _check_weights(terms, total, survivors)
    if not terms.trains(round_number) and total.update.any():
        raise ProtocolError("sum-bounds", "the closing validation round moved the model: a silo sent garbage")
    model = _next(terms, round_number, old, total)
    return Outcome(model, tuple(survivors), total.weight, total.correct, total.total)


def _next(terms: Terms, round_number: int, old: AdapterState, total: Total) -> AdapterState:
    """`old` itself where nothing moved: -0 and 0 are equal, and would give two digests."""
    if not terms.trains(round_number):
        return old
    vector, moved = _step(old.vector, total, terms.grid)
    return AdapterState(old.layout, vector) if moved else old


def _step(old: Floats, total: Total, grid: FixedPoint) -> tuple[Floats, bool]:
    """The next vector (d,), and whether it differs from `old` (d,); beside them memory does not grow with d."""
    vector, moved = np.empty(total.update.size, dtype=np.float32), False
    for part in chunks(total.update.size):
        vector[part] = old[part].astype(np.float64) + grid.mean(total.update[part], total.weight)
        moved = moved or not np.array_equal(vector[part], old[part])
    return vector, moved


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
