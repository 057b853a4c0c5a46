"""What the demo measures: each lab's test records under zero-shot, a model of its own, and the federated one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import FederationPlan, Training
from fedclip_secure.config.silo import FolderData, SiloConfig
from fedclip_secure.data.dataset import Counts, FeatureSet
from fedclip_secure.demo.labs import Scene, Site
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.evaluation.evaluate import evaluate
from fedclip_secure.training.inputs import Inputs, load_inputs
from fedclip_secure.training.local_training import LocalTrainer

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Accuracies:
    """Shares of records classified right, 0..1, by site; None where a site is too small to have test records."""

    zero_shot: dict[str, float | None]
    local_only: dict[str, float | None]
    federated: dict[str, float | None]
    local_only_at_unseen: dict[str, float | None]


def measure(  # noqa: PLR0917 - each is a thing of its own
    contract: Contract,
    scene: Scene,
    workdirs: dict[str, Path],
    start: AdapterState,
    end: AdapterState,
    alone: Training,
) -> Accuracies:
    """Evaluate on each site's test split, and on every record of the unseen site: none of them trained anything.

    A site's own model is trained by `alone` from `start`, without privacy: what stays at a site needs no noise.
    """
    found = Accuracies({}, {}, {}, {})
    plan = contract.plan.model_copy(update={"privacy": None, "training": alone})
    own = {}
    for site in scene.training:
        inputs = _inputs(contract, scene, site, workdirs[site.name])
        own[site.name] = _train_alone(plan, inputs, site.silo, start)
        tests = [inputs.splits["test"]]
        found.zero_shot[site.name], found.federated[site.name] = _compare(plan, inputs, tests, end)
        found.local_only[site.name] = _compare(plan, inputs, tests, own[site.name])[1]
    if scene.unseen is not None:
        name = scene.unseen.name
        inputs = _inputs(contract, scene, scene.unseen, workdirs[name])
        records = list(inputs.splits.values())
        found.zero_shot[name], found.federated[name] = _compare(plan, inputs, records, end)
        for site_name, state in own.items():
            found.local_only_at_unseen[site_name] = _compare(plan, inputs, records, state)[1]
    return found


def _inputs(contract: Contract, scene: Scene, site: Site, workdir: Path) -> Inputs:
    data = FolderData(format="folder", path=str(site.images), absent_classes=scene.absent(site))
    config = SiloConfig(name=site.silo, data=data, workdir=str(workdir), device="cpu")
    return load_inputs(config, contract, lambda *_: None)


def _train_alone(plan: FederationPlan, inputs: Inputs, silo: str, state: AdapterState) -> AdapterState:
    if inputs.encoder is not None:
        return _rounds_alone(plan, inputs, silo, state)
    # Steps this small are over before a second thread has woken up: on busy cores it takes 30 times as long.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _rounds_alone(plan, inputs, silo, state)
    finally:
        torch.set_num_threads(threads)


def _rounds_alone(plan: FederationPlan, inputs: Inputs, silo: str, state: AdapterState) -> AdapterState:
    trainer = LocalTrainer(plan, inputs.task, inputs.splits, _CPU, encoder=inputs.encoder, silo=silo)
    for _ in range(plan.training.rounds):
        vector = state.vector.astype(np.float64) + trainer.train(state)
        state = AdapterState(state.layout, vector.astype(np.float32))
    return state


def _compare(
    plan: FederationPlan, inputs: Inputs, parts: Sequence[FeatureSet], state: AdapterState
) -> tuple[float | None, float | None]:
    """Accuracy of zero-shot and of `state` over all records of `parts`."""
    results = [
        evaluate(plan, inputs.task, records, state, _CPU, encoder=inputs.encoder) for records in parts if len(records)
    ]
    return _share(result.zero_shot for result in results), _share(result.adapter for result in results)


def _share(counts: Iterable[Counts]) -> float | None:
    listed = list(counts)
    return Counts(sum(one.correct for one in listed), sum(one.total for one in listed)).accuracy
