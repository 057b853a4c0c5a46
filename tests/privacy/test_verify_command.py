from __future__ import annotations

import html
import json
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner
from fedclip_cli import silo

from fedclip_secure.privacy.page.page import render_page
from fedclip_secure.privacy.report.silo_report import report_body
from tests.privacy.reports import AUDIT, Site, replace
from tools import verify_report


def test_only_a_report_that_was_compared_with_both_pins_is_called_verified(tmp_path: Path) -> None:
    site, path = Site(tmp_path), tmp_path / "report.json"
    path.write_bytes(site.report(rounds=1))

    def last_words(*options: str) -> tuple[int, str]:
        done = CliRunner().invoke(silo.main, ["verify", str(path), *options], terminal_width=200)
        return done.exit_code, " ".join(done.output.split()).rpartition("report.json: ")[2]

    both = ("--plan", site.agreed.pin, "--roster", site.roster.pin)
    assert last_words(*both) == (0, "verified")
    assert last_words() == (0, "consistent in itself; plan and roster not compared")
    assert last_words(*both[:2]) == (0, "consistent in itself; roster not compared")
    assert last_words("--plan", "sha256:" + "0" * 64) == (1, "NOT verified")
    assert last_words(*(as_the_page_has_it(word) for word in both)) == (0, "verified")
    assert (
        last_words(*(word.removeprefix("sha256:").upper() if ":" in word else word for word in both))[1] == "verified"
    )
    done = CliRunner().invoke(silo.main, ["verify", str(path), "--plan", site.agreed.pin[:-1]], terminal_width=200)
    assert done.exit_code == 2
    assert "is no pin; a pin has 64 digits of 0-9 and a-f, after sha256: or alone" in " ".join(done.output.split())


def as_the_page_has_it(word: str) -> str:
    """A pin in groups."""
    head, colon, digits = word.partition(":")
    return f"{head}{colon} {' '.join(digits[i : i + 4] for i in range(0, 64, 4))}" if colon else word


def test_json_says_which_pins_were_compared(tmp_path: Path) -> None:
    site, path = Site(tmp_path), tmp_path / "report.json"
    path.write_bytes(site.report(rounds=1))
    for options, plan in (((), False), (("--plan", site.agreed.pin), True)):
        done = CliRunner().invoke(silo.main, ["verify", str(path), "--json", *options])
        assert json.loads(done.output)["compared"] == {"plan": plan, "roster": False}


def test_an_audit_is_said_to_be_the_silos_word(tmp_path: Path) -> None:
    site, path = Site(tmp_path), tmp_path / "report.json"
    path.write_bytes(site.signed(report_body(replace(site.trained(rounds=1), audit=AUDIT))))
    done = CliRunner().invoke(silo.main, ["verify", str(path)], terminal_width=200)
    said = " ".join(done.output.split())
    assert done.exit_code == 0
    assert "that its tests were run, and what came of them, is the silo's word" in said
    assert "that the tests of the mechanism were run: the silo says so" in said


FAILED = AUDIT.model_copy(
    update={
        "self_tests": [
            *AUDIT.self_tests[:4],
            AUDIT.self_tests[4].model_copy(update={"passed": False}),
            *AUDIT.self_tests[5:],
        ]
    }
)


def test_a_test_that_failed_is_told_in_the_last_lines_wherever_its_report_goes(tmp_path: Path) -> None:
    site, path = Site(tmp_path), tmp_path / "report.json"
    facts = site.trained(rounds=1)
    mine, other = site.signed(report_body(replace(facts, audit=FAILED))), site.trained("birch", rounds=1)
    both = [mine, site.signed(report_body(other), "birch")]
    name = AUDIT.self_tests[4].name
    for data in (mine, site.federation(both, [facts.receipts[-1], other.receipts[-1]])):
        path.write_bytes(data)
        flag = f"<strong>Tests of the mechanism failed on a silo's own machine:</strong> {name} at oak. Do not rely"
        assert flag in html.unescape(render_page(data))
        done = CliRunner().invoke(silo.main, ["verify", str(path)], terminal_width=200)
        last = " ".join(done.output.split())
        assert done.exit_code == 0
        assert f"FAILED on a silo's own machine: {name} at oak do not rely on the claim" in last
        assert last.endswith("plan and roster not compared; but tests of the mechanism FAILED")
        tool = subprocess.run(
            [sys.executable, "-I", verify_report.__file__, path], capture_output=True, text=True, check=False
        )
        assert (
            f"FAILED on a silo's own machine: {name} at oak; do not rely on the claim" in tool.stdout.splitlines()[-2]
        )
        assert tool.stdout.endswith("; but tests of the mechanism FAILED\n")
        found = json.loads(CliRunner().invoke(silo.main, ["verify", str(path), "--json"]).output)
        assert found["failed_tests"] == [f"{name} at oak"]
        assert any("A test on the silo's machine failed" in line for line in found["open"])


def test_what_a_report_leaves_open_is_listed_with_its_silos(tmp_path: Path) -> None:
    site, path = Site(tmp_path), tmp_path / "report.json"
    facts = {name: site.trained(name, rounds=1) for name in ("birch", "oak")}
    reports = [site.signed(report_body(made), name) for name, made in facts.items()]
    path.write_bytes(site.federation(reports, [made.receipts[-1] for made in facts.values()]))
    said = " ".join(CliRunner().invoke(silo.main, ["verify", str(path)], terminal_width=200).output.split())
    assert "- birch, oak: A person has one record? The unit is a record." in said.partition("left open, as it says")[2]
    assert "oak: plan pin: it is that of the federation's report" in said
