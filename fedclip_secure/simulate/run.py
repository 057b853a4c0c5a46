"""An experiment from its file to its rows. Cells run in other processes, and only where they are not done yet."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fedclip_secure.errors import ConfigError, DataError, FedClipError
from fedclip_secure.features.progress import ShowProgress
from fedclip_secure.features.stage import FEATURES
from fedclip_secure.files import make_folder
from fedclip_secure.methods.registry import find_method
from fedclip_secure.simulate.experiment import Experiment, encoder_of, read_experiment
from fedclip_secure.simulate.experiment_cells import Cell, cells_of, digest_of, label_of
from fedclip_secure.simulate.sources import find_sources
from fedclip_secure.simulate.store import load, path_of
from fedclip_secure.simulate.worker import BESIDE, Answer, Setting, open_workshop, run_cell


@dataclass(frozen=True, slots=True)
class Row:
    """A cell with what came of it; `path` is its file where it is done."""

    cell: Cell
    label: str
    answer: Answer
    path: Path | None


@dataclass(frozen=True, slots=True)
class Telling:
    """Whom a simulation tells what it does."""

    say: Callable[[str], None]
    extracting: ShowProgress
    begin: Callable[[int, int], None]  # how many cells there are, and how many were done before
    done: Callable[[Row], None]


@dataclass(frozen=True, slots=True)
class Results:
    """All rows, in the order of the experiment's file."""

    experiment: Experiment
    rows: list[Row]


def simulate(path: Path, out: Path, workers: int, telling: Telling) -> Results:
    """Run what is not done yet of the experiment in the file `path`; everything is kept in the folder `out`.

    Raises:
        ConfigError: the file has faults, or the data do not go with it.
        DataError, ModelError: the data, the encoder's weights or the disk are at fault.
    """
    experiment = read_experiment(path)
    _claim(out)
    telling.say(f"encoder: {encoder_of(experiment)}")
    setting = Setting(experiment, find_sources(experiment, path.resolve().parent, out))
    cells = cells_of(experiment, list(setting.sources.sites))
    data = _extract(setting, telling.extracting)
    rows = dict[Cell, Row]()
    digests = dict[Cell, str]()
    for cell in cells:
        try:
            digests[cell] = digest_of(experiment, cell, setting.plan(cell), data)
        except ConfigError as error:  # there can be no plan of it
            rows[cell] = _row(setting, cell, None, Answer(None, str(error)))
            continue
        if (figures := load(out, digests[cell])) is not None:
            rows[cell] = _row(setting, cell, digests[cell], Answer(figures, None))
    telling.begin(len(cells), sum(row.answer.figures is not None for row in rows.values()))
    for row in rows.values():
        if row.answer.figures is None:
            telling.done(row)
    for row in _run(setting, {cell: digests[cell] for cell in cells if cell not in rows}, workers):
        rows[row.cell] = row
        telling.done(row)
    return Results(experiment, [rows[cell] for cell in cells])


def _row(setting: Setting, cell: Cell, digest: str | None, answer: Answer) -> Row:
    path = None if digest is None or answer.figures is None else path_of(setting.sources.out, digest)
    return Row(cell, label_of(setting.experiment, cell), answer, path)


def _claim(out: Path) -> None:
    make_folder(out, "choose another with --out")


def _extract(setting: Setting, progress: ShowProgress) -> bytes:
    """Have all images encoded before several processes ask for them; the fingerprint of the records."""
    data = setting.load(BESIDE, progress).fingerprint()
    found = {FEATURES}
    for arm in setting.experiment.methods:
        stage = find_method(arm.method).spec.stage
        if stage not in found:
            with suppress(FedClipError):  # the method's own cells will say why
                setting.load(arm.method, progress)
        found.add(stage)
    return data


def _run(setting: Setting, cells: Mapping[Cell, str], workers: int) -> Iterator[Row]:
    """Rows of `cells`, each with its digest, as they are done.

    Raises:
        DataError: a process was killed.
    """
    if not cells:
        return
    with _pool(setting, min(workers, len(cells))) as pool:
        futures = {pool.submit(run_cell, cell, digest): cell for cell, digest in cells.items()}
        for future in as_completed(futures):
            cell = futures[future]
            try:
                yield _row(setting, cell, cells[cell], future.result())
            except BrokenProcessPool as error:
                raise DataError(
                    "a process that ran cells was killed, most often for want of memory; finished cells are kept: "
                    "run again with fewer --workers"
                ) from error


@contextmanager
def _pool(setting: Setting, workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the block, whatever ends it. Forked ones would share torch's threads, so they are new."""
    before = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=open_workshop, initargs=(setting,))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    finally:
        pool.shutdown()
