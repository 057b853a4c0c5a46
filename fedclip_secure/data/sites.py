"""A folder of several sites, each a folder per class: `DIR/<site>/<class>/*`."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from fedclip_secure.data.classes import composed, some
from fedclip_secure.data.walk import is_housekeeping, subfolders, walk
from fedclip_secure.errors import ConfigError

_log = logging.getLogger(__name__)


def folders_in(folder: Path) -> list[Path]:
    """The folders in `folder` that people made, by name.

    Raises:
        ConfigError: it is no folder. DataError: it cannot be listed.
    """
    if not folder.is_dir():
        raise ConfigError(f"'{folder}': is not a folder")
    found = subfolders(folder)
    ours = [name for name in found if is_housekeeping(name)]
    if ours:
        _log.warning("'%s': taken for a system's own and passed over: %s; rename what is not", folder, some(ours))
    return [folder / name for name in found if name not in ours]


def classes_in(sites: Sequence[Path]) -> dict[str, str]:
    """All classes that any of the `sites` has a folder for, and the phrase that stands for each: folder: phrase."""
    names = {composed(kind.name) for site in sites for kind in folders_in(site)}
    return {name: name.replace("_", " ") for name in sorted(names)}


def absent_classes(site: Path, classes: Sequence[str]) -> list[str]:
    """Those of `classes` of which a site has no files.

    Raises:
        DataError: a folder cannot be listed.
    """
    folders = {composed(folder.name): folder for folder in folders_in(site)}
    return [kind for kind in classes if composed(kind) not in folders or not walk(folders[composed(kind)]).files]


def silo_name(site: str) -> str:
    """The folder's name `site` as certificates and rosters take it."""
    plain = re.sub(r"[^a-z0-9-]+", "-", site.lower()).strip("-")[:63]
    return plain or f"site-{hashlib.sha256(site.encode()).hexdigest()[:8]}"
