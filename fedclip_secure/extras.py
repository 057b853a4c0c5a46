"""Packages of the extras, which an installation may lack: what is said then.

The command that installs an extra names the packages it consists of, as this installation's own metadata list them,
and never this package: so it is right wherever this was installed from, and nobody can be installed by it who has
taken this package's name in an index.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import requires
from importlib.util import find_spec

from fedclip_secure.errors import ConfigError

_DISTRIBUTION = "fedclip-secure"
_EXTRAS = {  # of top-level modules: those of the packages that pyproject.toml lists, and what open_clip brings
    "PIL": "silo",
    "huggingface_hub": "silo",
    "open_clip": "silo",
    "opacus": "silo",
    "timm": "silo",
    "torch": "silo",
    "torchvision": "silo",
    "pydicom": "dicom",
    "transformers": "transformers",
}


def install_command(extra: str) -> str:
    """What installs the packages of `extra` beside this program, as shells of POSIX systems and of Windows read it."""
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    return " ".join([python, "-m pip install", *(f'"{package}"' for package in _packages(extra))])


def _packages(extra: str) -> list[str]:
    """The requirements of `extra`, each with the rest of its marker; in single quotes, to stand in double ones."""
    of_extra = re.compile(rf"""(\s*;|\s+and)\s+\(?extra\s*==\s*['"]{extra}['"]\)?\s*$""")
    listed = [line for line in requires(_DISTRIBUTION) or () if of_extra.search(line)]
    return [of_extra.sub("", line).replace('"', "'") for line in listed]


def lacking(error: ImportError) -> str | None:
    """Which package of an extra `error` misses, and the command that installs it; None where it misses none."""
    module = (error.name or "").partition(".")[0]
    return _remedy(module) if isinstance(error, ModuleNotFoundError) and module in _EXTRAS else None


def check_installed(extra: str, what: str) -> None:
    """Look for the packages of `extra` before anything is begun that would need them; imports none.

    Raises:
        ConfigError: `what` needs one that is missing.
    """
    for module, of in _EXTRAS.items():
        if of == extra and find_spec(module) is None:
            raise ConfigError(f"{what}: {_remedy(module)}")


def _remedy(module: str) -> str:
    missing, extra = f"the package {module!r} is not installed here", _EXTRAS[module]
    if not _packages(extra):
        return f"{missing}; install this program again from where it came from, with its extra `{extra}`"
    return f"{missing}; run `{install_command(extra)}`"
