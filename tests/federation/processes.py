"""Real processes for tests: the installed programs, with the interpreter that runs the tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.waiting import BOUND

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")},
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}",
    "OMP_NUM_THREADS": "1",  # four silos share two cores
    "NO_COLOR": "1",
}


def run(*arguments: str | Path, cwd: Path) -> str:
    """Run a program to its end; its standard output. It must succeed."""
    done = subprocess.run(
        list(map(str, arguments)),
        cwd=cwd,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=BOUND,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def start(*arguments: str | Path, cwd: Path, log: Path) -> subprocess.Popen[str]:
    """Start a program; all it prints goes to `log`."""
    with log.open("w") as file:
        return subprocess.Popen(
            list(map(str, arguments)), cwd=cwd, env=ENVIRONMENT, text=True, stdout=file, stderr=subprocess.STDOUT
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
