from __future__ import annotations

import numpy as np
import pytest

from fedclip_secure.errors import ProtocolError
from tests.fakes import Attempt, Federation


def plain_sum(attempt: Attempt, names: set[str]) -> list[int]:
    vectors = np.stack([attempt.records[name].open_vector().view(np.int32) for name in sorted(names)])
    return [int(value) for value in vectors.astype(np.int64).sum(axis=0)]


@pytest.mark.parametrize("size", [3, 4, 5, 10])
def test_the_sum_is_exact(size: int) -> None:
    attempt = Federation(size).attempt()
    attempt.run()
    assert attempt.total.view(np.int32).tolist() == plain_sum(attempt, set(attempt.federation.silos))


@pytest.mark.parametrize("stage", ["share", "upload", "agree", "unmask", "result"])
def test_a_silo_that_vanishes_at_any_stage_does_not_stop_the_others(stage: str) -> None:
    federation = Federation(5)
    attempt = federation.attempt(drop={stage: {"silo-002"}})
    attempt.run()
    gone = {"silo-002"} if stage in ("share", "upload") else set()
    assert attempt.total.view(np.int32).tolist() == plain_sum(attempt, set(federation.silos) - gone)


def test_below_the_floor_the_attempt_ends() -> None:
    attempt = Federation(4).attempt(drop={"upload": {"silo-000", "silo-001"}})
    attempt.join()
    attempt.share()
    with pytest.raises(ProtocolError, match="2 silos at stage 'upload'"):
        attempt.upload()
