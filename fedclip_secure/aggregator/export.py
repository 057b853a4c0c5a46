"""The global adapter out of the coordinator's store."""

from __future__ import annotations

from pathlib import Path

from fedclip_secure.aggregator.blobs import RESTORE
from fedclip_secure.aggregator.home import Home
from fedclip_secure.aggregator.store import RoundRow, Store
from fedclip_secure.config.lock import Contract
from fedclip_secure.config.plan import ExternalModel
from fedclip_secure.disk import refused
from fedclip_secure.errors import ConfigError, DataError
from fedclip_secure.export.adapter_facts import Facts
from fedclip_secure.export.folder import write_export
from fedclip_secure.model.state import AdapterState
from fedclip_secure.pki.roster import Roster
from fedclip_secure.secagg.terms import Terms


def export_last(home: Home, folder: Path) -> tuple[Facts, list[Path]]:
    """Write the model after the newest round into `folder`; what is known of it, and the files.

    Raises:
        ConfigError: there is no federation here, or no round is finished. DataError: the store or the disk is at fault.
    """
    home.plan()  # is there a federation at all? A store would be made where there is none
    store = home.store_to_read()
    try:
        frozen, rows = store.frozen(), store.rounds()
        if frozen is None or not rows:
            raise ConfigError(
                f"'{home.folder}': no round is finished yet, so there is no adapter; see `fedclip-agg status`"
            )
        contract, roster = Contract.decode(frozen[0], "the store"), Roster.decode(frozen[1])
        facts = _facts(rows, contract)
        state = _state(store, facts.model, Terms.of(contract, roster))
    finally:
        store.close()
    model = contract.plan.model
    text_features = home.folder / model.text_features if isinstance(model, ExternalModel) else None
    return facts, write_export(folder, state, facts, contract, roster, text_features=text_features)


def _facts(rows: list[RoundRow], contract: Contract) -> Facts:
    """A round's counts are of the model that it started from: the closing round has the last one's."""
    last = rows[-1]
    after = min(last.round, contract.plan.training.rounds)
    counted = next((row for row in rows if row.start_model == last.model), None)
    if counted is None:
        return Facts("last", after, last.model)
    return Facts("last", after, last.model, counted.correct, counted.total)


def _state(store: Store, digest: bytes, terms: Terms) -> AdapterState:
    path = store.blobs.model_path(digest)
    try:
        state = AdapterState.from_file(path, terms.layout, str(path))
    except OSError as error:
        raise DataError(refused(error, path, otherwise=RESTORE)) from error
    if state.digest != digest:
        raise DataError(f"'{path}': is not the model of its name; {RESTORE}")
    return state
