"""How far one unit moves the clipped sum: never further than C, and as far whoever else is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedclip_secure.audit.audited_parts import Engine
from fedclip_secure.audit.evidence import Doubles, Evidence
from fedclip_secure.audit.made_up_records import Scene
from fedclip_secure.methods.base import Batch, Phase
from fedclip_secure.training.device_records import select
from fedclip_secure.training.private.gradients import Integers
from fedclip_secure.training.private.linear_layers import MOST_CANCELLED

TOLERANCE = 1e-7  # of C
_LARGE = 1e6  # by how much losses are scaled, and features
_RESTS = (0, 1, 2, 48)  # units that stay when one is taken away; also as many as add up to about C
_NEIGHBOURS = (1, 2, 15, 48)  # units beside the one whose bits are looked at
_HALF_ULP = 2.0**-53
# Four times the size, in C, of what is summed: a unit's records may add up to less than each adds by itself.
_TERM = 4 * MOST_CANCELLED


@dataclass(frozen=True, slots=True)
class _Amount:
    """How much is looked at."""

    most_units: int  # that stay
    removed: int  # units taken away, one at a time, from each set
    pairs: int  # of records that cancel


_PLENTY = _Amount(256, 4, 256)
_FEWER = _Amount(48, 2, 32)  # inside an encoder, where each record takes a pass of its own


def sensitivity(engine: Engine, scenes: Sequence[Scene], max_grad_norm: float) -> Evidence:
    """The furthest that taking one unit away moves the clipped sum, in units of `max_grad_norm`.

    For every phase of the method, batches of several sizes, losses and features as they are and a million times
    larger, and losses of which only some are. No method is taken at its word that a record's loss is its own. Nothing
    here is random, so there is no false alarm.
    """
    moved = [distance / max_grad_norm for scene in scenes for distance in _moved(engine, scene, max_grad_norm)]
    worst = float(np.max(moved))  # NaN, which does not pass, where there is one
    return Evidence(
        name="sensitivity",
        passed=worst <= 1 + TOLERANCE,
        quantity="largest change of the clipped sum by one unit, in units of max_grad_norm; passes up to the bound",
        measured=worst,
        bound=1 + TOLERANCE,
        shows=f"taking one unit away, {len(moved)} times, moved the clipped sum by at most {worst:.9f} of "
        f"max_grad_norm ({'; '.join(scene.about for scene in scenes)})",
        failure="One unit counts for more than the noise was made for; epsilon is larger than claimed.",
    )


def records_apart(engine: Engine, scenes: Sequence[Scene], max_grad_norm: float) -> Evidence:
    """Whether what a unit adds is the same, to the last bit, whoever else is in the batch.

    Of one record, looked at where sums of float64 round nothing: beside units without a loss, and in coordinates to
    which the others add nothing. Elsewhere, and for patients of several records, whose own gradients are summed, only
    what exceeds the rounding of such sums counts. For every phase, losses and features as they are, and a million
    times larger. Nothing here is random, so there is no false alarm.
    """
    found = [change / max_grad_norm for scene in scenes for change in _changes(engine, scene, max_grad_norm)]
    worst = float(np.max(found))  # NaN, which does not pass, where there is one
    return Evidence(
        name="records_apart",
        passed=worst <= 0,
        quantity="largest change of what a unit adds by who else is there, in units of max_grad_norm; passes at 0",
        measured=worst,
        bound=0.0,
        shows=f"what a unit adds was compared {len(found)} times with what it adds beside others, bit by bit; it "
        f"changed by {worst:.2g} of max_grad_norm at most",
        failure="What one record adds depends on the others: without it these add something else, and nothing bounds "
        "how far that goes.",
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """Clipped sums of one phase over units of the scene, whose records are those of `records`."""

    engine: Engine
    scene: Scene
    phase: Phase
    records: Batch

    def of(self, units: Integers) -> Doubles:
        """Over the units with these numbers."""
        rows = np.flatnonzero(np.isin(self.scene.unit_of, units))
        batch = select(self.records, torch.from_numpy(rows).to(self.scene.device))
        return self.engine.clipped_sum(self.scene.module, self.phase, batch, self.scene.unit_of[rows])

    def moved(self, rest: int, removed: int) -> Iterator[float]:
        """‖S(D) - S(D without x)‖, D being `rest` units and x, for the first `removed` units x of D."""
        units = np.arange(rest + 1)
        everybody = self.of(units)
        for unit in units[:removed]:
            yield float(np.linalg.norm(everybody - self.of(units[units != unit])))

    def adding_up_to(self, max_grad_norm: float, most: int) -> int:
        """About how many units have gradients whose norms add up to `max_grad_norm`, at most `most`."""
        norms = [float(np.linalg.norm(self.of(np.array([unit])))) for unit in range(4)]
        return int(max_grad_norm / max(float(np.nan_to_num(np.median(norms))), max_grad_norm / most))


def _moved(engine: Engine, scene: Scene, max_grad_norm: float) -> Iterator[float]:
    amount = _PLENTY if scene.encoder is None else _FEWER
    for sums in _cases(engine, scene):
        for rest in (*_RESTS, sums.adding_up_to(max_grad_norm, amount.most_units)):
            yield from sums.moved(rest, amount.removed)
    for phase in scene.method.phases(scene.setting.silo):
        yield _by_cancelling(engine, scene, phase, amount.pairs)


def _cases(engine: Engine, scene: Scene) -> Iterator[_Sums]:
    """Losses that are scaled in several ways, and features that are."""
    plain = scene.records
    wide = dataclasses.replace(plain, images=plain.images * _LARGE)
    for phase in scene.method.phases(scene.setting.silo):
        yield _Sums(engine, scene, phase, plain)
        yield _Sums(engine, scene, phase, wide)
        yield _Sums(engine, scene, _with_factors(phase, _large), plain)
        yield _Sums(engine, scene, _with_factors(phase, _some_large), plain)


def _changes(engine: Engine, scene: Scene, max_grad_norm: float) -> Iterator[float]:
    """By how much what a unit adds changes beside others, beyond what the sums round off."""
    heard, silent = _heard_and_silent(scene)
    for sums in _cases(engine, scene):
        some = dataclasses.replace(sums, phase=_with_factors(sums.phase, _of_positive))
        for unit, count in zip(heard, _NEIGHBOURS, strict=False):
            alone, everybody = np.array([unit]), np.append(silent[:count], unit)
            several = bool((scene.unit_of == unit).sum() > 1)  # whose own sum is rounded too
            rounded = float(_HALF_ULP * np.isin(scene.unit_of, everybody).sum() ** 2 * _TERM * max_grad_norm)
            yield _beyond(some.of(everybody) - some.of(alone), np.array(several), rounded)
            others = sums.of(silent[:count])
            added = sums.of(everybody) - others - sums.of(alone)
            yield _beyond(added, (others != 0) | several, rounded)


def _heard_and_silent(scene: Scene) -> tuple[Integers, Integers]:
    """Units whose records' first features are all positive, of one record and of several, and those with none such."""
    positive = (scene.records.images.flatten(1)[:, 0] > 0).cpu().numpy()
    count, of_them = np.bincount(scene.unit_of), np.bincount(scene.unit_of, weights=positive)
    single, several = (np.flatnonzero((of_them == count) & fits) for fits in (count == 1, count > 1))
    return np.concatenate([single[:2], several[:2], single[2:]]), np.flatnonzero(of_them == 0)


def _beyond(change: Doubles, sums: npt.NDArray[np.bool_], rounded: float) -> float:
    """The largest of `change` (d,) in size, beyond `rounded` where coordinates are `sums`; NaN stays NaN."""
    return float(np.maximum(0.0, np.abs(change) - rounded * sums).max())


def _by_cancelling(engine: Engine, scene: Scene, phase: Phase, pairs: int) -> float:
    """How far one unit of many records moves the sum of units whose two records all but cancel.

    What such a unit adds is decided by its last bits: here a factor that depends on anybody else would show.
    """
    plain, rows = scene.records, torch.arange(3 * pairs) % pairs
    images = plain.images[rows.to(plain.images.device)].clone()
    last = images.flatten(1)[:, -1]  # a view
    last[:] = 1e-20  # told apart by a feature too small to matter otherwise
    last[pairs : 2 * pairs] = -1e-20
    batch = dataclasses.replace(plain, images=images, labels=plain.labels[rows.to(scene.device)])
    units = np.concatenate([np.tile(np.arange(1, pairs + 1), 2), np.zeros(pairs, dtype=np.int64)])
    without = select(batch, torch.arange(2 * pairs).to(scene.device))
    signed = _with_factors(phase, _signed)
    added = engine.clipped_sum(scene.module, signed, batch, units)
    added = added - engine.clipped_sum(scene.module, signed, without, units[: 2 * pairs])
    return float(np.linalg.norm(added))


# What trains computes some losses in a way of its own, where it knows each of their operations: those here are simple.


def _with_factors(phase: Phase, factors: Callable[[Tensor], Tensor | float]) -> Phase:
    """`phase` with its losses times `factors` of the flattened images."""
    return Phase(phase.parameters, lambda module, batch: phase.loss(module, batch) * factors(batch.images.flatten(1)))


def _signed(images: Tensor) -> Tensor:
    """Large, and of the other sign and a little smaller where the last feature is negative."""
    return torch.where(images[:, -1] < 0, (2.0**-20 - 1) * _LARGE, _LARGE)


def _large(images: Tensor) -> float:  # noqa: ARG001 - for all records
    return _LARGE


def _some_large(images: Tensor) -> Tensor:
    return torch.where(images[:, 0] <= 0, 1.0, _LARGE)


def _of_positive(images: Tensor) -> Tensor:
    """No loss at all where the first feature is not positive."""
    return torch.where(images[:, 0] > 0, 1.0, 0.0)
