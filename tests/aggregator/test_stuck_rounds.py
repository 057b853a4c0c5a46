"""Rounds that could stand still for good, and state that was restored from an older backup."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fedclip_secure.errors import FedClipError, TrustError
from fedclip_secure.silo.run.link import LeftOutError
from fedclip_secure.silo.run.runner import Runner
from tests.aggregator.liars import LIAR, NO_COUNTS, averaged, others, run, sharing
from tests.aggregator.site import NAMES, Gate, Site, each, set_back, silos_of, vanishing
from tests.aggregator.test_bound_silos import SHORT, agreed_in_vain
from tests.aggregator.test_lying_silos import garbage_for
from tests.waiting import BOUND, until


def test_an_accuser_whose_accused_is_gone_is_needed_after_all(tmp_path: Path) -> None:
    # Of four silos the accuser is out, and the liar has vanished: two are too few.
    site = Site.frozen(tmp_path, splits=NO_COUNTS, deadlines={"join": 1, "share": 1})
    run(site, sharing(garbage_for("lab-b")), vanishing("uploads"))
    assert averaged(site) == [others(site)]


def test_who_keeps_a_result_from_being_signed_is_said(tmp_path: Path) -> None:
    """Its workdir may have become read-only: the others wait for it, and the coordinator must know for whom."""
    site = Site.frozen(tmp_path, 3, deadlines=dict.fromkeys(("join", "share", "upload", "agree", "unmask"), 5))
    gate = Gate("results")

    async def among() -> None:
        async with site.serving(), silos_of(site) as silos:
            silos.start(*NAMES[:2])
            silos.start(NAMES[2], before=gate)
            said = "round 1 of 1, attempt 1: 2 of 3 signatures on its result are there; waiting for lab-c"
            await until(lambda: said in site.said)
            gate.opened.set()
            await silos.done()

    asyncio.run(among())
    assert site.status().state == "finished"


class Abandoning(Runner):
    """Started with `--abandon-round 1`."""

    async def run(self, abandon: int | None = None) -> None:
        del abandon
        await super().run(1)


def test_a_bound_silo_that_had_joined_can_give_the_round_up(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, deadlines=SHORT)

    async def among() -> None:
        async with site.serving(), agreed_in_vain(site, ["lab-a"], NAMES[1:3], [LIAR]) as silos:
            await until(lambda: "blocked" in [event["kind"] for event in site.status().events])
            silos.tasks["lab-a"].cancel()
            await asyncio.wait([silos.tasks["lab-a"]])
            silos.start("lab-a", runner=Abandoning)
            await silos.done(*others(site))

    asyncio.run(among())
    assert averaged(site) == [others(site)] * 2


async def _never_shares(attempt: int, stage: str) -> None:
    if attempt > 1 and stage == "bundles":
        raise LeftOutError("gone again")


def test_one_that_joins_and_never_shares_cannot_hold_up_silos_that_are_enough(tmp_path: Path) -> None:
    # lab-a agreed to all seven names, and lab-g is among them.
    deadlines = {"join": 2, "share": 1, "upload": 2, "agree": 3}  # lab-a must have agreed by then
    site = Site.frozen(tmp_path, 7, splits=NO_COUNTS, deadlines=deadlines)

    async def among() -> None:
        gate = Gate("list of uploads")
        async with site.serving(), silos_of(site) as silos:
            silos.start("lab-a")
            silos.start(*NAMES[1:6], before=gate)
            silos.start("lab-g", before=each(gate, _never_shares))
            await until(lambda: site.reasons(None) != [])
            gate.opened.set()
            await silos.done(*NAMES[1:6])

    asyncio.run(among())
    assert averaged(site) == [list(NAMES[1:6])]


@pytest.mark.parametrize(
    ("backup_at", "stage"), [("key-ads", "bundles"), ("key-ads", "results"), ("uploads", "agrees")]
)
def test_state_restored_within_an_attempt_ends_the_silos_with_a_word_on_it(
    tmp_path: Path, backup_at: str, stage: str
) -> None:
    deadlines = dict.fromkeys(("join", "share", "upload", "agree", "unmask"), 2)
    site = Site.frozen(tmp_path, splits=NO_COUNTS, deadlines=deadlines)
    first, second = Gate(backup_at, attempt=1), Gate(stage, attempt=1)
    said: list[str] = []

    async def among() -> None:
        async with silos_of(site) as silos:
            await set_back(site, silos, first, second)
            async with site.serving(), asyncio.timeout(BOUND):
                second.opened.set()
                for ended in await asyncio.gather(*silos.tasks.values(), return_exceptions=True):
                    assert ended is None or isinstance(ended, FedClipError)
                    said.append(str(ended))

    asyncio.run(among())
    assert said
    if stage != "agrees":  # restored at uploading, the same attempt can still end well
        assert any("restored from an older backup" in reason for reason in said)


def test_a_silo_restarted_in_an_attempt_that_a_restored_server_does_not_know_hears_so(tmp_path: Path) -> None:
    site = Site.frozen(tmp_path, training={"rounds": 3})
    first, second = Gate("key-ads", attempt=2), Gate("bundles", attempt=3)

    async def among() -> None:
        async with silos_of(site) as silos:
            await set_back(site, silos, first, second)
            async with site.serving():
                await silos.stop()
                silos.start(*NAMES[:4])
                with pytest.raises(TrustError, match="restored from an older backup"):
                    await silos.done("lab-a")

    asyncio.run(among())
