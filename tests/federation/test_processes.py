"""Four silos and a coordinator as processes, real certificates, real TLS, real images; one silo is killed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fedclip_secure.aggregator.home import Home
from fedclip_secure.config.lock import Contract
from fedclip_secure.pki.roster import Roster
from fedclip_secure.secagg.terms import Terms
from tests.federation.probe import PAUSED
from tests.federation.processes import BIN, ROOT, free_port, run, start
from tests.waiting import BOUND, wait_for

SITES = {"art": "art_painting", "cartoon": "cartoon", "photo": "photo", "sketch": "sketch"}
VICTIM = "sketch"
# The victim is waited for at one upload, and at each joining until it was not heard of for a minute.
DEADLINES = "deadlines: {join: 5s, share: 10m, upload: 20s, agree: 10m, unmask: 10m}"


@dataclass(frozen=True)
class FinishedRun:
    folder: Path
    status: dict[str, object]
    terms: Terms
    server_ready: float  # seconds from the start of the process to the first answer
    server_memory: float  # MB resident at its peak

    def rounds(self) -> list[dict[str, object]]:
        finished = self.status["finished_rounds"]
        assert isinstance(finished, list)
        return finished

    def dump(self, silo: str, round_number: object) -> dict[str, npt.NDArray[np.float64]]:
        with np.load(self.folder / silo / f"round-{round_number}.npz") as file:
            return dict(file)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, random_tower: Path, pacs_mini: Path) -> Iterator[FinishedRun]:
    folder = tmp_path_factory.mktemp("federation")
    port = free_port()
    server_url = f"https://localhost:{port}"
    run(BIN / "fedclip-agg", "init", "fed", "--name", "pacs", "--hosts", "localhost", "--port", str(port), cwd=folder)
    for name in ("tower.json", "tower.safetensors"):
        (folder / "fed" / name).write_bytes((random_tower / name).read_bytes())
    plan = (ROOT / "silo_configs" / "walkthrough.yaml").read_text().replace("https://localhost:8443", server_url)
    (folder / "fed" / "federation.yaml").write_text(re.sub("^deadlines: .*", DEADLINES, plan, flags=re.MULTILINE))
    run(BIN / "fedclip-agg", "prepare", "--dir", "fed", cwd=folder)
    processes: dict[str, subprocess.Popen[str]] = {}
    try:
        began = time.monotonic()
        processes["serve"] = start(
            BIN / "fedclip-agg", "serve", "--dir", "fed", "--listen", f"127.0.0.1:{port}",
            cwd=folder, log=folder / "serve.log",
        )  # fmt: skip
        wait_for("serving", lambda: "serving" in (folder / "serve.log").read_text(), processes["serve"])
        ready = time.monotonic() - began
        for silo, domain in SITES.items():
            (folder / silo).mkdir()
            token = run(BIN / "fedclip-agg", "invite", silo, "--dir", "fed", "--token-only", cwd=folder).strip()
            run(
                BIN / "fedclip-silo", "enroll", server_url, "--token", token, "--images", pacs_mini / domain,
                "--weights", "../fed/tower.safetensors", cwd=folder / silo,
            )  # fmt: skip
        run(BIN / "fedclip-agg", "freeze", "--dir", "fed", cwd=folder)
        for silo in SITES:
            run(BIN / "fedclip-silo", "accept", "--yes", cwd=folder / silo)
            pause = ["--pause-from", "2"] if silo == VICTIM else []
            processes[silo] = start(
                sys.executable, "-m", "tests.federation.probe", "silo.yaml", ".", *pause,
                cwd=folder / silo, log=folder / f"{silo}.log",
            )  # fmt: skip
        wait_for("the victim's pause", (folder / VICTIM / PAUSED).exists, processes[VICTIM])
        processes[VICTIM].kill()  # SIGKILL, after its shares went out and before its upload
        for silo in set(SITES) - {VICTIM}:
            assert processes[silo].wait(timeout=BOUND) == 0, (folder / f"{silo}.log").read_text()
        status = json.loads(run(BIN / "fedclip-agg", "status", "--dir", "fed", "--json", cwd=folder))
        memory = peak_memory(processes["serve"].pid)
        store = Home(folder / "fed").store()
        frozen = store.frozen()
        store.close()
        assert frozen is not None
        terms = Terms.of(Contract.decode(frozen[0], "test"), Roster.decode(frozen[1]))
        yield FinishedRun(folder, status, terms, ready, memory)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def peak_memory(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000


def test_the_run_finishes_without_the_silo_that_was_killed(finished: FinishedRun) -> None:
    assert finished.status["state"] == "finished"
    assert [row["round"] for row in finished.rounds()] == [1, 2, 3, 4, 5, 6]
    killed_in = int((finished.folder / VICTIM / PAUSED).read_text())
    for row in finished.rounds():
        survivors = row["survivors"]
        assert isinstance(survivors, list)
        if row["attempt"] >= killed_in:  # type: ignore[operator]
            assert VICTIM not in survivors
        assert len(survivors) >= 3
    events = finished.status["events"]
    assert isinstance(events, list)
    assert any(event["silo"] == VICTIM and event["stage"] == "upload" for event in events)


def test_the_integer_sum_is_exact_and_the_mean_within_its_bound(finished: FinishedRun) -> None:
    grid, d = finished.terms.grid, finished.terms.layout.size
    for row in finished.rounds():
        survivors = row["survivors"]
        assert isinstance(survivors, list)
        dumps = {silo: finished.dump(silo, row["round"]) for silo in survivors}
        total = np.load(finished.folder / survivors[0] / f"sum-{row['attempt']}.npy").view(np.int32).astype(np.int64)
        integers = np.stack([dump["integers"].view(np.int32) for dump in dumps.values()]).astype(np.int64)
        assert (integers.sum(axis=0) == total).all()

        weights = {silo: float(dump["integers"][d]) for silo, dump in dumps.items()}
        weighted = [weights[silo] * np.clip(dumps[silo]["update"], -grid.clip, grid.clip) for silo in survivors]
        mean = np.sum(weighted, axis=0) / sum(weights.values())
        error = np.abs(grid.mean(total[:d], int(sum(weights.values()))) - mean).max()
        assert error <= grid.error_bound(len(survivors), int(sum(weights.values())))


def test_every_silo_ends_with_the_same_adapters(finished: FinishedRun) -> None:
    for kind in ("best", "last"):
        files = {
            (finished.folder / silo / "work" / "adapters" / f"{kind}.safetensors").read_bytes()
            for silo in set(SITES) - {VICTIM}
        }
        assert len(files) == 1
    card = json.loads((finished.folder / "art" / "work" / "adapters" / "last.json").read_text())
    assert card["after_round"] == 5
    assert card["model_digest"] == finished.rounds()[-1]["model"]


def test_the_next_round_starts_from_the_mean_bit_for_bit(finished: FinishedRun) -> None:
    d = finished.terms.layout.size
    for before, after in zip(finished.rounds(), finished.rounds()[1:], strict=False):
        silo = next(name for name in after["survivors"] if name in before["survivors"])  # type: ignore[attr-defined, operator]
        total = np.load(finished.folder / silo / f"sum-{before['attempt']}.npy").view(np.int32).astype(np.int64)
        old = finished.dump(silo, before["round"])["old"]
        mean = finished.terms.grid.mean(total[:d], int(total[d]))
        expected = (old.astype(np.float64) + mean).astype(np.float32)
        assert (finished.dump(silo, after["round"])["old"] == expected).all()


def test_the_server_stays_small(finished: FinishedRun) -> None:
    assert finished.server_memory < 150  # MB
