"""The demo as a person runs it: the program, its processes, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.federation.processes import BIN, ENVIRONMENT, run
from tests.waiting import BOUND, wait_for


def children(pid: int) -> list[int]:
    """Every process below `pid`."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            child = int(status.parent.name)
            found += [child, *children(child)]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_demo_ends_with_one_object_that_says_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "https_proxy", "http://127.0.0.1:9")  # nothing listens there
    printed = run(BIN / "fedclip-agg", "demo", "--rounds", "2", "--out", "out", "--json", cwd=tmp_path)
    found = json.loads(printed.splitlines()[-1])
    assert (found["federation"], found["rounds_completed"], found["masked"]) == ("demo", 2, True)
    assert found["encoder"] == "fedclip-tiny"
    assert found["silos"] == ["birch", "cedar", "maple", "oak"]
    assert (found["unseen"], found["dropped"], found["epsilon"], found["reports"]) == ("willow", [], None, [])
    labs = {*found["silos"], "willow"}
    assert set(found["accuracy"]["zero_shot"]) == set(found["accuracy"]["federated"]) == labs
    assert set(found["accuracy"]["local_only"]) == set(found["accuracy"]["local_only_at_unseen"]) == set(found["silos"])
    assert found["update_bytes"] > 4 * found["parameters"]
    adapter = tmp_path / "out" / "silos" / "birch" / "work" / "adapters" / "last.json"
    assert json.loads(adapter.read_text())["model_digest"] == found["model_digest"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_stopped_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    with (tmp_path / "demo.log").open("w") as log:
        demo = subprocess.Popen(
            [BIN / "fedclip-agg", "demo", "--out", "out"], cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log
        )
    try:
        wait_for("the silos' start", lambda: len(children(demo.pid)) >= 5, demo)
        started = children(demo.pid)
        os.kill(demo.pid, number)
        assert demo.wait(timeout=BOUND) == 130
        wait_for("the silos' end", lambda: not any(map(alive, started)))
        assert "Traceback" not in (tmp_path / "demo.log").read_text()
        assert "stopped; no process runs on" in (tmp_path / "demo.log").read_text()
    finally:
        demo.kill()
        demo.wait()


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    done = subprocess.run(
        [BIN / "fedclip-agg", "demo", "--out", "out"],
        cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True, timeout=BOUND, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "--out out: is not an empty folder; choose another" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.long
def test_one_silo_is_killed_and_the_others_finish(tmp_path: Path, pacs_mini: Path) -> None:
    printed = run(
        BIN / "fedclip-agg", "demo", "--data", pacs_mini, "--kill-one", "--rounds", "3", "--out", "out", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    found = json.loads(printed.splitlines()[-1])
    assert found["rounds_completed"] == 3
    assert [drop["silo"] for drop in found["dropped"]] == ["sketch"]


@pytest.mark.long
@pytest.mark.parametrize("method", ["fedapt", "feddat", "discriminant"])
def test_other_methods_are_trained_and_measured_at_every_lab(tmp_path: Path, method: str) -> None:
    rounds = [] if method == "discriminant" else ["--rounds", "2"]
    printed = run(BIN / "fedclip-agg", "demo", "--method", method, *rounds, "--out", "out", "--json", cwd=tmp_path)
    found = json.loads(printed.splitlines()[-1])
    assert found["rounds_completed"] == (1 if method == "discriminant" else 2)
    for kind in ("zero_shot", "local_only", "federated", "local_only_at_unseen"):
        assert all(0 < share <= 1 for share in found["accuracy"][kind].values())
    assert found["accuracy"]["federated"]["willow"] != found["accuracy"]["zero_shot"]["willow"]
