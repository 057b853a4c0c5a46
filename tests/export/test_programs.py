"""The programs in exported cards, of every method and of several kinds of towers, against the product's own predict."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.config.silo import FolderData, SiloConfig
from fedclip_secure.export.encoder_examples import INSIDE, example_of
from fedclip_secure.export.examples import EXAMPLES
from fedclip_secure.methods.registry import METHODS
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.evaluation.predict import predict
from tests.export.test_export import exported, plan_for, prepared, program
from tests.waiting import BOUND

TINY = {"name": "fedclip-tiny", "pretrained": "shipped"}
# As SigLIP: timm's tower of images, a text tower of its own, in which tokens see each other, and a bias.
OTHER = {"name": "other", "pretrained": "other.safetensors", "config": "other.json"}
OTHER_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "init_logit_scale": 3.0,
    "init_logit_bias": -1.0,
    "vision_cfg": {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2,
                 "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
}  # fmt: skip
DOMAINS = {"domains": {"upright": ["st-marys"], "portable": ["lakeside"], "other": ["hillcrest"]}, "length": 4}


@dataclass(frozen=True, slots=True)
class Case:
    """A method with options, on one of the two encoders, with an adapter `moved` so far from its start.

    `zeroed` is what of the adapter is zeros: of fedapt's network, so that all domains weigh alike.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=lambda: TINY)
    moved: float = 0.05
    zeroed: str = ""

    def __str__(self) -> str:
        options = (f"{key}={value}" for key, value in self.options.items() if key != "domains")
        named = [self.method, *options, *filter(None, [self.zeroed])]
        return "-".join([*named, self.model["name"]])


INNER: list[tuple[str, dict[str, Any]]] = [
    ("fedtune:text_context", {"context_length": 4}),
    ("fedtune:text_bias", {}),
    ("fedtune:visual_prompt", {"prompt_length": 3}),
    ("fedtune:visual_prompt_deep", {"prompt_length": 3, "first_block": 1}),
    ("fedtune:adapter", {"width": 8, "first_block": 1}),
    ("fedtune:visual_bias", {"first_block": 1}),
    ("fedtune:layernorm", {}),
    ("fedtune:lora", {"first_block": 2}),
    ("fedtune:full", {}),
    ("feddat", {"place": "blocks", "first_block": 2, "width": 8}),
    ("fedapt", {**DOMAINS, "seed": 5}),
]
CASES = [
    *(Case(method, options, model) for model in (TINY, OTHER) for method, options in INNER),
    Case("linear_probe"),
    Case("fedtune:head"),
    Case("private_prototypes"),
    Case("discriminant", moved=0.002),
    Case("feddat"),
    Case("fedtune:visual_prompt", {"first_block": 2}),
    Case("fedtune:visual_prompt_deep"),
    Case("fedtune:adapter"),
    Case("fedapt", {**DOMAINS, "fast": False}),
    Case("fedapt", {**DOMAINS, "fast": False}, zeroed="network.weight"),
    Case("fedapt", {"domains": {"all": ["st-marys"]}, "fast": False, "length": 4}),
    Case("fedavg_full"),
    Case("fedprox_full", {"mu": 0.1}),
]


@dataclass(frozen=True, slots=True)
class Told:
    """The words of each line that a program prints, and its logits (N, C)."""

    lines: list[list[str]]
    logits: list[list[float]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six images and the other encoder."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "other.json").write_text(json.dumps({"custom_text": True, **OTHER_CONFIG}), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        save_file(open_clip.CustomTextCLIP(**OTHER_CONFIG).state_dict(), folder / "other.safetensors")
    for number, pixels in enumerate(np.random.default_rng(1).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)):
        Image.fromarray(pixels).resize((70, 90)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def adapters(home: Path) -> dict[str, tuple[Contract, AdapterState]]:
    """Of each case, exported into `out`."""
    made = {}
    for case in CASES:
        agreed, state = prepared(plan_of(case), home, case.moved)
        if case.zeroed:
            arrays = state.arrays()
            state = AdapterState.from_arrays({**arrays, case.zeroed: np.zeros_like(arrays[case.zeroed])})
        folder = home / "out" / str(case)
        exported(folder, agreed, state)
        if case.model is OTHER:
            shutil.copy(home / "other.safetensors", folder)
        made[str(case)] = agreed, state
    return made


@pytest.fixture(scope="module")
def told(home: Path, adapters: dict[str, tuple[Contract, AdapterState]]) -> dict[str, Told]:
    """By each case's program. One process runs them all: loading the libraries takes longer than any of them."""
    code = "import os, sys; sys.modules['fedclip_secure'] = None\n"
    for name in adapters:
        text = program((home / "out" / name / "README.md").read_text("utf-8"))
        code += f"os.chdir({str(home / 'out' / name)!r}); seen = {{}}; exec({text!r}, seen)\n"
        code += "print('logits', seen['logits'].tolist())\n"
    command = [sys.executable, "-I", "-c", code, *map(str, images_in(home))]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=BOUND)
    assert done.returncode == 0, done.stderr
    parts = re.findall(r"(.*?)logits (.*?)\n", done.stdout, re.DOTALL)
    told = [Told([line.split() for line in lines.splitlines()], json.loads(logits)) for lines, logits in parts]
    return dict(zip(adapters, told, strict=True))


def plan_of(case: Case) -> FederationPlan:
    return plan_for(dict(case.model), case.method, case.options)


def images_in(home: Path) -> list[Path]:
    return sorted(home.glob("*.png"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_program_says_what_predict_does(
    case: Case, home: Path, adapters: dict[str, tuple[Contract, AdapterState]], told: dict[str, Told]
) -> None:
    data = FolderData(format="folder", path=str(home))
    weights = str(home / "other.safetensors") if case.model is OTHER else None
    silo = SiloConfig(name="lab", data=data, workdir=str(home / "work"), device="cpu", weights=weights)
    wanted = predict(silo, *adapters[str(case)], images_in(home), lambda _: None)
    found, labels = told[str(case)], wanted.probabilities.argmax(axis=1)
    assert [line[:2] for line in found.lines] == [
        [str(path), wanted.classes[label]] for path, label in zip(wanted.paths, labels, strict=True)
    ]
    assert [float(line[2]) for line in found.lines] == pytest.approx(wanted.probabilities.max(axis=1), abs=1e-4)
    shares = torch.tensor(found.logits, dtype=torch.float64).log_softmax(dim=1).numpy()
    np.testing.assert_allclose(shares, np.log(wanted.probabilities), rtol=1e-4, atol=1e-4)
    assert np.ptp(shares) > 0.01, "they must differ to show anything"


def test_every_program_is_run_here() -> None:
    run = {example_of(plan_of(case).method) for case in CASES}
    assert {lines for name, lines in {**EXAMPLES, **INSIDE}.items() if name != "fedclip"} <= run


def test_programs_are_of_methods_that_there_are() -> None:
    variants = {"feddat:blocks": "feddat", "fedapt:mixture": "fedapt"}
    assert {variants.get(name, name) for name in [*EXAMPLES, *INSIDE]} <= set(METHODS)
    assert not set(EXAMPLES) & set(INSIDE)
