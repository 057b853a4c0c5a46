from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest

from fedclip_secure.config.fields import check
from fedclip_secure.config.lock import Contract, FederationLock
from fedclip_secure.config.plan import FederationPlan
from fedclip_secure.errors import ConfigError, DataError, ModelError, ProtocolError
from fedclip_secure.model.round_models import ModelPoint, best_of
from fedclip_secure.model.state import AdapterState
from fedclip_secure.secagg.messages import Result, sign_message
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.run.final_models import Course, fetch_course, load_adapter, read_models, save_adapters
from fedclip_secure.silo.run.link import Link
from tests.config.test_lock import LOCK
from tests.config.test_plan import PLAN
from tests.fakes import Federation


@dataclass
class Archive:
    """A finished run of two training rounds and the closing one, as a server would hand it out."""

    federation: Federation
    models: list[AdapterState] = field(init=False)  # after 0, 1, 2, 3 rounds
    lists: dict[int, list[bytes]] = field(init=False)
    counts: tuple[tuple[int, int], ...] = ((3, 10), (9, 10), (6, 10))  # under the model after 0, 1, 2 rounds

    def __post_init__(self) -> None:
        first = self.federation.model
        self.models = [first, *(AdapterState(first.layout, first.vector + step) for step in (1, 2, 2))]
        self.lists = {number: self.sign(number, self.federation.silos) for number in (1, 2, 3)}

    def sign(self, number: int, signers: tuple[str, ...], model: bytes | None = None) -> list[bytes]:
        correct, total = self.counts[number - 1]
        body = Result(
            plan=self.terms.plan,
            roster=self.terms.roster.digest,
            round=number,
            start=self.models[number - 1].digest,
            transcript=bytes(32),
            survivors=bytes(32),
            sum=bytes(32),
            model=model or self.models[number].digest,
            correct=correct,
            total=total,
        )
        return [sign_message(body, "test", name, self.federation.keys[name].sign) for name in signers]

    async def results(self, number: int) -> list[bytes]:
        return self.lists[number]

    async def model(self, digest: bytes, terms: Terms) -> AdapterState:
        return next(model for model in self.models if model.digest == digest)

    @property
    def terms(self) -> Terms:
        return replace(self.federation.terms, training_rounds=2)

    def course(self, terms: Terms | None = None) -> Course:
        return asyncio.run(fetch_course(cast(Link, self), terms or self.terms))

    def points(self, terms: Terms | None = None) -> tuple[ModelPoint, ...]:
        return self.course(terms).points

    def ended_after(self, number: int) -> None:
        """As if training round `number` had changed nothing; what a server made up after it lies there too."""
        self.models[number:] = [self.models[number - 1]] * (4 - number)
        self.lists = {each: self.sign(each, self.federation.silos) for each in self.lists}


@pytest.fixture
def archive() -> Archive:
    return Archive(Federation(4))


def test_points_follow_the_models_with_their_validation_counts(archive: Archive) -> None:
    points = archive.points()
    assert [point.round for point in points] == [0, 1, 2]
    assert [point.model for point in points] == [model.digest for model in archive.models[:3]]
    assert [(point.correct, point.total) for point in points] == list(archive.counts)


def test_without_a_closing_round_the_last_model_has_no_counts(archive: Archive) -> None:
    first = archive.federation.model
    archive.models[3] = AdapterState(first.layout, first.vector + 3)
    archive.lists[3] = archive.sign(3, archive.federation.silos)
    points = archive.points(replace(archive.terms, training_rounds=3))
    assert (points[-1].round, points[-1].correct, points[-1].total) == (3, 0, 0)


@pytest.mark.parametrize("number", [1, 2])
def test_a_training_round_that_changed_nothing_is_the_last_and_its_counts_are_the_last_models(
    archive: Archive, number: int
) -> None:
    archive.ended_after(number)
    course = archive.course()
    assert course.still
    assert course.rounds == number
    assert [point.round for point in course.points] == list(range(number + 1))
    last, before = course.points[-1], course.points[-2]
    assert last.model == before.model == archive.models[number - 1].digest
    assert (last.correct, last.total) == (before.correct, before.total) == archive.counts[number - 1]


def test_a_closing_round_that_leaves_the_model_as_it_is_ends_the_run_as_planned(archive: Archive) -> None:
    assert not archive.course().still
    assert archive.course().rounds == 2


def test_a_run_that_the_server_calls_finished_too_early_is_none(archive: Archive) -> None:
    archive.lists[2] = archive.lists[3] = []
    with pytest.raises(ProtocolError, match="0 silos vouch") as caught:
        archive.course()
    assert caught.value.code == "chain"


def test_adapters_of_a_run_that_ended_early_say_after_which_round(archive: Archive, tmp_path: Path) -> None:
    archive.ended_after(2)
    saved = asyncio.run(save_adapters(cast(Link, archive), archive.course(), _contract(), archive.terms, tmp_path))
    assert [(each.kind, each.card["after_round"]) for each in saved] == [("best", 2), ("last", 2)]
    assert sorted(read_models(tmp_path / "adapters", _contract())) == [1, 2]


@pytest.mark.parametrize(
    ("counts", "best"),
    [
        (((3, 10), (9, 10), (6, 10)), 1),
        (((9, 10), (3, 10), (6, 10)), 0),
        (((9, 10), (9, 10), (6, 10)), 1),  # the later one of equals
        (((1, 2), (5, 10), (50, 100)), 2),
        (((0, 0), (0, 0), (0, 0)), 2),  # nobody counted
        (((0, 10), (0, 0), (0, 10)), 2),
        (((99, 100), (1, 1), (98, 100)), 1),
    ],
)
def test_best_is_the_highest_accuracy_and_the_later_of_equals(counts: tuple[tuple[int, int], ...], best: int) -> None:
    points = [ModelPoint(number, bytes([number]) * 32, *pair) for number, pair in enumerate(counts)]
    assert best_of(points).round == best


def test_server_that_skips_a_round_is_refused(archive: Archive) -> None:
    archive.lists[1] = archive.lists[2]
    with pytest.raises(ProtocolError, match="results of round 2 for round 1") as caught:
        archive.points()
    assert caught.value.code == "chain"


def test_server_that_swaps_two_rounds_is_refused(archive: Archive) -> None:
    archive.lists[1], archive.lists[2] = archive.lists[2], archive.lists[1]
    with pytest.raises(ProtocolError) as caught:
        archive.points()
    assert caught.value.code == "chain"


@pytest.mark.parametrize(
    ("signers", "code"),
    [
        ((), "chain"),
        (("silo-000", "silo-001"), "chain"),  # the threshold of four is three
        (("silo-001", "silo-000", "silo-002"), "list"),
        (("silo-000", "silo-000", "silo-001"), "list"),
        (("aggregator", "silo-000", "silo-001"), "list"),
    ],
)
def test_result_that_too_few_silos_signed_is_refused(archive: Archive, signers: tuple[str, ...], code: str) -> None:
    archive.lists[2] = archive.sign(2, signers)
    with pytest.raises(ProtocolError) as caught:
        archive.points()
    assert caught.value.code == code


def test_result_of_strangers_is_refused(archive: Archive) -> None:
    archive.lists[3] = Archive(Federation(4)).lists[3]
    with pytest.raises(ProtocolError) as caught:
        archive.points()
    assert caught.value.code == "signature"


def test_silos_that_contradict_each_other_open_nothing(archive: Archive) -> None:
    split = archive.sign(2, ("silo-000", "silo-001")) + archive.sign(2, ("silo-002", "silo-003"), b"x" * 32)
    archive.lists[2] = split
    with pytest.raises(ProtocolError, match="2 different result") as caught:
        archive.points()
    assert caught.value.code == "chain"


def test_altered_result_is_refused(archive: Archive) -> None:
    wire = bytearray(archive.lists[1][0])
    wire[-1] ^= 1
    archive.lists[1][0] = bytes(wire)
    with pytest.raises(ProtocolError) as caught:
        archive.points()
    assert caught.value.code == "signature"


def _contract() -> Contract:
    return Contract(check(PLAN, FederationPlan, "plan"), check(LOCK, FederationLock, "lock"))


def test_best_and_last_are_saved_with_cards_and_load_again(archive: Archive, tmp_path: Path) -> None:
    saved = asyncio.run(save_adapters(cast(Link, archive), archive.course(), _contract(), archive.terms, tmp_path))
    assert [(each.kind, each.card["after_round"]) for each in saved] == [("best", 1), ("last", 2)]
    for each, model in zip(saved, (archive.models[1], archive.models[2]), strict=True):
        assert load_adapter(each.path, archive.terms).digest == model.digest
        card = json.loads(each.path.with_suffix(".json").read_text("utf-8"))
        assert card["model_digest"] == model.digest.hex()
        assert list(card["classes"]) == list(PLAN["classes"])
        assert card["plan"] == _contract().pin


def test_missing_adapter_says_what_writes_it(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"best\.safetensors': is missing; `fedclip-silo train` writes it"):
        load_adapter(tmp_path / "best.safetensors", archive.terms)


def test_damaged_adapter_and_folder_in_its_place_are_named(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"garbage")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError, match="x: is not a safetensors file"):
        load_adapter(tmp_path / "x", archive.terms)
    with pytest.raises(DataError, match="folder': cannot be read"):
        load_adapter(tmp_path / "folder", archive.terms)
