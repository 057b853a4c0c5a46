"""How one round grows with the number of silos and of parameters, in time, memory and bytes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from secure.attempt import Attempt
from secure.federation import Federation
from secure.remote import Remote

SIZES = (
    (5, 525_312), (20, 525_312), (50, 525_312), (100, 525_312), (200, 525_312),
    (20, 500_000), (20, 5_000_000), (3, 151_277_313),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Grown:
    """One round. Bytes are those of one silo; a peak is in vectors, of 4 bytes a parameter."""

    silos: int
    parameters: int
    share_seconds: float
    mask_seconds: float
    unmask_seconds: float
    result_seconds: float
    server_unmask_seconds: float
    server_result_seconds: float
    bytes_up: int
    bytes_down: int
    silo_peak_vectors: float
    server_peak_vectors: float


def grow(silos: int, parameters: int) -> Grown:
    """One round of so many silos over so many parameters, in files, one silo and the server each in a process."""
    federation = Federation.create(silos, parameters)
    with Remote() as first, Remote() as aggregator, tempfile.TemporaryDirectory() as name:
        federation.model.to_file(Path(name, "model"))
        attempt = Attempt(federation, 1, first, server=aggregator, folder=Path(name))
        attempt.run()
        silo, server = first.seconds(), aggregator.seconds()
        return Grown(
            silos=silos,
            parameters=parameters,
            share_seconds=silo["share"],
            mask_seconds=silo["quantise"] + silo["mask"] + silo["seal"],
            unmask_seconds=silo["unmask"],
            result_seconds=silo["result"],
            server_unmask_seconds=server["answers"] + server["sum"],
            server_result_seconds=server["result"],
            bytes_up=sum(attempt.sent),
            bytes_down=sum(attempt.received),
            silo_peak_vectors=first.memory() / (4 * parameters),
            server_peak_vectors=aggregator.memory() / (4 * parameters),
        )
