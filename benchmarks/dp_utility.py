"""How much accuracy privacy costs: every private method at several epsilons, next to zero-shot and to no privacy.

`FEDCLIP_PACS_MINI=DIR python benchmarks/dp_utility.py [--json] [--seeds 3]`: the demo's drawn labs (willow never
trains) and PACS (sketch never trains), features by fedclip-tiny. Each silo trains by the production engine,
`PrivateTrainer`, with noise from the operating system, and the mean of the updates moves the model: what the secure
round computes, without network and masks. Epsilon is what one record is promised over the whole run, at
delta = 1e-5, by PLD; `inf` trains the same method without privacy for as many rounds. All plans of a method are the
same but for the noise: they were fixed on seed 100 of the drawn labs before seeds 0 to 2 were run, and none follows
from how many images a site has. Without privacy the methods train as in the demo.
Accuracies in percent: at the site that never trained (all its images), and on the test splits of those that did.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.config.silo import FolderData, SiloConfig
from fedclip_secure.data.dataset import FeatureSet, Task
from fedclip_secure.demo.labs import Options, Scene, set_scene
from fedclip_secure.model.state import AdapterState, Layout
from fedclip_secure.training.evaluation.evaluate import evaluate
from fedclip_secure.training.inputs import Inputs, load_inputs
from fedclip_secure.training.local_training import LocalTrainer
from fedclip_secure.training.prepare import Prepared, prepare
from fedclip_secure.training.private.dp_sgd import PrivateTrainer
from fedclip_secure.training.private.units import unit_ids

EPSILONS = (1.0, 2.0, 4.0, 8.0, float("inf"))
ROUNDS = 20
# Of each method: optimiser, and where privacy is on q, steps of a round, C, divisor.
METHODS: dict[str, dict[str, Any]] = {
    "fedclip": {"optimizer": {"name": "sgd", "lr": 1.0}, "rounds": ROUNDS, "privacy": (1.0, 2, 1.0, 300.0)},
    "linear_probe": {"optimizer": {"name": "adam", "lr": 3e-3}, "rounds": ROUNDS, "privacy": (1.0, 2, 1.0, 300.0)},
    "private_prototypes": {"optimizer": {"name": "sgd", "lr": 1.0}, "rounds": 1, "privacy": (1.0, 1, 1.0, 5.0)},
}
SHIPPED = {"name": "fedclip-tiny", "pretrained": "shipped"}
_BATCH = 32  # records, without privacy
_CPU = torch.device("cpu")
_DATA = os.environ.get("FEDCLIP_PACS_MINI", str(Path(__file__).parents[2] / "shared/data/pacs-mini"))


@dataclass(frozen=True, slots=True)
class Sites:
    """Features of a scene: of each site that trains, and of the one that does not."""

    scene: Scene
    task: Task
    training: list[Inputs]
    unseen: FeatureSet


def plan_of(scene: Scene, method: str, epsilon: float, seed: int, model: Mapping[str, Any] = SHIPPED) -> FederationPlan:
    """A plan as a coordinator would write it."""
    given = METHODS[method]
    plan: dict[str, Any] = {
        "federation": "utility",
        "server": "https://localhost",
        "model": dict(model),
        "classes": scene.classes,
        "templates": [scene.template],
        "splits": {"train": 0.8, "validation": 0.0, "test": 0.2},
        "method": {"name": method},
        "training": {"rounds": given["rounds"], "optimizer": given["optimizer"], "seed": seed},
        "secure_aggregation": {"weights": "equal"},
    }
    if epsilon == float("inf"):
        plan["training"] |= {"batch_size": _BATCH, "optimizer": {"name": "adam", "lr": 1e-3}}
        if method == "private_prototypes":  # each batch's mean, so that records weigh as with the divisor
            plan["training"]["optimizer"] = {"name": "sgd", "lr": _BATCH / given["privacy"][3]}
    else:
        q, steps, clip, divisor = given["privacy"]
        plan["privacy"] = {
            "unit": "record", "sample_rate": q, "steps_per_round": steps, "target_epsilon": epsilon,
            "max_grad_norm": clip, "update_divisor": divisor, "delta": 1e-5,
        }  # fmt: skip
    return check(plan, FederationPlan, "benchmark's plan")


def sites_of(folder: Path, data: Path | None, unseen: str, seed: int) -> Sites:
    """Extract the features of all sites."""
    scene = set_scene(Options(out=folder, data=data, unseen=unseen, seed=seed))
    plan = plan_of(scene, "fedclip", float("inf"), seed)
    contract = Contract(plan, prepare(plan, folder).lock)
    sites = [*scene.training, *([scene.unseen] if scene.unseen else [])]
    found = []
    for site in sites:
        images = FolderData(format="folder", path=str(site.images), absent_classes=scene.absent(site))
        config = SiloConfig(name=site.silo, data=images, workdir=str(folder / "work"), device="cpu")
        found.append(load_inputs(config, contract, lambda *_: None))
    return Sites(scene, found[0].task, found[:-1], joined(list(found[-1].splits.values())))


def joined(parts: Sequence[FeatureSet]) -> FeatureSet:
    """All records of `parts`; those of image files keep the ids of their bytes."""
    ids = [part.record_ids for part in parts]
    return FeatureSet(
        np.concatenate([part.image_features for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.unit_ids for part in parts]),
        parts[0].source,
        None if any(one is None for one in ids) else np.concatenate([one for one in ids if one is not None]),
    )


def accuracy(plan: FederationPlan, sites: Sites, state: AdapterState) -> tuple[float, float, float, float]:
    """Zero-shot and the model at the unseen site, then the two on the test splits of the others; percent."""
    away = evaluate(plan, sites.task, sites.unseen, state, _CPU)
    home = [evaluate(plan, sites.task, inputs.splits["test"], state, _CPU) for inputs in sites.training]
    zero, mine = (
        statistics.mean((getattr(one, kind).accuracy or 0.0) for one in home) for kind in ("zero_shot", "adapter")
    )
    shares = (away.zero_shot.accuracy or 0.0, away.adapter.accuracy or 0.0, zero, mine)
    return tuple(100 * share for share in shares)  # type: ignore[return-value]


def federated(sites: Sites, plan: FederationPlan, prepared: Prepared) -> AdapterState:
    """The model after the plan's rounds: each moves it by the mean of the silos' updates."""
    layout = Layout(tuple((entry.name, tuple(entry.shape)) for entry in prepared.lock.layout))
    state = AdapterState.from_safetensors(prepared.initial_file, layout, "initial")
    trainers = [trainer_of(plan, prepared.lock.noise_multiplier, sites.task, inputs) for inputs in sites.training]
    for _ in range(plan.training.rounds):
        mean = np.mean([trainer.train(state) for trainer in trainers], axis=0)
        state = AdapterState(layout, (state.vector + mean).astype(np.float32))
    return state


def trainer_of(plan: FederationPlan, noise: float | None, task: Task, inputs: Inputs) -> LocalTrainer | PrivateTrainer:
    """The production trainer of a plan."""
    records = inputs.splits["train"]
    if noise is None:
        return LocalTrainer(plan, task, inputs.splits, _CPU)
    units = unit_ids(records, "record", FolderData(format="folder", path="."))
    return PrivateTrainer(plan, noise, task, records, units, _CPU)


def table(name: str, data: Path | None, unseen: str, seeds: int) -> dict[str, Any]:
    """All methods and epsilons on one set of sites."""
    rows: dict[tuple[str, float], list[tuple[float, float, float, float]]] = {}
    counts: list[int] = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            sites = sites_of(Path(folder), data, unseen, seed)
            counts += [len(inputs.splits["train"]) for inputs in sites.training]
            for method in METHODS:
                for epsilon in EPSILONS:
                    plan = plan_of(sites.scene, method, epsilon, seed)
                    found = accuracy(plan, sites, federated(sites, plan, prepare(plan, Path(folder))))
                    rows.setdefault((method, epsilon), []).append(found)
            print(f"{name}: seed {seed} done", file=sys.stderr)
    return {"name": name, "unseen": unseen, "units": (min(counts), max(counts)), "rows": rows}


def markdown(found: dict[str, Any]) -> str:
    """A table of means over the seeds, with the smallest and the largest."""
    low, high = found["units"]
    lines = [
        f"**{found['name']}**, {low} to {high} training records a silo; unseen: {found['unseen']}", "",
        f"| method | epsilon | at {found['unseen']} | at the silos that trained |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    some = next(iter(found["rows"].values()))
    lines.append(f"| zero-shot | 0 | {_span([row[0] for row in some])} | {_span([row[2] for row in some])} |")
    for (method, epsilon), rows in found["rows"].items():
        said = "no privacy" if epsilon == float("inf") else f"{epsilon:g}"
        lines.append(f"| {method} | {said} | {_span([row[1] for row in rows])} | {_span([row[3] for row in rows])} |")
    return "\n".join(lines)


def _span(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """Print the tables; with `--json` end with one object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if not Path(_DATA).is_dir():
        sys.exit(f"FEDCLIP_PACS_MINI={_DATA}: is no folder; set it to the folder of PACS's four domains")
    torch.set_num_threads(1)  # steps this small are over before a second thread has woken up
    began = time.perf_counter()
    found = [
        table("drawn labs", None, "willow", arguments.seeds),
        table("pacs-mini", Path(_DATA), "sketch", arguments.seeds),
    ]
    for one in found:
        print(f"{markdown(one)}\n")
    print(f"{time.perf_counter() - began:.0f} s")
    if arguments.json:
        rows = [
            {
                "data": one["name"], "method": method, "epsilon": None if epsilon == float("inf") else epsilon,
                "zero_shot_unseen": statistics.mean(row[0] for row in runs),
                "unseen": statistics.mean(row[1] for row in runs),
                "trained": statistics.mean(row[3] for row in runs),
            }
            for one in found
            for (method, epsilon), runs in one["rows"].items()
        ]  # fmt: skip
        print(json.dumps({"utility": rows}))


if __name__ == "__main__":
    main()
