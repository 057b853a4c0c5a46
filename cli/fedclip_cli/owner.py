"""Who may run what writes: not root, in a folder of another user, who could not use what root leaves there."""

from __future__ import annotations

import os
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

from fedclip_secure.config.silo import SiloConfig, read_silo
from fedclip_secure.disk import owner_of, owner_of_new, user_name
from fedclip_secure.errors import ConfigError


def check_owner(*folders: Path) -> None:
    """Refuse root in those of `folders` that are there and belong to somebody else.

    Raises:
        ConfigError: names the folder, its user, and the command as that user.
    """
    for folder in folders if os.geteuid() == 0 else ():
        owner = owner_of(folder) if folder.exists() else 0
        if owner and owner_of_new(folder) != owner:  # a share that makes them alike keeps nobody out
            raise ConfigError(
                f"'{folder}': belongs to user '{user_name(owner)}', who could not use what root writes there; run it "
                f"as that user: {_as_user(owner, folder.stat().st_gid)}"
            )


def _as_user(owner: int, group: int) -> str:
    user, command = user_name(owner), _typed()
    if user != f"#{owner}":
        return f"sudo -u {shlex.quote(user)} {command}"
    return (
        f"in a container `docker run --user {owner}:{group}`, else `setpriv --reuid {owner} --regid {group} "
        f"--clear-groups {command}`"
    )


def _typed() -> str:
    """The command once more. By its whole path, for sudo has a PATH of its own; without a token, which is a secret."""
    words = [
        "TOKEN" if before == "--token" else re.sub(r"^--token=.*", "--token=TOKEN", word, flags=re.DOTALL)
        for before, word in pairwise(sys.argv)
    ]
    return shlex.join([str(Path(sys.argv[0]).absolute()), *words])


def settings(path: Path) -> SiloConfig:
    """Read `silo.yaml`, for a command that may write into any of its folders.

    Raises:
        ConfigError: as `read_silo` and `check_owner`.
    """
    check_owner(path.absolute().parent)
    config = read_silo(path)
    check_owner(Path(config.identity), Path(config.workdir), Path(config.ledger))
    return config
