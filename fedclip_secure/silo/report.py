"""What `fedclip-silo report` gathers at this silo, and where report and audit lie."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path

from pydantic import ValidationError

from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.disk import refused
from fedclip_secure.errors import ConfigError, DataError
from fedclip_secure.files import write_atomically
from fedclip_secure.pki.identity import Identity
from fedclip_secure.privacy.ledger.entries import SignedEntry
from fedclip_secure.privacy.report.document import Audit, Estimate, Limit, sign_report
from fedclip_secure.privacy.report.silo_report import SiloFacts, report_body
from fedclip_secure.privacy.report.software import software
from fedclip_secure.silo.accepted import Accepted
from fedclip_secure.silo.receipts import read_receipts
from fedclip_secure.silo.run.final_models import adapter_folder, read_models
from fedclip_secure.silo.run.privacy_account import begun_with, is_begun, ledger_of_run

_LIBRARIES = ("torch", "open_clip_torch", "opacus", "dp-accounting", "numpy", "scipy", "cryptography")


def make_report(config: SiloConfig, identity: Identity, accepted: Accepted, prv: Estimate | None) -> bytes:
    """This silo's signed report on the accepted run, as it stands now.

    `prv` is epsilon of the whole plan by a second accountant; None without privacy.

    Raises:
        DataError: a file is at fault, or the clock is behind the ledger.
        TrustError: the ledger was edited, or is another one, or the journal is not the newest.
    """
    policy, workdir = config.policy, Path(config.workdir)
    limit = None if policy.max_epsilon is None else Limit(epsilon=policy.max_epsilon, delta=policy.delta)
    private = accepted.contract.plan.privacy is not None
    entries, receipts = _history(config, identity, accepted) if private else ((), ())
    facts = SiloFacts(
        contract=accepted.contract,
        roster=accepted.roster,
        silo=identity.name,
        at=int(time.time()),
        entries=entries,
        receipts=receipts,
        models=read_models(adapter_folder(workdir), accepted.contract),
        prv=prv,
        audit=load_audit(workdir, accepted) if private else None,
        limit=limit if private else None,
        units_at_least=config.units_at_least,
        versions=software(_LIBRARIES),
    )
    return sign_report(report_body(facts), identity.name, identity.sign, identity.key.public_bytes)


def _history(
    config: SiloConfig, identity: Identity, accepted: Accepted
) -> tuple[tuple[SignedEntry, ...], tuple[bytes, ...]]:
    """The whole ledger, and this run's receipts: these first, so that the ledger has the entries that they are for.

    A report begins no ledger: where there is none, nothing was spent.
    """
    roster = accepted.roster.digest
    receipts = read_receipts(Path(config.workdir), identity.epoch_path, roster)
    if not is_begun(config) and not receipts and begun_with(config, accepted) is None:
        return (), receipts
    with closing(ledger_of_run(config, identity, accepted, receipts)) as ledger:
        ledger.check_clock()
        units, entries = ledger.units_of(accepted.contract.digest, roster), tuple(ledger.entries())
    if config.units_at_least is not None and units and units < config.units_at_least:
        raise ConfigError(
            f"silo.yaml: units_at_least: {config.units_at_least} is more than this run has, and would be signed; "
            "lower it, or leave it out"
        )
    return entries, receipts


def save_audit(workdir: Path, accepted: Accepted, audit: Audit) -> Path:
    """Keep an audit for the next report.

    Raises:
        DataError: the disk refuses.
    """
    kept = {"plan": accepted.contract.pin, "audit": audit.model_dump(mode="json")}
    path = workdir / "audit.json"
    write_atomically(path, f"{json.dumps(kept, indent=2)}\n".encode())
    return path


def load_audit(workdir: Path, accepted: Accepted) -> Audit | None:
    """The newest audit, if it is of the accepted plan.

    Raises:
        ConfigError: the file is damaged. DataError: the disk refuses.
    """
    path = workdir / "audit.json"
    if not path.exists():
        return None
    try:
        kept = json.loads(path.read_text("utf-8"))
        return Audit.model_validate(kept["audit"]) if kept["plan"] == accepted.contract.pin else None
    except OSError as error:
        raise DataError(refused(error, path)) from error
    except (ValueError, KeyError, TypeError, ValidationError, RecursionError) as error:
        raise ConfigError(f"'{path}': cannot be read as an audit; run `fedclip-silo audit` again") from error
