"""The coordinator's folder: what lies where, how it is made, and how its roster is frozen."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib import resources
from pathlib import Path

from fedclip_secure.aggregator.store import Store
from fedclip_secure.config.fields import read_model
from fedclip_secure.config.lock import Contract, ExternalEncoder, read_lock
from fedclip_secure.config.method_needs import unlisted
from fedclip_secure.config.method_recipes import recipe_of
from fedclip_secure.config.plan import ExternalModel, FederationPlan
from fedclip_secure.disk import check_disk, refused
from fedclip_secure.errors import ConfigError, DataError, TrustError
from fedclip_secure.files import write_atomically
from fedclip_secure.names import AGGREGATOR
from fedclip_secure.pki.authority import (
    AUTHORITY_CERTIFICATE,
    Authority,
    create_authority,
    load_authority,
    server_names,
)
from fedclip_secure.pki.certificates import read_certificate, utc_time, write_certificate
from fedclip_secure.pki.invitation import Invitation
from fedclip_secure.pki.keys import SigningKey, write_private_key
from fedclip_secure.pki.roster import Roster
from fedclip_secure.privacy.accounting.releases import check_releases
from fedclip_secure.secagg.aggregator_session import Phase
from fedclip_secure.secagg.terms import Terms

_RENEWAL = timedelta(days=30)  # before its end a certificate is made anew


@dataclass(frozen=True, slots=True)
class Home:
    """The folder that `init` makes."""

    folder: Path

    @property
    def plan_path(self) -> Path:
        """`federation.yaml`."""
        return self.folder / "federation.yaml"

    @property
    def lock_path(self) -> Path:
        """`federation.lock`, which `prepare` writes."""
        return self.folder / "federation.lock"

    @property
    def initial_path(self) -> Path:
        """The adapter that round 1 starts from."""
        return self.folder / "initial.safetensors"

    @property
    def authority_folder(self) -> Path:
        """The CA. Its key signs the silos' certificates; `serve` uses it to enrol them."""
        return self.folder / "authority"

    @property
    def authority_certificate(self) -> Path:
        """The CA's certificate."""
        return self.authority_folder / AUTHORITY_CERTIFICATE

    @property
    def server_certificate(self) -> Path:
        """The server's certificate for TLS."""
        return self.folder / "server" / "certificate.pem"

    @property
    def server_key(self) -> Path:
        """The server's key for TLS."""
        return self.folder / "server" / "key.pem"

    @property
    def signing_key(self) -> Path:
        """The aggregator's own key, which the roster pins."""
        return self.folder / "server" / "signing-key.pem"

    def plan(self) -> FederationPlan:
        """Read `federation.yaml`.

        Raises:
            ConfigError: missing or faulty.
        """
        if not self.plan_path.exists():
            raise ConfigError(f"'{self.plan_path}': is missing; run `fedclip-agg init` or say where with --dir")
        return read_model(self.plan_path, FederationPlan)

    def contract(self) -> Contract:
        """Plan and lock, which must belong together."""
        plan, lock = self.plan(), read_lock(self.lock_path)
        contract = Contract(plan, lock)
        if lock.plan != plan.digest.hex():
            raise ConfigError(f"'{self.plan_path}': has changed since `prepare`; run `fedclip-agg prepare` again")
        return contract

    def check_not_frozen(self) -> None:
        """Refuse to touch plan or lock once the roster is frozen over them.

        Raises:
            TrustError: it is.
        """
        store = self.store_to_read()
        try:
            if store.frozen() is not None:
                raise TrustError(
                    f"'{self.folder}': the roster is frozen over this plan; another plan needs a new federation"
                )
        finally:
            store.close()

    def store(self) -> Store:
        """The aggregator's database and files."""
        return Store(self.folder / "state")

    def store_to_read(self) -> Store:
        """The same, for what only looks: whoever runs it, nothing is written."""
        return Store(self.folder / "state", reading=True)


def init_home(folder: Path, federation: str, hosts: Sequence[str], port: int, method: str = "fedclip") -> Home:
    """Make a coordinator's folder: plan to edit, for `method`, authority, server certificate, signing key.

    Raises:
        ConfigError: `folder` holds a federation already; a host or name is impossible; there is no such method.
    """
    home, recipe = Home(folder), recipe_of(method)
    if home.plan_path.exists():
        raise ConfigError(f"'{home.plan_path}': is there already; choose an empty folder")
    check_disk(folder, "choose another folder, on a local disk", private=True)
    server_names(hosts)  # a typo must show before there is a folder that a second try would find
    authority = create_authority(home.authority_folder, federation)
    issue_server_certificate(home, authority, hosts)
    SigningKey.create(home.signing_key)
    host = f"[{hosts[0]}]" if ":" in hosts[0] else hosts[0]
    server = f"https://{host}" if port == 443 else f"https://{host}:{port}"
    template = resources.files("fedclip_secure.config").joinpath("templates/federation.yaml").read_text("utf-8")
    # A seed of its own: a silo adds its update to one and the same model only once, in whatever run.
    ours = {"{federation}": federation, "{server}": server, "{seed}": str(secrets.randbelow(2**31))}
    values = {**ours, **recipe.values(method)}
    for key, value in values.items():
        template = template.replace(key, value)
    write_atomically(home.plan_path, template.encode())
    return home


def issue_server_certificate(home: Home, authority: Authority, hosts: Sequence[str]) -> None:
    """Make the server's TLS key and certificate anew. Silos notice nothing: they pin the authority."""
    key, certificate = authority.issue_server(hosts)
    write_private_key(home.server_key, key)
    write_certificate(home.server_certificate, certificate)


def renew_server_certificate(home: Home, authority: Authority, now: datetime) -> str | None:
    """Make the server's certificate anew where it ends within 30 days, or was made by a clock that was ahead.

    The key and the hosts stay. Silos notice nothing: they pin the authority. The line for a person, where there is one.

    Raises:
        TrustError: the authority is not valid yet, or has expired.
        DataError: the disk refuses, and the one that is there is not valid now.
    """
    certificate = read_certificate(home.server_certificate)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    last, valid = authority.certificate.not_valid_after_utc, begins <= now < ends
    if valid and ends - now > _RENEWAL:
        return None
    if valid and last - now <= _RENEWAL:
        return (
            f"the authority of {authority.federation} ends on {utc_time(last)}, and with it every certificate: end the "
            "run before, and begin a new federation with `fedclip-agg init`"
        )
    renewed = authority.renew_server(certificate)
    try:
        write_certificate(home.server_certificate, renewed)
    except DataError as error:
        if not valid:
            raise
        return f"the server's certificate ends on {utc_time(ends)} and could not be made anew, is tried daily: {error}"
    was = f"would have ended on {utc_time(ends)}" if valid else f"ended on {utc_time(ends)}"
    if now < begins:
        was = f"was valid only from {utc_time(begins)}, made by a clock that was ahead"
    return f"the server's certificate {was}; made anew until {utc_time(renewed.not_valid_after_utc)}"


@dataclass(frozen=True, slots=True)
class Invited:
    """A one-time `token`; whether it `replaced` one that was not used; whether the silo has `enrolled` already."""

    token: str
    replaced: bool
    enrolled: bool


def invite(home: Home, silo: str, valid: float) -> Invited:
    """Let `silo` enrol, or renew its certificate, within so many seconds; of the token only its hash is kept.

    Raises:
        TrustError: the roster is frozen and does not hold this silo.
    """
    invitation = Invitation.create(silo, load_authority(home.authority_folder).fingerprint)
    store = home.store()
    try:
        frozen = store.frozen()
        if frozen is not None and silo not in Roster.decode(frozen[1]).silos:
            raise TrustError(f"the roster is frozen without {silo}; start a new federation to add a silo")
        now = time.time()
        replaced = silo in dict(store.open_invitations(now))
        enrolled = silo in {member.silo for member in store.members()}
        store.add_invitation(silo, invitation.secret_hash(), now + valid)
    finally:
        store.close()
    return Invited(invitation.encode(), replaced, enrolled)


def freeze(home: Home) -> tuple[Contract, Roster, Terms]:
    """Close the roster over the silos that have enrolled, and keep the contract beside it.

    Raises:
        TrustError: frozen already; or fewer than 3 silos.
        ConfigError: plan or lock faulty, or not fit for so many silos; or with privacy the lock charges too little.
    """
    contract = home.contract()
    check_charges(contract)
    store = home.store()
    try:
        if store.frozen() is not None:
            raise TrustError("the roster is frozen already; a new one needs a new federation")
        keys = {member.silo: member.public_key for member in store.members()}
        roster = Roster.of({**keys, AGGREGATOR: SigningKey.load(home.signing_key).public_bytes})
        terms = Terms.of(contract, roster)
        if faults := unlisted(contract.plan, roster.silos):
            raise ConfigError(f"'{home.plan_path}': {faults[0]}; edit it, and run `fedclip-agg prepare` again")
        for data in _locked_files(home, contract):
            store.blobs.save_file(data)
        store.freeze(contract.encode(), roster.encode())
    finally:
        store.close()
    return contract, roster, terms


def check_charges(contract: Contract) -> None:
    """Refuse what every silo and every verifier would refuse, before anybody trains on it.

    Raises:
        ConfigError: with privacy, what a step releases is not what the lock has charged for it.
    """
    if contract.plan.privacy is not None:
        check_releases(contract)


def _locked_files(home: Home, contract: Contract) -> list[bytes]:
    """The files that the lock names by SHA-256, for the silos to fetch."""
    wanted = {home.initial_path: contract.lock.initial_file}
    if isinstance(contract.lock.encoder, ExternalEncoder) and isinstance(contract.plan.model, ExternalModel):
        wanted[home.folder / contract.plan.model.text_features] = contract.lock.encoder.text_features_sha256
    files = []
    for path, sha256 in wanted.items():
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(refused(error, path, otherwise="run `fedclip-agg prepare`")) from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(f"'{path}': has changed since `prepare`; run `fedclip-agg prepare` again")
        files.append(data)
    return files


def give_up(home: Home) -> str:
    """Stop waiting for unmasking answers that do not come; what was given up.

    The silos that have answered never join again over this model unless a person there gives the round up too.

    Raises:
        ConfigError: nothing waits for such answers.
    """
    store = home.store()
    try:
        last = store.last_attempt()
        if last is None or last.ended is not None or last.closed != Phase.UNMASK:
            raise ConfigError("no attempt waits for unmasking answers; every other stage ends by itself")
        store.give_up(last.number)
        return f"round {last.round}, attempt {last.number}"
    finally:
        store.close()
