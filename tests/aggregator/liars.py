"""Silos that break the rules among honest ones: all of them run for real, against the real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fedclip_secure.secagg.keys import AttemptSecrets
from fedclip_secure.secagg.opening_checks import Opening
from fedclip_secure.secagg.silo_session import SiloSession
from fedclip_secure.silo.run.journal import Drawn
from fedclip_secure.silo.run.runner import Runner
from tests.aggregator.site import Before, Site, nothing, silos_of
from tests.secagg.lies import Lie, LyingSilo

LIAR = "lab-d"
NO_COUNTS = {"train": 0.8, "validation": 0, "test": 0.2}  # no closing round, in which the liar would be waited for
Make = Callable[..., SiloSession]  # with the arguments of SiloSession


def lying(*liars: Make) -> type[Runner]:
    """A silo whose session in the nth attempt is the nth of these, and an honest one in later attempts."""

    class LyingRunner(Runner):
        def _session(self, opening: Opening, drawn: Drawn, secrets: AttemptSecrets) -> SiloSession:
            honest = super()._session(opening, drawn, secrets)
            if opening.ad.attempt > len(liars):
                return honest
            me, make = self._party.identity, liars[opening.ad.attempt - 1]
            return make(self._terms, me.name, me.sign, opening, honest._record, secrets=secrets)

    return LyingRunner


def sharing(*lies: Lie) -> type[Runner]:
    """A silo that in the nth attempt lies in what it seals to its peers."""
    return lying(*(_sharing(lie) for lie in lies))


def _sharing(lie: Lie) -> Make:
    def make(*args: object, **options: object) -> SiloSession:
        silo = LyingSilo(*args, **options)  # type: ignore[arg-type]
        silo.lie = lie
        return silo

    return make


def run(site: Site, liar: type[Runner], before: Before = nothing) -> BaseException | None:
    """All take part, one of them as `liar`, until the others have finished. How the liar ended, where it has."""

    async def among() -> BaseException | None:
        async with site.serving(), silos_of(site) as silos:
            silos.start(LIAR, before=before, runner=liar)
            silos.start(*others(site))
            await silos.done(*others(site))
            task = silos.tasks[LIAR]
            return task.exception() if task.done() else None

    return asyncio.run(among())


def others(site: Site) -> list[str]:
    return [name for name in site.terms.roster.silos if name != LIAR]


def averaged(site: Site) -> list[list[str]]:
    """Whom each round averaged, once the model is found to be what their updates add up to."""
    status = site.status()
    assert status.state == "finished"
    survivors = [row["survivors"] for row in status.finished_rounds]
    assert status.finished_rounds[-1]["model"] == site.foretold(survivors[: status.rounds])
    return survivors
