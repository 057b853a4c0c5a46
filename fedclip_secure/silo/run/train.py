"""What `fedclip-silo train` does, from the accepted contract to the adapters in the workdir."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedclip_secure.config.lock import Contract
from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.disk import check_disk
from fedclip_secure.errors import TrustError
from fedclip_secure.extras import check_installed
from fedclip_secure.features.progress import ShowProgress
from fedclip_secure.pki.identity import Identity
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.accepted import Accepted, check_same, text_features_path
from fedclip_secure.silo.policy import check_records
from fedclip_secure.silo.run.attendance import Attendance
from fedclip_secure.silo.run.final_models import SavedAdapter, fetch_course, save_adapters
from fedclip_secure.silo.run.journal import Journal
from fedclip_secure.silo.run.link import Link, present
from fedclip_secure.silo.run.party import Party
from fedclip_secure.silo.run.privacy_account import Account
from fedclip_secure.silo.run.runner import Runner, Trainer
from fedclip_secure.transport.client import Client, Waiting

if TYPE_CHECKING:  # loads torch
    from fedclip_secure.training.inputs import Inputs
    from fedclip_secure.training.unshared_state import PrivateState


@dataclass(frozen=True, slots=True)
class Finished:
    """What is left of a run that has ended. `still`: why that was before the plan's last round, if it was."""

    adapters: list[SavedAdapter]
    attendance: Attendance
    still: str | None


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
    changed_data: bool = False,
) -> Finished:
    """Join the run, stay until its last round, and save the best and the last adapter.

    `abandon` is a round that a person decided to give up. `changed_data`: with privacy, a person knows
    that records came or went since the run began.

    Raises:
        TrustError: the server runs another plan or roster than was accepted; or it halted the run.
        ProtocolError: the server broke a rule of the secure round.
        ConfigError: there is nothing to give up in round `abandon`, or packages of a silo are missing.
        DataError, ModelError: this silo's data, weights or disk are at fault.
        PolicyError: with privacy, the budget does not allow it.
    """
    check_installed("silo", "training")  # before the others see this silo come
    contract, workdir = accepted.contract, Path(config.workdir)
    _check_disks(config, private=contract.plan.privacy is not None)
    terms = Terms.of(contract, accepted.roster)
    with ExitStack() as stack:
        journal = Journal(workdir, identity.epoch_path)  # first of all: it keeps a second process out of this workdir
        stack.callback(journal.close)
        receipts = journal.receipts(terms.roster.digest)
        account = Account.opened(config, identity, accepted, receipts) if terms.private else None
        if account is not None:
            stack.callback(account.close)
            for line in account.about(config):
                say(f"{identity.name}: {line}")
        async with Client.of(identity, waiting) as client:
            link = Link(client, workdir)
            check_same(accepted, await link.offer(identity.server), identity.server)
            if account is not None:
                account.check(receipts, await link.receipt())
            async with present(link, after=0):
                await asyncio.sleep(_FIRST_SIGN)
                inputs = await asyncio.to_thread(_load, config, contract, progress)
                for line in inputs.report.warnings() if inputs.report else ():
                    say(f"{identity.name}: {line}")
                if account is None:
                    trainer = _trainer(config, contract, inputs)
                else:
                    trainer = _private_trainer(config, contract, inputs, account, changed_data=changed_data)
            if account is None:
                check_records(contract, trainer.records)
            party = Party(identity, terms)
            weight = party.weight(trainer.records)
            masked = contract.plan.secure_aggregation.weights == "masked"
            capped = f" (max_weight; {trainer.records} records)" if masked and weight < trainer.records else ""
            say(f"{identity.name}: {trainer.records} training records, weight {weight}{capped}")
            if account is not None:
                say(f"{identity.name}: {account.told()}")
            runner = Runner(party, trainer, link, journal, say, budget=account)
            await runner.run(abandon)
            course = await fetch_course(link, terms)
            saved = await save_adapters(link, course, contract, terms, workdir)
            if account is not None:
                account.finish()
            attendance = Attendance.of(course, journal.models(), terms, runner.missed)
            return Finished(saved, attendance, terms.still(course.rounds) if course.still else None)


def _check_disks(config: SiloConfig, *, private: bool) -> None:
    """What cannot be locked must show before anything is written into it."""
    for key in ("identity", "workdir", "ledger") if private else ("identity", "workdir"):
        check_disk(Path(getattr(config, key)), f"move it to a local disk, and set `{key}` in silo.yaml")


# These import torch only when the aggregator has seen this silo: that takes seconds, and a round may begin.


def _load(config: SiloConfig, contract: Contract, progress: ShowProgress) -> Inputs:
    from fedclip_secure.methods.registry import find_method  # noqa: PLC0415
    from fedclip_secure.training.inputs import load_inputs  # noqa: PLC0415

    inputs = load_inputs(config, contract, progress, text_features_path(config))
    method = find_method(contract.plan.method)
    if contract.plan.privacy and len(method.phases()) != contract.lock.releases:  # each is charged
        raise TrustError(
            f"federation.lock: says that a step releases {contract.lock.releases} noisy sum(s), and the method "
            f"releases {len(method.phases())}; ask the coordinator to run `prepare` again"
        )
    if method.server_state() != contract.lock.method_state:
        raise TrustError(
            f"federation.lock: its method_state is not what {contract.plan.method.name} makes of the plan here; "
            "ask the coordinator to run `prepare` again, with the versions that this silo has"
        )
    return inputs


def _trainer(config: SiloConfig, contract: Contract, inputs: Inputs) -> Trainer:
    from fedclip_secure.features.encoder import choose_device  # noqa: PLC0415
    from fedclip_secure.training.local_training import LocalTrainer  # noqa: PLC0415

    return LocalTrainer(
        contract.plan, inputs.task, inputs.splits, choose_device(config.device),
        encoder=inputs.encoder, silo=config.name, private_state=_private_state(config, contract),
    )  # fmt: skip


def _private_state(config: SiloConfig, contract: Contract) -> PrivateState:
    """What a method keeps to itself belongs to one run."""
    from fedclip_secure.training.unshared_state import PrivateState  # noqa: PLC0415

    return PrivateState(Path(config.workdir, "private", f"{contract.digest.hex()}.safetensors"), contract.digest)


def _private_trainer(
    config: SiloConfig, contract: Contract, inputs: Inputs, account: Account, *, changed_data: bool
) -> Trainer:
    """Trains on the records of those units that can still pay for the whole run."""
    from fedclip_secure.features.encoder import choose_device  # noqa: PLC0415
    from fedclip_secure.training.private.dp_sgd import PrivateTrainer  # noqa: PLC0415
    from fedclip_secure.training.private.units import unit_ids  # noqa: PLC0415

    plan, records = contract.plan, inputs.splits["train"]
    assert plan.privacy is not None  # noqa: S101 - the caller has an account
    assert contract.lock.noise_multiplier is not None  # noqa: S101 - the policy has seen it
    units = unit_ids(records, plan.privacy.unit, config.data)
    admitted = account.begin(units, changed_data=changed_data)
    device = choose_device(config.device)
    return PrivateTrainer(
        plan, contract.lock.noise_multiplier, inputs.task, records.select(admitted), units[admitted], device,
        encoder=inputs.encoder, silo=config.name, private_state=_private_state(config, contract),
    )  # fmt: skip
