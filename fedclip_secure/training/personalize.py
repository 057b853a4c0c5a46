"""A silo's own adapter: the global one, trained on for some epochs on this silo's records, and mixed with it.

Candidates are the mixes (1 - a)·global + a·personal of the parameters, as Wortsman et al. 2022 (arXiv:2109.01903)
mix a model with its fine-tuned self, for a few shares a after each epoch. The silo's validation records choose; the
global adapter is a candidate too and wins every tie, because it has seen more records than one silo has.

Where no candidate is better, the global adapter is chosen, with share 0: the answer to "which adapter is best for
this silo" is always there, and a script that uses it neither fails nor meets the one of an earlier run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedclip_secure.config.plan import FederationPlan, Optimizer, Training
from fedclip_secure.data.dataset import Counts, FeatureSet, split
from fedclip_secure.errors import DataError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.training.inputs import Inputs
from fedclip_secure.training.local_training import LocalTrainer

EPOCHS = 10
SHARES = (0.25, 0.5, 0.75, 1.0)  # a
HELD_OUT = 0.25  # of the training split, where the plan has no validation split
# In place of a plan's with `privacy`: that one's learning rate belongs to clipped sums, and would burst without them.
_BATCH_SIZE = 32
_OPTIMIZER = Optimizer(name="adam", lr=1e-3)


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """The mix with `share` after `epoch`, and how it does on the validation records; 0 and 0: the global adapter."""

    epoch: int
    share: float
    state: AdapterState
    validation: Counts


@dataclass(frozen=True, slots=True, eq=False)
class Personalized:
    """What was chosen, beside the global adapter on the same records.

    `training` are the settings by which `records` were trained on. `held_out`: the validation records were cut from
    the training split.
    """

    chosen: Candidate
    start: Candidate
    training: Training
    records: int
    held_out: bool


def personalize(
    plan: FederationPlan, inputs: Inputs, start: AdapterState, device: torch.device, silo: str | None = None
) -> Personalized:
    """Train from the global adapter `start` on the training split, and let the validation split choose.

    Raises:
        DataError: too few records to train on, or none to choose by.
        ModelError: `start` is not of the plan's method, or training ran to NaN or infinity.
    """
    plan, splits = without_privacy(plan), inputs.splits
    held_out = not len(splits["validation"])
    if held_out:
        splits = _with_validation(plan, splits)
    trainer = LocalTrainer(plan, inputs.task, splits, device, encoder=inputs.encoder, silo=silo)
    chosen = first = Candidate(0, 0.0, start, trainer.validate(start))
    trained = start
    for epoch in range(1, EPOCHS + 1):
        trained = _moved(trained, trainer.train(trained), 1.0)
        change = trained.vector.astype(np.float64) - start.vector
        for share in SHARES:
            state = _moved(start, change, share)
            counts = trainer.validate(state)
            if counts.correct > chosen.validation.correct:
                chosen = Candidate(epoch, share, state, counts)
    return Personalized(chosen, first, plan.training, trainer.records, held_out)


def without_privacy(plan: FederationPlan) -> FederationPlan:
    """The plan for what stays at home and needs no noise: epoch by epoch, by its optimiser or, with `privacy`, Adam.

    As in a round, every epoch's optimiser starts afresh.
    """
    changes: dict[str, object] = {"local_epochs": 1}
    if plan.privacy is not None:
        changes |= {"batch_size": _BATCH_SIZE, "optimizer": _OPTIMIZER}
    return plan.model_copy(update={"privacy": None, "training": plan.training.model_copy(update=changes)})


def _with_validation(plan: FederationPlan, splits: Mapping[str, FeatureSet]) -> dict[str, FeatureSet]:
    """A part of the training records for validation, by the units' hash under a name that no federation can have.

    Under the federation's own name the training split is exactly where the hash is small.
    """
    train = splits["train"]
    shares = {"train": 1 - HELD_OUT, "validation": HELD_OUT}
    parts = split(train, f"{plan.federation} personalize", shares)
    if not len(parts["validation"]):
        raise DataError(
            f"{train.source}: none of {len(train)} training record(s) falls into the quarter that would choose; "
            "add records"
        )
    return {**splits, **parts}


def _moved(state: AdapterState, change: npt.NDArray[np.float64], share: float) -> AdapterState:
    return AdapterState(state.layout, (state.vector + share * change).astype(np.float32))
