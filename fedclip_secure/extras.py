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
    pattern = re.compile(rf"""\s*;\s*extra\s*==\s*['"]{extra}['"]\s*$""")
    found = [pattern.sub("", line) for line in requires(_DISTRIBUTION) or () if pattern.search(line)]
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    return " ".join([python, "-m pip install", *(f'"{package}"' for package in found)])


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
    return f"the package {module!r} is not installed here; run `{install_command(_EXTRAS[module])}`"
