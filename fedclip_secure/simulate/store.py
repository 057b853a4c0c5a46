"""Finished cells on the disk, each a file named by the digest of all that decides it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedclip_secure import canonical
from fedclip_secure.disk import refused
from fedclip_secure.errors import DataError
from fedclip_secure.files import write_atomically
from fedclip_secure.simulate.figures import Figures

_log = logging.getLogger(__name__)


def path_of(out: Path, digest: str) -> Path:
    """Where the cell of this digest lies."""
    return out / "cells" / f"{digest}.json"


def save(out: Path, digest: str, about: dict[str, Any], figures: Figures) -> None:
    """Write a finished cell, with what it is `about` for people, all of it or nothing.

    Raises:
        DataError: the disk refuses.
    """
    found = figures.model_dump(mode="json")
    text = json.dumps({"sha256": _checksum(digest, found), "about": about, "figures": found}, indent=1)
    write_atomically(path_of(out, digest), f"{text}\n".encode())


def load(out: Path, digest: str) -> Figures | None:
    """A finished cell; None where it is not there, or damaged, which is told."""
    path = path_of(out, digest)
    try:
        data = json.loads(path.read_bytes())
        if data["sha256"] == _checksum(digest, data["figures"]):
            return Figures.model_validate_json(json.dumps(data["figures"]))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(refused(error, path)) from error
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError):
        pass
    _log.warning("'%s': is damaged; its cell is run again", path)
    return None


def _checksum(digest: str, figures: Any) -> str:
    return canonical.digest("fedclip/v1/figures", digest, figures).hex()
