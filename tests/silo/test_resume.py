"""A silo that is killed at any moment goes on, as if it had only been slow."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedclip_secure.errors import ConfigError, ProtocolError, TrustError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.secagg.aggregator_session import AggregatorSession, Phase
from fedclip_secure.secagg.messages import Agree, KeyAd, Result, open_message, sign_message
from fedclip_secure.secagg.ring import FixedPoint
from fedclip_secure.secagg.silo_session import Stage
from fedclip_secure.silo.run.link import LeftOutError
from fedclip_secure.transport.messages import OpeningAnswer
from tests.fakes import Federation
from tests.silo.careless import CarelessSession
from tests.silo.memory import (
    Hold,
    Hook,
    Hub,
    Leaves,
    Silo,
    at_once,
    leave_at,
    run_all,
    run_until_killed,
    run_with_kills,
)
from tests.waiting import BOUND

MESSAGES = ("key-ads", "bundles", "uploads", "agrees", "unmasks", "results")
KILLS = [(stage, when) for stage in MESSAGES[:5] for when in ("before", "after")]
KILLS += [("sum", "before"), ("results", "before"), ("results", "after")]
UNBOUND = KILLS[:6]  # before this silo agreed to names
OPEN = KILLS[:8]  # before shares are out: until then an attempt can end without a result
VICTIM, LAST = "silo-000", "silo-003"
STEP = 2.0**-30
ROUNDS = 2  # one of training, and the closing one


def _federation(plan: bytes = bytes(32)) -> Federation:
    """Four silos on a grid of powers of two, so that every integer is exact."""
    federation = Federation(4, rounds=ROUNDS, max_weight=1024)
    grid = FixedPoint((2**29 - 1) // 4 * STEP, 4, 1024)
    federation.terms = replace(federation.terms, plan=plan, grid=grid, training_rounds=ROUNDS - 1)
    return federation


def _silo(hub: Hub, name: str, folder: Path) -> Silo:
    party = Silo(hub, name, folder)
    party.trainer.records = 16
    party.trainer.update = (1000 + int(name[-3:])) * STEP * 1024 / 16
    return party


def _parties(hub: Hub, folder: Path) -> dict[str, Silo]:
    return {name: _silo(hub, name, folder) for name in hub.federation.silos}


def _outcomes(hub: Hub) -> list[tuple[bytes, bytes]]:
    """Sum and model of each round, as the silos signed them."""
    return [
        (result.sum, result.model)
        for wires in hub.results.values()
        for result in {open_message(wire, Result, "test", hub.federation.terms.roster).body for wire in wires}
    ]


def _key_ad(party: Silo, attempt: int) -> KeyAd:
    (wire,) = set(party.sent("key-ads", attempt))
    return open_message(wire, KeyAd, "test", party.hub.federation.terms.roster).body


def _abandoned(party: Silo) -> list[tuple[int, bytes, str]]:
    party.journal.close()
    sql = sqlite3.connect(party.workdir / "journal.sqlite")
    try:
        return sql.execute("SELECT round, model, agreed FROM abandoned").fetchall()
    finally:
        sql.close()


@pytest.fixture
def hub() -> Hub:
    return Hub(_federation())


@pytest.fixture
def parties(hub: Hub, tmp_path: Path) -> dict[str, Silo]:
    return _parties(hub, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[bytes, bytes]]:
    hub = Hub(_federation())
    run_all(_parties(hub, tmp_path_factory.mktemp("undisturbed")).values())
    return _outcomes(hub)


def _worked_once(party: Silo) -> None:
    """It trained once from each model, and validated each once."""
    assert len(party.trainer.trained) == len(set(party.trainer.trained)) == ROUNDS - 1
    assert len(party.trainer.validated) == len(set(party.trainer.validated)) == ROUNDS


# The same attempt


def test_everything_is_in_the_journal_before_it_leaves(hub: Hub, parties: dict[str, Silo]) -> None:
    victim, model, checked = parties[VICTIM], hub.model.digest, list[str]()

    async def is_noted(attempt: int, stage: str) -> None:
        if attempt != 1 or stage == "sum":
            return
        saved, drawn = victim.journal.attempt(hub.federation.terms.roster.digest), victim.journal.models()[0]
        assert saved is not None
        number = Stage(MESSAGES.index(stage) + 1)
        if stage != "uploads":  # its body is too large for the journal, which has how it is sealed
            assert saved.steps[number].sent == victim.link.sent[-1][2]
        assert (drawn.model, drawn.stage) == (model, number)
        assert drawn.agreed == (tuple(parties) if number >= Stage.AGREED else ())
        checked.append(stage)

    victim.link.before = is_noted
    run_all(parties.values())
    assert checked == list(MESSAGES)


@pytest.mark.parametrize(("stage", "when"), KILLS)
def test_silo_killed_around_any_message_resends_the_very_same_bytes_and_the_run_ends_as_if_undisturbed(
    hub: Hub, parties: dict[str, Silo], undisturbed: list[tuple[bytes, bytes]], stage: str, when: str
) -> None:
    victim = parties[VICTIM]
    run_with_kills(parties.values(), victim, [(Hold(1, stage), when)])
    assert hub.attempt == ROUNDS, "a new attempt was needed"
    assert _outcomes(hub) == undisturbed
    resent = "unmasks" if stage == "sum" else stage
    for each in MESSAGES:
        assert len(victim.sent(each, 1)) == (2 if each == resent else 1), each
        assert len(set(victim.sent(each, 1))) == 1, f"other bytes at {each}"
    _worked_once(victim)


def test_silo_killed_at_every_point_of_an_attempt_one_after_the_other_still_finishes_it(
    hub: Hub, parties: dict[str, Silo], undisturbed: list[tuple[bytes, bytes]]
) -> None:
    victim = parties[VICTIM]
    run_with_kills(parties.values(), victim, [(Hold(1, stage), when) for stage, when in KILLS])
    assert hub.attempt == ROUNDS
    assert _outcomes(hub) == undisturbed
    assert all(len(set(victim.sent(each, 1))) == 1 for each in MESSAGES)
    _worked_once(victim)


@pytest.mark.parametrize("stage", ["uploads", "unmasks"])
def test_all_silos_killed_at_once_finish_the_same_attempt(
    hub: Hub, tmp_path: Path, undisturbed: list[tuple[bytes, bytes]], stage: str
) -> None:
    parties = _parties(hub, tmp_path)

    async def main() -> None:
        async with asyncio.timeout(BOUND):
            await asyncio.gather(*(run_until_killed(party, Hold(1, stage), "before") for party in parties.values()))
            for party in parties.values():
                party.restart()
            await asyncio.gather(*(party.runner().run() for party in parties.values()))

    asyncio.run(main())
    assert hub.attempt == ROUNDS
    assert _outcomes(hub) == undisturbed
    for party in parties.values():
        assert len(party.sent(stage, 1)) == 2
        assert len(set(party.sent(stage, 1))) == 1


@pytest.mark.parametrize(("stage", "when"), [("bundles", "before"), ("agrees", "after"), ("results", "before")])
def test_silo_killed_in_the_closing_round_goes_on_too(
    hub: Hub, parties: dict[str, Silo], undisturbed: list[tuple[bytes, bytes]], stage: str, when: str
) -> None:
    victim = parties[VICTIM]
    run_with_kills(parties.values(), victim, [(Hold(ROUNDS, stage), when)])
    assert hub.attempt == ROUNDS
    assert _outcomes(hub) == undisturbed
    _worked_once(victim)


def test_silo_killed_while_it_trained_trains_again(hub: Hub, parties: dict[str, Silo]) -> None:
    victim = parties[VICTIM]
    train, model = victim.trainer.train, hub.model.digest

    def killed(received: AdapterState) -> None:
        victim.trainer.trained.append(received.digest)
        raise KeyboardInterrupt

    victim.trainer.train = killed  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        run_all([victim])
    assert (victim.journal.models(), victim.link.sent) == ([], [])
    victim.trainer.train = train  # type: ignore[method-assign]
    victim.restart()
    run_all(parties.values())
    assert victim.trainer.trained.count(model) == 2
    assert len(victim.sent("uploads", 1)) == 1


def test_result_is_resent_after_a_restart_and_the_run_goes_on_without_training_on_that_model_again(
    hub: Hub, parties: dict[str, Silo]
) -> None:
    victim = parties[VICTIM]

    def meanwhile() -> None:
        assert (hub.round, hub.session.phase) == (1, Phase.RESULT)
        assert VICTIM not in hub.session.results

    run_with_kills(parties.values(), victim, [(Hold(1, "results"), "before")], meanwhile)
    assert len(hub.results[1]) == 4
    assert any("going on after done" in line for line in victim.said)
    _worked_once(victim)


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


# Another attempt


def _goes_before_unmasking(party: Silo) -> Hook:
    async def after(attempt: int, stage: str) -> None:
        if (attempt, stage) == (1, "agrees"):
            party.link.late.add((attempt, stage))

    return after


@pytest.mark.parametrize(("stage", "when"), OPEN)
def test_after_the_attempt_has_ended_the_silo_comes_back_with_fresh_keys_and_the_same_vector(
    hub: Hub, parties: dict[str, Silo], undisturbed: list[tuple[bytes, bytes]], stage: str, when: str
) -> None:
    victim = parties[VICTIM]
    for name in set(parties) - {VICTIM}:
        parties[name].link.after = _goes_before_unmasking(parties[name])
    run_with_kills(parties.values(), victim, [(Hold(1, stage), when)], lambda: hub.open(1))
    assert hub.attempt == ROUNDS + 1
    assert _outcomes(hub) == undisturbed
    _worked_once(victim)
    first, second = _key_ad(victim, 1), _key_ad(victim, 2)
    for name in ("base", "mask_public", "share_seal", "salt_seal", "self_commit"):
        assert getattr(first, name) != getattr(second, name), name
    assert (first.agreed, second.agreed) == ([], [] if (stage, when) in UNBOUND else list(parties))
    assert all(len(set(victim.sent(each, attempt))) <= 1 for each in MESSAGES for attempt in (1, 2))


@pytest.mark.parametrize(("stage", "when"), [kill for kill in KILLS if kill not in OPEN])
def test_after_the_others_have_finished_the_round_the_silo_takes_part_in_the_next(
    hub: Hub, parties: dict[str, Silo], undisturbed: list[tuple[bytes, bytes]], stage: str, when: str
) -> None:
    victim = parties[VICTIM]

    def meanwhile() -> None:
        if hub.round == 1:  # else the last result has arrived
            hub.gone.add(VICTIM)
            hub.advance()

    run_with_kills(parties.values(), victim, [(Hold(1, stage), when)], meanwhile)
    assert hub.attempt == ROUNDS
    assert _outcomes(hub) == undisturbed
    assert len(victim.sent("results", 2)) == 1
    _worked_once(victim)


@pytest.mark.parametrize(("stage", "when"), [("unmasks", "before"), ("unmasks", "after"), ("sum", "before")])
def test_silo_whose_shares_may_be_out_joins_no_other_attempt_over_the_model(
    hub: Hub, parties: dict[str, Silo], stage: str, when: str
) -> None:
    """The server may know the sum by then, and colluders could choose what they add to another one."""
    victim = parties[VICTIM]
    others = set(parties) - {VICTIM}
    start = hub.model
    for name in others:
        parties[name].link.after = Leaves(1, "uploads")

    def others_agree() -> None:
        for name in others:
            hub.session.receive_agree(name, _agree(hub, name))
        hub.advance()

    async def main() -> None:
        async with asyncio.timeout(BOUND):
            tasks = [asyncio.create_task(parties[name].runner().run()) for name in others]
            running = asyncio.create_task(run_until_killed(victim, Hold(1, stage), when))
            await _until(lambda: VICTIM in hub.session.agrees)
            others_agree()
            if stage == "sum":
                await _until(lambda: VICTIM in hub.session.unmasks)
            await running
            hub.model, hub.waits_for, hub.sits_out = start, {1: others}, {2: {VICTIM}}
            hub.open(1)
            victim.restart()
            await asyncio.gather(victim.runner().run(), *tasks)

    asyncio.run(main())
    assert {attempt for attempt, _, _ in victim.link.sent} == {1, 3}
    assert [line for line in victim.said if "helped to open a sum over this very model" in line]


def _agree(hub: Hub, name: str) -> bytes:
    """What a silo would sign in this attempt, had it not left."""
    body = open_message(next(iter(hub.session.agrees.values())).wire, Agree, "test", hub.federation.terms.roster).body
    return sign_message(body, "test", name, hub.federation.keys[name].sign)


def _lost_vector(victim: Silo) -> None:
    shutil.rmtree(victim.workdir / "vectors")


def test_vector_that_is_lost_before_it_left_is_drawn_anew(hub: Hub, parties: dict[str, Silo]) -> None:
    victim, model = parties[VICTIM], hub.model.digest

    def meanwhile() -> None:
        _lost_vector(victim)
        hub.open(1)

    run_with_kills(parties.values(), victim, [(Hold(1, "bundles"), "after")], meanwhile)
    assert victim.trainer.trained.count(model) == 2
    assert victim.sent("uploads", 2)


@pytest.mark.parametrize("when", ["before", "after"])
def test_vector_that_is_lost_after_it_may_have_left_is_not_replaced(
    hub: Hub, parties: dict[str, Silo], when: str
) -> None:
    victim, model = parties[VICTIM], hub.model.digest
    others = set(parties) - {VICTIM}
    for name in others:
        parties[name].link.after = Leaves(1, "uploads")

    def meanwhile() -> None:
        _lost_vector(victim)
        hub.waits_for, hub.sits_out = {1: others}, {2: {VICTIM}}
        hub.open(1)

    run_with_kills(parties.values(), victim, [(Hold(1, "uploads"), when)], meanwhile)
    assert victim.trainer.trained.count(model) == 1
    assert {attempt for attempt, _, _ in victim.link.sent} == {1, 3}


# Names that were agreed to


def _bound(parties: dict[str, Silo]) -> tuple[list[Silo], Silo]:
    """The others leave the first attempt before they agree, so that only the victim is bound."""
    others = [party for party in parties.values() if party.name != VICTIM]
    for party in others:
        party.link.after = Leaves(1, "uploads")
    return others, parties[VICTIM]


@pytest.mark.parametrize("lacking", ["key-ads", "bundles", "uploads"])
def test_after_it_agreed_a_silo_leaves_an_attempt_over_other_names_and_finishes_one_over_the_same(
    hub: Hub, parties: dict[str, Silo], undisturbed: list[tuple[bytes, bytes]], lacking: str
) -> None:
    others, victim = _bound(parties)

    async def vanishes(attempt: int, stage: str) -> None:
        if (attempt, stage) == (2, lacking):
            hub.gone.add(LAST)
            hub.advance()
            raise LeftOutError(lacking)

    async def main() -> None:
        async with asyncio.timeout(BOUND):
            tasks = [asyncio.create_task(party.runner().run()) for party in others]
            await run_until_killed(victim, Hold(1, "agrees"), "after")
            parties[LAST].link.before = vanishes
            for party in others:
                party.link.after = Leaves(2, "uploads")  # before they agree to fewer
            hub.session_type = CarelessSession
            hub.open(1)
            victim.restart()
            tasks.append(asyncio.create_task(victim.runner().run()))
            await _until(lambda: any("goes on without this silo: this silo agreed to" in line for line in victim.said))
            hub.session_type = AggregatorSession
            hub.gone.clear()
            hub.open(1)
            await asyncio.gather(*tasks)

    asyncio.run(main())
    stages = {stage for attempt, stage, _ in victim.link.sent if attempt == 2}
    assert stages == set(MESSAGES[: MESSAGES.index(lacking) + 1]), "it went on with other names"
    assert _key_ad(victim, 2).agreed == _key_ad(victim, 3).agreed == list(parties)
    assert victim.sent("agrees", 3)
    assert _outcomes(hub) == undisturbed
    _worked_once(victim)


def test_honest_server_waits_for_all_names_that_a_silo_agreed_to(
    hub: Hub, parties: dict[str, Silo], undisturbed: list[tuple[bytes, bytes]]
) -> None:
    others, victim = _bound(parties)
    hub.waits_for = {1: set(parties) - {LAST}}

    async def is_late(attempt: int, stage: str) -> None:
        if (attempt, stage) == (2, "key-ads"):
            await _until(lambda: len(hub.session.ads) == 3)
            await asyncio.sleep(0.02)
            assert hub.session.phase is Phase.JOIN

    async def main() -> None:
        async with asyncio.timeout(BOUND):
            tasks = [asyncio.create_task(party.runner().run()) for party in others]
            hub.waits_for = {}
            await run_until_killed(victim, Hold(1, "agrees"), "after")
            hub.waits_for = {1: set(parties) - {LAST}}
            parties[LAST].link.before = is_late
            hub.open(1)
            victim.restart()
            await asyncio.gather(victim.runner().run(), *tasks)

    asyncio.run(main())
    assert hub.attempt == ROUNDS + 1
    assert _outcomes(hub) == undisturbed


# What a person gives up


def _abandon(victim: Silo, number: int) -> None:
    async def main() -> None:
        async with asyncio.timeout(BOUND):
            await victim.runner().run(abandon=number)

    asyncio.run(main())


def test_round_is_given_up_only_while_it_is_going_on(hub: Hub, parties: dict[str, Silo], tmp_path: Path) -> None:
    _, victim = _bound(parties)
    leave_at(parties.values(), victim, (Hold(1, "agrees"), "after"))
    victim.journal = victim.open_journal()
    before, sent = victim.journal.models(), len(victim.link.sent)
    hub.open(1)
    with pytest.raises(ConfigError, match="round 2 is not the one going on, which is round 1"):
        _abandon(victim, 2)
    assert victim.journal.models() == before
    assert victim.journal.attempt(hub.federation.terms.roster.digest) is not None
    assert len(victim.link.sent) == sent
    assert _abandoned(victim) == []


@pytest.mark.parametrize("stage", [None, "key-ads", "bundles", "uploads"])
def test_nothing_is_given_up_where_the_same_update_can_still_go_out(
    hub: Hub, parties: dict[str, Silo], stage: str | None
) -> None:
    _, victim = _bound(parties)
    if stage is not None:
        leave_at(parties.values(), victim, (Hold(1, stage), "after"))
        victim.journal = victim.open_journal()
    before, sent = victim.journal.models(), len(victim.link.sent)
    hub.open(1)
    with pytest.raises(ConfigError, match="there is nothing to give up in round 1; leave out --abandon-round"):
        _abandon(victim, 1)
    assert victim.journal.models() == before
    assert len(victim.link.sent) == sent
    assert _abandoned(victim) == []


def _given_up(hub: Hub, parties: dict[str, Silo], others: list[Silo]) -> None:
    """The victim gives round 1 up, in an attempt that it is not alone in; all go on to the end."""
    victim = parties[VICTIM]

    async def main() -> None:
        async with asyncio.timeout(BOUND):
            runs = [asyncio.create_task(party.runner().run()) for party in others]
            await asyncio.gather(victim.runner().run(abandon=1), *runs)

    asyncio.run(main())


def test_silo_that_gave_a_round_up_trains_anew_and_is_summed_over_other_names(
    hub: Hub, parties: dict[str, Silo]
) -> None:
    others, victim = _bound(parties)
    model = hub.model.digest
    leave_at(parties.values(), victim, (Hold(1, "agrees"), "after"))
    for party in parties.values():
        party.journal = party.open_journal()
        party.link.after = at_once
    drawn = victim.journal.models()[0]
    hub.waits_for = dict.fromkeys(range(1, ROUNDS + 1), set(parties) - {LAST})
    hub.open(1)
    _given_up(hub, parties, others[:2])
    assert hub.finished
    assert _key_ad(victim, 2).agreed == []
    assert victim.trainer.trained.count(model) == 2
    assert [line for line in victim.said if "given up; starting on it again with a new update" in line]
    assert victim.journal.models()[0].agreed == tuple(sorted(set(parties) - {LAST}))
    assert drawn.agreed == tuple(parties)
    assert _abandoned(victim) == [(1, model, " ".join(parties))]


def test_silo_that_gave_a_round_up_takes_part_again_though_its_vector_was_lost(
    hub: Hub, parties: dict[str, Silo]
) -> None:
    others, victim = _bound(parties)
    model = hub.model.digest
    leave_at(parties.values(), victim, (Hold(1, "uploads"), "after"))
    _lost_vector(victim)
    for party in parties.values():
        party.journal = party.open_journal()
        party.link.after = at_once
    hub.open(1)
    _given_up(hub, parties, others)
    assert victim.trainer.trained.count(model) == 2
    assert victim.sent("uploads", 2)
    assert _abandoned(victim) == [(1, model, "")]


# Other runs


def _other_run(kind: str, hub: Hub) -> Hub:
    """A run from the same model, under another plan, or with another roster."""
    if kind == "roster":
        return Hub(_federation())
    federation = hub.federation
    federation.terms = replace(federation.terms, plan=b"p" * 32)
    other = Hub(federation)
    other.open(1)  # its first attempt is over: the silo has seen one of this number
    return other


@pytest.mark.parametrize("kind", ["plan", "roster"])
@pytest.mark.parametrize("stage", ["uploads", "agrees", "unmasks", "results"])
def test_model_over_which_a_vector_left_in_another_run_is_sat_out(
    hub: Hub, parties: dict[str, Silo], tmp_path: Path, kind: str, stage: str
) -> None:
    victim, model = parties[VICTIM], hub.model.digest
    leave_at(parties.values(), victim, (Hold(1, stage), "after"))
    other = _other_run(kind, hub)
    assert other.model.digest == model
    again = {**_parties(other, tmp_path / "other"), VICTIM: _silo(other, VICTIM, tmp_path)}
    other.waits_for, other.sits_out = {1: set(again) - {VICTIM}}, {other.attempt: {VICTIM}}
    run_all(again.values())
    assert model not in again[VICTIM].trainer.trained
    assert {attempt for attempt, _, _ in again[VICTIM].link.sent} == {other.attempt}
    assert again[VICTIM].sent("uploads", other.attempt)


@pytest.mark.parametrize("kind", ["plan", "roster"])
@pytest.mark.parametrize("stage", ["key-ads", "bundles"])
def test_model_is_trained_on_anew_in_another_run_where_no_vector_left(
    hub: Hub, parties: dict[str, Silo], tmp_path: Path, kind: str, stage: str
) -> None:
    leave_at(parties.values(), parties[VICTIM], (Hold(1, stage), "after"))
    other = _other_run(kind, hub)
    first = other.attempt
    again = {**_parties(other, tmp_path / "other"), VICTIM: _silo(other, VICTIM, tmp_path)}
    run_all(again.values())
    assert again[VICTIM].sent("uploads", first)
    assert len(again[VICTIM].trainer.trained) == ROUNDS - 1
    assert {attempt for attempt, _, _ in again[VICTIM].link.sent} == set(range(first, first + ROUNDS))


def test_attempt_under_a_plan_that_was_replaced_is_not_gone_on_with(
    hub: Hub, parties: dict[str, Silo], tmp_path: Path
) -> None:
    victim = parties[VICTIM]
    leave_at(parties.values(), victim, (Hold(1, "key-ads"), "after"))
    hub.federation.terms = replace(hub.federation.terms, plan=b"p" * 32)
    other = Hub(hub.federation)  # in its first attempt, too
    again = _silo(other, VICTIM, tmp_path)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await again.runner().run()

    asyncio.run(main())
    assert again.link.sent == []
    assert again.journal.attempt(other.federation.terms.roster.digest) is None


def test_later_run_trains_on_the_model_of_a_closing_round_and_sends_no_counts_over_it_a_second_time(
    hub: Hub, parties: dict[str, Silo], tmp_path: Path
) -> None:
    run_all(parties.values())
    last = hub.model
    assert last.digest in {drawn.model for drawn in parties[VICTIM].journal.models() if not drawn.trains}
    for party in parties.values():
        party.journal.close()
    federation = _federation()
    federation.model = last
    federation.terms = replace(federation.terms, initial_model=last.digest)
    other = Hub(federation)
    again = _parties(other, tmp_path)
    run_all(again.values())
    assert other.finished
    for party in again.values():
        assert party.trainer.trained[0] == last.digest
        assert last.digest not in party.trainer.validated
        assert not any(party.link.idle)


def test_when_the_run_is_finished_only_what_was_signed_over_is_remembered(hub: Hub, parties: dict[str, Silo]) -> None:
    run_all(parties.values())
    for party in parties.values():
        assert [drawn.stage for drawn in party.journal.models()] == [Stage.DONE] * ROUNDS
        assert party.journal.attempt(hub.federation.terms.roster.digest) is None
        assert list((party.workdir / "vectors").iterdir()) == []


def test_silo_of_a_halted_run_keeps_no_secrets(hub: Hub, parties: dict[str, Silo]) -> None:
    victim = parties[VICTIM]
    leave_at(parties.values(), victim, (Hold(1, "bundles"), "after"))
    victim.journal = victim.open_journal()
    hub.answer = OpeningAnswer(state="halted", reason="so")
    with pytest.raises(TrustError, match="the aggregator halted the run: so"):
        _abandon(victim, 1)
    assert victim.journal.attempt(hub.federation.terms.roster.digest) is None


def test_fault_of_the_server_is_met_again_after_a_restart_and_nothing_more_leaves(
    hub: Hub, parties: dict[str, Silo]
) -> None:
    victim = parties[VICTIM]

    def withhold(inbox: dict[str, list[bytes]]) -> None:
        del inbox["silo-002"]

    victim.link.alter_inbox = withhold
    for _ in range(2):
        with pytest.raises(ProtocolError) as caught:
            run_all(parties.values())
        assert caught.value.code == "inbox"
        for party in parties.values():
            party.restart()
    assert {stage for _, stage, _ in victim.link.sent} == {"key-ads", "bundles"}
    assert len(set(victim.sent("bundles", 1))) == 1
