"""The end of a run at a silo: which model was best and which is last, on the word of t silos each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fedclip_secure.config.lock import Contract
from fedclip_secure.disk import refused
from fedclip_secure.errors import ConfigError, DataError, ProtocolError
from fedclip_secure.export.adapter_facts import Facts, write_card
from fedclip_secure.files import write_atomically
from fedclip_secure.model.round_models import ModelPoint, best_of
from fedclip_secure.model.state import AdapterState
from fedclip_secure.secagg.messages import Result
from fedclip_secure.secagg.opening_checks import check_results
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.run.link import Link


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """An adapter as it lies in the workdir: `best` or `last`."""

    kind: str
    path: Path
    card: dict[str, object]


@dataclass(frozen=True, slots=True)
class Course:
    """A run that has ended: its models in order, and whether its last round changed no parameter and so ended it."""

    points: tuple[ModelPoint, ...]
    still: bool = False

    @property
    def rounds(self) -> int:
        """How many training rounds there were."""
        return self.points[-1].round


async def fetch_course(link: Link, terms: Terms) -> Course:
    """Follow the chain of results from the initial model to the last one. That the run has ended must follow from it.

    Raises:
        ProtocolError: `chain`: a round is missing, or t silos do not vouch for it.
    """
    points, model = list[ModelPoint](), terms.initial_model
    for number in range(1, terms.rounds + 1):
        result = check_results(terms, await link.results(number))
        _check_order(result, number, model)
        points.append(ModelPoint(number - 1, model, result.correct, result.total))
        if terms.moved_nothing(number, model, result.model):
            return Course((*points, ModelPoint(number, model, result.correct, result.total)), still=True)
        model = result.model
    if terms.rounds == terms.training_rounds:  # no closing validation round: nobody has counted for the last model
        points.append(ModelPoint(terms.rounds, model, 0, 0))
    return Course(tuple(points))


async def save_adapters(
    link: Link, course: Course, contract: Contract, terms: Terms, workdir: Path
) -> list[SavedAdapter]:
    """Fetch the best and the last adapter and write each as safetensors with a JSON card beside it.

    Raises:
        ModelError: the server sent another model. DataError: the disk refuses.
    """
    points, saved = course.points, []
    for kind, point in (("best", best_of(points)), ("last", points[-1])):
        state = await link.model(point.model, terms)
        facts = Facts(kind, point.round, point.model, point.correct, point.total)
        folder = adapter_folder(workdir)
        state.to_file(folder / f"{kind}.safetensors", {"model": point.model.hex()})
        card = write_card(folder / f"{kind}.json", facts, contract, terms.roster)
        saved.append(SavedAdapter(kind, folder / f"{kind}.safetensors", card))
    chain = {"plan": contract.pin, "models": [point.model.hex() for point in points]}
    write_atomically(adapter_folder(workdir) / "models.json", f"{json.dumps(chain, indent=2)}\n".encode())
    return saved


def read_models(folder: Path, contract: Contract) -> dict[int, bytes]:
    """The digest of the model after each round, as `save_adapters` wrote them; none before the run has ended.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / "models.json"
    if not path.exists():
        return {}
    try:
        chain = json.loads(path.read_text("utf-8"))
        models = chain["models"] if chain["plan"] == contract.pin else []
        return {number: bytes.fromhex(digest) for number, digest in enumerate(models) if number}
    except OSError as error:
        raise DataError(refused(error, path)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{path}': cannot be read; `fedclip-silo train` writes it anew") from error


def newest_model(workdir: Path, contract: Contract, terms: Terms) -> AdapterState | None:
    """The newest model of this run that this silo keeps, which is its last one; None before the run has ended.

    Raises:
        ConfigError, DataError, ModelError: the files of the run's end are not whole.
    """
    folder = adapter_folder(workdir)
    return load_adapter(folder / "last.safetensors", terms) if read_models(folder, contract) else None


def load_adapter(path: Path, terms: Terms) -> AdapterState:
    """Read an adapter of the plan's layout.

    Raises:
        ConfigError: there is none yet. ModelError: it is another method's.
    """
    try:
        return AdapterState.from_file(path, terms.layout, str(path))
    except FileNotFoundError as error:
        raise ConfigError(f"'{path}': is missing; `fedclip-silo train` writes it when the run ends") from error
    except OSError as error:
        raise DataError(refused(error, path)) from error


def adapter_folder(workdir: Path) -> Path:
    """Where the adapters of a run lie."""
    return workdir / "adapters"


def _check_order(result: Result, number: int, start: bytes) -> None:
    if result.round != number:
        raise ProtocolError("chain", f"the server gave the results of round {result.round} for round {number}")
    if result.start != start:
        raise ProtocolError("chain", f"round {number} does not start from the model that the round before ended with")
