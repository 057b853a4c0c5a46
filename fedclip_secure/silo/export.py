"""An adapter of this silo's workdir for others."""

from __future__ import annotations

from pathlib import Path

from fedclip_secure.config.silo import SiloConfig
from fedclip_secure.errors import ConfigError
from fedclip_secure.export.adapter_facts import Facts
from fedclip_secure.export.folder import write_export
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.accepted import Accepted, text_features_path
from fedclip_secure.silo.adapters import choose


def export_adapter(
    config: SiloConfig, accepted: Accepted, wanted: str, folder: Path | None
) -> tuple[Facts, list[Path]]:
    """Write the adapter `wanted` into `folder` (default: export/NAME in the workdir); what is known of it, and files.

    Raises:
        ConfigError: there is no such adapter, or it has no card: what would be said of it?
        DataError, ModelError: it cannot be used, or the disk refuses.
    """
    chosen = choose(Path(config.workdir), wanted, Terms.of(accepted.contract, accepted.roster))
    facts = chosen.facts()
    if facts.after_round is None:
        raise ConfigError(f"'{chosen.path}': has no JSON card beside it that says where it comes from; copy that too")
    to = folder or Path(config.workdir, "export", chosen.name)
    contract, roster = accepted.contract, accepted.roster
    return facts, write_export(to, chosen.state, facts, contract, roster, text_features=text_features_path(config))
