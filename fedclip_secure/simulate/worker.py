"""What a process that runs cells keeps between them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from multiprocessing.connection import wait

import torch

from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import FederationPlan, MethodPlan
from fedclip_secure.errors import FedClipError
from fedclip_secure.features.progress import ShowProgress
from fedclip_secure.methods.registry import find_method
from fedclip_secure.simulate.experiment import Experiment
from fedclip_secure.simulate.experiment_cells import Cell, label_of, loading_plan, plan_of
from fedclip_secure.simulate.figures import Figures
from fedclip_secure.simulate.measure import Bench
from fedclip_secure.simulate.sources import Sites, Sources, load_sites
from fedclip_secure.simulate.store import save
from fedclip_secure.training.prepare import prepare

_log = logging.getLogger(__name__)
BESIDE = MethodPlan(name="linear_probe")  # stands for all methods that train beside the encoder: it takes any


@dataclass(frozen=True, slots=True)
class Setting:
    """An experiment, and where it happens."""

    experiment: Experiment
    sources: Sources

    def load(self, method: MethodPlan, progress: ShowProgress) -> Sites:
        """All sites as `method` takes them."""
        plan = loading_plan(self.experiment, self.sources.classes, method)
        return load_sites(self.experiment, self.sources, plan, progress)

    def plan(self, cell: Cell) -> FederationPlan:
        """The plan of `cell`.

        Raises:
            ConfigError: its values do not go together.
        """
        return plan_of(self.experiment, cell, self.sources.classes)


@dataclass(frozen=True, slots=True)
class Answer:
    """A cell's figures, or why there are none."""

    figures: Figures | None
    reason: str | None


def loaded_for(method: MethodPlan) -> MethodPlan:
    """Whose inputs a method's cells take: all that train beside the encoder have the same."""
    return method if find_method(method).spec.backprop != "none" else BESIDE


class Workshop:
    """Runs cells of one experiment, one after the other."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._method: MethodPlan | None = None
        self._sites: Sites | None = None

    def run(self, cell: Cell, digest: str) -> Answer:
        """Run `cell` and store its figures under `digest`; a cell that fails is told of, and ends no other."""
        try:
            figures = self._bench(cell).figures()
            save(self._setting.sources.out, digest, self._about(cell), figures)
        except FedClipError as error:
            return Answer(None, str(error).removeprefix("federation.yaml: "))  # the file here is another one
        except Exception as error:  # a fault in one method must not cost the others' hours
            _log.exception("%s, seed %d", label_of(self._setting.experiment, cell), cell.seed)
            return Answer(None, f"{type(error).__name__}: {error}")
        return Answer(figures, None)

    def _bench(self, cell: Cell) -> Bench:
        experiment, plan = self._setting.experiment, self._setting.plan(cell)
        prepared = prepare(plan, self._setting.sources.home)
        sites = self._loaded(loaded_for(experiment.methods[cell.arm].method))
        return Bench.of(experiment, cell, Contract(plan, prepared.lock), prepared, sites)

    def _loaded(self, method: MethodPlan) -> Sites:
        """Of the last method's sites alone: tokens of many images fill a disk."""
        if self._sites is None or self._method != method:
            self._sites = None
            self._sites, self._method = self._setting.load(method, lambda _: None), method
        return self._sites

    def _about(self, cell: Cell) -> dict[str, object]:
        experiment = self._setting.experiment
        return {
            "experiment": experiment.name,
            "method": label_of(experiment, cell),
            "left_out": cell.left_out,
            "seed": cell.seed,
            "plan": self._setting.plan(cell).model_dump(mode="json"),
        }


_workshop: Workshop | None = None  # of this process


def open_workshop(setting: Setting) -> None:
    """Make this process one that runs cells, and nothing else."""
    global _workshop  # noqa: PLW0603 - the pool hands a process nothing else to keep things in
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # steps this small are over before a second thread has woken up
    _workshop = Workshop(setting)


def run_cell(cell: Cell, digest: str) -> Answer:
    """As `Workshop.run`, in a process that `open_workshop` has made one."""
    assert _workshop is not None  # noqa: S101 - the pool's initializer ran
    return _workshop.run(cell, digest)


def _end_with_parent() -> None:
    """A first process that was killed leaves nobody behind who trains on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
