"""The demo's privacy reports: each lab's and the federation's, as their people would make them, and each verified."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedclip_secure.aggregator.home import Home
from fedclip_secure.aggregator.report import make_federation_report
from fedclip_secure.audit.at_silo import setting_of
from fedclip_secure.audit.crosscheck import second_opinion
from fedclip_secure.audit.selftest import run_audit
from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.errors import TrustError
from fedclip_secure.pki.identity import Identity
from fedclip_secure.privacy.accounting.plan_cost import PlannedRun
from fedclip_secure.privacy.page.output import write_report
from fedclip_secure.privacy.report.document import Audit, SiloReport
from fedclip_secure.privacy.verification.silo_checks import Expected
from fedclip_secure.privacy.verification.verify import read_report, verify
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.accepted import Accepted
from fedclip_secure.silo.report import make_report, save_audit
from fedclip_secure.silo.run.final_models import newest_model


@dataclass(frozen=True, slots=True)
class Reports:
    """`epsilon` is what each lab's report claims, by the lab's name; `paths` are those of the signed files."""

    epsilon: dict[str, float]
    delta: float
    unit: str
    paths: tuple[Path, ...]  # the federation's last


def write_reports(
    home: Home, accepted: Accepted, configs: Mapping[str, SiloConfig], say: Callable[[str], None]
) -> Reports:
    """Audit the mechanism once, as the first lab trains: all run the same code here. Then report and verify.

    Raises:
        TrustError: a report does not verify.
    """
    planned = PlannedRun.of(accepted.contract)
    assert planned is not None  # noqa: S101 - the caller asked for privacy
    say("auditing the mechanism: two rounds of the plan on made-up records, and an attack; it takes a while")
    audit = _audit(accepted, planned, next(iter(configs.values())))
    say("writing and verifying the reports")
    prv = second_opinion(accepted.contract)
    epsilon, paths = {}, []
    for name, config in configs.items():
        save_audit(Path(config.workdir), accepted, audit)
        data = make_report(config, Identity.load(Path(config.identity)), accepted, prv)
        paths.append(_written(Path(config.workdir, "report"), data, accepted))
        report = read_report(data)
        assert isinstance(report, SiloReport)  # noqa: S101 - made above
        assert report.body.claim is not None  # noqa: S101 - as above
        epsilon[name] = report.body.claim.epsilon
    paths.append(_written(home.folder / "report", make_federation_report(home, paths), accepted))
    return Reports(epsilon, planned.delta, planned.privacy.unit, tuple(paths))


def _audit(accepted: Accepted, planned: PlannedRun, config: SiloConfig) -> Audit:
    contract = accepted.contract
    received = newest_model(Path(config.workdir), contract, Terms.of(contract, accepted.roster))
    setting = setting_of(contract, config, received)
    return run_audit(contract.plan, planned.per_round.noise_multiplier, setting).for_report()


def _written(folder: Path, data: bytes, accepted: Accepted) -> Path:
    path = write_report(folder, data)[0]
    verdict = verify(path.read_bytes(), Expected(accepted.contract.pin, accepted.roster.pin))
    if not verdict.passed:
        listed = "".join(f"\n  {found.name}: {found.shows}" for found in verdict.failures)
        raise TrustError(f"'{path}': does not verify:{listed}")
    return path
