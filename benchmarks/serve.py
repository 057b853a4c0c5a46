"""How fast `fedclip-agg serve` answers and how much memory it takes, against their limits.

`python benchmarks/serve.py [--json]`: a fresh federation, the real program as a process; from its start to
the first answer over TLS, median of five; resident memory after 200 requests.
"""

from __future__ import annotations

import argparse
import json
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

READY_LIMIT = 1.0  # seconds
MEMORY_LIMIT = 150.0  # MB
_BIN = Path(sys.executable).parent
_PORT = 18743


def measure(folder: Path) -> tuple[float, float]:
    """Seconds to the first answer, and megabytes resident after 200 more."""
    context = ssl.create_default_context(cafile=str(folder / "authority" / "authority.pem"))
    address = f"https://localhost:{_PORT}/v1/authority"
    began = time.perf_counter()
    command = [_BIN / "fedclip-agg", "serve", "--dir", str(folder), "--listen", f"127.0.0.1:{_PORT}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:  # noqa: S603
        try:
            while not _answers(address, context):
                time.sleep(0.005)
            ready = time.perf_counter() - began
            for _ in range(200):
                _answers(address, context)
            status = Path(f"/proc/{server.pid}/status").read_text("utf-8").splitlines()
            resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        finally:
            server.terminate()
    return ready, resident / 1000


def _answers(address: str, context: ssl.SSLContext) -> bool:
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=5) as answer:
            return answer.status == 200
    except URLError:
        return False


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "federation")
        init = [
            _BIN / "fedclip-agg",
            "init",
            str(folder),
            "--name",
            "bench",
            "--hosts",
            "localhost",
            "--port",
            str(_PORT),
        ]
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
        runs = [measure(folder) for _ in range(5)]
    ready, resident = statistics.median(r for r, _ in runs), max(m for _, m in runs)
    if options.json:
        figures = {
            "ready_seconds": ready,
            "resident_mb": resident,
            "ready_over_limit": ready / READY_LIMIT,
            "memory_over_limit": resident / MEMORY_LIMIT,
        }
        print(json.dumps(figures))
    else:
        print(f"first answer after {ready:.2f} s (limit {READY_LIMIT:g} s): {ready / READY_LIMIT:.2f} of it")
        print(f"resident {resident:.0f} MB (limit {MEMORY_LIMIT:g} MB): {resident / MEMORY_LIMIT:.2f} of it")


if __name__ == "__main__":
    main()
