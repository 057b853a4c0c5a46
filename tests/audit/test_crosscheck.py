from __future__ import annotations

import pytest

from fedclip_secure.audit.crosscheck import cross_check
from fedclip_secure.privacy.accounting import accountant
from fedclip_secure.privacy.accounting.events import Event

SHORT = Event(1.0, 64 / 1200, 200)
LONG = Event(0.8, 0.01, 2000)


@pytest.mark.parametrize(("event", "prv", "rdp"), [(SHORT, 5.110, 5.731), (LONG, 4.304, 4.861)])
def test_opacus_gives_its_known_figures(event: Event, prv: float, rdp: float) -> None:
    found = cross_check([event], 1e-5)
    assert found.prv == pytest.approx(prv, abs=1e-3)
    assert found.rdp == pytest.approx(rdp, abs=1e-3)
    assert found.versions["opacus"].startswith("1.")


@pytest.mark.parametrize("events", [[Event(1.0, 1.0, 1)], [Event(2.0, 1.0, 5)], [Event(1.0, 0.05, 100), LONG]])
def test_accountants_agree_on_everybody_and_on_several_events(events: list[Event]) -> None:
    found, pld = cross_check(events, 1e-5), accountant.epsilon(events, 1e-5)
    assert abs(found.prv - pld) <= max(0.02, 0.005 * pld)
    assert found.prv < found.rdp


def test_order_and_splitting_of_events_change_nothing() -> None:
    half = Event(1.0, 64 / 1200, 100)
    assert cross_check([half, LONG, half], 1e-5) == cross_check([LONG, SHORT], 1e-5)
