"""What the demo says while it audits and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedclip_secure.aggregator.home import Home
from fedclip_secure.demo import reports
from fedclip_secure.silo.accepted import Accepted
from tests.privacy.reports import Site


class ReachedError(Exception):
    """The audit has begun."""


def test_the_audit_is_announced_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    site = Site(tmp_path)
    labs: dict[str, Any] = {"oak": None}

    def audit(*_: object) -> None:
        raise ReachedError

    monkeypatch.setattr(reports, "_audit", audit)
    with pytest.raises(ReachedError):
        reports.write_reports(Home(tmp_path), Accepted(site.agreed, site.roster), labs, said.append)
    (line,) = said
    assert line == "auditing the mechanism: two rounds of the plan on made-up records, and an attack; it takes a while"
