"""`fedclip-silo evaluate` and `predict` in a silo's folder after a run, without a server."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fedclip_cli import silo

from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import FederationPlan, MethodPlan
from fedclip_secure.config.silo import read_silo
from fedclip_secure.model.state import AdapterState, Layout
from fedclip_secure.pki.roster import Roster
from fedclip_secure.silo.accepted import Accepted, save_accepted
from fedclip_secure.training.prepare import prepare
from tests.cli.test_agg_mistakes import refused, run


@dataclass(frozen=True)
class Home:
    """A silo's folder; its images are `per_class` of each class of PACS's photos."""

    folder: Path

    def run(self, command: str, *more: str) -> tuple[str, str]:
        result = run(command, "--config", str(self.folder / "silo.yaml"), *more, program=silo.main)
        assert result.exit_code == 0, result.output
        return result.stdout, result.stderr

    def refused(self, said: str, command: str, *more: str) -> str:
        return refused(said, command, "--config", str(self.folder / "silo.yaml"), *more, program=silo.main)


def make_home(folder: Path, tower: Path, images: Path, plan: FederationPlan) -> Home:
    prepared = prepare(plan, tower)
    config = folder / "silo.yaml"
    config.write_text(
        f"name: lab\ndata: {{format: folder, path: {images}}}\ndevice: cpu\nweights: {tower / 'tower.safetensors'}\n"
    )
    names = ("aggregator", "lab", "other", "third")
    roster = Roster.of({name: Ed25519PrivateKey.generate().public_key().public_bytes_raw() for name in names})
    save_accepted(config, read_silo(config), Accepted(Contract(plan, prepared.lock), roster), None)
    adapters = folder / "work" / "adapters"
    adapters.mkdir()
    layout = Layout(tuple((entry.name, tuple(entry.shape)) for entry in prepared.lock.layout))
    start = AdapterState.from_safetensors(prepared.initial_file, layout, "initial")
    last = AdapterState(layout, (start.vector + 0.02 * np.sin(np.arange(layout.size))).astype(np.float32))
    for kind, state, after in (("best", start, 0), ("last", last, 2)):
        (adapters / f"{kind}.safetensors").write_bytes(state.to_safetensors())
        card = {"after_round": after, "model_digest": state.digest.hex()}
        (adapters / f"{kind}.json").write_text(json.dumps(card))
    return Home(folder)


@pytest.fixture(scope="module")
def photos(pacs_mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photos of each class."""
    root = tmp_path_factory.mktemp("photos")
    for folder in sorted((pacs_mini / "photo").iterdir()):
        (root / folder.name).mkdir()
        for image in sorted(folder.iterdir())[:6]:
            (root / folder.name / image.name).symlink_to(image)
    return root


@pytest.fixture
def probe_plan(tower_plan: FederationPlan) -> FederationPlan:
    return tower_plan.model_copy(update={"method": MethodPlan(name="linear_probe")})


@pytest.fixture
def home(tmp_path: Path, random_tower: Path, photos: Path, probe_plan: FederationPlan) -> Home:
    return make_home(tmp_path, random_tower, photos, probe_plan)


def test_evaluate_shows_best_and_last_beside_zero_shot_and_draws_both(home: Home) -> None:
    output, _ = home.run("evaluate", "--split", "train")
    lines = output.splitlines()
    assert lines[0] == "accuracy on the train split"
    assert lines[1].split() == ["class", "records", "zero-shot", "best", "(round", "0)", "last", "(round", "2)"]
    assert [line.split()[0] for line in lines[2:10]][-1] == "all"
    for kind in ("best", "last"):
        plot = home.folder / "work" / "evaluation" / f"train-{kind}.svg"
        assert f"confusion matrix of {kind}: {plot}" in lines
        ET.fromstring(plot.read_bytes())  # noqa: S314 - our own output


def test_evaluation_as_json_keeps_its_keys_and_adds_the_adapters(home: Home) -> None:
    found = json.loads(home.run("evaluate", "--split", "train", "--json")[0])
    assert set(found) == {"adapter", "split", "records", "accuracy", "classes", "adapters"}
    assert (found["adapter"], found["split"]) == ("best", "train")
    best, last = found["adapters"]["best"], found["adapters"]["last"]
    assert set(best) == {"after_round", "accuracy", "classes", "confusion", "plot"}
    assert (best["after_round"], last["after_round"]) == (0, 2)
    assert found["accuracy"] == {"zero_shot": best["accuracy"], "federated": best["accuracy"]}, "it starts at zero-shot"
    assert np.sum(last["confusion"]) == np.sum(best["confusion"]) == found["records"]
    assert np.trace(last["confusion"]) / found["records"] == last["accuracy"]
    assert set(found["classes"]["dog"]) == {"records", "zero_shot", "federated"}
    assert last["classes"].keys() == found["classes"].keys()
    alone = json.loads(home.run("evaluate", "--split", "train", "--json", "--adapter", "last")[0])
    assert alone["adapters"].keys() == {"last"}
    assert alone["accuracy"]["federated"] == last["accuracy"]


def test_adapter_without_its_card_is_named(home: Home) -> None:
    (home.folder / "work" / "adapters" / "last.json").write_text("[]")
    home.refused(r"last\.json': cannot be read as an adapter's card; `fedclip-silo train` writes it anew", "evaluate")


def test_the_card_of_another_adapter_is_not_believed(home: Home) -> None:
    adapters = home.folder / "work" / "adapters"
    adapters.joinpath("best.json").write_bytes(adapters.joinpath("last.json").read_bytes())
    home.refused(r"best\.json': is the card of another adapter than .*best\.safetensors", "evaluate")


def test_predict_agrees_with_evaluate_on_the_same_images(home: Home, photos: Path) -> None:
    output, _ = home.run("predict", str(photos), "--adapter", "last")
    rows = list(csv.DictReader(io.StringIO(output)))
    classes = sorted(folder.name for folder in photos.iterdir())
    assert output.splitlines()[0] == "path,class,probability,dog,elephant,giraffe,guitar,horse,house,person"
    assert [row["path"] for row in rows] == sorted(map(str, photos.glob("*/*")))
    for row in rows:
        shares = {name: float(row[name]) for name in classes}
        assert sum(shares.values()) == pytest.approx(1, abs=5e-6)
        assert row["probability"] == row[row["class"]]
        assert float(row["probability"]) == max(shares.values())
    found = {split: json.loads(home.run("evaluate", "--split", split, "--json", "--adapter", "last")[0])["adapters"]
             for split in ("train", "validation", "test")}  # fmt: skip
    right = sum(np.trace(each["last"]["confusion"]) for each in found.values())
    assert sum(Path(row["path"]).parent.name == row["class"] for row in rows) == right


def test_broken_image_is_left_out_and_named_and_with_strict_an_error(home: Home, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    (folder / "deep").mkdir(parents=True)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not looked at")
    (folder / "deep" / "dog.JPG").write_bytes(next(photos.glob("dog/*")).read_bytes())
    out = tmp_path / "found.csv"
    output, errors = home.run("predict", str(folder), "--output", str(out))
    assert output == f"1 prediction(s) in {out}\n"
    assert "1 image(s) cannot be used and were left out:" in errors
    assert f"'{folder / 'broken.png'}': cannot be read as an image" in errors
    assert [row["path"] for row in csv.DictReader(io.StringIO(out.read_text()))] == [str(folder / "deep" / "dog.JPG")]
    out.unlink()
    home.refused(r"1 image\(s\) cannot be used", "predict", str(folder), "--output", str(out), "--strict")
    assert len(out.read_text().splitlines()) == 2, "what could be read is written all the same"
    output, errors = home.run("predict", str(folder / "broken.png"))
    assert len(output.splitlines()) == 1
    assert "1 image(s) cannot be used" in errors


def test_predict_refuses_what_is_not_there(home: Home, tmp_path: Path) -> None:
    home.refused("nowhere': is no file and no folder", "predict", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    home.refused("empty': there is no image there", "predict", str(tmp_path / "empty"))
    dog = str(next(Path(read_silo(home.folder / "silo.yaml").data.path).glob("dog/*")))
    home.refused("taken': cannot be written", "predict", dog, "--output", str(taken(tmp_path)))


def taken(folder: Path) -> Path:
    (folder / "taken").mkdir()
    return folder / "taken"


def test_fedclip_predicts_too(tmp_path: Path, random_tower: Path, photos: Path, tower_plan: FederationPlan) -> None:
    home = make_home(tmp_path, random_tower, photos, tower_plan)
    output, _ = home.run("predict", str(photos / "dog"))
    assert len(output.splitlines()) == 7
    assert not torch.is_inference_mode_enabled()
