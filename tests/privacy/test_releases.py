"""A step's noisy sums are the method's, whatever a lock says: what each person reads who meets another number."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fedclip_cli import agg, silo

from fedclip_secure.config.lock import Contract, read_lock, write_lock
from fedclip_secure.config.plan import MethodPlan
from fedclip_secure.config.silo import Policy
from fedclip_secure.errors import ConfigError
from fedclip_secure.methods.registry import METHODS, find_method
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.keys import SigningKey
from fedclip_secure.pki.roster import Roster
from fedclip_secure.privacy.accounting.plan_cost import PlannedRun
from fedclip_secure.privacy.accounting.releases import RELEASES
from fedclip_secure.privacy.report.document import Agreement, as_data
from fedclip_secure.privacy.report.silo_report import SiloFacts, report_body
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.policy import check_policy
from tests.aggregator.site import Site as Federation
from tests.privacy.reports import NOW, PLAN, Site, contract
from tools import verify_report

DOMAINS = {"domains": {"all": ["oak", "birch", "cedar"]}}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "fedapt": [DOMAINS, {**DOMAINS, "fast": False}],
    "feddat": [{}, {"place": "blocks", "first_block": 2, "width": 8}],
}
FACT = "a step of feddat releases 1 noisy sum(s), and it releases 2"


def one_too_few() -> Contract:
    """Of a method that releases twice in a step, with a lock that charges once."""
    agreed = contract(method={"name": "feddat"})
    assert agreed.lock.releases == 2
    return Contract(agreed.plan, agreed.lock.model_copy(update={"releases": 1}))


def forged(tmp_path: Path, agreed: Contract) -> bytes:
    """The report of another method, by a silo that holds the key and puts `agreed` into it."""
    site = Site(tmp_path)
    body = report_body(SiloFacts(site.agreed, site.roster, "oak", NOW))
    body["contract"] = as_data(Agreement.of(agreed))
    body["mechanism"] |= {"method": agreed.plan.method.name}
    return site.signed(body)


def told_by_the_tool(data: bytes, capsys: pytest.CaptureFixture[str]) -> str:
    out = verify_report.Printed()
    options = argparse.Namespace(plan=None, roster=None)
    out.check("all checks were made", lambda: verify_report.check(out, verify_report.parse(data), options))
    assert out.failed
    return capsys.readouterr().out


@pytest.mark.parametrize("name", METHODS)
def test_the_table_has_what_the_methods_release_whatever_their_options(name: str) -> None:
    assert set(RELEASES) == set(METHODS) == set(verify_report.RELEASES)
    for options in OPTIONS.get(name, [{}]):
        method = find_method(MethodPlan(name=name, **options))
        assert len(method.phases()) == RELEASES[name] == verify_report.RELEASES[name]


def test_a_silo_does_not_accept_a_lock_that_charges_a_release_too_few(tmp_path: Path) -> None:
    agreed = one_too_few()
    with pytest.raises(ConfigError) as caught:
        check_policy(Policy(), agreed, Terms.of(agreed, Site(tmp_path).roster), "oak")
    said = str(caught.value)
    assert said.startswith("federation.lock: releases: ")
    assert FACT in said
    assert said.endswith("the coordinator must run `fedclip-agg prepare` again")


def undercharged(tmp_path: Path) -> Federation:
    """Enrolled, and prepared with a lock that charges one of two releases."""
    privacy = {**PLAN["privacy"], "unit": "record"}
    federation = Federation.create(
        tmp_path, method={"name": "feddat"}, privacy=privacy, splits=PLAN["splits"],
        training={"batch_size": None}, secure_aggregation={"weights": "equal"},
    )  # fmt: skip
    lock = read_lock(federation.home.lock_path)
    write_lock(federation.home.lock_path, lock.model_copy(update={"noise_multiplier": 1.0, "releases": 1}))
    for name in ("lab-a", "lab-b", "lab-c"):
        federation.enrol(name)
    return federation


def test_a_coordinator_does_not_freeze_a_lock_that_every_silo_would_refuse(tmp_path: Path) -> None:
    federation = undercharged(tmp_path)
    done = CliRunner().invoke(agg.main, ["freeze", "--dir", str(federation.home.folder)])
    assert done.exit_code == ConfigError.exit_code
    assert f"error: federation.lock: releases: says that {FACT}; the coordinator must run" in done.output
    assert federation.status().state == "enrolling"


def test_a_server_does_not_start_on_a_frozen_lock_that_every_silo_would_refuse(tmp_path: Path) -> None:
    federation = undercharged(tmp_path)
    with federation.store() as store:  # as an older version froze it
        keys = {member.silo: member.public_key for member in store.members()}
        roster = Roster.of({**keys, AGGREGATOR: SigningKey.load(federation.home.signing_key).public_bytes})
        store.freeze(federation.home.contract().encode(), roster.encode())
    command = ["serve", "--dir", str(federation.home.folder), "--listen", f"127.0.0.1:{federation.port}"]
    done = CliRunner().invoke(agg.main, command)
    assert done.exit_code == ConfigError.exit_code
    assert f"error: federation.lock: releases: says that {FACT}; the coordinator must run" in done.output


def test_verify_says_that_a_release_is_not_charged(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(forged(tmp_path, one_too_few()))
    done = CliRunner().invoke(silo.main, ["verify", str(tmp_path / "report.json")], terminal_width=300)
    assert done.exit_code == 1
    assert f"FAILED mechanism: federation.lock: releases: says that {FACT}" in " ".join(done.output.split())


def test_the_tool_says_that_a_release_is_not_charged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = told_by_the_tool(forged(tmp_path, one_too_few()), capsys)
    assert f"FAILED  arithmetic: the lock says that {FACT}" in said


def test_a_method_of_the_future_is_refused_by_name_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agreed = contract(method={"name": "fedfuture"})
    with pytest.raises(ConfigError, match=r"a step of 'fedfuture' releases is unknown.*use a newer version"):
        PlannedRun.of(agreed)
    said = told_by_the_tool(forged(tmp_path, agreed), capsys)
    assert "what a step of fedfuture releases is unknown; use a newer verify_report.py" in said
