"""Whole experiments, through the program and through the library: what is kept, what goes on, what is written."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fedclip_cli.agg import main

from fedclip_secure.errors import DataError
from fedclip_secure.methods.fedclip import FedClip
from fedclip_secure.simulate.experiment import read_experiment
from fedclip_secure.simulate.experiment_cells import cells_of, label_of
from fedclip_secure.simulate.plots import write_plots
from fedclip_secure.simulate.run import Results, Row, Telling, simulate
from fedclip_secure.simulate.sources import find_sources
from fedclip_secure.simulate.tables import markdown, write_tables
from fedclip_secure.simulate.worker import Setting, Workshop
from tests.demo.test_demo import alive, children
from tests.federation.processes import BIN, start
from tests.simulate.worlds import write_experiment, write_sites
from tests.waiting import BOUND, wait_for

LONG = {"training": {"rounds": 20, "batch_size": 8, "optimizer": {"name": "adam", "lr": 3e-3}}}
PRIVACY = {
    "unit": "record", "sample_rate": 0.5, "steps_per_round": 2, "noise_multiplier": 1.5, "max_grad_norm": 1.0,
    "update_divisor": 20.0, "delta": 1e-5,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Steps this small are over before a second thread has woken up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(path: Path, out: Path) -> tuple[Results, list[Row]]:
    """All rows, and those that were not done before."""
    fresh: list[Row] = []
    said: list[str] = []
    results = simulate(path, out, 1, Telling(said.append, lambda _: None, lambda *_: None, fresh.append))
    assert said == ["encoder: none here: 16 features from files"]
    return results, fresh


def run_here(path: Path, out: Path) -> Results:
    """All rows, without other processes."""
    experiment = read_experiment(path)
    setting = Setting(experiment, find_sources(experiment, path.parent, out))
    workshop = Workshop(setting)
    found = cells_of(experiment, list(setting.sources.sites))
    return Results(
        experiment,
        [
            Row(cell, label_of(experiment, cell), workshop.run(cell, str(number)), None)
            for number, cell in enumerate(found)
        ],
    )


def cells(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "cells").glob("*.json")}


def stop(program: subprocess.Popen[str], number: signal.Signals) -> int:
    """End the program; none of its processes may run on."""
    started = children(program.pid)
    os.kill(program.pid, number)
    code = program.wait(BOUND)
    wait_for("the workers' end", lambda: not any(map(alive, started)))
    return code


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -signal.SIGKILL), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)],
)
def test_a_run_that_was_stopped_goes_on_and_ends_with_one_table(
    tmp_path: Path, number: signal.Signals, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    write_sites(tmp_path)
    path, out, log = write_experiment(tmp_path, defaults=LONG, seeds=[0, 1]), tmp_path / "out", tmp_path / "log"
    program = start(BIN / "fedclip-agg", "simulate", path, "--out", out, "--workers", "1", cwd=tmp_path, log=log)
    try:
        wait_for("some cells", lambda: len(cells(out)) >= 2, program)
        assert stop(program, number) == code
    finally:
        program.kill()
        program.wait()
    assert "Traceback" not in log.read_text()
    assert ("finished cells are kept in" in log.read_text()) == (number == signal.SIGINT)
    before = cells(out)
    damaged, *whole = before
    (out / "cells" / damaged).write_bytes(before[damaged][:300])
    results, fresh = run(path, out)
    assert f"{damaged}': is damaged; its cell is run again" in caplog.text
    assert (len(results.rows), len(fresh)) == (8, 8 - len(whole))
    assert all(row.answer.figures for row in results.rows)
    assert {name: before[name] for name in whole}.items() <= cells(out).items()
    again, fresh = run(path, out)
    assert fresh == []
    assert markdown(again) == markdown(results)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Results]:
    """An experiment with everything in it, that has run."""
    folder = tmp_path_factory.mktemp("finished")
    write_sites(folder)
    path = write_experiment(
        folder,
        split={"by": "sites", "leave_out": "sketch", "shots": 8},
        methods=[
            {"label": "FedCLIP", "method": {"name": "fedclip"}},
            {"label": "paper", "method": {"name": "fedclip", "loss": "inbatch"}},
            {"label": "tight", "method": {"name": "linear_probe"}, "coordinate_clip": 1e-6},
        ],
        baselines=["zero_shot", "local_only", "centralised"],
        seeds=[0, 1],
        privacy=[None, PRIVACY],
        every=3,
    )
    return path, folder / "out", run_here(path, folder / "out")


def of(results: Results, label: str, *, private: bool = False, seed: int = 0) -> Row:
    (row,) = [
        row for row in results.rows
        if (row.label, row.cell.privacy is not None, row.cell.seed) == (label, private, seed)
    ]  # fmt: skip
    return row


def test_cells_that_fail_say_why_and_end_no_other(finished: tuple[Path, Path, Results]) -> None:
    _, _, results = finished
    failed = {(row.label, row.cell.privacy is not None) for row in results.rows if row.answer.figures is None}
    assert failed == {("paper", True), ("tight", False)}
    assert "couples the records of a batch" in (of(results, "paper", private=True).answer.reason or "")
    assert "lie beyond coordinate_clip 1e-06" in (of(results, "tight").answer.reason or "")
    assert "paper, sigma 1.5: " in markdown(results)
    assert "(2 cells)" in markdown(results)


def test_figures_are_of_the_rounds_splits_and_bytes_that_the_experiment_says(
    finished: tuple[Path, Path, Results],
) -> None:
    _, _, results = finished
    figures = of(results, "FedCLIP").answer.figures
    assert figures is not None
    assert [point.round for point in figures.points] == [0, 3, 4]
    assert list(figures.last.silos) == ["art", "cartoon", "photo"]
    assert figures.last.left_out is not None
    assert figures.last.left_out.total == 60
    assert figures.records == {"art": 24, "cartoon": 24, "photo": 24}
    assert figures.parameters == 2 * (16 * 16 + 16)
    assert 4 * figures.parameters < (figures.upload_bytes or 0) < 4 * figures.parameters + 2000
    assert (figures.seconds_per_round or 0) > 0
    assert figures.privacy is None


def test_private_cells_have_the_epsilon_of_their_plan_and_baselines_send_nothing(
    finished: tuple[Path, Path, Results],
) -> None:
    from fedclip_secure.privacy.accounting.accountant import epsilon
    from fedclip_secure.privacy.accounting.events import Event

    _, _, results = finished
    private = of(results, "FedCLIP", private=True).answer.figures
    assert private is not None
    assert private.privacy is not None
    assert private.privacy.epsilon == epsilon([Event(1.5, 0.5, 4 * 2)], 1e-5)
    for label in ("zero-shot", "FedCLIP, local only", "FedCLIP, centralised"):
        figures = of(results, label).answer.figures
        assert figures is not None
        assert figures.upload_bytes is None
    zero = of(results, "zero-shot").answer.figures
    assert zero is not None
    assert zero.last == private.zero_shot


def test_training_helps_and_a_silo_alone_is_counted_once_at_the_left_out_site(
    finished: tuple[Path, Path, Results],
) -> None:
    _, _, results = finished
    pooled, alone = (of(results, f"FedCLIP, {kind}").answer.figures for kind in ("centralised", "local only"))
    assert pooled is not None
    assert alone is not None
    assert (pooled.last.weighted or 0) > (pooled.points[0].weighted or 0)
    assert alone.last.left_out is not None
    assert alone.last.left_out.total == 3 * 60


def test_tables_and_plots_hold_every_cell(finished: tuple[Path, Path, Results]) -> None:
    _, out, results = finished
    files = [*write_tables(results, out), *write_plots(results, out)]
    assert [path.name for path in files] == [
        "results.csv", "silos.csv", "rounds.csv", "table.md", "rounds.svg", "bytes.svg", "epsilon.svg",
    ]  # fmt: skip
    assert all(path.stat().st_size for path in files)
    with (out / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(results.rows)
    line = next(row for row in rows if (row["method"], row["privacy"], row["seed"]) == ("FedCLIP", "", "0"))
    figures = of(results, "FedCLIP").answer.figures
    assert figures is not None
    assert float(line["accuracy_left_out"]) == figures.last.away
    table = (out / "table.md").read_text()
    shares = [of(results, "FedCLIP", seed=seed).answer.figures for seed in (0, 1)]
    found = [100 * (one.last.away or 0) for one in shares if one is not None]
    assert f"{np.mean(found):.1f} ± {np.std(found, ddof=1):.1f}" in table
    assert "are not covered by it" in table
    assert "\nEncoder: none here: 16 features from files. Accuracy in percent" in table
    assert "ε of one run" in (out / "epsilon.svg").read_text()
    assert "encoder: none here: 16 features from files" in (out / "rounds.svg").read_text()


def test_the_command_line_ends_with_one_object_and_fails_where_no_cell_ran(tmp_path: Path) -> None:
    write_sites(tmp_path)
    methods = [{"method": {"name": "linear_probe"}, "coordinate_clip": 1e-6}]
    path = write_experiment(tmp_path, methods=methods, split={"by": "dirichlet", "alpha": 0.5, "silos": 4})
    done = CliRunner().invoke(main, ["simulate", str(path), "--out", str(tmp_path / "out"), "--json"])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert (found["name"], found["cells"], found["failed"]) == ("small", 1, 1)
    assert found["encoder"] == {"name": "external", "dim": 16, "text_features": "text.safetensors"}
    assert "lie beyond coordinate_clip" in found["rows"][0]["reason"]
    assert (tmp_path / "out" / "table.md").is_file()
    assert done.exit_code == 1
    assert "no cell could be run; the reasons stand above and in table.md" in done.stderr


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    write_sites(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be made"):
        run(write_experiment(tmp_path), tmp_path / "file" / "out")


def write_images(folder: Path, pacs_mini: Path) -> None:
    """Three sites, two classes, ten images of each."""
    for site in ("cartoon", "photo", "sketch"):
        for kind in ("dog", "horse"):
            (folder / site / kind).mkdir(parents=True)
            for image in sorted((pacs_mini / site / kind).iterdir())[:10]:
                (folder / site / kind / image.name).symlink_to(image)


def test_images_in_folders_are_sites_and_their_folders_the_classes(tmp_path: Path, pacs_mini: Path) -> None:
    write_images(tmp_path / "pacs", pacs_mini)
    path = write_experiment(
        tmp_path,
        model={"name": "fedclip-tiny", "pretrained": "shipped"},
        classes=None,
        data={"format": "folder", "path": "pacs"},
        split={"by": "dirichlet", "alpha": 1.0, "silos": 3},
    )
    (row,) = run_here(path, tmp_path / "out").rows
    assert row.answer.reason is None
    assert row.answer.figures is not None
    records, tested = row.answer.figures.records, row.answer.figures.last.silos
    assert list(records) == list(tested) == ["silo-001", "silo-002", "silo-003"]
    assert sum(records.values()) + sum(right.total for right in tested.values()) == 3 * 2 * 10
    assert sorted(path.name for path in (tmp_path / "out" / "sites").iterdir()) == ["cartoon", "photo", "sketch"]


def test_methods_that_train_inside_the_encoder_run_with_a_checkpoint_beside_the_file(
    tmp_path: Path, pacs_mini: Path, random_tower: Path
) -> None:
    write_images(tmp_path / "pacs", pacs_mini)
    for name in ("tower.json", "tower.safetensors"):
        (tmp_path / name).symlink_to(random_tower / name)
    path = write_experiment(
        tmp_path,
        model={"name": "tower", "pretrained": "tower.safetensors", "config": "tower.json"},
        classes=None,
        data={"format": "folder", "path": "pacs"},
        split={"by": "sites"},
        methods=[{"method": {"name": name}} for name in ("fedclip", "fedtune:visual_bias")],
        defaults={"training": {"rounds": 1}, "coordinate_clip": 1.0},
        baselines=["zero_shot"],
    )
    results = run_here(path, tmp_path / "out")
    assert [row.answer.reason for row in results.rows] == [None] * 3
    gate, biases = (of(results, label).answer.figures for label in ("fedclip", "fedtune:visual_bias"))
    assert gate is not None
    assert biases is not None
    assert gate.zero_shot == biases.zero_shot
    assert gate.parameters != biases.parameters


def test_a_fault_in_one_method_ends_no_other_cell_and_leaves_its_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_sites(tmp_path)
    path = write_experiment(tmp_path, methods=[{"method": {"name": name}} for name in ("fedclip", "linear_probe")])
    monkeypatch.setattr(FedClip, "predict", lambda *_: 1 / 0)
    results = run_here(path, tmp_path / "out")
    reasons = {row.label: row.answer.reason for row in results.rows}
    assert reasons == {"fedclip": "ZeroDivisionError: division by zero", "linear_probe": None}
    assert "Traceback" in caplog.text
