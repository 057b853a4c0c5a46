"""`fedclip-silo personalize` and `export` in a silo's folder after a run; and an export in the hands of a stranger."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fedclip_secure.config.plan import FederationPlan, MethodPlan, Optimizer
from fedclip_secure.export.adapter_facts import KEPT_HOME
from fedclip_secure.export.examples import EXAMPLES
from tests.cli.test_silo_results import Home, make_home, photos
from tests.waiting import BOUND

__all__ = ["photos"]  # a fixture


def with_method(plan: FederationPlan, name: str) -> FederationPlan:
    changes: dict[str, object] = {"method": MethodPlan(name=name)}
    if name in {"private_prototypes", "discriminant"}:
        once = {"rounds": 1, "batch_size": 1, "optimizer": Optimizer(name="sgd", lr=1.0)}
        changes["training"] = plan.training.model_copy(update=once)
        summed = {"coordinate_clip": 10_000.0, "weights": "equal"}
        changes["secure_aggregation"] = plan.secure_aggregation.model_copy(update=summed)
    return plan.model_copy(update=changes)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small are over before a second thread has woken up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def home(tmp_path: Path, random_tower: Path, photos: Path, tower_plan: FederationPlan) -> Home:
    return make_home(tmp_path, random_tower, photos, with_method(tower_plan, "linear_probe"))


def program_of(folder: Path) -> str:
    """The Python in an export's card."""
    found = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def run_as_strangers(folders: list[Path], images: list[Path]) -> list[list[str]]:
    """Run the programs where this package cannot be imported, each in its folder; what each prints, line by line."""
    code = "import os, sys; sys.modules['fedclip_secure'] = None\n"
    for folder in folders:
        code += f"os.chdir({str(folder)!r}); print('from', os.getcwd())\n{program_of(folder)}"
    command = [sys.executable, "-I", "-c", code, *map(str, images)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=BOUND)
    assert done.returncode == 0, done.stderr
    return [part.splitlines()[1:] for part in done.stdout.split("from ")[1:]]


def test_the_program_in_the_card_predicts_what_predict_does(
    tmp_path: Path, random_tower: Path, photos: Path, tower_plan: FederationPlan
) -> None:
    images, wanted, folders = sorted(photos.glob("*/*"))[::4], {}, []
    for method in EXAMPLES:
        (tmp_path / method).mkdir()
        home = make_home(tmp_path / method, random_tower, photos, with_method(tower_plan, method))
        folders.append(tmp_path / "given" / method)
        said, _ = home.run("export", "--adapter", "last", "--out", str(folders[-1]))
        names = {path.name for path in folders[-1].iterdir()}
        assert names == {"adapter.safetensors", "adapter.json", "README.md", "encoder.json"}
        assert all(str(path) in said for path in folders[-1].iterdir())
        shutil.copy(random_tower / "tower.safetensors", folders[-1])
        output, _ = home.run("predict", *map(str, images), "--adapter", "last")
        wanted[method] = list(csv.DictReader(io.StringIO(output)))
    for rows, lines in zip(wanted.values(), run_as_strangers(folders, images), strict=True):
        found = [line.split() for line in lines]
        assert [line[:2] for line in found] == [[row["path"], row["class"]] for row in rows]
        told = [float(row["probability"]) for row in rows]
        assert [float(line[2]) for line in found] == pytest.approx(told, abs=1e-4)
        assert len(set(told)) > len(rows) / 2, "they must differ to show anything"


def test_personalize_writes_an_adapter_of_this_silos_own_which_classifies_and_is_exported_with_its_warning(
    home: Home, photos: Path
) -> None:
    home.refused(r"personal\.safetensors': is missing; `fedclip-silo personalize` makes it", "predict", str(photos),
                 "--adapter", "personal")  # fmt: skip
    lines = home.run("personalize")[0].splitlines()
    assert "of this silo alone, without privacy: adam, lr 0.001, batches of 32" in lines[0]
    assert lines[1].split() == ["split", "records", "global", "personal"]
    assert [line.split()[0] for line in lines[2:4]] == ["validation", "test"]
    assert KEPT_HOME in lines[-1], "if no mix was better here, the features of the random tower have changed"
    adapters = home.folder / "work" / "adapters"
    card = json.loads((adapters / "personal.json").read_text("utf-8"))
    assert card["privacy"] == KEPT_HOME
    assert card["personal"]["of"] == json.loads((adapters / "best.json").read_text("utf-8"))["model_digest"]
    with safe_open(adapters / "personal.safetensors", "numpy") as file:
        assert file.metadata() == {"model": card["model_digest"], "personal": KEPT_HOME}
    assert len(home.run("predict", str(photos / "dog"), "--adapter", "personal")[0].splitlines()) == 7
    assert KEPT_HOME in home.run("export", "--adapter", "personal")[0]
    text = (home.folder / "work" / "export" / "personal" / "README.md").read_text("utf-8")
    assert f"**This is one silo's own adapter**, {KEPT_HOME}" in text
    assert "Outside of the house that trained it" in text


def test_personalize_as_json_agrees_with_evaluate(home: Home) -> None:
    found = json.loads(home.run("personalize", "--json")[0])["accuracy"]
    assert found["validation"]["personal"] >= found["validation"]["global"]
    for split, adapter, name in (("validation", "personal", "personal"), ("test", "best", "global")):
        told = json.loads(home.run("evaluate", "--split", split, "--adapter", adapter, "--json")[0])
        assert told["accuracy"]["federated"] == found[split][name]
        assert told["records"] == found[split]["records"]


def test_a_file_is_an_adapter_too(home: Home, photos: Path, tmp_path: Path) -> None:
    copy, dog, exported = tmp_path / "from-elsewhere.safetensors", str(photos / "dog"), tmp_path / "out"
    shutil.copy(home.folder / "work" / "adapters" / "last.safetensors", copy)
    assert home.run("predict", dog, "--adapter", str(copy)) == home.run("predict", dog, "--adapter", "last")
    found = json.loads(home.run("evaluate", "--split", "train", "--adapter", str(copy), "--json")[0])
    assert found["adapters"]["from-elsewhere"]["after_round"] is None
    home.refused("has no JSON card beside it", "export", "--adapter", str(copy))
    home.refused("nowhere: is none of best, last, personal, and no file", "evaluate", "--adapter", "nowhere")
    home.run("export", "--adapter", "last", "--out", str(exported))
    assert json.loads((exported / "adapter.json").read_text("utf-8"))["after_round"] == 2


def test_before_a_run_has_ended_there_is_nothing_to_personalize_or_export(home: Home) -> None:
    (home.folder / "work" / "adapters" / "best.safetensors").unlink()
    for command in ("personalize", "export"):
        home.refused("`fedclip-silo train` writes it when the run ends", command)
