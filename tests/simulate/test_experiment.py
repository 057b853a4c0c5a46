from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedclip_secure.config.silo import FolderData
from fedclip_secure.errors import ConfigError
from fedclip_secure.simulate import sources
from fedclip_secure.simulate.experiment import EmbeddingSites, FolderSites, encoder_of, read_experiment
from fedclip_secure.simulate.experiment_cells import cells_of, digest_of, label_of, plan_of
from tests.simulate.worlds import CLASSES, SITES, experiment, write_experiment

PRIVACY = {
    "unit": "record", "sample_rate": 0.5, "steps_per_round": 2, "noise_multiplier": 1.0, "max_grad_norm": 1.0,
    "update_divisor": 20.0, "delta": 1e-5,
}  # fmt: skip
FEDCLIP = {"method": {"name": "fedclip"}}
PACS = {"format": "folder", "path": "pacs"}
VIT = {"name": "timm/test_vit", "pretrained": "vit.safetensors"}


def test_every_fault_is_listed_with_its_key_and_a_remedy(tmp_path: Path) -> None:
    path = write_experiment(
        tmp_path,
        split={"by": "dirichlet", "alpha": 0, "silos": 2, "leave_out": "each"},
        methods=[{"label": "a", "method": {"name": "fedclap"}}, {**FEDCLIP, "training": {"rounds": "ten"}}],
        seeds=[0, 1, 0],
        evry=2,
    )
    with pytest.raises(ConfigError) as refused:
        read_experiment(path)
    said = str(refused.value)
    assert f"{path}: 7 value(s) cannot be used" in said
    for fault in (
        "split.alpha: input should be greater than or equal to 0.001",
        "split.silos: input should be greater than or equal to 3",
        "split.leave_out: unknown key; check its spelling or remove it",
        "methods.0.method: method.name: 'fedclap' is unknown to this version; it has fedclip",
        "methods.1.training.rounds: input should be a valid integer",
        "seeds: holds the same twice; remove one",
        "evry: unknown key; check its spelling or remove it",
    ):
        assert fault in said


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"privacy": [PRIVACY], "splits": {"train": 0.6, "validation": 0.2, "test": 0.2}}, "splits.validation must be"),
        ({"classes": None}, "classes is missing; files of features need it"),
        ({"data": {"format": "demo"}}, "data.format must be `embeddings`: the model is external"),
        ({"model": VIT, "baselines": ["zero_shot"]}, "baselines: zero_shot: timm/test_vit reads no text; leave it out"),
        ({"methods": [FEDCLIP, FEDCLIP]}, "the label 'fedclip' stands twice; give each method a `label` of its own"),
        ({"methods": [{"method": {"name": "linear_probe", "loss": "inbatch"}}]}, "leave `loss` out"),
        ({"splits": {"train": 0.5, "validation": 0.5, "test": 0}}, "splits.test must be above 0"),
        ({"name": "x" * 51}, "name: "),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_experiment(write_experiment(tmp_path, **changes))
    assert fault in str(refused.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (PACS, "model: {name: ViT-B-32-quickgelu, pretrained: openai}`, where `pretrained` may be a checkpoint"),
        (PACS, "to try the program with it set `model: {name: fedclip-tiny, pretrained: shipped}`"),
        (experiment()["data"], "model is missing; for features that another model made set `model: {name: external"),
    ],
    ids=["real", "tiny", "features"],
)
def test_sites_of_ones_own_need_an_encoder_that_somebody_chose(tmp_path: Path, data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_experiment(without_model(tmp_path, data))
    assert said in str(refused.value)


def test_the_encoder_is_named_with_what_it_does_not_know(tmp_path: Path) -> None:
    assert encoder_of(read_experiment(without_model(tmp_path, {"format": "demo"}))) == "fedclip-tiny (shipped)"
    tiny, real = (
        {"name": "fedclip-tiny", "pretrained": "shipped"},
        {"name": "ViT-B-32-quickgelu", "pretrained": "openai"},
    )
    for model, said in (
        (tiny, "fedclip-tiny (shipped), which knows drawn micrographs and nothing else: figures are near chance"),
        (real, "ViT-B-32-quickgelu (openai)"),
    ):
        assert encoder_of(read_experiment(write_experiment(tmp_path, model=model, data=PACS))) == said
    assert encoder_of(read_experiment(write_experiment(tmp_path))) == "none here: 16 features from files"


def test_a_tokenizers_folder_beside_the_file_is_what_every_silo_has(tmp_path: Path) -> None:
    model = {"name": "ViT-B-16-SigLIP", "pretrained": "siglip.safetensors", "tokenizer": "words"}
    path = write_experiment(tmp_path, model=model, data=PACS)
    found = sources.Sources({"photo": FolderData(format="folder", path="photo")}, CLASSES, tmp_path, tmp_path / "out")
    assert sources._config(read_experiment(path), found, "photo").tokenizer == str(tmp_path / "words")


def without_model(folder: Path, data: dict[str, Any]) -> Path:
    """An experiment on `data` that names no encoder."""
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in experiment(data=data).items() if key != "model"}))
    return path


def test_paths_count_from_the_file_and_take_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDCLIP_TEST_PACS", raising=False)
    model = {"name": "fedclip-tiny", "pretrained": "shipped"}
    path = write_experiment(tmp_path, model=model, data={"format": "folder", "path": "${FEDCLIP_TEST_PACS:-../pacs}"})
    for value, expected in ((None, tmp_path.parent / "pacs"), ("", tmp_path.parent / "pacs"), ("/x/y", Path("/x/y"))):
        if value is not None:
            monkeypatch.setenv("FEDCLIP_TEST_PACS", value)
        data = read_experiment(path).data
        assert isinstance(data, FolderSites)
        assert Path(data.path) == expected
    own = read_experiment(write_experiment(tmp_path)).data
    assert isinstance(own, EmbeddingSites)
    assert own.files["art"] == str(tmp_path / "art.safetensors")


def test_a_variable_that_is_not_set_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDCLIP_TEST_PACS", raising=False)
    path = write_experiment(tmp_path, data={"format": "folder", "path": "${FEDCLIP_TEST_PACS}"})
    with pytest.raises(ConfigError, match=r"data\.path: the environment has no FEDCLIP_TEST_PACS; set it"):
        read_experiment(path)


def test_a_method_has_its_own_settings_before_the_defaults_and_those_before_the_base(tmp_path: Path) -> None:
    methods = [{**FEDCLIP, "training": {"rounds": 7}, "coordinate_clip": 0.5}, {"method": {"name": "linear_probe"}}]
    private = {"optimizer": {"name": "sgd", "lr": 1.0}, "coordinate_clip": 2.0}
    defaults = {"training": {"batch_size": 8}, "weights": "equal", "private": private}
    path = write_experiment(tmp_path, methods=methods, defaults=defaults, privacy=[None, PRIVACY])
    experiment = read_experiment(path)
    cells = [cell for cell in cells_of(experiment, SITES) if cell.left_out == "art"]
    first, noisy, second, _ = (plan_of(experiment, cell, CLASSES) for cell in cells)
    assert (first.training.rounds, second.training.rounds) == (7, 20)
    assert (first.training.batch_size, second.training.batch_size) == (8, 8)
    clips = [plan.secure_aggregation.coordinate_clip for plan in (first, second, noisy)]
    assert clips == [0.5, 0.1, 2.0]
    assert (noisy.training.optimizer.name, noisy.training.batch_size, noisy.training.rounds) == ("sgd", None, 7)
    assert {plan.secure_aggregation.weights for plan in (first, second, noisy)} == {"equal"}


def test_cells_are_every_method_site_privacy_and_seed_and_baselines_have_no_privacy(tmp_path: Path) -> None:
    baselines = ["zero_shot", "local_only", "centralised"]
    path = write_experiment(tmp_path, baselines=baselines, seeds=[3, 4], privacy=[None, PRIVACY])
    experiment = read_experiment(path)
    cells = cells_of(experiment, SITES)
    assert len(cells) == len(set(cells)) == (3 + 2) * len(SITES) * 2
    labels = [label_of(experiment, cell) for cell in cells]
    assert list(dict.fromkeys(labels)) == ["zero-shot", "FedCLIP, local only", "FedCLIP, centralised", "FedCLIP"]
    assert {cell.privacy for cell in cells if cell.kind != "federated"} == {None}


def test_a_site_that_is_not_there_cannot_be_left_out(tmp_path: Path) -> None:
    experiment = read_experiment(write_experiment(tmp_path, split={"by": "sites", "leave_out": "clay"}))
    with pytest.raises(ConfigError, match=r"split\.leave_out: there is no site 'clay'; the data have art, cartoon"):
        cells_of(experiment, SITES)


def test_a_cells_digest_is_over_what_decides_it_and_nothing_else(tmp_path: Path) -> None:
    def digest(data: bytes = b"records", **changes: Any) -> str:
        experiment = read_experiment(write_experiment(tmp_path, **changes))
        cells = [cell for cell in cells_of(experiment, SITES) if cell.kind == "federated"]
        cell = next(cell for cell in cells if cell.left_out == "photo")
        return digest_of(experiment, cell, plan_of(experiment, cell, CLASSES), data)

    same = digest()
    one = {"by": "sites", "leave_out": "photo"}
    assert digest(split=one) == digest(seeds=[0, 9]) == digest(baselines=["zero_shot"]) == same
    named = [{"label": "another name", "method": {"name": "fedclip"}}]
    assert digest(methods=named) == same
    others = [
        digest(b"other"), digest(seeds=[1]), digest(every=2), digest(split={**one, "shots": 4}), digest(name="b"),
        digest(methods=[{**FEDCLIP, "coordinate_clip": 0.2}]),
    ]  # fmt: skip
    assert len({same, *others}) == 1 + len(others)
