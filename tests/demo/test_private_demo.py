"""`demo --dp` as a person runs it: what it promises, the reports that it leaves, and what can be done with them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.federation.processes import BIN, ENVIRONMENT, run
from tests.waiting import BOUND

TOOL = Path(__file__).parents[2] / "tools" / "verify_report.py"
LABS = ["birch", "cedar", "maple", "oak"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("demo")
    command = (BIN / "fedclip-agg", "demo", "--dp", "--rounds", "2", "--out", "out", "--json")
    printed = run(*command, cwd=folder)
    assert "Traceback" not in printed
    return folder / "out", json.loads(printed.splitlines()[-1])


def refused(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=BOUND,
        check=False,
    )


def test_it_ends_with_epsilon_and_a_report_for_each_lab_and_one_for_the_federation(
    demo: tuple[Path, dict[str, Any]],
) -> None:
    folder, found = demo
    assert set(found["epsilon"]) == set(LABS)
    assert all(3.9 < epsilon <= 4.0 for epsilon in found["epsilon"].values())
    paths = [Path(path) for path in found["reports"]]
    assert len(paths) == 5
    assert found["rounds_completed"] == 2
    for path in paths:
        full = folder.parent / path
        assert "consistent in itself" in run(BIN / "fedclip-silo", "verify", full, cwd=folder)
        assert full.with_suffix(".html").is_file()


def test_a_program_that_shares_no_code_verifies_them_too_and_refuses_an_edited_one(
    demo: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, found = demo
    paths = [folder.parent / path for path in found["reports"]]
    for path in (paths[0], paths[-1]):
        assert refused(sys.executable, TOOL, path, cwd=tmp_path).returncode == 0
    edited = tmp_path / "edited.json"
    edited.write_bytes(paths[0].read_bytes().replace(b'"epsilon":', b'"epsilon": ', 1))
    for verifier in ((BIN / "fedclip-silo", "verify"), (sys.executable, TOOL)):
        done = refused(*verifier, edited, cwd=tmp_path)
        assert done.returncode == 1
        assert "Traceback" not in done.stdout + done.stderr


def test_the_budget_shows_what_the_run_spent_and_what_is_left(demo: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = demo
    lab = folder / "silos" / "oak"
    spent = json.loads(run(BIN / "fedclip-silo", "budget", "--json", cwd=lab).splitlines()[-1])
    (one,) = spent["runs"]
    assert (one["federation"], one["trained"], one["retrains"], one["without_result"]) == ("demo", [1, 2], 0, 0)
    assert 0 < one["epsilon"] < one["epsilon_at_most"] <= 4.0
    assert spent["lifetime"]["cap_epsilon"] == 8.0
    assert 0 < spent["lifetime"]["share"] < spent["lifetime"]["epsilon"] / 8 < 1
    assert re.search(
        r"has spent [0-9.]+ % of the limit's budget \(epsilon [0-9.]+ of 8, delta 1e-05\)",
        run(BIN / "fedclip-silo", "budget", cwd=lab),
    )


def test_a_report_can_be_made_again_and_holds_the_audit(demo: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = demo
    lab = folder / "silos" / "cedar"
    printed = run(BIN / "fedclip-silo", "report", "--out", "again", cwd=lab)
    assert "signed by cedar" in printed
    body = json.loads((lab / "again" / "report.json").read_text())["body"]
    assert all(test["passed"] for test in body["audit"]["self_tests"])
    assert body["audit"]["attack"]["epsilon_at_least"] <= body["claim"]["epsilon"]
    assert len(body["models"]) == 2
    assert (body["ledger"]["uploaded"], len(body["ledger"]["receipts"])) == ([1, 2], 2)


def test_the_coordinator_names_who_did_not_report_and_takes_no_edited_report(
    demo: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = demo
    reports = [folder / "silos" / lab / "work" / "report" / "report.json" for lab in LABS]
    printed = run(
        BIN / "fedclip-agg",
        "report",
        "--dir",
        folder / "coordinator",
        "--out",
        tmp_path / "out",
        *reports[:3],
        cwd=tmp_path,
    )
    assert "without the reports of oak: ask them for `fedclip-silo report`" in printed
    body = json.loads((tmp_path / "out" / "report.json").read_text())["body"]
    assert {entry["silo"]: entry["reported"] for entry in body["silos"]} == {lab: lab != "oak" for lab in LABS}
    edited = tmp_path / "edited.json"
    shutil.copy(reports[3], edited)
    edited.write_bytes(edited.read_bytes().replace(b'"trained":[1,2]', b'"trained":[1,1]', 1))
    done = refused(BIN / "fedclip-agg", "report", "--dir", folder / "coordinator", edited, cwd=tmp_path)
    assert done.returncode == 1
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr
