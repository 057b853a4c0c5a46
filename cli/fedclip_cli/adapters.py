"""`fedclip-silo personalize` and `export`: what a silo makes of the adapters that a run has left it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from fedclip_cli.console import FILE, FOLDER, Command, err, image_progress, out, print_table, printable
from fedclip_cli.evaluation import percent
from fedclip_cli.exported import print_export
from fedclip_cli.owner import settings
from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.export.adapter_facts import KEPT_HOME
from fedclip_secure.silo.accepted import Accepted, load_accepted, text_features_path
from fedclip_secure.silo.export import export_adapter
from fedclip_secure.silo.personal_adapter import Personal, make_personal

if TYPE_CHECKING:  # loads torch
    from fedclip_secure.training.inputs import Inputs

ADAPTER = "best|last|personal|FILE"
_CONFIG = click.option(
    "--config", "path", type=FILE, default="silo.yaml", show_default=True, help="This silo's settings."
)


@click.command(cls=Command, epilog="Example: fedclip-silo personalize")
@_CONFIG
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def personalize(path: Path, as_json: bool) -> None:
    """Train an adapter of this silo's own from the best global one: for use here, never to be sent.

    Trains for some epochs on this silo's training records alone, without privacy, and mixes global and own
    parameters. The validation records choose the mix; where none is better, the global adapter stands as the
    personal one.
    """
    config = settings(path)
    accepted = load_accepted(config)
    made = make_personal(config, accepted, load(config, accepted, quiet=as_json))
    if as_json:
        click.echo(json.dumps(_as_json(made)))
    else:
        _print(made)


@click.command(cls=Command, epilog="Example: fedclip-silo export --adapter last --out lung-xray-adapter")
@_CONFIG
@click.option("--adapter", metavar=ADAPTER, default="best", show_default=True)
@click.option("--out", "to", type=FOLDER, help="Where to; default: export/ADAPTER in the workdir.")
def export(path: Path, adapter: str, to: Path | None) -> None:
    """Write an adapter with its model card into a folder, to be loaded without this program.

    The card, README.md, ends with the few lines of Python that do it.
    """
    config = settings(path)
    print_export(*export_adapter(config, load_accepted(config), adapter, to))


def load(config: SiloConfig, accepted: Accepted, *, quiet: bool = False) -> Inputs:
    """This silo's task and records, with a bar where images must be encoded; what is wrong with them is told."""
    from fedclip_secure.training.inputs import load_inputs

    with image_progress(quiet=quiet) as progress:
        inputs = load_inputs(config, accepted.contract, progress, text_features_path(config))
    for line in inputs.report.warnings() if inputs.report else ():
        err.print(printable(line), markup=False)
    return inputs


def _print(made: Personal) -> None:
    training, chosen = made.made.training, made.made.chosen
    optimizer = training.optimizer
    out.print(
        f"trained on {made.made.records} records of this silo alone, without privacy: {optimizer.name}, "
        f"lr {optimizer.lr:g}, batches of {training.batch_size}"
        + ("; a quarter of the training split chooses, as there is no validation split" if made.made.held_out else ""),
        markup=False,
    )
    table = Table("split", "records", "global", "personal", box=None)
    for name, before, after in made.compared():
        table.add_row(name, str(after.total), percent(before), percent(after))
    print_table(table)
    if not chosen.share:
        said = "the global adapter, unchanged, as no mix was better on the validation records"
        out.print(f"personal: {said}; {made.path}", markup=False)
        return
    mix = f"{1 - chosen.share:g} global + {chosen.share:g} personal, after epoch {chosen.epoch}"
    out.print(f"personal: {mix}; {made.path}", markup=False)
    out.print(f"it was {KEPT_HOME}. next: `fedclip-silo predict --adapter personal`", markup=False)


def _as_json(made: Personal) -> dict[str, object]:
    """The object of `--json`; accuracies are shares 0..1, null where there are no records."""
    chosen = made.made.chosen
    return {
        "path": str(made.path),
        "share": chosen.share,
        "epoch": chosen.epoch,
        "training": made.made.training.model_dump(mode="json", include={"batch_size", "optimizer"}),
        "held_out": made.made.held_out,
        "accuracy": {
            name: {"records": after.total, "global": before.accuracy, "personal": after.accuracy}
            for name, before, after in made.compared()
        },
    }
