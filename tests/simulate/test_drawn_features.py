"""Drawn features: what the experiments on them rely on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from fedclip_secure.config.plan import ExternalModel
from fedclip_secure.data.embeddings import read_embeddings, read_text_features
from fedclip_secure.simulate.experiment import EmbeddingSites, Experiment, read_experiment
from tests.conftest import ROOT
from tools.draw_features import DIM, REGIMES, SITES, write_regime

NAMES = {"features-many-classes": "c1", "features-skewed": "c2", "features-few-classes": "c3"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiments, and beside them the features that they name."""
    folder = tmp_path_factory.mktemp("drawn")
    for name, regime in NAMES.items():
        shutil.copy(ROOT / "benchmarks" / "experiments" / f"{name}.yaml", folder)
        write_regime(folder / "features" / regime, regime, seed=3)
    return folder


def _read(folder: Path, name: str) -> tuple[Experiment, dict[str, Path]]:
    experiment = read_experiment(folder / f"{name}.yaml")
    assert isinstance(experiment.data, EmbeddingSites)
    return experiment, {site: Path(path) for site, path in experiment.data.files.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_files_named_by_an_experiment_are_the_ones_drawn(folder: Path, name: str) -> None:
    experiment, files = _read(folder, name)
    drawn = folder / "features" / NAMES[name]
    assert [*files.values(), drawn / "text.safetensors"] == [drawn / f"{site}.safetensors" for site in (*SITES, "text")]
    assert isinstance(experiment.model, ExternalModel)
    assert folder / experiment.model.text_features == drawn / "text.safetensors"


@pytest.mark.parametrize("name", NAMES)
def test_zero_shot_on_them_is_good_but_not_perfect(folder: Path, name: str) -> None:
    experiment, files = _read(folder, name)
    classes = list(experiment.classes or {})
    assert len(classes) == REGIMES[NAMES[name]].classes
    text, scale = read_text_features(folder / "features" / NAMES[name] / "text.safetensors", classes, DIM)
    assert scale == 100
    sites = [read_embeddings(path, classes, DIM) for path in files.values()]
    right = np.concatenate([(site.image_features @ text.T).argmax(axis=1) == site.labels for site in sites])
    assert 0.88 < right.mean() < 0.98


def test_all_records_are_told_apart(folder: Path) -> None:
    _, files = _read(folder, "features-few-classes")
    classes = list(read_experiment(folder / "features-few-classes.yaml").classes or {})
    ids = np.concatenate([read_embeddings(path, classes, DIM).unit_ids for path in files.values()])
    assert len(np.unique(ids, axis=0)) == len(ids)


def test_the_same_seed_draws_the_same_bytes_and_another_does_not(folder: Path, tmp_path: Path) -> None:
    drawn = {path.name: path.read_bytes() for path in (folder / "features" / "c3").iterdir()}
    for seed in (3, 4):
        write_regime(tmp_path / str(seed), "c3", seed)
    assert {path.name: path.read_bytes() for path in (tmp_path / "3").iterdir()} == drawn
    for path in (tmp_path / "4").iterdir():
        assert path.read_bytes() != drawn[path.name]
