"""`fedclip-agg export` from a real store, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclip_secure.aggregator.home import Home, init_home
from fedclip_secure.aggregator.store import RoundRow
from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.model.state import AdapterState, Layout
from fedclip_secure.pki.roster import Roster
from fedclip_secure.training.prepare import prepare
from tests.cli.test_agg_mistakes import refused, run
from tests.waiting import BOUND

ROOT = Path(__file__).resolve().parents[2]
PARTIES = ("aggregator", "art", "cartoon", "photo")


class Run:
    """A coordinator's folder; `models` are those after 0, 1, 2 rounds, of which some are in the store."""

    def __init__(self, folder: Path, tower: Path, plan: FederationPlan) -> None:
        self.home: Home = init_home(folder, plan.federation, ["localhost"], 8443)
        made = prepare(plan, tower)
        self.contract = Contract(plan, made.lock)
        layout = Layout(tuple((entry.name, tuple(entry.shape)) for entry in made.lock.layout))
        first = AdapterState.from_safetensors(made.initial_file, layout, "initial")
        steps = (np.float32(0.01) * number for number in range(3))
        self.models = [AdapterState(layout, first.vector + step) for step in steps]
        keys = {name: Ed25519PrivateKey.generate().public_key().public_bytes_raw() for name in PARTIES}
        store = self.home.store()
        store.freeze(self.contract.encode(), Roster.of(keys).encode())
        store.close()

    def finish(self, number: int, start: int, end: int, correct: int = 0, total: int = 0) -> None:
        store = self.home.store()
        model = self.models[end]
        store.blobs.save_model(model.digest, model)
        sums = bytes([number]) * 32
        start_model = self.models[start].digest
        store.end_round(
            RoundRow(number, number, PARTIES[1:], 3, correct, total, start_model, model.digest, sums, 1.0e9)
        )
        store.close()

    def export(self, *more: str) -> str:
        result = run("export", "--dir", str(self.home.folder), *more)
        assert result.exit_code == 0, result.output
        return result.stdout


@pytest.fixture
def made(tmp_path: Path, random_tower: Path, tower_plan: FederationPlan) -> Run:
    return Run(tmp_path / "fed", random_tower, tower_plan)


def card(folder: Path) -> dict[str, object]:
    return json.loads((folder / "adapter.json").read_text("utf-8"))  # type: ignore[no-any-return]


def test_the_model_after_the_last_round_is_written_with_the_counts_of_the_closing_one(
    made: Run, tmp_path: Path
) -> None:
    made.finish(1, 0, 1, 10, 40)
    made.finish(2, 1, 2, 20, 40)
    made.finish(3, 2, 2, 30, 40)  # only counts
    said = made.export("--out", str(tmp_path / "out"))
    assert "last adapter, after round 2;" in said
    last = made.models[2]
    read = AdapterState.from_file(tmp_path / "out" / "adapter.safetensors", last.layout, "exported")
    assert read.digest == last.digest
    assert card(tmp_path / "out")["model_digest"] == last.digest.hex()
    assert card(tmp_path / "out")["validation"] == {
        "correct": 30,
        "total": 40,
        "scope": "all silos of the round after it",
    }
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "30 of 40 records right (75.0 %)" in text
    assert made.contract.pin in text


def test_in_the_middle_of_a_run_the_newest_model_is_written_and_nobody_has_counted_for_it(made: Run) -> None:
    made.finish(1, 0, 1, 10, 40)
    assert "last adapter, after round 1;" in made.export()
    folder = made.home.folder / "export"
    assert card(folder)["validation"] == {"correct": 0, "total": 0, "scope": "all silos of the round after it"}
    assert "after round 1 of 2" in (folder / "README.md").read_text("utf-8")


def test_before_the_first_round_is_over_there_is_nothing_to_export(made: Run) -> None:
    refused("no round is finished yet", "export", "--dir", str(made.home.folder))


def test_a_model_that_is_lost_or_another_is_refused(made: Run) -> None:
    made.finish(1, 0, 1)
    path = made.home.store().blobs.model_path(made.models[1].digest)
    made.models[2].to_file(path)
    refused(
        "is not the model of its name; restore `state/` as the server last left it",
        "export",
        "--dir",
        str(made.home.folder),
    )
    path.unlink()
    refused("cannot be read .*restore `state/` as the server last left it", "export", "--dir", str(made.home.folder))
    assert not (made.home.folder / "export").exists()


def test_export_needs_no_torch(made: Run, tmp_path: Path) -> None:
    made.finish(1, 0, 1)
    code = "import sys; sys.modules |= dict.fromkeys(('torch', 'open_clip')); from fedclip_cli.agg import main; main()"
    command = [sys.executable, "-c", code, "export", "--dir", str(made.home.folder), "--out", str(tmp_path / "out")]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}", "PATH": ""}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=BOUND)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "README.md").is_file()
