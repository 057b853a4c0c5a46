"""The commands about privacy: what was spent, the report, its verification, the audit."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from fedclip_cli.console import FILE, FOLDER, Command, agreed, err, out, print_table, printable
from fedclip_cli.owner import settings
from fedclip_secure.disk import telling
from fedclip_secure.errors import ConfigError, TrustError
from fedclip_secure.pki.identity import Identity
from fedclip_secure.silo.accepted import load_accepted

if TYPE_CHECKING:  # these take seconds to load
    from fedclip_secure.audit.selftest import AuditResult
    from fedclip_secure.privacy.ledger.spending import Account, RunAccount
    from fedclip_secure.privacy.verification.verdict import Verdict

_CONFIG = click.option(
    "--config", "path", type=FILE, default="silo.yaml", show_default=True, help="This silo's settings."
)
_ENDING = (
    "This ends for good: {runs}. Nothing more can be trained there; what was spent stays spent, and what is kept "
    "for it becomes free."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object.")


def _pin(_context: click.Context, _parameter: click.Parameter, given: str | None) -> str | None:
    """A pin as documents hold it, of one as `accept` or a report's page shows it."""
    if given is None:
        return None
    digits = "".join(given.split()).lower().removeprefix("sha256:")
    if not re.fullmatch("[0-9a-f]{64}", digits):
        raise click.BadParameter(
            f"{given!r} is no pin; a pin has 64 digits of 0-9 and a-f, after sha256: or alone, in quotes where there "
            "are spaces between them"
        )
    return f"sha256:{digits}"


@click.command(cls=Command, epilog="Example: fedclip-silo budget")
@_CONFIG
@_JSON
@click.option(
    "--end",
    "federation",
    metavar="FEDERATION",
    help="End this silo's unfinished runs of a federation, for good: what was kept for them is free.",
)
@click.option(
    "--clock-was-wrong", is_flag=True, help="Note that the clock was ahead when the ledger's newest entry was written."
)
@click.option("--yes", is_flag=True, help="End it without asking.")
def budget(path: Path, as_json: bool, federation: str | None, clock_was_wrong: bool, yes: bool) -> None:
    """What was spent of this organisation's privacy budget, by which run, and what is left.

    For this house alone: the numbers of units follow from the data. It may be asked while `train` runs.
    """
    from fedclip_secure.silo.run.privacy_account import cap_of, end_runs, existing_ledger, mend_clock, unfinished

    config = settings(path)
    identity = Identity.load(Path(config.identity))
    if clock_was_wrong:
        mend_clock(config, identity)
        err.print("noted and signed: the clock was ahead. The report will say so")
    if federation is not None:
        question = f"{_ENDING.format(runs=unfinished(config, identity, federation))} End it?"
        if not agreed(question, yes=yes, on_stderr=True):
            raise TrustError("nothing was ended; `fedclip-silo train` goes on with what is unfinished")
        freed = end_runs(config, identity, federation)
        err.print(f"ended: nothing more is paid for in {federation}; {freed} round(s) are free again", markup=False)
    with closing(existing_ledger(config, identity)) as ledger:
        account = ledger.account(cap_of(config.policy))
        for line in ledger.warnings(cap_of(config.policy)):
            err.print(line, markup=False)
    if as_json:
        click.echo(json.dumps(account.as_json()))
    else:
        _print_account(account)


@click.command(cls=Command, epilog="Example: fedclip-silo report --out report")
@_CONFIG
@click.option("--out", "folder", type=FOLDER, help="Where to; default: report in the workdir.")
def report(path: Path, folder: Path | None) -> None:
    """Write the signed privacy report (report.json) and the page made of it (report.html).

    No figure in it depends on this silo's records. Without privacy in the plan it says what is then not protected.
    """
    from fedclip_secure.audit.crosscheck import second_opinion
    from fedclip_secure.privacy.page.output import write_report
    from fedclip_secure.privacy.verification.verify import verify as check
    from fedclip_secure.silo.report import make_report

    config = settings(path)
    identity, accepted = Identity.load(Path(config.identity)), load_accepted(config)
    data = make_report(config, identity, accepted, second_opinion(accepted.contract))
    verdict = check(data)
    if not verdict.passed:
        listed = "".join(f"\n  {found.name}: {found.shows}" for found in verdict.failures)
        raise TrustError(f"the report does not pass its own verification, and was not written:{listed}")
    signed, page = write_report(folder or Path(config.workdir, "report"), data)
    out.print(f"{signed}, signed by {identity.name}; {page} shows it", markup=False)
    print_failed_tests(verdict.failed_tests)
    out.print(f"anybody can check it offline: fedclip-silo verify {signed}", markup=False)


@click.command(
    cls=Command, anywhere=True, epilog="Example: fedclip-silo verify report.json --plan sha256:... --roster sha256:..."
)
@click.argument("file", type=FILE)
@click.option("--plan", callback=_pin, help="The plan's pin that you know from elsewhere.")
@click.option("--roster", callback=_pin, help="The roster's pin that you know from elsewhere.")
@_JSON
def verify(file: Path, plan: str | None, roster: str | None, as_json: bool) -> None:
    """Check a privacy report, of a silo or of the federation: offline, and without trusting who wrote it."""
    from fedclip_secure.privacy.verification.silo_checks import Expected
    from fedclip_secure.privacy.verification.verify import verify as check

    with telling(file):
        data = file.read_bytes()
    verdict = check(data, Expected(plan_pin=plan, roster_pin=roster))
    compared = {"plan": plan is not None, "roster": roster is not None}
    if as_json:
        click.echo(json.dumps({**_verdict_json(verdict), "compared": compared}))
    else:
        _print_verdict(file, verdict, [name for name, done in compared.items() if not done])
    if not verdict.passed:
        click.get_current_context().exit(1)


@click.command(cls=Command, epilog="Example: fedclip-silo audit")
@_CONFIG
@_JSON
def audit(path: Path, as_json: bool) -> None:
    """Test that the mechanism is what the plan says, on made-up records, and attack it; for the next report.

    Two whole rounds of the plan are trained on this silo's device, from the newest model that it keeps. That takes
    from some seconds to minutes, by the plan. No record of this silo is read.
    """
    from fedclip_secure.audit.at_silo import setting_of
    from fedclip_secure.audit.selftest import run_audit
    from fedclip_secure.secagg.terms import Terms
    from fedclip_secure.silo.report import save_audit
    from fedclip_secure.silo.run.final_models import newest_model

    config = settings(path)
    accepted = load_accepted(config)
    contract, workdir = accepted.contract, Path(config.workdir)
    noise = contract.lock.noise_multiplier
    if noise is None:
        raise ConfigError(f"'{path}': the accepted plan has no differential privacy; there is no mechanism to test")
    received = newest_model(workdir, contract, Terms.of(contract, accepted.roster))
    result = run_audit(contract.plan, noise, setting_of(contract, config, received))
    kept = save_audit(workdir, accepted, result.for_report())
    if as_json:
        click.echo(json.dumps(result.as_json()))
    else:
        _print_audit(result, kept)
    if not result.passed:
        click.get_current_context().exit(1)


def _print_audit(result: AuditResult, kept: Path) -> None:
    for found in result.evidence:
        mark = Text("passed", "green") if found.passed else Text("FAILED", "bold red")
        out.print(Text.assemble(mark, " ", found.name, ": ", found.shows))
        if not found.passed:
            out.print(f"  {found.failure}", markup=False)
    hour = time.strftime("%Y-%m-%d %H h UTC", time.gmtime(result.at))
    out.print(
        f"{hour}, code {result.code[:16]}, on {result.setting.device}, from {result.setting.came_from}; "
        f"it took {result.seconds:.0f} s",
        markup=False,
    )
    out.print(f"{kept}; the next report holds it", markup=False)


def _print_account(account: Account) -> None:
    from fedclip_secure.privacy.ledger.spending import PLAN_DIGITS, percent

    if not account.runs:
        out.print("nothing was spent yet")
        return
    table = Table(
        "run",
        "plan",
        "begun",
        "rounds trained",
        "again",
        "lost",
        "sigma",
        "steps",
        "epsilon so far",
        "at most",
        box=None,
    )
    for run in account.runs:
        table.add_row(*(Text(cell) for cell in _run_cells(run)))
    print_table(table)
    life = account.lifetime
    if life is None:
        out.print("no policy.max_epsilon in silo.yaml: nothing limits the sum of these runs")
        return
    out.print(
        f"over all runs, the unit that was charged most has spent {percent(life.share)} of the limit's budget "
        f"(epsilon {life.epsilon:.4g} of {life.cap_epsilon:g}, delta {life.cap_delta:g}); "
        f"{life.rounds_left} more round(s) like the last run's fit",
        markup=False,
    )
    held = [
        f"{run.federation} ({run.silo}, plan {run.plan[:PLAN_DIGITS]}): {run.held} round(s)"
        for run in account.runs
        if run.held
    ]
    if held:
        out.print(
            f"beside what is kept for unfinished runs, which may bring it to {percent(life.share_held)} of the limit's "
            f"budget (epsilon {life.epsilon_held:.4g}): "
            f"{', '.join(held)}; `fedclip-silo budget --end FEDERATION` frees what nobody will train any more",
            markup=False,
        )
    out.print(
        "(the limit's budget is the RDP that max_epsilon and delta allow at one order: each round like another takes "
        "the same share of it, while a first round costs more of an epsilon than the next. It holds over plans that "
        "are chosen after seeing results, so its epsilon is not the runs' own, each of which is of one plan, by PLD)",
        markup=False,
    )
    out.print(f"{life.exhausted} of {life.units} unit(s) cannot pay for one more such round", markup=False)


def _run_cells(run: RunAccount) -> list[str]:
    from fedclip_secure.privacy.ledger.spending import PLAN_DIGITS, day

    return [
        f"{run.federation} ({run.silo}), {run.unit}s{', ended' if run.ended else ''}",
        run.plan[:PLAN_DIGITS],
        day(run.began_at),
        f"{len(run.trained)} of {run.rounds}",
        f"{run.retrains} of {run.max_retrains}",
        str(run.without_result),
        f"{run.noise_multiplier:g}",
        f"{run.steps} of {run.steps_at_most}",
        f"{run.epsilon:.4g} (delta {run.delta:g})",
        f"{run.epsilon_at_most:.4g}",
    ]


def _print_verdict(file: Path, verdict: Verdict, uncompared: Sequence[str]) -> None:
    for check in verdict.checks:
        mark = Text("passed", "green") if check.passed else Text("FAILED", "bold red")
        out.print(Text.assemble(mark, f" {check.name}: ", printable(check.shows)))
    for name, pin in (("plan  ", verdict.plan_pin), ("roster", verdict.roster_pin)):
        if pin is not None:
            out.print(f"{name} {pin}", markup=False)
    if verdict.passed:
        if uncompared:
            out.print(
                "compare them with what you were told, or give --plan and --roster: they decide whose report it is"
            )
        _print_list("left open, as it says itself:", verdict.open_points)
        _print_list("not shown by any report:", verdict.cannot_show)
        print_failed_tests(verdict.failed_tests)
    out.print(f"{file}: {_outcome(verdict, uncompared)}", markup=False)


def _print_list(title: str, lines: Sequence[str]) -> None:
    if lines:
        out.print(title)
    for line in lines:
        out.print(f"  - {printable(line)}", markup=False)


def print_failed_tests(tests: Sequence[str]) -> None:
    """Say which tests of the mechanism have failed, as a report says itself."""
    if tests:
        out.print(Text.assemble(("FAILED", "bold red"), " on a silo's own machine: ", printable(", ".join(tests))))
        out.print("do not rely on the claim until it is known why: `fedclip-silo audit` there says what each means")


def _outcome(verdict: Verdict, uncompared: Sequence[str]) -> str:
    if not verdict.passed:
        return "NOT verified"
    found = f"consistent in itself; {' and '.join(uncompared)} not compared" if uncompared else "verified"
    return f"{found}; but tests of the mechanism FAILED" if verdict.failed_tests else found


def _verdict_json(verdict: Verdict) -> dict[str, object]:
    return {
        "passed": verdict.passed,
        "checks": [{"name": one.name, "passed": one.passed, "shows": one.shows} for one in verdict.checks],
        "plan": verdict.plan_pin,
        "roster": verdict.roster_pin,
        "open": list(verdict.open_points),
        "failed_tests": list(verdict.failed_tests),
        "cannot_show": list(verdict.cannot_show),
    }
