"""FedCLIP as its paper trains it (Lu et al. 2023, arXiv:2302.13485), over whole rounds, against plain torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.data.dataset import FeatureSet, Task
from fedclip_secure.model.state import AdapterState, Layout
from fedclip_secure.simulate.federation import run_federated, terms_of
from fedclip_secure.training.local_training import LocalTrainer
from fedclip_secure.training.prepare import prepare
from tests.config.test_plan import PLAN

DIM, RECORDS = 16, {"st-marys": 40, "lakeside": 24, "hillcrest": 56}
ADAM: dict[str, Any] = {"lr": 5e-5, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.2}
ROUNDS = EPOCHS = 3


def paper_plan(folder: Path, task: Task) -> FederationPlan:
    text = {"text_features": task.text_features, "logit_scale": np.array(task.logit_scale, np.float32)}
    save_file(text, folder / "text.safetensors", {"classes": '["disc", "rod"]'})
    changes = {
        "model": {"name": "external", "dim": DIM, "text_features": "text.safetensors"},
        "classes": {"disc": "a disc", "rod": "a rod"},
        "initial": None,
        "method": {"name": "fedclip", "loss": "inbatch"},
        "training": {"rounds": ROUNDS, "local_epochs": EPOCHS, "batch_size": 64, "optimizer": {"name": "adam", **ADAM}},
        "secure_aggregation": {"weights": "equal", "coordinate_clip": 0.01},
    }
    return check({**PLAN, **changes}, FederationPlan, "plan")


def local_update(adapter: nn.Module, images: Tensor, own_text: Tensor, scale: float) -> dict[str, Tensor]:
    """What one client sends: Adam begins anew, and each batch is all of its records, so that order plays no part."""
    client = copy.deepcopy(adapter)
    optimizer = torch.optim.Adam(client.parameters(), **{**ADAM, "betas": tuple(ADAM["betas"])})
    for _ in range(EPOCHS):
        logits = scale * normalize(client(images) * images, dim=1) @ own_text.T
        diagonal = torch.arange(len(images))
        loss = (cross_entropy(logits, diagonal) + cross_entropy(logits.T, diagonal)) / 2
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return client.state_dict()


def test_rounds_of_the_papers_mode_make_the_model_that_plain_federated_averaging_makes(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    text = random.normal(size=(2, DIM))
    task = Task(("disc", "rod"), (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32), 20.0)
    plan = paper_plan(tmp_path, task)
    made = prepare(plan, tmp_path)
    start = AdapterState.from_safetensors(
        made.initial_file, Layout(tuple((entry.name, tuple(entry.shape)) for entry in made.lock.layout)), "initial"
    )
    data = {
        name: FeatureSet(
            random.normal(size=(count, DIM)).astype(np.float32), random.integers(2, size=count),
            random.integers(0, 256, (count, 32), dtype=np.uint8), name,
        )
        for name, count in RECORDS.items()
    }  # fmt: skip
    trainers = {
        name: LocalTrainer(plan, task, {"train": one, "validation": one}, torch.device("cpu"))
        for name, one in data.items()
    }
    terms, models = terms_of(Contract(plan, made.lock), list(RECORDS)), []
    run_federated(terms, trainers, start, lambda _, states, __: models.append(states["lakeside"]))

    adapter = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM), nn.Softmax(dim=1))
    values = [
        torch.from_numpy(start.arrays()[f"{layer}.{kind}"].copy())
        for layer in ("hidden", "gate")
        for kind in ("weight", "bias")
    ]
    adapter.load_state_dict(dict(zip(adapter.state_dict(), values, strict=True)))
    for number in range(ROUNDS):
        sent = [
            local_update(
                adapter, torch.from_numpy(one.image_features), torch.from_numpy(task.text_features[one.labels]), 20.0
            )
            for one in data.values()
        ]
        adapter.load_state_dict({key: torch.stack([one[key] for one in sent]).mean(dim=0) for key in sent[0]})
        found = models[number].arrays()
        wanted = dict(
            zip(("hidden.weight", "hidden.bias", "gate.weight", "gate.bias"), adapter.parameters(), strict=True)
        )
        for key, value in wanted.items():
            moved = value.detach().numpy() - start.arrays()[key]
            np.testing.assert_allclose(found[key] - start.arrays()[key], moved, atol=2e-3 * np.abs(moved).max())
