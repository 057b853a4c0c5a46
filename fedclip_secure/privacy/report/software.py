"""Which software made a report: versions, and one hash over this package's own code."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fedclip_secure


def software(libraries: Iterable[str]) -> dict[str, str]:
    """Versions of Python, of this package and of those `libraries` that are here, and the hash of the code."""
    found = {"python": platform.python_version(), "fedclip-secure": version("fedclip-secure"), "code": code_sha256()}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def code_sha256() -> str:
    """SHA-256 over the sorted lines `sha256  path` of every Python file of this package, as sha256sum prints them."""
    home = Path(fedclip_secure.__file__).parent
    files = sorted(home.rglob("*.py"), key=lambda path: path.relative_to(home).as_posix())
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(home).as_posix()}" for path in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
