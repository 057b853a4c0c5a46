"""The adapters that a silo has: the global ones, its own, and files from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedclip_secure.errors import ConfigError
from fedclip_secure.export.adapter_facts import Facts, read_facts
from fedclip_secure.model.state import AdapterState
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.run.final_models import adapter_folder, load_adapter

GLOBAL = ("best", "last")
PERSONAL = "personal"
_NAMES = (*GLOBAL, PERSONAL)


@dataclass(frozen=True, slots=True)
class Chosen:
    """An adapter that a person named; `own`: it is one of the workdir's."""

    name: str
    path: Path
    state: AdapterState
    own: bool

    def facts(self) -> Facts:
        """What its card says; of a file from elsewhere without a card, next to nothing is known.

        Raises:
            DataError: the card is damaged, or another adapter's; or one of the workdir's has none.
        """
        if self.own or self.path.with_suffix(".json").exists():
            return read_facts(self.path, self.state)
        return Facts(self.name, None, self.state.digest)


def choose(workdir: Path, wanted: str, terms: Terms) -> Chosen:
    """Read the adapter `wanted`: best, last, personal, or the path of a file (`./best` for a file of such a name).

    Raises:
        ConfigError: it is not there. ModelError: it is of another layout than the plan's.
        DataError: it cannot be read.
    """
    own = wanted in _NAMES
    path = adapter_folder(workdir) / f"{wanted}.safetensors" if own else Path(wanted)
    if not path.exists() and wanted == PERSONAL:
        raise ConfigError(f"'{path}': is missing; `fedclip-silo personalize` makes it")
    if not path.exists() and not own:
        raise ConfigError(f"{wanted}: is none of {', '.join(_NAMES)}, and no file; check the path")
    return Chosen(wanted if own else path.stem, path, load_adapter(path, terms), own)
