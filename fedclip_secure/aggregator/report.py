"""The federation's privacy report, of the silos' signed ones and of what the coordinator itself has signed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from fedclip_secure.aggregator.home import Home
from fedclip_secure.config.lock import Contract
from fedclip_secure.disk import refused
from fedclip_secure.errors import ConfigError, DataError, TrustError
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.keys import SigningKey
from fedclip_secure.pki.roster import Roster
from fedclip_secure.privacy.report.document import FederationReport, SiloReport, sign_report
from fedclip_secure.privacy.report.software import software
from fedclip_secure.privacy.verification.federation_report import FederationFacts, combine
from fedclip_secure.privacy.verification.verify import read_report

_LIBRARIES = ("dp-accounting", "numpy", "scipy", "cryptography")


def make_federation_report(home: Home, files: Sequence[Path]) -> bytes:
    """The signed report over the silos' reports in `files`, each verified, and held against this server's receipts.

    Raises:
        ConfigError: the roster is not frozen. DataError: a file cannot be read.
        TrustError: a report does not pass, or is no silo's of this federation.
    """
    reports = [_read(path) for path in files]
    store = home.store_to_read()
    try:
        frozen = store.frozen()
        if frozen is None:
            raise ConfigError(f"'{home.folder}': the roster is not frozen: there was no run; run `fedclip-agg freeze`")
        contract, roster = Contract.decode(frozen[0], "the store"), Roster.decode(frozen[1])
        receipts = [receipt for silo in roster.silos if (receipt := store.receipt(silo)) is not None]
        models = {row.round: row.model for row in store.rounds()}
    finally:
        store.close()
    facts = FederationFacts(
        contract=contract,
        roster=roster,
        at=int(time.time()),
        reports=reports,
        receipts=receipts,
        models=models,
        versions=software(_LIBRARIES),
    )
    key = SigningKey.load(home.signing_key)
    return sign_report(combine(facts), AGGREGATOR, key.sign, key.public_bytes)


def silent_silos(data: bytes) -> list[str]:
    """Whose report is missing from the federation's report `data`."""
    report = read_report(data)
    assert isinstance(report, FederationReport)  # noqa: S101 - `make_federation_report` made it
    return [silo.silo for silo in report.body.silos if not silo.reported]


def _read(path: Path) -> SiloReport:
    try:
        report = read_report(path.read_bytes())
    except OSError as error:
        raise DataError(refused(error, path)) from error
    except TrustError as error:
        raise TrustError(f"'{path}': {error}") from error
    if not isinstance(report, SiloReport):
        raise TrustError(f"'{path}': is a federation's report; give those of the silos")
    return report
