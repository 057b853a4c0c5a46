"""Contract and roster as a person accepted them: two digests in silo.yaml, and the documents themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedclip_secure.config.lock import Contract, differences
from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.config.yaml12 import replace_scalar
from fedclip_secure.disk import refused
from fedclip_secure.errors import DataError, FedClipError, TrustError
from fedclip_secure.files import write_atomically
from fedclip_secure.pki.identity import Identity
from fedclip_secure.pki.keys import spki_sha256
from fedclip_secure.pki.roster import Roster, readable_fingerprint

_ACCEPT = "run `fedclip-silo accept` to look at it and decide"


@dataclass(frozen=True, slots=True)
class Accepted:
    """What this silo has agreed to."""

    contract: Contract
    roster: Roster


def save_accepted(config_path: Path, config: SiloConfig, accepted: Accepted, text_features: bytes | None) -> None:
    """Keep the documents in the workdir, then their digests in silo.yaml, all else in it as it was.

    `text_features` is the file that an external model needs.

    Raises:
        DataError: a file cannot be written.
    """
    workdir = Path(config.workdir)
    try:
        workdir.mkdir(mode=0o700, parents=True, exist_ok=True)  # it will hold features of private images
        mode = config_path.stat().st_mode & 0o777
    except OSError as error:
        raise DataError(refused(error, workdir, "be made", "set another `workdir` in silo.yaml")) from error
    write_atomically(workdir / "contract.cbor", accepted.contract.encode())
    write_atomically(workdir / "roster.cbor", accepted.roster.encode())
    if text_features is not None:
        write_atomically(text_features_path(config), text_features)
    for key, pin in (("plan", accepted.contract.pin), ("roster", accepted.roster.pin)):
        write_atomically(config_path, replace_scalar(config_path, key, pin).encode(), mode)


def text_features_path(config: SiloConfig) -> Path:
    """Where `accept` puts the file of text features that an external model needs."""
    return Path(config.workdir) / "text_features.safetensors"


def load_accepted(config: SiloConfig) -> Accepted:
    """Read the documents and hold them against the pins.

    Raises:
        TrustError: nothing was accepted yet, or the documents are not the pinned ones.
    """
    workdir = Path(config.workdir)
    if config.plan is None or config.roster is None:
        raise TrustError(f"silo.yaml pins no plan and roster yet; {_ACCEPT}")
    contract_path, roster_path = workdir / "contract.cbor", workdir / "roster.cbor"
    contract_data, roster_data = _read(contract_path), _read(roster_path)
    try:
        contract, roster = Contract.decode(contract_data, str(contract_path)), Roster.decode(roster_data)
    except FedClipError as error:
        raise TrustError(f"{workdir}: contract.cbor or roster.cbor is damaged ({error}); {_ACCEPT}") from error
    if (contract.pin, roster.pin) != (config.plan, config.roster):
        raise TrustError(
            f"'{workdir}': holds another plan or roster than silo.yaml pins\n"
            f"  plan:   pinned {config.plan}, here {contract.pin}\n"
            f"  roster: pinned {config.roster}, here {roster.pin}\n{_ACCEPT}"
        )
    return Accepted(contract, roster)


def check_same(mine: Accepted, theirs: Accepted, server: str) -> None:
    """Refuse a server that runs another plan, lock or roster than was accepted.

    Raises:
        TrustError: names every key that differs, with both values side by side.
    """
    rows = differences(mine.contract, theirs.contract)
    left, right = dict(mine.roster.members), dict(theirs.roster.members)
    for name in sorted({*left, *right}):
        if left.get(name) != right.get(name):
            rows.append((f"roster: {name}", _key(mine.roster, name), _key(theirs.roster, name)))
    if rows:
        listed = "".join(f"\n  {key}\n    accepted here: {a}\n    server's:      {b}" for key, a, b in rows)
        raise TrustError(f"{server} runs another plan or roster than this silo accepted:{listed}\n{_ACCEPT}")


def check_own_key(roster: Roster, identity: Identity) -> None:
    """Refuse a roster that names another key for this silo than the one it signs with.

    Raises:
        TrustError: gives both fingerprints.
    """
    mine, name = spki_sha256(identity.key.public), identity.name
    if name in roster.silos and roster.spki_sha256(name) != mine:
        raise TrustError(
            f"the roster holds another key for {name} than {identity.folder} does: roster {roster.fingerprint(name)}, "
            f"here {readable_fingerprint(mine)}; restore the key that enrolled, or tell the coordinator"
        )


def _key(roster: Roster, name: str) -> str:
    return roster.fingerprint(name) if name in dict(roster.members) else "(absent)"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(refused(error, path, otherwise=_ACCEPT)) from error
