"""One run's side of the organisation's privacy ledger: begin, reserve, settle, and compare with the receipts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedclip_secure.config.silo import EmbeddingsData, Policy, SiloConfig
from fedclip_secure.errors import ConfigError, DataError, TrustError
from fedclip_secure.names import AGGREGATOR, Normalisation
from fedclip_secure.pki.identity import Identity
from fedclip_secure.privacy.cap import Cap
from fedclip_secure.privacy.ledger import Ledger, OpenRun
from fedclip_secure.privacy.receipts import open_receipt
from fedclip_secure.privacy.software import code_sha256
from fedclip_secure.privacy.terms import RunTerms
from fedclip_secure.silo.pins import Accepted


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
    data = config.data
    patients = None if isinstance(data, EmbeddingsData) else data.patients
    return tuple(patients.normalise) if patients else ()


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


def existing_ledger(config: SiloConfig, identity: Identity) -> Ledger:
    """As `open_ledger`, but none is begun.

    Raises:
        ConfigError: there is none.
    """
    if not ledger_begun(config):
        raise ConfigError(
            f"{ledger_folder(config)}: there is no ledger; `ledger` in silo.yaml names it, and `train` begins it"
        )
    return open_ledger(config, identity)


def ledger_folder(config: SiloConfig) -> Path:
    """Where the ledger lies, links followed: what is noted of it must be found by whatever way it is named."""
    try:
        return Path(config.ledger).resolve()
    except RuntimeError as error:  # links that lead to each other
        raise ConfigError(
            f"{config.ledger}: cannot be followed ({error}); name a folder as `ledger` in silo.yaml"
        ) from error


def ledger_exists(config: SiloConfig) -> bool:
    """Whether anything was ever written into the ledger that silo.yaml names."""
    return (ledger_folder(config) / "ledger.sqlite").exists()


def ledger_begun(config: SiloConfig) -> bool:
    """Whether there is a ledger, or was one that is gone."""
    return ledger_exists(config) or bool(_notes(config))


def about_ledger(config: SiloConfig, identity: Identity) -> str:
    """Which ledger a run is written into, how old it is and what it remembers; none is begun."""
    if not ledger_begun(config):
        return _about(config, None)
    with closing(open_ledger(config, identity)) as ledger:
        return _about(config, ledger.remembered())


def _about(config: SiloConfig, remembered: str | None) -> str:
    if remembered is None:
        return f"begins a new ledger at {ledger_folder(config)}; nothing spent before is remembered"
    return f"ledger {ledger_folder(config)}: {remembered}"


def note_of(config: SiloConfig) -> Path:
    """Where the hash of the ledger's newest entry lies: beside its folder, so that a backup of it is not one of both.

    Whatever the federation: receipts are held against the ledger within one roster alone.
    """
    return Path(f"{ledger_folder(config)}.head")


def _notes(config: SiloConfig) -> list[Path]:
    """Those that there are. Where `ledger` is a link, version 0.1 kept its note beside that."""
    places = dict.fromkeys((note_of(config), Path(f"{Path(config.ledger)}.head")))
    return [place for place in places if place.exists()]


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
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it, or the ledger that it stands beside") from error


class Account:
    """Charges one run. Others of the organisation may write into the ledger meanwhile."""

    def __init__(self, ledger: Ledger, terms: RunTerms, cap: Cap | None, aggregator: bytes, note: Path) -> None:
        self._ledger, self._terms, self._cap = ledger, terms, cap
        self._note = note  # outlives a ledger that is restored from a backup
        self._aggregator = aggregator  # public key
        self._run: OpenRun | None = None

    @classmethod
    def opened(cls, config: SiloConfig, identity: Identity, accepted: Accepted) -> Account:
        """The account of the accepted run.

        Raises:
            DataError: another process holds the ledger for long, or the disk refuses. TrustError: it was edited.
        """
        aggregator = dict(accepted.roster.members)[AGGREGATOR]
        ledger, cap = open_ledger(config, identity), cap_of(config.policy)
        return cls(ledger, run_terms(config, accepted), cap, aggregator, note_of(config))

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()

    def about(self, config: SiloConfig) -> str:
        """Which ledger it is, how old, and what it remembers."""
        return _about(config, self._ledger.remembered())

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
        return np.array([unit in self._run.admitted for unit in ids], dtype=np.bool_)

    def told(self) -> str:
        """What the run spends at most, for a person."""
        from fedclip_secure.privacy.accountant import epsilon  # noqa: PLC0415 - takes seconds, and only here

        terms, most = self._terms, epsilon([self._terms.total()], self._terms.delta)
        said = f"privacy: epsilon at most {most:g} (delta {terms.delta:g}) for each {terms.unit} over the whole run"
        left_out = self._opened.left_out
        if left_out:
            said += f"; {left_out} {terms.unit}(s) whose budget is spent, or held by unfinished runs, are left out"
        return f"{said}; the run was ended, no round can be paid for" if self._opened.state.ended else said

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
