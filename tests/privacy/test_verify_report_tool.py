from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dp_accounting.pld.privacy_loss_distribution import NeighborRel, from_gaussian_mechanism

from fedclip_secure.privacy.accounting.accountant import epsilon, epsilon_of_group
from fedclip_secure.privacy.accounting.events import Event
from fedclip_secure.privacy.accounting.rdp import rdp_epsilon
from fedclip_secure.privacy.report.document import Estimate, Limit
from fedclip_secure.privacy.report.silo_report import SiloFacts, report_body
from tests.privacy.reports import AUDIT, NOW, Site, body_of, plain_contract, replace
from tests.privacy.test_verify import EDITS
from tests.privacy.texts import texts
from tests.waiting import BOUND
from tools import verify_report

TOOL = Path(verify_report.__file__)
ALLOWED = {"cryptography", "cbor2", "dp_accounting", "numpy", "scipy"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def report(site: Site) -> bytes:
    facts = site.trained(rounds=5, crash_in=3, limit=Limit(epsilon=8.0, delta=1e-5))
    return site.signed(report_body(replace(facts, audit=AUDIT, prv=Estimate(library="opacus 1.6.0", epsilon=4.863))))


def run(folder: Path, data: bytes, *options: str) -> subprocess.CompletedProcess[str]:
    path = folder / "report.json"
    path.write_bytes(data)
    command = [sys.executable, "-I", str(TOOL), str(path), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=BOUND, check=False, cwd=folder)


def printed(data: bytes, capsys: pytest.CaptureFixture[str]) -> str:
    """What it says of a file, in this process."""
    out = verify_report.Printed()
    options = argparse.Namespace(plan=None, roster=None)
    value = out.check("canonical bytes", lambda: verify_report.parse(data))
    if value is not None:
        out.check("all checks were made", lambda: verify_report.check(out, value, options))
    return capsys.readouterr().out


def judged(data: bytes, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The names of the checks that failed."""
    lines = printed(data, capsys).splitlines()
    return [line.split(":")[0].removeprefix("FAILED").strip() for line in lines if line.startswith("FAILED")]


def test_it_shares_no_code_with_the_product() -> None:
    tree = ast.parse(TOOL.read_text("utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in names}
    assert roots - set(sys.stdlib_module_names) == ALLOWED


def test_it_knows_every_text_by_its_hash() -> None:
    assert texts() == verify_report.TEXTS, f"write these into TEXTS of {TOOL.name}: {json.dumps(texts(), indent=4)}"


def test_its_arithmetic_is_that_of_the_product() -> None:
    event = Event(1.0, 64 / 1200, 200)
    mine = verify_report.Event(1.0, 64 / 1200, 200)
    assert verify_report.epsilon(mine, 1e-5) == pytest.approx(epsilon([event], 1e-5), abs=2e-4)
    replaced = verify_report.epsilon(mine, 1e-5, replace=True)
    assert replaced == pytest.approx(epsilon([event], 1e-5, "replace_one"), abs=2e-4)
    for size in (2, 5, 10):
        theirs = epsilon_of_group([event], 1e-5, size)
        assert verify_report.epsilon(mine, 1e-5, size) == pytest.approx(theirs, rel=verify_report.SLACK / 2)
    assert verify_report.rdp(mine, 1e-5) == pytest.approx(rdp_epsilon([event], 1e-5), abs=1e-6)


def test_a_good_report_passes_as_a_process_and_shows_what_to_compare(site: Site, report: bytes, tmp_path: Path) -> None:
    done = run(tmp_path, report)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"compare plan: {site.agreed.pin}" in done.stdout
    assert "FAILED" not in done.stdout
    assert "no second ledger" in done.stdout
    pinned = run(tmp_path, report, "--plan", site.agreed.pin, "--roster", site.roster.pin)
    assert pinned.returncode == 0
    assert done.stdout.splitlines()[-1].endswith("report.json: consistent in itself; plan and roster not compared")
    assert pinned.stdout.splitlines()[-1].endswith("report.json: verified")
    assert "left out together with their receipts" in done.stdout


def test_an_edited_report_fails_as_a_process(site: Site, report: bytes, tmp_path: Path) -> None:
    done = run(tmp_path, report.replace(b"at least one", b"at least two") + b" ")
    assert done.returncode == 1
    assert "FAILED  canonical bytes" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("report.json: NOT verified")
    body = body_of(report)
    body["claim"]["epsilon"] = 0.5
    done = run(tmp_path, site.signed(body))
    assert done.returncode == 1
    assert "FAILED  arithmetic" in done.stdout
    assert done.stderr == ""


def test_another_pin_fails(site: Site, report: bytes, tmp_path: Path) -> None:
    done = run(tmp_path, report, "--plan", "sha256:" + "0" * 64)
    assert done.returncode == 1
    assert "FAILED  plan pin" in done.stdout


def test_the_federations_report_and_one_without_privacy_pass(
    site: Site, report: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judged(site.federation([report]), capsys) == []
    plain = Site(tmp_path, plain_contract())
    data = plain.signed(report_body(SiloFacts(plain.agreed, plain.roster, "oak", NOW)))
    assert judged(data, capsys) == []
    assert judged(plain.federation([data]), capsys) == []


def test_nothing_from_the_file_acts_on_the_terminal(report: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    nasty = "\x1b[2Jok\u202e\x07\r\n\u2028ver\u00effied"
    places: list[tuple[str | int, ...]] = [
        ("body", "silo"),
        ("body", "federation"),
        ("body", "kind"),
        ("body", "contract", "digest"),
        ("body", "roster", "members", 0, "name"),
        ("body", nasty),
        ("body", "ledger", "entries", 0, "entry", "kind"),
        ("signature", nasty),
    ]
    for place in places:
        value: Any = json.loads(report)
        inner = value
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = nasty
        said = printed(verify_report.canonical(value), capsys)
        assert "FAILED" in said
        assert re.fullmatch(r"[\n -~]+", said)


def test_names_that_are_words_of_the_sentences_are_no_obstacle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Site(tmp_path, silos=("a", "in", "nothing"))
    reports = [site.report(silo, rounds=1) for silo in site.silos]
    assert judged(site.federation(reports), capsys) == []


def test_a_plan_of_very_many_steps_is_judged_in_bounded_memory() -> None:
    code = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from tools import verify_report as tool
wide = tool.Event(1000.0, 1.0, 600_000)
print(tool.epsilon(wide, 1e-5), tool.epsilon(wide, 1e-5, 10), tool.epsilon(wide, 1e-5, replace=True))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TOOL.parents[1], capture_output=True, text=True, timeout=BOUND, check=True
    )
    assert done.stderr == ""
    event = Event(1000.0, 1.0, 600_000)
    wanted = epsilon([event], 1e-5), epsilon_of_group([event], 1e-5, 10), epsilon([event], 1e-5, "replace_one")
    assert [float(word) for word in done.stdout.split()] == pytest.approx(wanted, rel=2e-4)


@pytest.mark.parametrize("event", [(1.0, 64 / 1200, 200), (0.5, 0.2, 20), (3.0, 1.0, 1), (2.396, 0.5, 84)])
def test_its_distributions_are_those_of_the_library(event: tuple[float, float, int]) -> None:
    for relation, replaced in ((NeighborRel.ADD_OR_REMOVE_ONE, False), (NeighborRel.REPLACE_ONE, True)):
        sigma, rate, steps = event
        one = from_gaussian_mechanism(
            sigma, sampling_prob=rate, value_discretization_interval=1e-4, neighboring_relation=relation
        )
        found = verify_report.epsilon(verify_report.Event(*event), 1e-5, replace=replaced)
        assert found == pytest.approx(one.self_compose(steps).get_epsilon_for_delta(1e-5), abs=1e-4)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_signed_with_the_silos_key_fails(
    site: Site, report: bytes, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    body = body_of(report)
    edit: Callable[[Any, Site], None] = EDITS[name][1]
    edit(body, site)
    assert judged(site.signed(body), capsys)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"[" * 5000, b"1e999", b'{"body":1,"signature":2}'])
def test_hostile_bytes_fail_with_words(data: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    assert judged(data, capsys)
