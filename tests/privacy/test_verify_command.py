from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner
from fedclip_cli import silo

from fedclip_secure.privacy.report import report_body
from tests.privacy.reports import AUDIT, Site, replace


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


def test_an_audit_is_said_to_be_the_silos_word(tmp_path: Path) -> None:
    site, path = Site(tmp_path), tmp_path / "report.json"
    path.write_bytes(site.signed(report_body(replace(site.trained(rounds=1), audit=AUDIT))))
    done = CliRunner().invoke(silo.main, ["verify", str(path)], terminal_width=200)
    said = " ".join(done.output.split())
    assert done.exit_code == 0
    assert "that its tests were run, and what came of them, is the silo's word" in said
    assert "that the tests of the mechanism were run: the silo says so" in said
