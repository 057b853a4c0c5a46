"""All the evidence for one plan, from made-up records alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fedclip_secure.audit import canaries, sampler
from fedclip_secure.audit import noise as noises
from fedclip_secure.audit.audited_parts import Engine, MakeEngine, TrainingEngine
from fedclip_secure.audit.canaries import Attack
from fedclip_secure.audit.evidence import Doubles, Evidence
from fedclip_secure.audit.made_up_records import Scene, make_scene, same_torch_seed
from fedclip_secure.audit.reference_trainer import Work
from fedclip_secure.audit.sensitivity import records_apart, sensitivity
from fedclip_secure.audit.setting import Setting
from fedclip_secure.audit.trainer import MakeTrainer, as_by_hand, keys_fresh, noise_apart, noise_of_each, rehearse
from fedclip_secure.config.plan import FederationPlan, PrivacyPlan
from fedclip_secure.errors import ConfigError
from fedclip_secure.privacy.accounting.empirical_epsilon import CONFIDENCE
from fedclip_secure.privacy.ledger.entries import HOUR
from fedclip_secure.privacy.report import document
from fedclip_secure.privacy.report.software import code_sha256
from fedclip_secure.training.private.dp_sgd import PrivateTrainer

_UNITS = 1000  # to take away one of; the sampler's tests choose their own number
_ODD_DIM = 67  # no multiple of 4: libraries multiply matrices of such widths by other programs
_IN_STEP = 16  # units in a step whose noise is looked at, on average
_FEWEST = 16  # units of the trainer


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What was found, in the order of the tests; `at` is the whole hour, in seconds since 1970, `code` the program."""

    evidence: tuple[Evidence, ...]
    attack: Attack
    setting: Setting
    at: int
    code: str
    seconds: float  # that it took

    @property
    def passed(self) -> bool:
        """Whether every test did."""
        return all(found.passed for found in self.evidence)

    def for_report(self) -> document.Audit:
        """What a privacy report holds of it."""
        tests = [
            document.SelfTest(
                name=found.name, passed=found.passed, shows=found.shows + ("" if found.passed else f". {found.failure}")
            )
            for found in self.evidence
        ]
        return document.Audit(
            at=self.at,
            code=self.code,
            received=self.setting.received,
            self_tests=tests,
            attack=document.Attack(
                canaries=canaries.CANARIES,
                guesses=canaries.GUESSES,
                right=self.attack.right,
                confidence=CONFIDENCE,
                epsilon_at_least=round(self.attack.epsilon_at_least, 4),
                curve=[
                    document.Rates(false_positives=round(false, 4), true_positives=round(true, 4))
                    for false, true in self.attack.curve
                ],
            ),
        )

    def as_json(self) -> dict[str, Any]:
        """Everything as plain JSON data: numbers rounded to 7 digits, None for those that are not finite."""
        return {
            "version": 1,
            "at": self.at,
            "code": self.code,
            "device": str(self.setting.device),
            "start": self.setting.came_from,
            "seconds": round(self.seconds, 1),
            "records": "made up for these tests; no record of this silo was read",
            "passed": self.passed,
            "tests": [_rounded(asdict(found)) for found in self.evidence],
            "attack": _rounded({**asdict(self.attack), "canaries": canaries.CANARIES, "guesses": canaries.GUESSES}),
        }


def run_audit(
    plan: FederationPlan,
    noise_multiplier: float,
    setting: Setting | None = None,
    *,
    make_engine: MakeEngine = TrainingEngine,
    make_trainer: MakeTrainer = PrivateTrainer,
) -> AuditResult:
    """Test the mechanism of `plan` (its method, unit, C, q and divisor) with `noise_multiplier`, as `setting` has it.

    This takes up to some minutes, most of them for two rounds of training, and reads no record.

    Raises:
        ConfigError: the plan has no privacy.
        ModelError: the model that the silo starts from cannot be trained.
    """
    privacy = plan.privacy
    if privacy is None:
        raise ConfigError("federation.yaml: privacy is missing; there is no mechanism to test")
    setting, began = setting or Setting(), time.monotonic()
    with one_thread():
        mechanism = Mechanism(plan, privacy, noise_multiplier, make_engine, setting)
        found = mechanism.attack()
        evidence = (
            *mechanism.clipping(),
            *mechanism.noise(),
            *mechanism.sampling(),
            *mechanism.training(make_trainer),
            canaries.as_planned(found),
            canaries.not_refuted(found),
        )
    hour = int(time.time()) // HOUR * HOUR
    return AuditResult(evidence, found, setting, hour, code_sha256(), time.monotonic() - began)


@dataclass(frozen=True, slots=True)
class Mechanism:
    """What is under test."""

    plan: FederationPlan
    privacy: PrivacyPlan
    noise_multiplier: float
    make_engine: MakeEngine
    setting: Setting

    def engine(self) -> Engine:
        """For a new run."""
        return self.make_engine(self.privacy, self.noise_multiplier)

    def clipping(self) -> list[Evidence]:
        """How far one unit moves the clipped sum, and whether others change what it adds; also at an odd width."""
        scenes = [make_scene(self.plan, _UNITS, self.setting)]
        if scenes[0].encoder is None and scenes[0].records.images.shape[1] % 4 == 0:
            scenes.append(make_scene(self.plan, _UNITS, self.setting.narrow(_ODD_DIM)))
        engine, norm = self.engine(), self.privacy.max_grad_norm
        return [sensitivity(engine, scenes, norm), records_apart(engine, scenes, norm)]

    def training(self, make_trainer: MakeTrainer) -> list[Evidence]:
        """Two whole rounds of the trainer, and what it releases in them."""
        units = min(_UNITS, max(_FEWEST, math.ceil(_IN_STEP / self.privacy.sample_rate)))
        scene = make_scene(self.plan, units, self.setting)
        found = rehearse(Work(self.plan, self.privacy, self.noise_multiplier, scene), make_trainer)
        return [keys_fresh(found), as_by_hand(found), noise_of_each(found), noise_apart(found)]

    def attack(self) -> Attack:
        """On all steps that the plan allows for one phase, or as many as are attacked at most."""
        steps = (self.plan.training.rounds + self.privacy.max_retrains) * self.privacy.steps_per_round
        return canaries.attack(self.engine(), self.privacy, self.noise_multiplier, steps)

    def noise(self) -> list[Evidence]:
        """Whole steps, and wide sums; a second run only to compare the first with."""
        units = min(_UNITS, math.ceil(_IN_STEP / self.privacy.sample_rate))
        scene = make_scene(self.plan, units, self.setting.narrow())
        one, other = self._noise(scene, noises.COORDINATES), self._noise(scene, noises.FEWER_COORDINATES)
        both = [*one, noises.noise_of_wide_sums(self.engine(), self.privacy, self.noise_multiplier)]
        tests = (noises.deviation, noises.shape, noises.across_steps, noises.across_coordinates)
        return [*(test(both) for test in tests), noises.across_runs(one, other)]

    def _noise(self, scene: Scene, coordinates: int) -> list[Doubles]:
        with same_torch_seed():
            return noises.noise_of_steps(self.engine(), scene, self.privacy, self.noise_multiplier, coordinates)

    def sampling(self) -> list[Evidence]:
        """One run, and another to compare it with."""
        rate = self.privacy.sample_rate
        one, other = self._members(), self._members()
        tests = (sampler.sizes, sampler.participation, sampler.independence)
        return [*(test(one, rate) for test in tests), sampler.across_runs(one, other, rate)]

    def _members(self) -> sampler.Members:
        with same_torch_seed():
            return sampler.members_of_steps(self.engine(), self.privacy.sample_rate)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's threads cost more than they give on such small batches, several times over on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
