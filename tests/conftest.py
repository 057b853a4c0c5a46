"""What several tests need: a small CLIP with random weights, and real images."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from fedclip_secure.config.fields import check
from fedclip_secure.config.plan import FederationPlan

ROOT = Path(__file__).resolve().parent.parent
PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")

# A shell starts what runs in the background with Ctrl-C ignored, and so would be every program that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def random_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tower.json and tower.safetensors."""
    from tools.random_tower import write_random_tower

    folder = tmp_path_factory.mktemp("tower")
    write_random_tower(folder)
    return folder


@pytest.fixture(scope="session")
def pacs_mini() -> Path:
    """`<domain>/<class>/<image>`, 24 images a class."""
    folder = Path(os.environ.get("FEDCLIP_PACS_MINI", ROOT.parent / "shared/data/pacs-mini"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set FEDCLIP_PACS_MINI to a folder <domain>/<class>/<image>")
    return folder


@pytest.fixture
def tower_plan() -> FederationPlan:
    """FedCLIP over the PACS classes, on the random tower."""
    return check(
        {
            "federation": "pets",
            "server": "https://localhost",
            "model": {"name": "tower", "pretrained": "tower.safetensors", "config": "tower.json"},
            "classes": {name: name for name in PACS_CLASSES},
            "templates": ["a picture of a {}", "a drawing of a {}"],
            "splits": {"train": 0.6, "validation": 0.2, "test": 0.2},
            "method": {"name": "fedclip"},
            "training": {"rounds": 2, "batch_size": 32, "optimizer": {"name": "adam", "lr": 1e-3}},
        },
        FederationPlan,
        "test plan",
    )
