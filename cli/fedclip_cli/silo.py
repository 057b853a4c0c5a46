"""`fedclip-silo`: the program of one silo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click
from click.core import ParameterSource
from rich.table import Column, Table
from rich.text import Text

from fedclip_cli import adapters, privacy
from fedclip_cli.adapters import ADAPTER, load
from fedclip_cli.console import (
    FILE,
    Group,
    agreed,
    err,
    image_progress,
    out,
    print_table,
    printable,
    program_options,
    run,
    say,
    waiting,
    warn,
)
from fedclip_cli.data import print_data
from fedclip_cli.evaluation import Measured, evaluation_json, print_evaluation
from fedclip_cli.owner import check_owner, settings
from fedclip_secure.config.lock import ExternalEncoder
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.config.silo import (
    EmbeddingsData,
    Precision,
    SiloConfig,
    check_given,
    first_silo,
    for_extraction,
    write_silo,
)
from fedclip_secure.disk import check_disk
from fedclip_secure.errors import ConfigError, DataError, TrustError
from fedclip_secure.files import write_output
from fedclip_secure.pki.identity import Identity
from fedclip_secure.pki.invitation import Invitation
from fedclip_secure.pki.keys import spki_sha256
from fedclip_secure.pki.roster import readable_fingerprint
from fedclip_secure.privacy.accounting.plan_cost import PlannedRun
from fedclip_secure.privacy.report import wording
from fedclip_secure.privacy.report.parties import costs, most_hurt
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.accepted import Accepted, check_own_key, load_accepted, save_accepted, text_features_path
from fedclip_secure.silo.adapters import GLOBAL, choose
from fedclip_secure.silo.policy import check_plan, check_policy
from fedclip_secure.silo.run.final_models import adapter_folder, read_models
from fedclip_secure.silo.run.link import Link
from fedclip_secure.silo.run.privacy_account import ENDED, about_ledger, about_place
from fedclip_secure.silo.run.recovery import giving_up, look
from fedclip_secure.silo.run.recovery import recover as go_on
from fedclip_secure.transport.client import Client, Patience
from fedclip_secure.transport.enrolment import enroll as get_certificate

if TYPE_CHECKING:
    from fedclip_secure.silo.run.train import Finished

_QUESTION = "Do the fingerprints match what you were told, and do you take part on these terms?"
_CONFIG = click.option(
    "--config", "path", type=FILE, default="silo.yaml", show_default=True, help="This silo's settings."
)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@program_options
def main() -> None:
    """Take part in a federation: images stay here, masked updates leave.

    Before anything is sent, this program checks plan, roster and every message of the server
    against what you accepted.
    """


@main.command(epilog="Example: fedclip-silo enroll https://agg.example.org --token fedclip-...")
@click.argument("url")
@click.option("--token", required=True, help="The one-time token from the coordinator.")
@_CONFIG
@click.option("--images", default="images", show_default=True, help="Folder of class folders, for a new silo.yaml.")
@click.option("--weights", help="Local copy of the encoder's checkpoint, for a new silo.yaml.")
def enroll(url: str, token: str, path: Path, images: str, weights: str | None) -> None:
    """Make this silo's key here, get its certificate, and pin the coordinator's authority.

    Writes a silo.yaml to start from where there is none.
    """
    name, new = Invitation.decode(token).name, not path.exists()
    default = click.get_current_context().get_parameter_source("images") == ParameterSource.DEFAULT
    check_owner(path.absolute().parent)
    config = first_silo(path, name, images, weights) if new else settings(path)
    if config.name != name:
        raise ConfigError(f"'{path}': name is {config.name!r}, the token is for {name!r}; use the right one of the two")
    check_given(path, config, None if default else images, weights)
    elsewhere = "run this in a folder on a local disk" if new else "name a folder on a local disk in silo.yaml"
    check_disk(Path(config.identity), f"{elsewhere} (`identity`)", private=True)
    check_disk(Path(config.workdir), f"{elsewhere} (`workdir`)")
    identity = run(get_certificate(url, token, Path(config.identity), waiting))
    if new:  # only now: a second try must not find the options of one that failed
        write_silo(path, name, images, weights)
        out.print(f"wrote {path} to start from", markup=False)
    left = f"set `data` in {path}; " if new and default else ""
    if new and not default and not Path(config.data.path).is_dir():
        out.print(f"'{config.data.path}': there is no such folder yet, and `data.path` names it", markup=False)
    out.print(f"enrolled as {identity.name}; certificate until {identity.not_after:%Y-%m-%d}", markup=False)
    out.print(f"fingerprint of this silo's key: {readable_fingerprint(spki_sha256(identity.key.public))}", markup=False)
    out.print(f"next: {left}when the coordinator has frozen the roster, run `fedclip-silo accept`", markup=False)


@main.command(epilog="Example: fedclip-silo accept")
@_CONFIG
@click.option("--yes", is_flag=True, help="Accept without asking, where a person has compared before.")
def accept(path: Path, yes: bool) -> None:
    """Show the plan, the lock and the roster; on consent, pin both in silo.yaml."""
    config = settings(path)
    identity = Identity.load(Path(config.identity))
    offer, text_features = run(_fetch_offer(identity, Path(config.workdir)))
    terms = Terms.of(offer.contract, offer.roster)
    _show_offer(offer, terms, identity)
    ended = False
    if offer.contract.plan.privacy is not None:
        lines, ended = about_ledger(config, identity, offer)
        for line in [*lines, *_place(config, path)]:
            out.print(line, markup=False)
    check_plan(offer.contract, offer.roster)
    check_policy(config.policy, offer.contract, terms, identity.name)
    check_own_key(offer.roster, identity)
    if not agreed(_QUESTION, yes=yes, to="compared the fingerprints with the coordinator's"):
        raise TrustError(f"not accepted: {path} is as it was; settle the difference with the coordinator")
    save_accepted(path, config, offer, text_features)
    out.print(f"pinned in {path}. {_after_accept(config, offer, ended=ended)}", markup=False)


@main.command(epilog="Example: fedclip-silo extract --precision bf16")
@_CONFIG
@click.option(
    "--precision", type=click.Choice(get_args(Precision)), help="The encoder's, in place of silo.yaml's `precision`."
)
@click.option("--strict", is_flag=True, help="Refuse what the data report finds wrong; without it, it is told.")
@click.option("--verify", is_flag=True, help="Read every image again, also those of unchanged size and time.")
@click.option("--json", "as_json", is_flag=True, help="The data report as one JSON object.")
def extract(path: Path, precision: Precision | None, strict: bool, verify: bool, as_json: bool) -> None:
    """Turn this silo's images into cached CLIP features. A second run does only what is new.

    Says what the data are: classes, splits and patients, what was left out, what is there twice or shows nothing. The
    same is written to data-report.html, with thumbnails, in the workdir. It stays there, as the images do.

    It may be stopped or killed at any time, and goes on from there.
    """
    from fedclip_secure.training.inputs import load_inputs

    config = settings(path)
    wanted, accepted = for_extraction(config, precision, strict), load_accepted(config)
    with image_progress(quiet=as_json) as progress:
        inputs = load_inputs(wanted, accepted.contract, progress, text_features_path(config), verify=verify)
    assert inputs.report is not None  # noqa: S101 - of a silo's own data
    if as_json:
        click.echo(json.dumps(inputs.report.as_json()))
        return
    print_data(inputs.report, None if isinstance(config.data, EmbeddingsData) else Path(config.workdir))
    if wanted.precision != config.precision:
        out.print(f"to train on them set `precision: {wanted.precision}` in {path}", markup=False)


@main.command(epilog="Example: fedclip-silo train")
@_CONFIG
@click.option(
    "--abandon-round", type=click.IntRange(min=1), help="Give up this round, in which a silo is gone for good."
)
@click.option("--yes", is_flag=True, help="Give it up without asking.")
@click.option("--changed-data", is_flag=True, help="With privacy: records came or went since this run began.")
def train(path: Path, abandon_round: int | None, yes: bool, changed_data: bool) -> None:
    """Join the federation and stay until the plan's last round; then write the adapters.

    It may be stopped or killed at any time, and goes on from there with the same update.
    """
    from fedclip_secure.silo.run.train import take_part

    config = settings(path)
    identity = Identity.load(Path(config.identity))
    if abandon_round and not yes:
        question = giving_up(Path(config.workdir), identity.epoch_path, abandon_round)
        if not agreed(question, yes=False):
            raise TrustError(f"round {abandon_round} is not given up; `fedclip-silo train` goes on with it as it was")
    mine = load_accepted(config)
    check_plan(mine.contract, mine.roster)
    check_policy(config.policy, mine.contract, Terms.of(mine.contract, mine.roster), identity.name)
    check_own_key(mine.roster, identity)
    if mine.contract.plan.privacy is not None:
        for line in _place(config, path):
            say(f"{identity.name}: {line}")
    with image_progress() as progress:
        taking_part = take_part(
            config,
            identity,
            mine,
            progress=progress,
            say=say,
            waiting=waiting,
            abandon=abandon_round,
            changed_data=changed_data,
        )
        finished = run(taking_part)
    _print_finished(identity.name, finished)
    out.print("next: `fedclip-silo evaluate`, and `fedclip-silo report`")


@main.command(epilog="Example: fedclip-silo recover")
@_CONFIG
@click.option("--yes", is_flag=True, help="Go on without asking.")
def recover(path: Path, yes: bool) -> None:
    """Say how far this silo's journal has come; go on with one that was lost or restored from a backup."""
    config = settings(path)
    identity, workdir = Identity.load(Path(config.identity)), Path(config.workdir)
    standing = look(workdir, identity.epoch_path)
    for line in standing.lines():
        out.print(line, markup=False)
    if standing.matches:
        out.print("next: `fedclip-silo train`")
        return
    if not agreed("Go on, and sit out every model over which this silo may have sent an update?", yes=yes):
        raise TrustError("nothing was changed; restore the newest journal, or ask the coordinator")
    count = go_on(workdir, identity.epoch_path)
    out.print(f"this silo will not sign over {count} model(s) again. next: `fedclip-silo train`", markup=False)


@main.command(epilog="Example: fedclip-silo evaluate --split validation --json")
@_CONFIG
@click.option("--adapter", metavar=ADAPTER, help="Only this one.  [default: best and last]")
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="test", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def evaluate(path: Path, adapter: str | None, split: str, as_json: bool) -> None:
    """Accuracy of an adapter on this silo's own records, class by class, next to zero-shot.

    Draws each adapter's confusion matrix to evaluation/SPLIT-ADAPTER.svg in the workdir.
    """
    from fedclip_secure.features.encoder import choose_device
    from fedclip_secure.training.evaluation.evaluate import evaluate as measure
    from fedclip_secure.training.evaluation.plots import save_confusion

    config = settings(path)
    accepted = load_accepted(config)
    terms = Terms.of(accepted.contract, accepted.roster)
    chosen = [choose(Path(config.workdir), name, terms) for name in ([adapter] if adapter else GLOBAL)]
    facts = [one.facts() for one in chosen]
    inputs = load(config, accepted, quiet=as_json)
    records, device = inputs.splits[split], choose_device(config.device)
    results = []
    for one, known in zip(chosen, facts, strict=True):
        result = measure(accepted.contract.plan, inputs.task, records, one.state, device, encoder=inputs.encoder)
        plot = Path(config.workdir, "evaluation", f"{split}-{one.name}.svg")
        after = "" if known.after_round is None else f" (after round {known.after_round})"
        save_confusion(plot, result, f"{one.name} adapter{after}, {split} split")
        results.append(Measured(one.name, known.after_round, result, plot))
    if as_json:
        click.echo(json.dumps(evaluation_json(split, results)))
    else:
        print_evaluation(split, results)


@main.command(epilog="Example: fedclip-silo predict scans/ --output predictions.csv")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@_CONFIG
@click.option("--adapter", metavar=ADAPTER, default="best", show_default=True)
@click.option("--output", type=click.Path(allow_dash=True), default="-", show_default=True, help="A CSV file, or -.")
@click.option("--strict", is_flag=True, help="Exit with 1 where an image cannot be used.")
def predict(paths: tuple[Path, ...], path: Path, adapter: str, output: str, strict: bool) -> None:
    """Classify images, and those in folders at any depth: a CSV row each, a column for each class.

    Images that cannot be used are left out and named on standard error.
    """
    from fedclip_secure.data.report import why_left_out
    from fedclip_secure.training.evaluation.predict import find_images, to_csv
    from fedclip_secure.training.evaluation.predict import predict as classify

    config = settings(path)
    accepted = load_accepted(config)
    terms = Terms.of(accepted.contract, accepted.roster)
    state = choose(Path(config.workdir), adapter, terms).state
    listing = find_images(paths)
    for finding in why_left_out(listing.left_out):
        err.print(printable(finding.told()), markup=False)
    with image_progress(quiet=output == "-") as progress:
        found = classify(config, accepted.contract, state, [file.path for file in listing.files], progress)
    if output == "-":
        click.echo(to_csv(found), nl=False)
    else:
        write_output(Path(output), to_csv(found))
        out.print(f"{len(found.paths)} prediction(s) in {output}", markup=False)
    if found.broken:
        listed = "".join(f"\n  {image.reason}" for image in found.broken)
        said = f"{len(found.broken)} image(s) cannot be used and were left out:{listed}"
        if strict:
            raise DataError(f"{said}\nreplace them, or leave out --strict")
        err.print(printable(said), markup=False)


for _command in (adapters.personalize, adapters.export):
    main.add_command(_command)
for _command in (privacy.budget, privacy.report, privacy.verify, privacy.audit):
    main.add_command(_command)


def _print_finished(name: str, finished: Finished) -> None:
    """What a run has left, and in how much of it this silo was: loudly where that is little."""
    if finished.still is not None:
        out.print(f"finished: {finished.still}", markup=False)
    for adapter in finished.adapters:
        out.print(f"{adapter.kind}: after round {adapter.card['after_round']}, {adapter.path}", markup=False)
    told = f"{name} {finished.attendance.told()}"
    if finished.attendance.poor:
        warn(
            f"{told}. The adapters owe little or nothing to its records: the reason stands in what `train` printed, "
            "and in the coordinator's `fedclip-agg status`"
        )
    else:
        out.print(told, markup=False)


def _place(config: SiloConfig, path: Path) -> list[str]:
    """What a person should know of where the ledger lies."""
    line = about_place(config, path.resolve().parent)
    return [] if line is None else [line]


def _after_accept(config: SiloConfig, offer: Accepted, *, ended: bool) -> str:
    """What is left to do in the run that was accepted."""
    try:
        finished = bool(read_models(adapter_folder(Path(config.workdir)), offer.contract))
    except DataError:  # `train` writes the file anew
        finished = False
    if finished:
        return "the run has come to its end. next: `fedclip-silo evaluate`, and `fedclip-silo report`"
    if ended:
        return f"{ENDED}. next: `fedclip-silo report`"
    if offer.contract.plan.privacy is None:
        return "next: `fedclip-silo extract`, then `fedclip-silo train`"
    return "next: `fedclip-silo extract`, `fedclip-silo audit`, and an hour later or more `fedclip-silo train`"


async def _fetch_offer(identity: Identity, workdir: Path) -> tuple[Accepted, bytes | None]:
    """Contract and roster as the server has them, and an external model's text features."""
    async with Client.of(identity, waiting, Patience(tries=5)) as client:  # a person sits before it
        link = Link(client, workdir)
        offer = await link.offer(identity.server)
        encoder = offer.contract.lock.encoder
        if isinstance(encoder, ExternalEncoder):
            return offer, await link.file(encoder.text_features_sha256)
        return offer, None


def _show_offer(offer: Accepted, terms: Terms, identity: Identity) -> None:
    plan = offer.contract.plan
    table = Table("", Column("", overflow="fold"), box=None, show_header=False)
    for key, value in {
        "federation": f"{plan.federation} at {plan.server}",
        "purpose": plan.purpose or wording.NOT_STATED,
        "whom to ask": plan.contact or wording.NOT_STATED,
        "what becomes of it": plan.retention or wording.NOT_STATED,
        "encoder": f"{plan.model.name}, {offer.contract.lock.encoder.dim} features",
        "classes": ", ".join(f"{folder}: {phrase}" for folder, phrase in plan.classes.items()),
        "templates": "; ".join(plan.templates),
        "starts from": f"adapter {offer.contract.lock.initial_model}",
        "method": f"{_method(plan)}; {terms.layout.size:,} parameters travel",
        "training": f"{plan.training.rounds} rounds of "
        f"{_batches(plan)}, {plan.training.optimizer.name}, lr {plan.training.optimizer.lr:g}",
        "weights": {
            "masked": f"number of records, at most {terms.grid.max_weight}, inside the masked sum",
            "equal": "all silos alike",
            "public": "as the plan lists them",
        }[plan.secure_aggregation.weights],
        "splits": f"{plan.splits.train:g} train, {plan.splits.validation:g} validation, {plan.splits.test:g} test",
        "privacy": _privacy(offer),
        **_accuracy(plan),
        "a round": f"{terms.floor} to {len(terms.roster.silos)} silos; {terms.threshold} must agree before it opens "
        f"({plan.secure_aggregation.threshold}, {terms.colluding} colluding)",
        "one change": f"at most {terms.grid.clip:g} of a parameter in a round",
    }.items():
        table.add_row(key, Text(value))
    print_table(table)
    fingerprints = Table("party", "key's fingerprint", box=None)
    for name, _ in offer.roster.members:
        fingerprints.add_row(f"{name} (you)" if name == identity.name else name, offer.roster.fingerprint(name))
    print_table(fingerprints)
    out.print(f"roster {offer.roster.pin}\nplan   {offer.contract.pin}", markup=False)


def _batches(plan: FederationPlan) -> str:
    if plan.privacy is None:
        return f"{plan.training.local_epochs} epoch(s), batch {plan.training.batch_size}"
    steps, privacy = plan.privacy.steps_per_round, plan.privacy
    return f"{steps} step(s), each {privacy.unit} in one with chance {privacy.sample_rate:g}"


def _method(plan: FederationPlan) -> str:
    """Its name, and every option that the plan sets."""
    return ", ".join([plan.method.name, *(f"{key} {value}" for key, value in plan.method.options.items())])


def _accuracy(plan: FederationPlan) -> dict[str, str]:
    """What the noise costs, where the plan says it."""
    given = costs(plan)
    if given is None:
        return {}
    measured, found = given
    return {"accuracy": f"{most_hurt(found)} The coordinator's word, measured on: {measured.data}"}


def _privacy(offer: Accepted) -> str:
    planned = PlannedRun.of(offer.contract)
    if planned is None:
        return "none: whoever gets a model may learn about records from it"
    privacy = planned.privacy
    return (
        f"epsilon at most {planned.epsilon():g} (delta {planned.delta:g}) for each {privacy.unit}, over all "
        f"rounds and {privacy.max_retrains} retrain(s); noise {planned.per_round.noise_multiplier:g} x "
        f"{privacy.max_grad_norm:g}"
    )
