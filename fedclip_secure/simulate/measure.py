"""One cell, from its plan to its figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedclip_secure.config.lock import Contract
from fedclip_secure.data.dataset import FeatureSet
from fedclip_secure.errors import ModelError
from fedclip_secure.features.encoder import choose_device
from fedclip_secure.methods.zero_shot import zero_shot_logits
from fedclip_secure.model.state import AdapterState, Layout
from fedclip_secure.privacy.accounting.plan_cost import PlannedRun
from fedclip_secure.secagg.sizes import upload_bytes
from fedclip_secure.simulate.experiment import ByDirichlet, Experiment
from fedclip_secure.simulate.experiment_cells import Cell
from fedclip_secure.simulate.federation import Trainer, run_alone, run_federated, terms_of
from fedclip_secure.simulate.figures import Figures, Point, Right, Spent
from fedclip_secure.simulate.partition import SimulatedSilo, cut, deal, joined
from fedclip_secure.simulate.sources import Sites, named_as_silos
from fedclip_secure.training.evaluation.evaluate import Logits, classify, predictor
from fedclip_secure.training.local_training import LocalTrainer
from fedclip_secure.training.prepare import Prepared
from fedclip_secure.training.private.dp_sgd import PrivateTrainer
from fedclip_secure.training.private.units import unit_ids

POOL = "all"  # who trains where all records are at one place


@dataclass(eq=False)
class Bench:
    """A cell on the bench: its contract, its parties, and the points that were measured."""

    experiment: Experiment
    cell: Cell
    contract: Contract
    start: AdapterState
    sites: Sites
    silos: list[SimulatedSilo]
    away: FeatureSet | None
    device: torch.device
    points: list[Point] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    trainers: dict[str, Trainer] = field(default_factory=dict)

    @classmethod
    def of(cls, experiment: Experiment, cell: Cell, contract: Contract, prepared: Prepared, sites: Sites) -> Bench:
        """Deal the records out, as the split says."""
        layout = Layout(tuple((entry.name, tuple(entry.shape)) for entry in contract.lock.layout))
        start = AdapterState.from_safetensors(prepared.initial_file, layout, "the initial adapter")
        away = None if cell.left_out is None else sites.features[cell.left_out]
        silos = _silos(experiment, cell, contract, sites)
        return cls(experiment, cell, contract, start, sites, silos, away, choose_device(experiment.device))

    def figures(self) -> Figures:
        """Run the cell.

        Raises:
            FedClipError: it cannot be run, or training came to nothing.
        """
        if self.cell.kind == "zero_shot":
            return self._figures(parameters=None, bytes_up=None, points=[self._needed_zero_shot()])
        if self.cell.kind == "federated":
            return self._federated()
        names = [POOL] if self.cell.kind == "centralised" else [silo.name for silo in self.silos]
        self._train_with(names)
        run_alone(self.contract.plan.training.rounds, self.trainers, self.start, self._watch)
        return self._figures(parameters=self.start.layout.size, bytes_up=None, points=self.points)

    def _federated(self) -> Figures:
        names = [silo.name for silo in self.silos]
        terms = terms_of(self.contract, names)
        self._train_with(names)
        run_federated(terms, self.trainers, self.start, self._watch)
        size = upload_bytes(terms, names[0])
        return self._figures(parameters=self.start.layout.size, bytes_up=size, points=self.points)

    def _train_with(self, names: list[str]) -> None:
        """A trainer for each of `names`, and the point before they begin."""
        self.trainers = {name: self._trainer(name) for name in names}
        self._watch(0, dict.fromkeys(names, self.start), 0.0)

    def _trainer(self, name: str) -> LocalTrainer | PrivateTrainer:
        """Without privacy, what validates on a silo's test records: with what the silo keeps of the model to itself."""
        plan, task, encoder = self.contract.plan, self.sites.task, self.sites.encoder
        train, test = self._records(name, "train"), self._records(name, "test")
        silo = None if name == POOL else name
        if plan.privacy is None:
            splits = {"train": train, "validation": test}
            return LocalTrainer(plan, task, splits, self.device, encoder=encoder, silo=silo)
        noise = self.contract.lock.noise_multiplier
        assert noise is not None  # noqa: S101 - `prepare` settled it
        units = unit_ids(train, plan.privacy.unit, self.sites.data)
        return PrivateTrainer(plan, noise, task, train, units, self.device, encoder=encoder, silo=silo)

    def _records(self, name: str, split: str) -> FeatureSet:
        chosen = self.silos if name == POOL else [silo for silo in self.silos if silo.name == name]
        return joined([silo.splits[split] for silo in chosen])

    def _watch(self, number: int, models: Mapping[str, AdapterState], seconds: float | None) -> None:
        rounds = self.contract.plan.training.rounds
        if number and seconds is not None:
            self.seconds.append(seconds)
        if number % self.experiment.every == 0 or number == rounds:
            self.points.append(self._point(number, models))

    def _point(self, number: int, models: Mapping[str, AdapterState]) -> Point:
        """Each silo's own model, or the one that all have in common."""
        common = models.get(POOL)
        silos = {silo.name: self._at(silo, common or models[silo.name]) for silo in self.silos}
        if self.away is None:
            return Point(round=number, silos=silos, left_out=None)
        different = {state.digest: state for state in models.values()}.values()
        away = [self._right(self.away, self._logits(state)) for state in different]
        return Point(round=number, silos=silos, left_out=Right.over(away))

    def _at(self, silo: SimulatedSilo, state: AdapterState) -> Right:
        trainer = self.trainers.get(silo.name)
        if isinstance(trainer, LocalTrainer):
            counts = trainer.validate(state)
            return Right(correct=counts.correct, total=counts.total)
        return self._right(silo.splits["test"], self._logits(state))

    def _logits(self, state: AdapterState) -> Logits:
        return predictor(self.contract.plan, self.sites.task, state, self.device, self.sites.encoder)

    def _right(self, records: FeatureSet, logits: Logits) -> Right:
        found = classify(records, self.sites.task, self.device, logits)
        return Right(correct=int((found == records.labels).sum()), total=len(found))

    def _zero_shot(self) -> Point | None:
        """None where the encoder reads no text."""
        if not len(self.sites.task.text_features):
            return None
        tests = {silo.name: replace(silo.splits["test"], inputs=None) for silo in self.silos}
        silos = {name: self._right(test, zero_shot_logits) for name, test in tests.items()}
        away = None if self.away is None else self._right(replace(self.away, inputs=None), zero_shot_logits)
        return Point(round=0, silos=silos, left_out=away)

    def _needed_zero_shot(self) -> Point:
        point = self._zero_shot()
        if point is None:
            raise ModelError(f"{self.contract.plan.model.name} reads no text, so there is no zero-shot; leave it out")
        return point

    def _figures(self, *, parameters: int | None, bytes_up: int | None, points: Sequence[Point]) -> Figures:
        return Figures(
            records={silo.name: len(silo.splits["train"]) for silo in self.silos},
            zero_shot=self._zero_shot(),
            points=list(points),
            parameters=parameters,
            upload_bytes=bytes_up,
            seconds_per_round=statistics.mean(self.seconds) if self.seconds else None,
            privacy=_spent(self.contract),
        )


def _silos(experiment: Experiment, cell: Cell, contract: Contract, sites: Sites) -> list[SimulatedSilo]:
    split, plan = experiment.split, contract.plan
    training = {site: records for site, records in sites.features.items() if site != cell.left_out}
    if isinstance(split, ByDirichlet):
        pool = joined(list(training.values()))
        places = deal(pool, split.silos, split.alpha, cell.seed)
        named = {f"silo-{place + 1:03}": pool.select(places == place) for place in range(split.silos)}
    else:
        named = named_as_silos(training)
    return cut(named, plan.federation, plan.splits.model_dump(), split.shots, cell.seed)


def _spent(contract: Contract) -> Spent | None:
    planned = PlannedRun.of(contract)
    if planned is None:
        return None
    noise = planned.per_round.noise_multiplier
    return Spent(epsilon=planned.epsilon(), delta=planned.delta, noise_multiplier=noise)
