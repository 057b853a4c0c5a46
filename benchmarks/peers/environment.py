"""An environment of its own for a peer, and a process in it that answers requests."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from types import TracebackType
from typing import Any

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"
_FLOWER = Path(__file__).with_name("flower.py")


def interpreter() -> Path:
    """A Python that has what the extra `bench` of pyproject.toml names, made when there is none yet.

    Apart from the project's own environment, because Flower would lower the versions of packages there (rich,
    packaging) and holds `cryptography` under a major version that the project will want to leave before it. So
    `make bench` is enough on a fresh machine, and changes nothing that the tests run with.
    """
    wanted = tomllib.loads(_PROJECT.read_text("utf-8"))["project"]["optional-dependencies"]["bench"]
    named = hashlib.sha256(repr((wanted, sys.version_info[:2], sys.base_prefix)).encode()).hexdigest()[:16]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "fedclip-secure" / f"bench-{named}"
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        print(f"installing {', '.join(wanted)} into {folder}, once; a minute or so", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        install = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *wanted]
        if subprocess.run(install, check=False).returncode:  # noqa: S603
            sys.exit(f"{', '.join(wanted)} cannot be installed: this benchmark needs the package registry once")
        complete.touch()
    return python


class Flower:
    """Flower's SecAgg+ in a process of its own: `flower("mask")` is the operation `mask` of `flower.py`."""

    def __enter__(self) -> Flower:
        self._process = subprocess.Popen(  # noqa: S603
            [interpreter(), _FLOWER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0"},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # the end of its stdin ends it

    def __call__(self, operation: str, **arguments: int | str) -> Any:
        """Have it do one operation; its answer."""
        assert self._process.stdin is not None  # noqa: S101 - both are pipes
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdin.write(json.dumps([operation, arguments]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit("Flower's process has ended; what it wrote above says why")
        return json.loads(answer)
