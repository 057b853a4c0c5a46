"""A silo process that also writes down what it computed, and can stop for good before an upload.

For tests alone: the package has no switch that could write an unmasked update anywhere.
`python -m tests.federation.probe SILO_YAML DUMP_FOLDER [--pause-from ATTEMPT]`
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedclip_secure.config.silo import read_silo
from fedclip_secure.model.state import AdapterState
from fedclip_secure.pki.identity import Identity
from fedclip_secure.secagg.ring import Words
from fedclip_secure.silo.accepted import load_accepted
from fedclip_secure.silo.run import runner, train
from fedclip_secure.silo.run.link import Link
from fedclip_secure.silo.run.runner import Runner
from fedclip_secure.silo.run.stages import Stages

PAUSED = "paused"


@dataclass
class Orders:
    """What `main` was told."""

    dump: Path = Path()
    pause_from: int = 2**31  # attempt


ORDERS = Orders()


class ProbedRunner(Runner):
    """Keeps the update in float64, the old model and the integers of each round."""

    def _make_vector(self, round_number: int, old: AdapterState, *, counts: bool) -> Words:
        updates: list[npt.NDArray[np.float64]] = [np.zeros(old.vector.size)]
        train_once = self._trainer.train

        def remembering(received: AdapterState) -> npt.NDArray[np.float64]:
            updates.append(train_once(received))
            return updates[-1]

        self._trainer.train = remembering  # type: ignore[method-assign]
        vector = super()._make_vector(round_number, old, counts=counts)
        self._trainer.train = train_once  # type: ignore[method-assign]
        np.savez(ORDERS.dump / f"round-{round_number}.npz", update=updates[-1], old=old.vector, integers=vector)
        return vector


class ProbedLink(Link):
    """Hangs before an upload when told to."""

    async def send_upload(self, attempt: int, pieces: Callable[[], Iterable[bytes]], length: int) -> bytes:
        if attempt >= ORDERS.pause_from:
            (ORDERS.dump / PAUSED).write_text(str(attempt))
            await asyncio.sleep(3600)
        return await super().send_upload(attempt, pieces, length)


class ProbedStages(Stages):
    """Keeps the sums that this silo has checked."""

    async def _sum(self) -> Words:
        words = await super()._sum()
        np.save(ORDERS.dump / f"sum-{self._number}.npy", words)
        return words


def main(config_path: str, dump: str, *pause: str) -> None:
    ORDERS.dump = Path(dump)
    if pause:
        ORDERS.pause_from = int(pause[1])
    vars(train).update(Runner=ProbedRunner, Link=ProbedLink)
    vars(runner).update(Stages=ProbedStages)
    config = read_silo(Path(config_path))
    identity = Identity.load(Path(config.identity))
    asyncio.run(
        train.take_part(
            config,
            identity,
            load_accepted(config),
            progress=lambda _: None,
            say=lambda text: print(text, flush=True),
            waiting=lambda reason, _seconds: print(reason, flush=True),
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
