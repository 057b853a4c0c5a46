"""A ledger in a folder, opened as often as a test likes, and terms and units to open runs with."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclip_secure.pki.keys import SigningKey
from fedclip_secure.privacy.ledger.ledger import Ledger
from fedclip_secure.privacy.ledger.run_terms import RunTerms

START = 1_800_000_000  # seconds since 1970
KEYS = {silo: SigningKey(Ed25519PrivateKey.generate()) for silo in ("lab-a", "lab-b")}  # two identities of one house
TERMS = RunTerms(
    federation="pets",
    plan=b"p" * 32,
    roster=b"r" * 32,
    unit="record",
    noise_multiplier=20.0,
    sample_rate=1.0,  # a plain Gaussian: how many rounds fit is continuous in the epsilon of the cap
    steps_per_round=20,
    releases=1,
    rounds=3,
    max_retrains=1,
    max_grad_norm=1.0,
    update_divisor=64.0,
    delta=1e-5,
    features="computed here",
    code="0c" * 32,
)


def terms(**changed: Any) -> RunTerms:
    """Those above, with some changed. `plan` may be a number."""
    if isinstance(changed.get("plan"), int):
        changed["plan"] = changed["plan"].to_bytes(32, "big")
    return dataclasses.replace(TERMS, **changed)


def units(numbers: Iterable[int]) -> list[bytes]:
    return [hashlib.sha256(b"unit %d" % number).digest() for number in numbers]


class Books:
    """Opens one ledger after another over one folder; the clock stands at `now`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now, self._opened = folder, float(START), list[Ledger]()

    def __enter__(self) -> Books:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def database(self) -> Path:
        return self.folder / "ledger.sqlite"

    @property
    def key(self) -> Path:
        return self.folder / "units.key"

    def open(self, silo: str = "lab-a") -> Ledger:
        """As a process that starts; one that was open before has ended."""
        self.close()
        key = KEYS[silo]
        ledger = Ledger(self.folder, silo, key.sign, key.public_bytes, clock=lambda: self.now)
        self._opened.append(ledger)
        return ledger

    def close(self) -> None:
        while self._opened:
            self._opened.pop().close()

    def files(self) -> dict[str, bytes]:
        """All that lies in the folder."""
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}
