"""What differential privacy costs a step of training, and how that compares with Opacus.

`python benchmarks/dp.py [--json]`: FedCLIP's adapter at D = 512, 525,312 parameters, on cached features with seven
classes; one process, all cores. Four kinds of step take turns on one batch, step by step, and the best time of
each counts. All use the plan's Adam, and none loads a batch from disk.

- Plain: torch alone - zero the gradients, forward, mean loss, backward, optimiser.
- Ours: `PrivateTrainer.step`, all of what a silo runs in a step: membership and noise from AES-256-CTR keyed by the
  operating system, the batch gathered from all records, gradients in exact arithmetic (exact.py), sums in float64, the
  grid, the optimiser. The sample rate is 1, so that batches are of one size.
- Opacus hooks: GradSampleModule and DPOptimizer, with Opacus's own noise (torch's generator, float32).
- Opacus ghost: its fast gradient clipping of two backward passes, with the same noise.

The parts of our step are measured one by one, the best time of each: together they are less than the step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from fedclip_secure.config.fields import check
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.data.dataset import FeatureSet, Task
from fedclip_secure.methods.base import Batch
from fedclip_secure.methods.registry import find_method
from fedclip_secure.training.device_records import load_records
from fedclip_secure.training.local_training import make_optimizer
from fedclip_secure.training.private.clipping import clipped_sum
from fedclip_secure.training.private.dp_sgd import PrivateTrainer, system_coins
from fedclip_secure.training.private.gaussian import GaussianMechanism
from fedclip_secure.training.private.linear_layers import find_layers, layer_gradients
from fedclip_secure.training.private.poisson import draw_members

DIM, CLASSES = 512, 7
TURNS = {64: 60, 512: 40}  # batch size: steps of each kind
TARGETS = {64: 4.0, 512: 2.5}  # times a plain step, at most
HOOKS_TARGET = 4.0  # times ours, at least
CPU = torch.device("cpu")
_QUIET = 0.5  # load average; above it others are at work
Step = Callable[[], object]


def make_plan(batch: int) -> FederationPlan:
    """Every record in every step, and Adam as FedCLIP has it."""
    plan = {
        "federation": "bench",
        "server": "https://localhost",
        "model": {"name": "external", "dim": DIM, "text_features": "prompts.safetensors"},
        "classes": {f"class {number}": f"class {number}" for number in range(CLASSES)},
        "templates": ["a {}"],
        "splits": {"train": 0.5, "validation": 0.0, "test": 0.5},
        "method": {"name": "fedclip"},
        "training": {"rounds": 1, "optimizer": {"name": "adam", "lr": 1e-4}},
        "secure_aggregation": {"weights": "equal"},
        "privacy": {
            "unit": "record",
            "sample_rate": 1.0,
            "steps_per_round": 1,
            "noise_multiplier": 1.0,
            "max_grad_norm": 1.0,
            "update_divisor": batch,
            "delta": 1e-5,
        },
    }
    return check(plan, FederationPlan, "benchmark's plan")


def make_task() -> Task:
    """Made-up text features."""
    text = np.random.default_rng(0).normal(size=(CLASSES, DIM)).astype(np.float32)
    names = tuple(f"class {number}" for number in range(CLASSES))
    return Task(names, text / np.linalg.norm(text, axis=1, keepdims=True), 100.0)


def make_records(count: int) -> FeatureSet:
    """Made-up image features of norm 10."""
    random = np.random.default_rng(1)
    images = (random.normal(size=(count, DIM)) * 10 / np.sqrt(DIM)).astype(np.float32)
    ids = random.integers(0, 256, (count, 32), dtype=np.uint8)
    return FeatureSet(images, random.integers(0, CLASSES, count), ids, "benchmark")


class Bench:
    """One batch size: every kind of step, over the same records and from the same start."""

    def __init__(self, batch: int) -> None:
        self.plan, self.task, records = make_plan(batch), make_task(), make_records(batch)
        self.method = find_method(self.plan.method)
        self.phase = self.method.phases()[0]
        self.batch: Batch = load_records(records, self.task, CPU)
        self.units = np.arange(batch)
        self.start = self.method.build(self.task)
        self.trainer = PrivateTrainer(self.plan, 1.0, self.task, records, records.unit_ids, CPU)

    def steps(self) -> dict[str, Step]:
        """One step of each kind."""
        optimizer = self.trainer.make_optimizer(self.phase)
        return {
            "plain": self._plain(),
            "dp": lambda: self.trainer.step(self.phase, optimizer),
            "ghost": self._ghost(),
            "hooks": self._hooks(),
        }

    def parts(self) -> dict[str, Step]:
        """What our step is made of."""
        module, mechanism = self._module(), GaussianMechanism(1.0, 1.0, len(self.units))
        places = find_layers(module, dict(module.named_parameters()))
        assert places is not None  # noqa: S101 - the adapter is linear layers
        optimizer = make_optimizer(module.parameters(), self.plan.training.optimizer)
        total = clipped_sum(module, self.phase, self.batch, self.units, 1.0)
        found = layer_gradients(module, self.phase, places, self.batch)
        for value in module.parameters():
            value.grad = torch.ones_like(value)
        return {
            "membership": lambda: draw_members(system_coins(), len(self.units), 1.0),
            "forward and backward": lambda: layer_gradients(module, self.phase, places, self.batch),
            "norms and float64 sums": lambda: found.clipped(self.units, 1e9, len(total)),
            "noise and grid": lambda: mechanism.release(total, system_coins()),
            "optimiser": optimizer.step,
        }

    def _module(self) -> nn.Module:
        module = self.method.build(self.task)
        module.load_state_dict(self.start.state_dict())
        return module.train()

    def _logits(self, module: nn.Module) -> Tensor:
        return self.method.predict(module, self.batch)

    def _plain(self) -> Step:
        module = self._module()
        optimizer = make_optimizer(module.parameters(), self.plan.training.optimizer)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(self.phase.loss(module, self.batch).mean())
            optimizer.step()

        return step

    def _hooks(self) -> Step:
        module = GradSampleModule(self._module())
        inner = make_optimizer(module.parameters(), self.plan.training.optimizer)
        optimizer = DPOptimizer(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=len(self.units))
        criterion = nn.CrossEntropyLoss()

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            criterion(self._logits(module), self.batch.labels).backward()
            optimizer.step()

        return step

    def _ghost(self) -> Step:
        module = GradSampleModuleFastGradientClipping(self._module(), max_grad_norm=1.0, use_ghost_clipping=True)
        inner = make_optimizer(module.parameters(), self.plan.training.optimizer)
        optimizer = DPOptimizerFastGradientClipping(
            inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=len(self.units)
        )
        criterion = DPLossFastGradientClipping(module, optimizer, nn.CrossEntropyLoss())

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            criterion(self._logits(module), self.batch.labels).backward()
            optimizer.step()

        return step


def best(work: dict[str, Step], turns: int) -> dict[str, float]:
    """Milliseconds of each, the best of `turns` turns that they take one after the other."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(turns):
        for name, run in work.items():
            began = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: min(values) for name, values in times.items()}


def measure(batch: int) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of a step of each kind, and of the parts of ours."""
    bench = Bench(batch)
    steps = bench.steps()
    if batch > 64:
        del steps["hooks"]  # 0.1 s a step, and 1 GB
    return best(steps, TURNS[batch]), best(bench.parts(), TURNS[batch])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if (load := os.getloadavg()[0]) > _QUIET:
        print(f"this machine is busy (load {load:.1f}): ratios will be off, times more so", file=sys.stderr)
    # Torch tells of Opacus's hooks on a first layer, whose inputs take no gradients.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    measured = {batch: measure(batch) for batch in TURNS}
    if options.json:
        print(json.dumps(figures(measured)))
    else:
        show(measured)


def figures(measured: dict[int, tuple[dict[str, float], dict[str, float]]]) -> dict[str, object]:
    """What `--json` prints."""
    small, large = measured[64][0], measured[512][0]
    found: dict[str, object] = {
        "dp_over_plain_b64": small["dp"] / small["plain"],
        "dp_over_plain_b512": large["dp"] / large["plain"],
        "hooks_over_dp_b64": small["hooks"] / small["dp"],
        "ghost_over_dp_b64": small["ghost"] / small["dp"],
    }
    for batch, (steps, parts) in measured.items():
        found |= {f"{kind}_ms_b{batch}": value for kind, value in steps.items()}
        found[f"parts_ms_b{batch}"] = parts
    return found


def show(measured: dict[int, tuple[dict[str, float], dict[str, float]]]) -> None:
    """The same for people."""
    for batch, (steps, parts) in measured.items():
        ratio = steps["dp"] / steps["plain"]
        print(f"batch {batch}: plain {steps['plain']:.2f} ms, private {steps['dp']:.2f} ms:", end=" ")
        print(f"{ratio:.2f} times (at most {TARGETS[batch]:g})")
        print("  of it " + ", ".join(f"{name} {value:.2f}" for name, value in parts.items()))
        for kind in ("hooks", "ghost"):
            if kind in steps:
                least = f" (at least {HOOKS_TARGET:g})" if kind == "hooks" else ""
                print(f"  Opacus {kind} {steps[kind]:.2f} ms: {steps[kind] / steps['dp']:.1f} times ours{least}")


if __name__ == "__main__":
    main()
