"""What `fedclip-silo train` does, from the accepted contract to the adapters in the workdir."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from fedclip_secure.config.lock import Contract
from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.features.progress import ShowProgress
from fedclip_secure.pki.identity import Identity
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.journal import Journal
from fedclip_secure.silo.link import Link, present
from fedclip_secure.silo.outcome import SavedAdapter, save_adapters
from fedclip_secure.silo.party import Party
from fedclip_secure.silo.pins import Accepted, check_same, text_features_path
from fedclip_secure.silo.runner import Runner, Trainer
from fedclip_secure.transport.client import Client, Waiting

_FIRST_SIGN = 0.5  # seconds; loading torch can keep the event loop from its first sign of life for seconds


async def take_part(
    config: SiloConfig,
    identity: Identity,
    accepted: Accepted,
    *,
    progress: ShowProgress,
    say: Callable[[str], None],
    waiting: Waiting,
    abandon: int | None = None,
) -> list[SavedAdapter]:
    """Join the run, stay until its last round, and save the best and the last adapter.

    `abandon` is a round that a person decided to give up.

    Raises:
        TrustError: the server runs another plan or roster than was accepted; or it halted the run.
        ProtocolError: the server broke a rule of the secure round.
        ConfigError: there is nothing to give up in round `abandon`.
        DataError, ModelError: this silo's data, weights or disk are at fault.
    """
    contract, workdir = accepted.contract, Path(config.workdir)
    terms = Terms.of(contract, accepted.roster)
    journal = Journal(workdir, identity.epoch_path)  # first of all: it keeps a second process out of this workdir
    try:
        async with Client.of(identity, waiting) as client:
            link = Link(client, workdir)
            check_same(accepted, await link.offer(identity.server), identity.server)
            async with present(link, after=0):
                await asyncio.sleep(_FIRST_SIGN)
                trainer = await asyncio.to_thread(_trainer, config, contract, progress)
            party = Party(identity, terms)
            weight = party.weight(trainer.records)
            capped = f" (max_weight; {trainer.records} records)" if weight < trainer.records else ""
            say(f"{identity.name}: {trainer.records} training records, weight {weight}{capped}")
            await Runner(party, trainer, link, journal, say).run(abandon)
            return await save_adapters(link, contract, terms, workdir)
    finally:
        journal.close()


def _trainer(config: SiloConfig, contract: Contract, progress: ShowProgress) -> Trainer:
    """Imports torch only here, when the aggregator has seen this silo: that takes seconds, and a round may begin."""
    from fedclip_secure.features.encoder import choose_device  # noqa: PLC0415
    from fedclip_secure.training.inputs import load_inputs  # noqa: PLC0415
    from fedclip_secure.training.local import LocalTrainer  # noqa: PLC0415

    inputs = load_inputs(config, contract, progress, text_features_path(config))
    return LocalTrainer(contract.plan, inputs.task, inputs.splits, choose_device(config.device))
