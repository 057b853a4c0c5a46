"""`fedclip-agg`: the coordinator's program."""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click
from rich.table import Table

from fedclip_cli.console import (
    FILE,
    FOLDER,
    Group,
    agreed,
    ending_in_order,
    image_progress,
    out,
    print_table,
    program_options,
    run,
    say,
)
from fedclip_cli.demo import print_demo, run_progress
from fedclip_cli.owner import check_owner
from fedclip_cli.privacy import print_failed_tests
from fedclip_cli.simulate import cell_progress, print_simulation, simulation_json
from fedclip_secure.aggregator.home import Home
from fedclip_secure.aggregator.status import RunStatus, read_status
from fedclip_secure.config.fields import parse_duration, parse_name
from fedclip_secure.errors import ConfigError
from fedclip_secure.extras import lacking

if TYPE_CHECKING:  # loads torch
    from collections.abc import Callable

    from fedclip_secure.config.plan import FederationPlan
    from fedclip_secure.training.prepare import Prepared

_DIR = click.option("--dir", "folder", type=FOLDER, default=".", show_default=True, help="The folder that `init` made.")

_GIVING_UP = (
    "The silos that have answered will sit out every further attempt of this round, until a person at each gives the "
    "round up too (`fedclip-silo train --abandon-round`). Do this only when the missing silos are gone for good. "
    "Give up?"
)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@program_options
def main() -> None:
    """Coordinate a federation: enrol silos, freeze the roster, serve secure averaging.

    The server learns the weighted average of the silos' updates and nothing about any one silo.
    """


@main.command(epilog="Example: fedclip-agg init lung-xray --name lung-xray --hosts agg.example.org")
@click.argument("folder", type=FOLDER)
@click.option("--name", required=True, help="The federation's name: a-z, 0-9 and -.")
@click.option("--hosts", required=True, help="Names or addresses that silos connect to, separated by commas.")
@click.option("--port", type=click.IntRange(1, 65535), default=443, show_default=True, help="The server's one port.")
@click.option(
    "--method",
    default="fedclip",
    show_default=True,
    help="Whose plan to begin with: NAME or NAME:ARM, as fedtune:visual_bias. An unknown one lists all.",
)
def init(folder: Path, name: str, hosts: str, port: int, method: str) -> None:
    """Make a federation's folder: plan, certificate authority, server certificate, signing key."""
    from fedclip_secure.aggregator.home import init_home

    check_owner(folder)
    named = [host.strip() for host in hosts.split(",") if host.strip()]
    home = init_home(folder, parse_name(name), named, port, method)
    out.print(
        f"made {folder}/: authority/ (whoever has its key can name silos: keep it safe), server/ and federation.yaml",
        markup=False,
    )
    out.print(f"next: edit {home.plan_path}, then run `fedclip-agg prepare --dir {folder}`", markup=False)


@main.command(epilog="Example: fedclip-agg prepare --dir lung-xray")
@_DIR
def prepare(folder: Path) -> None:
    """Resolve the plan's encoder and write federation.lock and initial.safetensors.

    Needs the packages of a silo (torch). Where they are missing, it may run on another machine, in a folder that
    holds federation.yaml and the files that it names: copy the two files back.
    """
    from fedclip_secure.config.lock import Contract, write_lock
    from fedclip_secure.files import write_atomically
    from fedclip_secure.privacy.accounting.plan_cost import PlannedRun

    home = _own(folder)
    plan = home.plan()
    home.check_not_frozen()
    resolve = _resolve_of(folder)  # takes seconds, and a mistake is told before
    prepared = resolve(plan, folder)
    write_atomically(home.initial_path, prepared.initial_file)
    write_lock(home.lock_path, prepared.lock)
    size = sum(math.prod(entry.shape) for entry in prepared.lock.layout)
    out.print(f"wrote {home.lock_path} and {home.initial_path}", markup=False)
    out.print(f"{plan.method.name} on {plan.model.name}: {size:,} shared parameters", markup=False)
    contract = Contract(plan, prepared.lock)
    if (planned := PlannedRun.of(contract)) is not None:
        noise = planned.per_round.noise_multiplier
        most, target = planned.epsilon(), planned.privacy.target_epsilon
        out.print(
            f"privacy: epsilon at most {most:g} (delta {planned.delta:g}) for each "
            f"{planned.privacy.unit} over all rounds and retrains, with noise_multiplier {noise:g}",
            markup=False,
        )
        if target is not None and most < 0.99 * target - 1e-4:
            out.print(
                f"target_epsilon {target:g} is more than anything can be claimed for here: {most:g} is the largest, "
                "with the least noise that can be accounted for",
                markup=False,
            )
        if not planned.privacy.max_retrains:
            out.print(
                "privacy.max_retrains is 0: a silo that crashes in training sits that round out, and where no silo may "
                "be absent the run ends; to pay for another try, set it before the freeze"
            )
    out.print(f"plan {contract.pin}", markup=False)


def _resolve_of(folder: Path) -> Callable[[FederationPlan, Path], Prepared]:
    """What resolves a plan.

    Raises:
        ConfigError: it needs packages that are not here; says how the coordinator can do without them.
    """
    try:
        from fedclip_secure.training.prepare import prepare as resolve
    except ModuleNotFoundError as error:
        if (missing := lacking(error)) is None:
            raise
        raise ConfigError(
            f"`prepare` reads the encoder's weights: {missing}. Or leave this machine without them: copy "
            "federation.yaml, and the files that it names, into a folder DIR of a machine where a silo is installed, "
            "run `fedclip-agg prepare --dir DIR` there, and copy DIR/federation.lock and DIR/initial.safetensors back "
            f"into {folder}. Keys stay here: it needs none"
        ) from error
    return resolve


@main.command(epilog="Example: fedclip-agg invite st-marys --dir lung-xray")
@click.argument("silo")
@_DIR
@click.option("--valid", default="7d", show_default=True, help="How long the token can be used: 12h, 7d.")
@click.option("--token-only", is_flag=True, help="Print nothing but the token, for a script.")
def invite(silo: str, folder: Path, valid: str, token_only: bool) -> None:
    """Make a one-time token with which SILO enrols. Send it over a channel that you trust."""
    from fedclip_secure.aggregator.home import invite as make

    home = _own(folder)
    plan = home.plan()
    invited = make(home, silo, parse_duration(valid))
    if token_only:
        click.echo(invited.token)
        return
    if invited.replaced:
        out.print(f"the earlier token for {silo}, which was not used, is void", markup=False)
    if invited.enrolled:
        out.print(f"{silo} is enrolled: this one renews its certificate, and its key stays", markup=False)
    out.print(f"token for {silo}, once, within {valid}:\n{invited.token}", markup=False)
    out.print(f"on the silo: fedclip-silo enroll {plan.server} --token TOKEN", markup=False)


@main.command(epilog="Example: fedclip-agg freeze --dir lung-xray")
@_DIR
def freeze(folder: Path) -> None:
    """Close the roster over the silos that have enrolled; print fingerprints to compare by phone."""
    from fedclip_secure.aggregator.home import freeze as close

    contract, roster, terms = close(_own(folder))
    table = Table("party", "key's fingerprint", box=None)
    for name, _ in roster.members:
        table.add_row(name, roster.fingerprint(name))
    print_table(table)
    out.print(f"roster {roster.pin}\nplan   {contract.pin}", markup=False)
    n, absent = len(roster.silos), terms.absent_tolerated
    out.print(
        f"{n} silos; a round needs {terms.floor} of them, so {absent or 'none'} may be absent from a round",
        markup=False,
    )
    out.print("next: each silo runs `fedclip-silo accept` and compares these with you, then `fedclip-silo train`")


@main.command(epilog="Example: fedclip-agg serve --dir lung-xray --listen 0.0.0.0:443")
@_DIR
@click.option("--listen", help="HOST:PORT; default: all addresses (IPv4 and IPv6), the port of the plan's server.")
def serve(folder: Path, listen: str | None) -> None:
    """Serve enrolment and, once the roster is frozen, the rounds. A restart goes on where it was."""
    from fedclip_secure.aggregator.serve import serve as start
    from fedclip_secure.aggregator.serve import stop_on_signals

    home = _own(folder)
    host, port = _address(listen, home.plan().server)

    async def forever() -> None:
        stop = asyncio.Event()
        stop_on_signals(stop)
        await start(home, host, port, say, stop)

    run(forever())
    say("stopped; `fedclip-agg serve` goes on from here")


@main.command(epilog="Example: fedclip-agg status --dir lung-xray --json")
@_DIR
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(folder: Path, as_json: bool) -> None:
    """Show the round, who is in, who dropped out at which stage, and when certificates end."""
    state = read_status(Home(folder), time.time())
    if as_json:
        click.echo(json.dumps(state.as_json()))
    else:
        _print_status(state)


@main.command("give-up", epilog="Example: fedclip-agg give-up --dir lung-xray")
@_DIR
@click.option("--yes", is_flag=True, help="Without asking.")
def give_up_attempt(folder: Path, yes: bool) -> None:
    """Give up an attempt that waits for unmasking answers of silos that are gone for good.

    The silos that have answered then sit out, until their own people give the round up as well.
    """
    from fedclip_secure.aggregator.home import give_up

    if not agreed(_GIVING_UP, yes=yes):
        raise ConfigError("nothing was given up")
    out.print(f"{give_up(_own(folder))} is given up", markup=False)


@main.command(epilog="Example: fedclip-agg report --dir lung-xray reports/*.json")
@_DIR
@click.argument("files", nargs=-1, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--out", "to", type=FOLDER, help="Where to; default: report in the federation's folder.")
def report(folder: Path, files: tuple[Path, ...], to: Path | None) -> None:
    """Combine the silos' signed privacy reports into the federation's, and sign it.

    Each is verified first. Silos whose report is missing are named.
    """
    from fedclip_secure.aggregator.report import make_federation_report, silent_silos
    from fedclip_secure.privacy.page.output import write_report
    from fedclip_secure.privacy.verification.verify import failed_tests, read_report

    home = Home(folder) if to else _own(folder)
    data = make_federation_report(home, files)
    signed, page = write_report(to or folder / "report", data)
    out.print(f"{signed}, signed by the coordinator; {page} shows it", markup=False)
    if missing := silent_silos(data):
        out.print(f"without the reports of {', '.join(missing)}: ask them for `fedclip-silo report`", markup=False)
    print_failed_tests(failed_tests(read_report(data)))
    out.print(f"anybody can check it offline: fedclip-silo verify {signed}", markup=False)


@main.command(epilog="Example: fedclip-agg export --dir lung-xray --out lung-xray-adapter")
@_DIR
@click.option("--out", "to", type=FOLDER, help="Where to; default: export in the federation's folder.")
def export(folder: Path, to: Path | None) -> None:
    """Write the global adapter after the last round, with its model card, into a folder.

    The card, README.md, ends with the few lines of Python that load it without this program.
    """
    from fedclip_cli.exported import print_export
    from fedclip_secure.aggregator.export import export_last

    home = Home(folder) if to else _own(folder)
    print_export(*export_last(home, to or folder / "export"))


@main.command(epilog="Example: fedclip-agg demo --data DIR --unseen sketch --rounds 3")
@click.option("--data", type=FOLDER, help="Images of your own: DIR/<site>/<class>/*. Default: labs drawn on the spot.")
@click.option("--unseen", help="A site that never trains, to measure generalisation. Drawn labs: willow.")
@click.option("--rounds", type=click.IntRange(1, 1000), help="Default: what suits the method; 20 with fedclip.")
@click.option(
    "--silos", type=click.IntRange(3, 50), help="How many of the sites train. Default: all but the unseen one."
)
@click.option(
    "--method",
    default="fedclip",
    show_default=True,
    help="How the adapter is built and trained: NAME or NAME:ARM, as fedtune:visual_bias. An unknown one lists all.",
)
@click.option("--dp", is_flag=True, help="Train with differential privacy, and end with a verified report per lab.")
@click.option("--kill-one", is_flag=True, help="SIGKILL one silo in the middle of a round; needs four that train.")
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Drawings and first weights."
)
@click.option("--out", "folder", type=FOLDER, help="A new folder for everything; default: fedclip-demo/<time>.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object.")
def demo(folder: Path | None, as_json: bool, **chosen: Any) -> None:
    """Run a whole federation here: a coordinator and its silos as processes, real certificates, real TLS.

    Needs the packages of a silo (torch).
    """
    from fedclip_secure.demo.labs import Options
    from fedclip_secure.demo.steps import Telling, conduct

    folder = folder or Path("fedclip-demo", f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    try:
        with ending_in_order(), run_progress(quiet=as_json) as show:
            outcome = conduct(Options(out=folder, **chosen), Telling((lambda _: None) if as_json else say, show))
    except KeyboardInterrupt:
        click.echo(f"stopped; no process runs on. What there was lies in {folder}", err=True)
        click.get_current_context().exit(130)
    if as_json:
        click.echo(json.dumps(outcome.as_json()))
    else:
        print_demo(outcome, folder)


@main.command(epilog="Example: fedclip-agg simulate pacs.yaml --out results --workers 8")
@click.argument("file", type=FILE, metavar="EXPERIMENT.yaml")
@click.option("--out", "folder", type=FOLDER, required=True, help="Where to; what is done there is not done again.")
@click.option(
    "--workers", type=click.IntRange(1, 1024), help="Cells at the same time, each a process. Default: a core each."
)
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object.")
def simulate(file: Path, folder: Path, workers: int | None, as_json: bool) -> None:
    """Compare methods: all silos in one program, without a network, over methods, splits, seeds and privacy.

    Training, rounding and averaging are those of a real federation. A cell is one method, one left-out site, one
    privacy block and one seed; cells that are done are kept, so a run that was stopped goes on. Results are
    table.md, results.csv, silos.csv, rounds.csv and plots as SVG. Needs the packages of a silo (torch).

    \b
    EXPERIMENT.yaml, for example:
      name: pacs
      model: {name: ViT-B-32-quickgelu, pretrained: openai}
      # DIR/<site>/<class>/*; or {format: demo, seed: 0} or embeddings
      data: {format: folder, path: "${PACS:-pacs}"}
      # or {by: dirichlet, alpha: 0.1, silos: 8}; shots: 16
      split: {by: sites, leave_out: each}
      defaults:
        training: {rounds: 50, optimizer: {name: adam, lr: 1e-3}}
      methods:
        - {label: FedCLIP, method: {name: fedclip}}
        - label: linear probe
          method: {name: linear_probe}
          coordinate_clip: 0.2
      baselines: [zero_shot, local_only, centralised]
      seeds: [0, 1, 2]
      privacy: [null]      # or blocks as in federation.yaml, each a row
      every: 10            # rounds between two evaluations
    """
    from fedclip_secure.simulate.plots import write_plots
    from fedclip_secure.simulate.run import Telling
    from fedclip_secure.simulate.run import simulate as run_cells
    from fedclip_secure.simulate.tables import write_tables

    try:
        with ending_in_order(), image_progress(quiet=as_json) as images, cell_progress(quiet=as_json) as show:
            telling = Telling(show.say, images, show.begin, show.done)
            results = run_cells(file, folder, workers or os.cpu_count() or 1, telling)
    except KeyboardInterrupt:
        click.echo(f"stopped; finished cells are kept in {folder}, and the same command goes on from there", err=True)
        click.get_current_context().exit(130)
    files = [*write_tables(results, folder), *write_plots(results, folder)]
    if as_json:
        click.echo(json.dumps(simulation_json(results, files)))
    else:
        print_simulation(results, files)
    if all(row.answer.figures is None for row in results.rows):
        raise ConfigError("no cell could be run; the reasons stand above and in table.md")


def _own(folder: Path) -> Home:
    """The home of a command that writes there."""
    check_owner(folder)
    return Home(folder)


def _print_status(state: RunStatus) -> None:
    stage = f", attempt {state.attempt} at stage {state.stage}" if state.stage else ""
    reason = f": {state.reason}" if state.reason else ""
    out.print(f"{state.federation}: {state.state}{reason}", markup=False)
    if state.state in ("running", "frozen") and not state.serving:
        out.print("no server is running; `fedclip-agg serve` goes on from here")
    if state.round:
        done = len([row for row in state.finished_rounds if row["round"] <= state.rounds])
        now = f"round {state.round}{stage}; " if state.stage else ""
        out.print(f"{now}{done} of {state.rounds} training rounds averaged", markup=False)
    over = state.server_certificate_ends < time.time()
    until = "ended on" if over else "is valid until"
    anew = ": start `fedclip-agg serve` again, which makes it anew" if over else ""
    out.print(f"the server's certificate {until} {_date(state.server_certificate_ends)}{anew}", markup=False)
    if state.answered:
        out.print(f"answered: {', '.join(state.answered)}", markup=False)
    if state.floor is not None:
        out.print(f"a round needs {state.floor} silos; {state.absent_tolerated} may be absent", markup=False)
    if not state.silos:
        out.print("no silo was invited yet; `fedclip-agg invite SILO` makes a token")
        return
    table = Table("silo", "enrolled", "last seen", "averaged", "missed", "dropped at", "valid until", box=None)
    for silo in state.silos:
        drops = ", ".join(f"{stage} x{count}" for stage, count in silo.dropped.items()) or "-"
        table.add_row(
            silo.name,
            "yes" if silo.enrolled else "invited",
            _ago(silo.last_seen),
            str(silo.rounds_averaged),
            str(silo.rounds_missed),
            drops,
            _date(silo.certificate_ends)[:10],
        )
    print_table(table)
    for event in state.events[-5:]:
        who = f"{event['silo']}: " if event["silo"] else ""
        where = f"{_date(event['at'])}, round {event['round']}, {event['stage']}"
        out.print(f"{where}: {who}{event['reason']}", markup=False)


def _ago(then: float | None) -> str:
    return "never" if then is None else f"{time.time() - then:.0f} s ago"


def _date(then: float | None) -> str:
    return "-" if then is None else datetime.fromtimestamp(then, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _address(listen: str | None, server: str) -> tuple[str | None, int]:
    if listen is None:
        return None, urlsplit(server).port or 443
    try:
        parts = urlsplit(f"//{listen}")
        if parts.hostname and parts.port:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise ConfigError(f"--listen {listen}: must be HOST:PORT, as 0.0.0.0:443")
