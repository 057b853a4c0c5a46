"""One run's side of the organisation's privacy ledger: begin, reserve, settle, and compare with the receipts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedclip_secure.config.silo import EmbeddingsData, Policy, SiloConfig
from fedclip_secure.disk import refused
from fedclip_secure.errors import ConfigError, DataError, TrustError
from fedclip_secure.files import write_atomically
from fedclip_secure.names import AGGREGATOR, Normalisation
from fedclip_secure.pki.identity import Identity
from fedclip_secure.privacy.accounting.plan_cost import PlannedRun
from fedclip_secure.privacy.accounting.privacy_filter import Cap
from fedclip_secure.privacy.ledger.admission import Need
from fedclip_secure.privacy.ledger.ledger import Ledger, OpenRun
from fedclip_secure.privacy.ledger.receipts import open_receipt
from fedclip_secure.privacy.ledger.run_terms import RunTerms
from fedclip_secure.privacy.ledger.spending import outlook
from fedclip_secure.privacy.ledger.storage import RESTORE
from fedclip_secure.privacy.ledger.unit_sets import Charges
from fedclip_secure.privacy.report.software import code_sha256
from fedclip_secure.silo.accepted import Accepted, load_accepted
from fedclip_secure.silo.receipts import read_receipts

ENDED = (
    "this silo's run was ended, by `fedclip-silo budget --end` or as the federation came to its end, and nothing more "
    "is paid for in it; to train again this silo needs a new plan from the coordinator"
)
_WITH_LEDGER = "restore it, or the ledger that it stands beside"
_UNLIMITED = "no policy.max_epsilon in silo.yaml: nothing limits the sum of runs"


def run_terms(config: SiloConfig, accepted: Accepted) -> RunTerms:
    """What a run of the accepted plan spends at most, and on whom."""
    plan, lock = accepted.contract.plan, accepted.contract.lock
    assert plan.privacy is not None  # noqa: S101 - only plans with privacy are charged
    assert lock.noise_multiplier is not None  # noqa: S101 - check_policy has seen it
    privacy, stated = plan.privacy, isinstance(config.data, EmbeddingsData)
    return RunTerms(
        federation=plan.federation,
        plan=accepted.contract.digest,
        roster=accepted.roster.digest,
        unit=privacy.unit,
        noise_multiplier=lock.noise_multiplier,
        sample_rate=privacy.sample_rate,
        steps_per_round=privacy.steps_per_round,
        releases=lock.releases,
        rounds=plan.training.rounds,
        max_retrains=privacy.max_retrains,
        max_grad_norm=privacy.max_grad_norm,
        update_divisor=privacy.update_divisor,
        delta=privacy.delta,
        features="stated to be per record" if stated else "computed here",
        code=code_sha256(),
        patients=_normalised(config) if privacy.unit == "patient" else (),
    )


def _normalised(config: SiloConfig) -> tuple[Normalisation, ...]:
    return () if isinstance(config.data, EmbeddingsData) else tuple(config.data.patients.normalise)


def cap_of(policy: Policy) -> Cap | None:
    """The silo's lifetime limit, if it has set one."""
    return None if policy.max_epsilon is None else Cap(policy.max_epsilon, policy.delta)


def open_ledger(config: SiloConfig, identity: Identity) -> Ledger:
    """The organisation's ledger, for this silo to write into.

    Raises:
        DataError: another process holds it for long, or the disk refuses.
        TrustError: it was edited, or is not the newest.
    """
    notes = _notes(config)
    newest = [_noted(note) for note in notes]  # before the ledger: whoever writes meanwhile, it is then as new
    if newest and not ledger_exists(config):
        raise TrustError(
            f"{ledger_folder(config)}: is gone, and {notes[0]} says that there was a ledger; put its newest backup "
            "there; without it what was spent would be spent twice"
        )
    ledger = Ledger(ledger_folder(config), identity.name, identity.sign, identity.key.public_bytes)
    try:
        for head in newest:
            ledger.check_newest(head)
    except BaseException:
        ledger.close()
        raise
    return ledger


def ledger_of_run(config: SiloConfig, identity: Identity, accepted: Accepted, receipts: Sequence[bytes]) -> Ledger:
    """As `open_ledger`, for a run with the receipts that this silo kept; where it is refused, nothing was made.

    Raises:
        TrustError: besides, the run was begun with another ledger.
    """
    folder, begun, uploaded = ledger_folder(config), begun_with(config, accepted), _uploaded(accepted, receipts)
    elsewhere = begun is not None and begun != folder
    if not ledger_exists(config) and (elsewhere or (begun is None and uploaded and not _notes(config))):
        raise _of_another(folder, begun, accepted)
    if not ledger_exists(config) and begun is not None and not _notes(config):
        raise TrustError(
            f"'{folder}': is gone, and the run of federation {accepted.contract.plan.federation} was begun with it; "
            "put its newest backup there; without it what was spent would be spent twice"
        )
    ledger = open_ledger(config, identity)
    if (begun or uploaded) and not ledger.has_run(accepted.contract.digest, accepted.roster.digest):
        ledger.close()
        if begun is not None and not elsewhere:
            raise TrustError(
                f"'{folder}': lacks the run of federation {accepted.contract.plan.federation}, which was begun with "
                f"it, so it is not the newest, and what was spent since would be spent twice; {RESTORE}"
            )
        raise _of_another(folder, begun, accepted)
    return ledger


def _uploaded(accepted: Accepted, receipts: Sequence[bytes]) -> bool:
    """Whether one of the receipts is of the accepted plan."""
    opened = [open_receipt(wire, dict(accepted.roster.members)[AGGREGATOR]) for wire in receipts]
    return any(receipt.plan == accepted.contract.digest for receipt in opened)


def _begun_ledger(config: SiloConfig, identity: Identity, accepted: Accepted | None) -> Ledger | None:
    """As `ledger_of_run`, or as `open_ledger` where no run is known; None where there is no ledger, and none was."""
    if accepted is None:
        return open_ledger(config, identity) if is_begun(config) else None
    noted, receipts = begun_with(config, accepted) is not None, tuple[bytes, ...]()
    if not noted:  # as version 0.1 left it
        receipts = read_receipts(Path(config.workdir), identity.epoch_path, accepted.roster.digest)
    if not noted and not _uploaded(accepted, receipts) and not is_begun(config):
        return None
    return ledger_of_run(config, identity, accepted, receipts)


def _accepted_run(config: SiloConfig) -> Accepted | None:
    """The accepted plan with privacy, where its documents still lie in the workdir."""
    documents = (Path(config.workdir, name) for name in ("contract.cbor", "roster.cbor"))
    if config.plan is None or config.roster is None or not all(path.exists() for path in documents):
        return None
    accepted = load_accepted(config)
    return None if accepted.contract.plan.privacy is None else accepted


def _of_another(folder: Path, begun: Path | None, accepted: Accepted) -> TrustError:
    there, back = ("another ledger", "") if begun is None else (f"the ledger {begun}", f" to {begun}")
    return TrustError(
        f"silo.yaml: `ledger` names {folder}, and the run of federation {accepted.contract.plan.federation} was begun "
        f"with {there}, which knows what it spent; set `ledger` back{back}, or move that whole folder, and the file "
        "beside it that ends in .head, to where silo.yaml says"
    )


def _begun_note(config: SiloConfig) -> Path:
    return Path(config.workdir) / "ledger.json"


def begun_with(config: SiloConfig, accepted: Accepted) -> Path | None:
    """The ledger that the accepted run was begun with, where that is noted."""
    path = _begun_note(config)
    try:
        kept = json.loads(path.read_text("utf-8"))
        return Path(kept["ledger"]) if (kept["plan"], kept["roster"]) == _pins(accepted) else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(refused(error, path)) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"'{path}': which ledger the run was begun with cannot be read; delete it, if `ledger` in silo.yaml is that"
        ) from error


def _pins(accepted: Accepted) -> tuple[str, str]:
    return accepted.contract.pin, accepted.roster.pin


def existing_ledger(config: SiloConfig, identity: Identity) -> Ledger:
    """As `open_ledger`, but none is begun.

    Raises:
        ConfigError: there is none.
        TrustError: besides, the accepted run was begun with another ledger.
    """
    ledger = _begun_ledger(config, identity, _accepted_run(config))
    if ledger is None:
        raise ConfigError(
            f"'{ledger_folder(config)}': there is no ledger; `ledger` in silo.yaml names it, and `train` begins it"
        )
    return ledger


def ledger_folder(config: SiloConfig) -> Path:
    """Where the ledger lies, links followed: what is noted of it must be found by whatever way it is named."""
    try:
        return Path(config.ledger).resolve()
    except RuntimeError as error:  # links that lead to each other
        raise ConfigError(
            f"'{config.ledger}': cannot be followed ({error}); name a folder as `ledger` in silo.yaml"
        ) from error


def ledger_exists(config: SiloConfig) -> bool:
    """Whether anything was ever written into the ledger that silo.yaml names."""
    return (ledger_folder(config) / "ledger.sqlite").exists()


def is_begun(config: SiloConfig) -> bool:
    """Whether there is a ledger, or was one."""
    return ledger_exists(config) or bool(_notes(config))


def about_ledger(config: SiloConfig, identity: Identity, offer: Accepted) -> tuple[list[str], bool]:
    """Which ledger a run is written into, what it remembers, and how the plan fits; and if that run was ended in it.

    No ledger is begun.

    Raises:
        DataError, TrustError: as `open_ledger`; or the offered run was begun with another ledger.
    """
    cap, planned = cap_of(config.policy), PlannedRun.of(offer.contract)
    need = None if planned is None else Need(planned.per_round, planned.rounds)
    ledger = _begun_ledger(config, identity, offer)
    if ledger is None:
        nothing = Charges.of((), 0)
        fits = [outlook(nothing, nothing, need, cap)] if need and cap else []
        return [*_about(config, None), *(fits or [_UNLIMITED])], False
    with closing(ledger):
        fits = [ledger.outlook(offer.contract.digest, offer.roster.digest, need, cap)] if need and cap else []
        ended = ledger.has_ended(offer.contract.digest, offer.roster.digest)
        return [*_about(config, ledger), *(fits or [_UNLIMITED])], ended


def _about(config: SiloConfig, ledger: Ledger | None) -> list[str]:
    remembered = ledger.remembered() if ledger else None
    if ledger is None or remembered is None:
        return [f"`train` begins a new ledger at '{ledger_folder(config)}'; nothing spent before is remembered"]
    return [f"ledger {ledger_folder(config)}: {remembered}", *ledger.warnings(cap_of(config.policy))]


def about_place(config: SiloConfig, home: Path) -> str | None:
    """That the ledger lies inside of this silo's own folder, that of silo.yaml; None where it does not."""
    folder, own = ledger_folder(config), (home, Path(config.workdir), Path(config.identity))
    around = next((place for place in own if folder.is_relative_to(place.resolve())), None)
    if around is None:
        return None
    return (
        f"ledger {folder} lies inside of {around.resolve()}, this silo's own folder: what is spent in federations with "
        "another folder is not counted here, nor this there; before the first run, name one folder for the whole "
        "organisation as `ledger` in silo.yaml"
    )


def note_of(config: SiloConfig) -> Path:
    """Where the hash of the ledger's newest entry lies: beside its folder, so that a backup of it is not one of both.

    Whatever the federation: receipts are held against the ledger within one roster alone.
    """
    return Path(f"{ledger_folder(config)}.head")


def _notes(config: SiloConfig) -> list[Path]:
    """Those that there are. Where `ledger` is a link, version 0.1 kept its note beside that."""
    places = dict.fromkeys((note_of(config), Path(f"{Path(config.ledger)}.head")))
    return [place for place in places if place.exists()]


def unfinished(config: SiloConfig, identity: Identity, federation: str) -> str:
    """This silo's unfinished runs of a federation, for a person.

    Raises:
        ConfigError: there is no ledger, or no such run.
        DataError, TrustError: as `open_ledger`.
    """
    with closing(existing_ledger(config, identity)) as ledger:
        return ledger.unfinished(federation)


def end_runs(config: SiloConfig, identity: Identity, federation: str) -> int:
    """Reserve nothing more in this silo's unfinished runs of a federation; how many rounds that frees.

    Raises:
        ConfigError: there is no ledger, or no such run.
        DataError, TrustError: as `open_ledger`; or the clock is behind.
    """
    with closing(existing_ledger(config, identity)) as ledger:
        freed = ledger.end_runs(federation)
        ledger.note_newest(note_of(config))
    return freed


def mend_clock(config: SiloConfig, identity: Identity) -> None:
    """Note in the ledger that the clock was wrong.

    Raises:
        ConfigError: there is no ledger, or its newest entry is not ahead of the clock.
        DataError, TrustError: as `open_ledger`.
    """
    with closing(existing_ledger(config, identity)) as ledger:
        ledger.mend_clock()
        ledger.note_newest(note_of(config))


def _noted(path: Path) -> bytes:
    try:
        return bytes.fromhex(path.read_text("ascii").strip())
    except OSError as error:
        raise DataError(refused(error, path, otherwise=_WITH_LEDGER)) from error
    except ValueError as error:
        raise DataError(f"'{path}': cannot be read ({error}); {_WITH_LEDGER}") from error


class Account:
    """Charges one run. Others of the organisation may write into the ledger meanwhile."""

    def __init__(
        self,
        ledger: Ledger,
        terms: RunTerms,
        cap: Cap | None,
        aggregator: bytes,
        note: Path,
        *,
        begun: Callable[[], None] = lambda: None,
    ) -> None:
        """`note` is for the newest entry, and outlives a ledger that is restored; `begun` is told when the run has."""
        self._ledger, self._terms, self._cap = ledger, terms, cap
        self._note, self._begun = note, begun
        self._aggregator = aggregator  # public key
        self._run: OpenRun | None = None

    @classmethod
    def opened(
        cls, config: SiloConfig, identity: Identity, accepted: Accepted, receipts: Sequence[bytes] = ()
    ) -> Account:
        """The account of the accepted run; `receipts` are those that this silo kept of it.

        Raises:
            DataError: another process holds the ledger for long, or the disk refuses.
            TrustError: it was edited, or is not the one that the run was begun with.
        """
        aggregator = dict(accepted.roster.members)[AGGREGATOR]
        ledger, cap = ledger_of_run(config, identity, accepted, receipts), cap_of(config.policy)

        def begun() -> None:
            plan, roster = _pins(accepted)
            kept = {"plan": plan, "roster": roster, "ledger": str(ledger_folder(config))}
            write_atomically(_begun_note(config), f"{json.dumps(kept, indent=2)}\n".encode())

        return cls(ledger, run_terms(config, accepted), cap, aggregator, note_of(config), begun=begun)

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()

    def about(self, config: SiloConfig) -> list[str]:
        """Which ledger it is, how old, what it remembers, and what a person should know of it."""
        return _about(config, self._ledger)

    def check(self, receipts: Sequence[bytes], newest: bytes | None) -> None:
        """Hold the ledger against the receipts that this silo kept, and the newest that the server has.

        Raises:
            TrustError: it is behind one of them: it was restored from a backup, or another one.
        """
        wires = [*receipts, *([] if newest is None else [newest])]
        self._ledger.check_receipts({open_receipt(wire, self._aggregator).head for wire in wires})

    def begin(self, units: npt.NDArray[np.uint8], *, changed_data: bool) -> npt.NDArray[np.bool_]:
        """Begin the run, or find it again; which records (N,) of `units` (N, 32) uint8 may be trained on.

        Raises:
            PolicyError: the run does not fit what is left.
        """
        ids = [row.tobytes() for row in units]
        self._run = self._ledger.open_run(self._terms, ids, self._cap, changed_data=changed_data)
        self._note_head()
        self._begun()
        return np.array([unit in self._run.admitted for unit in ids], dtype=np.bool_)

    def told(self) -> str:
        """What the run spends at most, for a person."""
        from fedclip_secure.privacy.accounting.accountant import epsilon  # noqa: PLC0415 - takes seconds, and only here

        terms, most = self._terms, epsilon([self._terms.total()], self._terms.delta)
        said = f"privacy: epsilon at most {most:g} (delta {terms.delta:g}) for each {terms.unit} over the whole run"
        left_out = self._opened.left_out
        if left_out:
            said += f"; {left_out} {terms.unit}(s) whose budget is spent, or held by unfinished runs, are left out"
        return f"{said}; {ENDED}" if self.ended else said

    @property
    def ended(self) -> bool:
        """Whether nothing is paid for in the run any more."""
        return self._opened.state.ended

    @property
    def head(self) -> bytes:
        """Hash of the ledger's newest entry."""
        return self._ledger.head

    def may_train(self, round_number: int) -> bool:
        """Whether this round may be trained, for the first time or again."""
        return self._opened.may_train(round_number)

    @contextmanager
    def charged(self, round_number: int) -> Iterator[None]:
        """Reserve the round before the data are touched; settle it after. What fails in between stays spent."""
        reservation = self._opened.reserve(round_number)
        self._note_head()
        yield
        self._opened.settle(reservation)
        self._note_head()

    def finish(self) -> None:
        """The federation has come to its end: what was held for rounds that this silo was not in is free."""
        self._opened.finish()
        self._note_head()

    def _note_head(self) -> None:
        self._ledger.note_newest(self._note)

    @property
    def _opened(self) -> OpenRun:
        if self._run is None:
            raise ValueError("the run has not begun")
        return self._run
