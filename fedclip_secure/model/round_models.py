"""The models of a run and how they did; which of them is the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelPoint:
    """The model after `round` rounds, and its validation counts over the silos of the round that started from it."""

    round: int
    model: bytes  # digest
    correct: int
    total: int


def best_of(points: Sequence[ModelPoint]) -> ModelPoint:
    """The point of the highest validation accuracy, the later one of equals; the last where nobody counted."""
    return max(points, key=lambda point: (point.correct / point.total if point.total else 0.0, point.round))
