"""Any federation, any drop-outs, any order and any bit, for the properties that hold for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from fedclip_secure.secagg.aggregator_session import Phase
from fedclip_secure.secagg.silo_session import ModelRecord
from fedclip_secure.secagg.terms import threshold
from tests.fakes import Attempt, Federation
from tests.secagg.lies import STAGES

# Mostly small: an attempt costs some n^2 sealed texts. No deadlines: other processes may use the machine.
SIZES = [*range(3, 13)] * 8 + [16, 25, 40]
SEED = st.integers(0, 2**32 - 1)
WHICH = st.integers(0, 2**20)  # of a list, by its remainder


@dataclass(frozen=True)
class Scenario:
    """A federation, and how many silos vanish before each stage; `seed` decides which, and every order."""

    size: int
    mode: str
    colluding: int
    vanish: Mapping[str, int]
    seed: int

    @property
    def enough(self) -> bool:
        """Whether the rules let this end with a result."""
        left, federation = self.size, self.federation()
        for stage in STAGES:
            left -= self.vanish[stage]
            least = federation.terms.floor if STAGES.index(stage) <= STAGES.index("upload") else self.t
            if left < least:
                return False
        return True

    @property
    def t(self) -> int:
        return threshold(self.size, self.mode, self.colluding)

    def federation(self, parameters: int = 5) -> Federation:
        return Federation(self.size, parameters, mode=self.mode, colluding=self.colluding)

    def drop(self, silos: Sequence[str]) -> dict[str, set[str]]:
        order = shuffled(silos, np.random.default_rng(self.seed))
        return {stage: {order.pop() for _ in range(self.vanish[stage])} for stage in STAGES}


def shuffled(names: Sequence[str], rng: np.random.Generator) -> list[str]:
    return [names[index] for index in rng.permutation(len(names))]


def allowed(size: int) -> list[tuple[str, int]]:
    """Modes and numbers of colluding silos that a plan for `size` silos may have."""
    return [
        (mode, colluding)
        for mode in ("malicious", "honest_but_curious")
        for colluding in range(size - 1)
        if colluding + 2 <= threshold(size, mode, colluding) <= size
    ]


@st.composite
def scenarios(draw: st.DrawFn, sizes: Sequence[int] = SIZES, stages: Sequence[str] = STAGES) -> Scenario:
    """As many drop-outs as the plan tolerates, fewer, or one more."""
    size = draw(st.sampled_from(sizes))
    mode, colluding = draw(st.sampled_from(allowed(size)))
    floor = max(threshold(size, mode, colluding), 3)
    gone = draw(st.lists(st.sampled_from(stages), max_size=size - floor + 1))
    return Scenario(size, mode, colluding, {stage: gone.count(stage) for stage in STAGES}, draw(SEED))


@dataclass
class Shuffled(Attempt):
    """Silos that are still in it come to each stage in an order of its own."""

    rng: np.random.Generator = field(default_factory=np.random.default_rng)

    def _enter(self, stage: str) -> list[str]:
        listed = super()._enter(stage)
        if self.server.phase is not Phase.JOIN:
            listed = [name for name in listed if name in self.server.missing()]
        return shuffled(listed, self.rng)


def random_records(federation: Federation, seed: int) -> dict[str, ModelRecord]:
    """Any words at all: sums of them wrap."""
    rng, words = np.random.default_rng(seed), federation.terms.vector.words

    def record() -> ModelRecord:
        vector = rng.integers(0, 2**32, words, dtype=np.uint32)
        return ModelRecord(federation.model.digest, lambda: vector)

    return {name: record() for name in federation.silos}


def sum_of(attempt: Attempt) -> list[int]:
    """Over the survivors, in Python's integers, modulo 2^32."""
    rows = [[int(word) for word in attempt.records[name].open_vector()] for name in attempt.server.uploads]
    return [sum(column) % 2**32 for column in zip(*rows, strict=True)]


def unmasked(attempt: Attempt) -> list[int]:
    total = attempt.server.unmask_sum(attempt.vectors[name] for name in attempt.server.uploads)
    return [int(word) for word in total]


def flipped(data: bytes, bit: int) -> bytes:
    place, changed = bit % (8 * len(data)), bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def flipped_text(text: str, bit: int) -> str:
    """One of the seven bits of one letter."""
    place, changed = bit % (7 * len(text)), bytearray(text.encode())
    changed[place // 7] ^= 1 << place % 7
    return changed.decode()
