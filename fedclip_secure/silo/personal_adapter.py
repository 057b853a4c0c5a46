"""What `fedclip-silo personalize` does: an adapter of this silo's own, in the workdir beside the global ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.data.dataset import Counts
from fedclip_secure.export.adapter_facts import Facts, write_card
from fedclip_secure.model.state import AdapterState
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.accepted import Accepted
from fedclip_secure.silo.adapters import PERSONAL, choose
from fedclip_secure.silo.run.final_models import adapter_folder

if TYPE_CHECKING:  # these load torch
    import torch

    from fedclip_secure.training.inputs import Inputs
    from fedclip_secure.training.personalize import Personalized


@dataclass(frozen=True, slots=True, eq=False)
class Personal:
    """The adapter at `path`, how it was made, and test records right under the global adapter and under it."""

    path: Path
    made: Personalized
    tested: tuple[Counts, Counts]

    def compared(self) -> list[tuple[str, Counts, Counts]]:
        """Split, and its records right under the global adapter and under the personal one."""
        chosen = (self.made.start.validation, self.made.chosen.validation)
        return [("validation", *chosen), ("test", *self.tested)]


def make_personal(config: SiloConfig, accepted: Accepted, inputs: Inputs) -> Personal:
    """Make it from the best global adapter, write it with its card, and hold both against the test records.

    Raises:
        ConfigError: there is no global adapter yet.
        DataError, ModelError: as `personalize`; or the disk refuses.
    """
    from fedclip_secure.features.encoder import choose_device  # noqa: PLC0415
    from fedclip_secure.training.personalize import personalize  # noqa: PLC0415

    plan, device = accepted.contract.plan, choose_device(config.device)
    best = choose(Path(config.workdir), "best", Terms.of(accepted.contract, accepted.roster))
    made = personalize(plan, inputs, best.state, device, config.name)
    path = adapter_folder(Path(config.workdir)) / f"{PERSONAL}.safetensors"
    facts = _facts(made, best.facts())
    made.chosen.state.to_file(path, {"model": facts.model.hex(), **facts.warning()})
    write_card(path.with_suffix(".json"), facts, accepted.contract, accepted.roster)
    before, after = (_tested(accepted, inputs, state, device) for state in (best.state, made.chosen.state))
    return Personal(path, made, (before, after))


def _facts(made: Personalized, best: Facts) -> Facts:
    chosen, training = made.chosen, made.training
    return Facts(
        kind=PERSONAL,
        after_round=best.after_round,
        model=chosen.state.digest,
        correct=chosen.validation.correct,
        total=chosen.validation.total,
        scope="this silo alone, which chose by them",
        personal={
            "of": best.model.hex(),
            "share": chosen.share,
            "epoch": chosen.epoch,
            "batch_size": training.batch_size,
            "optimizer": training.optimizer.model_dump(mode="json"),
        },
    )


def _tested(accepted: Accepted, inputs: Inputs, state: AdapterState, device: torch.device) -> Counts:
    from fedclip_secure.training.evaluation.evaluate import evaluate  # noqa: PLC0415

    test = inputs.splits["test"]
    if not len(test):
        return Counts(0, 0)
    plan = accepted.contract.plan
    return evaluate(plan, inputs.task, test, state, device, encoder=inputs.encoder).adapter
