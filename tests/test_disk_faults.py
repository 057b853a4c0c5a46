"""A disk that refuses, at every place where a file is opened: the message names the file, and never calls it damaged.

The faults are injected where Python calls the system; a file that is really closed to a user stands at the end.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import dataclasses
import errno
import fcntl
import io
import os
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fedclip_cli import privacy as privacy_commands

from fedclip_secure.aggregator import export as agg_export
from fedclip_secure.aggregator import home as agg_home
from fedclip_secure.aggregator import report as agg_report
from fedclip_secure.aggregator.blobs import Blobs
from fedclip_secure.aggregator.store import Store
from fedclip_secure.config.lock import read_lock
from fedclip_secure.config.plan import OpenClipModel
from fedclip_secure.config.silo import FolderData, SiloConfig, read_silo, write_silo
from fedclip_secure.config.yaml12 import replace_scalar
from fedclip_secure.data import embeddings, walk
from fedclip_secure.data.dicom import patient_of
from fedclip_secure.data.drawn.labs import write_lab
from fedclip_secure.data.folder import read_folder
from fedclip_secure.data.image import FileKind, file_kinds, load_image
from fedclip_secure.data.manifest import read_manifest
from fedclip_secure.disk import Meaning, check_disk, is_damage, meaning_of
from fedclip_secure.errors import FedClipError
from fedclip_secure.export import folder as export_folder
from fedclip_secure.export.adapter_facts import read_facts
from fedclip_secure.features import clip, vision_only
from fedclip_secure.features.cache import FeatureCache
from fedclip_secure.features.checkpoint import sha256_of
from fedclip_secure.features.index import FileIndex
from fedclip_secure.files import make_folder, write_atomically, write_output
from fedclip_secure.pki.authority import load_authority
from fedclip_secure.pki.epoch_file import Epoch, lock_epoch
from fedclip_secure.pki.identity import Identity
from fedclip_secure.privacy.ledger.storage import LedgerFile
from fedclip_secure.privacy.ledger.unit_sets import load_key
from fedclip_secure.silo.accepted import Accepted, load_accepted
from fedclip_secure.silo.receipts import read_receipts
from fedclip_secure.silo.report import load_audit
from fedclip_secure.silo.run import privacy_account
from fedclip_secure.silo.run.final_models import load_adapter, read_models
from fedclip_secure.simulate.store import load, path_of
from fedclip_secure.training import prepare
from fedclip_secure.training.silo_data import _holds
from fedclip_secure.training.unshared_state import PrivateState
from fedclip_secure.transport.bodies import Sink
from fedclip_secure.transport.client import Client
from fedclip_secure.transport.tls import client_context, server_context
from tests.aggregator.site import Site
from tests.features.test_cache import KEYS, ROWS, fresh, shard
from tests.silo.desk import Desk
from tests.users import without_privileges
from tests.waiting import BOUND

ROOT = Path(__file__).resolve().parent.parent
_READS = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
_FAILS = (errno.EIO, errno.ESTALE)
_WRITES = (errno.EACCES, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT)
_WORDS = {
    errno.EACCES: "let the user that runs this program, '",
    errno.EPERM: "let the user that runs this program, '",
    errno.EROFS: "the disk is mounted read-only",
    errno.EIO: "the disk or the share fails; check it, and run again",
    errno.ESTALE: "the disk or the share fails; check it, and run again",
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there",
    errno.ENOLCK: "a disk that cannot lock files, as some network disks",
    errno.EBUSY: "another process",
}
_NEVER = re.compile(r"damaged|delete|enrol+ again|remove it|restore|fix its owner|check the path")
_SQLITE = {  # what SQLite makes of these
    errno.EACCES: sqlite3.SQLITE_CANTOPEN,
    errno.EROFS: sqlite3.SQLITE_READONLY,
    errno.EIO: sqlite3.SQLITE_IOERR_READ,
    errno.ENOSPC: sqlite3.SQLITE_FULL,
    errno.EDQUOT: sqlite3.SQLITE_IOERR_WRITE,
    errno.ENOLCK: sqlite3.SQLITE_BUSY,
    errno.EBUSY: sqlite3.SQLITE_BUSY,
}


class Disk:
    """A small real home of a coordinator and of a silo, and beside them one file of each other kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.site = Site.frozen(folder / "site", 3)
        self.home, self.silo = self.site.home, self.site.identities["lab-a"]
        self.model = self.site.terms.initial_model
        self.store = self.home.store()
        self.store.blobs.copy_model(self.model, bytes.fromhex(self.site.contract.lock.initial_file))
        self.state = agg_export._state(self.store, self.model, self.site.terms)
        self.desk = Desk.enrolled(folder / "desk")
        self.yaml = folder / "silo" / "silo.yaml"
        write_silo(self.yaml, "lab-a", "images", None)
        data, pin = FolderData(format="folder", path="images"), f"sha256:{'0' * 64}"
        self.config = SiloConfig(name="lab-a", data=data, workdir=str(folder / "work"), plan=pin, roster=pin)
        fresh(folder / "cache").add(KEYS, ROWS)
        LedgerFile(folder / "ledger").close()

    @property
    def accepted(self) -> Accepted:
        return load_accepted(self.config)

    def file(self, name: str) -> Path:
        """A file that is there; what it holds does not matter where it cannot be read."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a file is opened: `use` does it, in `module`; `path` is the file, or the folder it is written into."""

    name: str
    module: str
    path: Callable[[Disk], Path]
    use: Callable[[Disk, Path], object]
    numbers: tuple[int, ...] = _READS  # what is told here


def _file(name: str) -> Callable[[Disk], Path]:
    return lambda disk: disk.file(name)


def _cell(disk: Disk) -> Path:
    return disk.file(str(path_of(Path(), "ab")))


def _images(disk: Disk) -> Path:
    return disk.file("images/a/1.png").parent.parent


def _shards(disk: Disk) -> Path:
    return disk.file("closed/00/x.safetensors").parent


def _identity(name: str) -> Callable[[Disk], Path]:
    return lambda disk: disk.silo.folder / name


def _load_identity(disk: Disk, _path: Path) -> object:
    return Identity.load(disk.silo.folder)


def _drawn_vector(disk: Disk) -> Path:
    journal = disk.desk.open()
    if not journal.models():
        disk.desk.begin(journal)
    journal.close()
    (path,) = (disk.desk.workdir / "vectors").iterdir()
    return path


def _open_vector(disk: Disk, _path: Path) -> object:
    journal = disk.desk.open()
    try:
        return journal.open_vector(journal.models()[0])
    finally:
        journal.close()


def _download(disk: Disk, path: Path) -> object:
    async def fetch() -> bool:
        async with Client("https://127.0.0.1:1", client_context(disk.silo), lambda *_: None) as client:
            return await client.download("/v1/x", path, 10)

    return asyncio.run(asyncio.wait_for(fetch(), BOUND))


def _sink(_disk: Disk, path: Path) -> None:
    class Refusing(io.BytesIO):
        def write(self, _data: Any) -> int:
            with path.open("wb"):
                return 0

    Sink(Refusing(), str(path)).write(b"x")


READS = [
    Place("enrolment", "pki/identity.py", _identity("enrolment.json"), _load_identity),
    Place("private key", "pki/keys.py", _identity("key.pem"), _load_identity),
    Place("certificate", "pki/certificates.py", _identity("certificate.pem"), _load_identity),
    Place("authority", "pki/certificates.py", _identity("authority.pem"), _load_identity),
    Place("TLS of a silo", "transport/tls.py", _identity("certificate.pem"), lambda disk, _: client_context(disk.silo)),
    Place(
        "TLS of the server",
        "transport/tls.py",
        lambda disk: disk.home.server_key,
        lambda disk, path: server_context(disk.home.server_certificate, path, disk.home.authority_certificate),
    ),
    Place(
        "signing key of the CA",
        "pki/keys.py",
        lambda disk: disk.home.authority_folder / "authority-key.pem",
        lambda disk, _: load_authority(disk.home.authority_folder),
    ),
    Place("epoch file", "pki/epoch_file.py", lambda disk: disk.silo.epoch_path, lambda _, path: Epoch.load(path)),
    Place("silo.yaml", "config/yaml12.py", lambda disk: disk.yaml, lambda _, path: read_silo(path)),
    Place(
        "silo.yaml, to pin", "config/yaml12.py", lambda disk: disk.yaml, lambda _, path: replace_scalar(path, "a", "b")
    ),
    Place("federation.yaml", "config/yaml12.py", lambda disk: disk.home.plan_path, lambda disk, _: disk.home.plan()),
    Place("federation.lock", "config/lock.py", lambda disk: disk.home.lock_path, lambda _, path: read_lock(path)),
    Place(
        "initial adapter, to freeze",
        "aggregator/home.py",
        lambda disk: disk.home.initial_path,
        lambda disk, _: agg_home._locked_files(disk.home, disk.site.contract),
    ),
    Place("contract", "silo/accepted.py", _file("work/contract.cbor"), lambda disk, _: disk.accepted),
    Place(
        "audit",
        "silo/report.py",
        _file("work/audit.json"),
        lambda _, path: load_audit(path.parent, Accepted(None, None)),  # type: ignore[arg-type]
    ),
    Place(
        "note of the ledger",
        "silo/run/privacy_account.py",
        _file("work/ledger.json"),
        lambda disk, _: privacy_account.begun_with(disk.config, Accepted(None, None)),  # type: ignore[arg-type]
    ),
    Place(
        "newest entry",
        "silo/run/privacy_account.py",
        _file("ledger.head"),
        lambda _, path: privacy_account._noted(path),
    ),
    Place(
        "models",
        "silo/run/final_models.py",
        _file("work/adapters/models.json"),
        lambda disk, path: read_models(path.parent, disk.site.contract),
    ),
    Place(
        "adapter",
        "model/state.py",
        _file("work/adapters/best.safetensors"),
        lambda disk, path: load_adapter(path, disk.site.terms),
    ),
    Place(
        "card of an adapter",
        "export/adapter_facts.py",
        _file("work/adapters/best.json"),
        lambda disk, path: read_facts(path.with_suffix(".safetensors"), disk.state),
    ),
    Place(
        "private part",
        "training/unshared_state.py",
        _file("work/private/run.safetensors"),
        lambda _, path: PrivateState(path, b"run"),
    ),
    Place("earlier adapter", "training/prepare.py", _file("last.safetensors"), lambda _, path: prepare._read(path)),
    Place("weights", "features/checkpoint.py", _file("weights.pt"), lambda _, path: sha256_of(path)),
    Place("weights without text", "features/vision_only.py", _file("net.pt"), lambda _, path: vision_only._read(path)),
    Place(
        "model config",
        "features/clip.py",
        _file("tower.json"),
        lambda _, path: clip._config(
            OpenClipModel(name="tower", pretrained="tower.pt", config=path.name, image_window=None), path.parent
        ),
    ),
    Place(
        "shard of features",
        "features/cache.py",
        lambda disk: shard(disk.folder / "cache"),
        lambda disk, _: fresh(disk.folder / "cache"),
    ),
    Place("folder of classes", "data/folder.py", _images, lambda _, path: read_folder(path, ["a"])),
    Place("folder of images", "data/walk.py", _images, lambda _, path: walk.walk(path)),
    Place("image", "data/image.py", _file("1.png"), lambda _, path: load_image(path, None)),
    Place(
        "folder of features",
        "features/cache.py",
        _shards,
        lambda _, path: FeatureCache(path.parent, b"\0", (2,)),
    ),
    Place("patient of DICOM", "data/dicom.py", _file("1.dcm"), lambda _, path: patient_of(path)),
    Place("data report", "training/silo_data.py", _file("data-report.json"), lambda _, path: _holds(path, b"")),
    Place("image without a suffix", "data/image.py", _file("IM0001"), lambda _, path: file_kinds([str(path)]), _FAILS),
    Place("manifest", "data/manifest.py", _file("r.csv"), lambda _, path: read_manifest(path, path.parent, ["a"])),
    Place("features", "data/embeddings.py", _file("features.npz"), lambda _, path: embeddings._read(path)),
    Place("features", "data/embeddings.py", _file("f.safetensors"), lambda _, path: embeddings._read(path)),
    Place("key of the ledger", "privacy/ledger/unit_sets.py", _file("units.key"), lambda _, path: load_key(path)),
    Place("report of a silo", "aggregator/report.py", _file("report.json"), lambda _, path: agg_report._read(path)),
    Place(
        "report to verify",
        "fedclip_cli/privacy.py",
        _file("report.json"),
        lambda _, path: privacy_commands.verify.callback(path, None, None, False),  # type: ignore[misc]
    ),
    Place(
        "model of the coordinator",
        "model/state.py",
        lambda disk: disk.store.blobs.model_path(disk.model),
        lambda disk, _: agg_export._state(disk.store, disk.model, disk.site.terms),
    ),
    Place(
        "vector of a silo at the coordinator",
        "aggregator/blobs.py",
        _file(f"vectors/{bytes(32).hex()}.words"),
        lambda disk, _: Blobs(disk.folder).vector(bytes(32)),
    ),
    Place(
        "locked file at the coordinator",
        "aggregator/blobs.py",
        lambda disk: disk.store.blobs.file_path(bytes.fromhex(disk.site.contract.lock.initial_file)),
        lambda disk, _: disk.store.blobs.copy_model(disk.model, bytes.fromhex(disk.site.contract.lock.initial_file)),
    ),
    Place("text features", "export/folder.py", _file("t.safetensors"), lambda _, path: export_folder._sha256(path)),
    Place("drawn vector", "silo/run/vectors.py", _drawn_vector, _open_vector),
    Place("finished cell", "simulate/store.py", _cell, lambda disk, _: load(disk.folder, "ab")),
]
WRITES = [
    Place("whole file", "files.py", _file("whole"), lambda _, path: write_atomically(path, b"x")),
    Place("output", "files.py", _file("out.csv"), lambda _, path: write_output(path, b"x")),
    Place("folder", "files.py", lambda disk: disk.folder / "new", lambda _, path: make_folder(path, "choose another")),
    Place("download", "transport/client.py", lambda disk: disk.folder / "got", _download),
    Place("body", "transport/bodies.py", lambda disk: disk.folder / "body", _sink),
    Place(
        "drawn images",
        "data/drawn/labs.py",
        lambda disk: disk.folder / "birch",
        lambda _, path: write_lab(path, "birch", 0),
    ),
    Place(
        "features",
        "features/cache.py",
        lambda disk: disk.folder / "c2",
        lambda _, path: FeatureCache(path, b"e", (3,)).add(KEYS, ROWS),
    ),
    Place("trial", "disk.py", lambda disk: disk.folder, lambda _, path: check_disk(path, "choose another")),
    Place(
        "vectors that are not wanted",
        "aggregator/blobs.py",
        lambda disk: disk.folder / "vectors",
        lambda disk, _: Blobs(disk.folder).keep_vectors([]),
    ),
    Place("lock of an identity", "disk.py", _file("epoch.lock"), lambda _, path: lock_epoch(path.with_suffix(""))),
    Place(
        "lock of the server",
        "disk.py",
        lambda disk: disk.home.folder / "state" / "serve.lock",
        lambda disk, _: disk.store.lock(),
    ),
    Place(
        "lock of a workdir",
        "disk.py",
        lambda disk: disk.desk.workdir / "journal.lock",
        lambda disk, _: disk.desk.open().close(),
    ),
]
DATABASES = [
    Place("journal", "silo/run/journal.py", lambda disk: disk.desk.database, lambda disk, _: disk.desk.open().close()),
    Place(
        "receipts",
        "silo/receipts.py",
        lambda disk: disk.desk.database,
        lambda disk, _: read_receipts(disk.desk.workdir, disk.desk.epoch, b"r"),
    ),
    Place(
        "ledger",
        "privacy/ledger/storage.py",
        lambda disk: disk.folder / "ledger" / "ledger.sqlite",
        lambda _, path: LedgerFile(path.parent).close(),
    ),
    Place(
        "state",
        "aggregator/store.py",
        lambda disk: disk.home.folder / "state" / "aggregator.sqlite",
        lambda _, path: Store(path.parent).close(),
    ),
    Place(
        "state, to read",
        "aggregator/store.py",
        lambda disk: disk.home.folder / "state" / "aggregator.sqlite",
        lambda _, path: Store(path.parent, reading=True).close(),
    ),
    Place("index of images", "features/index.py", _file("index/files.sqlite"), lambda _, path: FileIndex(path).close()),
]
# Modules that open files and stand in no table, and why that is no gap.
ELSEWHERE = {
    "aggregator/app.py": "the answer is 503, and the log has the message: tests/aggregator/test_server_process.py",
    "aggregator/attempt.py": "as in app.py, which calls it",
    "aggregator/serve.py": "looks after its certificate and runs on: tests/aggregator/test_server_certificate.py",
    "silo/run/recovery.py": "renames in the folder whose journal it has just read",
    "simulate/sources.py": "renames what data/drawn/labs.py has just written",
    "silo/run/link.py": "maps what has just been downloaded: tests/silo/test_link.py",
    "privacy/report/software.py": "reads the package's own code",
    "simulate/experiment_cells.py": "reads the package's own code",
    "data/decoding_memory.py": "what a container may use; all of the memory where the system does not say",
    "data/dataset.py": "maps a file of its own without a name",
    "demo/steps.py": "a new folder of the demo's own; the command line tells what the system says",
    "demo/processes.py": "a new folder of the demo's own; the command line tells what the system says",
    "demo/reports.py": "a new folder of the demo's own; the command line tells what the system says",
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    made = Disk(tmp_path_factory.mktemp("disk"))
    yield made
    made.store.close()


@contextmanager
def _refusing(place: Path, number: int) -> Iterator[None]:
    """Whatever opens, makes or removes `place`, or what lies in it or beside it under a name for a moment, fails."""

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(path, str | os.PathLike) and _is_at(Path(path), place):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "PATIENCE", ())
        for module, name in (
            (io, "open"),
            (builtins, "open"),
            (os, "open"),
            (os, "mkdir"),
            (os, "unlink"),
            (os, "listdir"),
            (os, "scandir"),
        ):
            patch.setattr(module, name, guarded(getattr(module, name)))
        yield


def _is_at(path: Path, place: Path) -> bool:
    return (
        path == place
        or place in path.parents
        or (path.parent == place.parent and path.name.startswith(f".{place.name}."))
    )


@contextmanager
def _database_refusing(place: Path, number: int) -> Iterator[None]:
    """SQLite says the same of several faults: what the system says then tells them apart."""
    real = sqlite3.connect

    def connect(name: Any, *arguments: Any, **options: Any) -> sqlite3.Connection:
        if place.name not in str(name):
            opened: sqlite3.Connection = real(name, *arguments, **options)
            return opened
        error = sqlite3.OperationalError("what SQLite says")
        error.sqlite_errorcode = _SQLITE[number]
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", connect)
        if number == errno.EACCES:
            patch.setattr(os, "access", lambda *_arguments, **_options: False)
        if number == errno.EROFS:
            patch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_flag=os.ST_RDONLY))
        if number == errno.ENOLCK:
            patch.setattr(fcntl, "lockf", _without_locks)
        yield


def _without_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def _told(disk: Disk, place: Place, path: Path) -> str:
    with pytest.raises(FedClipError) as caught:
        place.use(disk, path)
    return str(caught.value)


def _ids(places: list[Place]) -> list[str]:
    return [f"{place.module}: {place.name}" for place in places]


@pytest.mark.parametrize(
    ("place", "number"),
    [
        pytest.param(place, number, id=f"{name}: {errno.errorcode[number]}")
        for place, name in zip(READS, _ids(READS), strict=True)
        for number in place.numbers
    ],
)
def test_file_that_the_disk_does_not_give_is_named_with_what_helps(disk: Disk, place: Place, number: int) -> None:
    path = place.path(disk)
    with _refusing(path, number):
        said = _told(disk, place, path)
    assert said.startswith(f"'{path}': cannot be "), said
    assert _WORDS[number] in said
    assert not _NEVER.search(said), said


@pytest.mark.parametrize("number", set(_READS) - set(_FAILS), ids=errno.errorcode.get)
def test_image_that_is_closed_is_left_to_be_read_which_says_why(disk: Disk, number: int) -> None:
    path = disk.file("IM0002")
    with _refusing(path, number):
        assert file_kinds([str(path)]) == [FileKind.CLOSED]


@pytest.mark.parametrize("number", _WRITES, ids=errno.errorcode.get)
@pytest.mark.parametrize("place", WRITES, ids=_ids(WRITES))
def test_file_that_the_disk_does_not_take_is_named_with_what_helps(disk: Disk, place: Place, number: int) -> None:
    path = place.path(disk)
    with _refusing(path, number):
        said = _told(disk, place, path)
    assert said.startswith(f"'{path}"), said
    assert _WORDS[number] in said
    assert not _NEVER.search(said), said


@pytest.mark.parametrize("number", _SQLITE, ids=errno.errorcode.get)
@pytest.mark.parametrize("place", DATABASES, ids=_ids(DATABASES))
def test_database_that_the_disk_refuses_is_not_called_damaged(disk: Disk, place: Place, number: int) -> None:
    disk.desk.open().close()
    path = place.path(disk)
    with _database_refusing(path, number):
        said = _told(disk, place, path)
    assert said.startswith(f"'{path}': "), said
    assert _WORDS[number] in said
    assert not _NEVER.search(said), said
    assert path.is_file()


def test_database_in_a_folder_that_is_gone_is_not_called_closed(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError) as caught:
        sqlite3.connect(tmp_path / "gone" / "journal.sqlite")
    assert meaning_of(caught.value, tmp_path / "gone" / "journal.sqlite") is Meaning.OTHER


def _database_error(kind: type[sqlite3.Error], code: int | None, said: str = "what SQLite says") -> sqlite3.Error:
    error = kind(said)
    if code is not None:
        error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("error", "damage"),
    [
        (_database_error(sqlite3.DatabaseError, sqlite3.SQLITE_CORRUPT), True),
        (_database_error(sqlite3.DatabaseError, sqlite3.SQLITE_CORRUPT_INDEX), True),
        (_database_error(sqlite3.DatabaseError, sqlite3.SQLITE_NOTADB), True),
        (_database_error(sqlite3.DatabaseError, None, "it is no journal"), True),
        (_database_error(sqlite3.OperationalError, sqlite3.SQLITE_ERROR, "no such table: epoch"), True),
        (_database_error(sqlite3.OperationalError, sqlite3.SQLITE_ERROR, "no such column: wire"), True),
        (_database_error(sqlite3.OperationalError, None, "Could not decode to UTF-8 column 'silo'"), True),
        (_database_error(sqlite3.OperationalError, sqlite3.SQLITE_ERROR, "cannot commit"), False),
        (_database_error(sqlite3.OperationalError, sqlite3.SQLITE_NOMEM), False),
        (_database_error(sqlite3.OperationalError, sqlite3.SQLITE_INTERRUPT), False),
        (_database_error(sqlite3.OperationalError, sqlite3.SQLITE_NOLFS), False),
        (_database_error(sqlite3.OperationalError, sqlite3.SQLITE_SCHEMA), False),
        (_database_error(sqlite3.OperationalError, sqlite3.SQLITE_ABORT), False),
        (_database_error(sqlite3.InterfaceError, sqlite3.SQLITE_MISUSE), False),
        (_database_error(sqlite3.IntegrityError, sqlite3.SQLITE_CONSTRAINT), False),
        (_database_error(sqlite3.ProgrammingError, None, "Cannot operate on a closed database."), False),
    ],
    ids=str,
)
def test_only_what_the_file_holds_is_damage_of_a_database(error: sqlite3.Error, damage: bool) -> None:
    assert is_damage(error) is damage


@pytest.mark.parametrize(
    ("names", "meaning"),
    [
        ("ENOLCK EOPNOTSUPP ENOTSUP ENOSYS", Meaning.NO_LOCKS),
        ("EIO ESTALE ENOTCONN EHOSTDOWN EHOSTUNREACH ECONNABORTED ECONNRESET ECONNREFUSED", Meaning.FAILING),
    ],
)
def test_what_shares_and_disks_of_the_network_say_is_known(names: str, meaning: Meaning, tmp_path: Path) -> None:
    for name in names.split():
        number = getattr(errno, name)
        assert meaning_of(OSError(number, os.strerror(number)), tmp_path) is meaning


@pytest.mark.parametrize("place", [place for place in WRITES if "lock of" in place.name], ids=lambda place: place.name)
def test_lock_that_the_disk_cannot_hold_is_not_taken_for_another_process(
    disk: Disk, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", _without_locks)
    said = _told(disk, place, place.path(disk))
    assert _WORDS[errno.ENOLCK] in said
    assert "another" not in said


@pytest.mark.parametrize(
    ("name", "load_it"),
    [
        ("enrolment.json", Identity.load),
        ("key.pem", Identity.load),
        ("epoch", lambda folder: Epoch.load(folder / "epoch")),
    ],
)
def test_identity_of_another_user_is_not_called_damaged(name: str, load_it: Callable[[Path], object]) -> None:
    """Enrolled by root, run as the user of the service: closed by the system itself, where the tests are root's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Site.frozen(Path(folder), 3).identities["lab-a"].folder / name
        for above in (Path(folder), path.parent):
            above.chmod(0o755)
        path.chmod(0)
        with without_privileges(), pytest.raises(FedClipError) as caught:
            load_it(path.parent)
        path.chmod(0o600)
    assert f"'{path}': cannot be read (Permission denied); let the user that runs this" in str(caught.value)
    if os.geteuid() == 0:
        assert "'nobody', read it (it belongs to 'root')" in str(caught.value)


_OPENERS = {
    "open", "read_bytes", "read_text", "write_bytes", "write_text", "iterdir", "memmap", "safe_open", "load_file",
    "save_file", "load_cert_chain", "load_verify_locations", "flock", "lockf", "connect", "scandir", "listdir",
    "open_regular", "unlink", "mkdir", "touch", "rename",
}  # fmt: skip
_NO_FILES = {"Image.open", "resources", "self.open", "self._open", "store.blobs.save_file"}


def _opens(path: Path) -> bool:
    """Whether a module calls what opens a file, a database or a lock."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            moves = called.endswith(".replace") and len(node.args) == 1 and not node.keywords  # of a path, not a text
            if (moves or called.split(".")[-1] in _OPENERS) and not any(called.startswith(name) for name in _NO_FILES):
                return True
    return False


def test_every_module_that_opens_files_stands_in_a_table() -> None:
    package, programs = ROOT / "fedclip_secure", ROOT / "cli"
    found = {
        str(path.relative_to(base))
        for base in (package, programs)
        for path in base.rglob("*.py")
        if "secagg" not in path.parts and _opens(path)  # `open` is of sealed messages there, and it does no I/O
    }
    known = {place.module for place in (*READS, *WRITES, *DATABASES)}
    assert found - known - set(ELSEWHERE) == set(), "give what opens files there a place in a table above"
    assert set(ELSEWHERE) - found == set(), "these open no files any more"
    assert len(known) > 25, "the tables hold too little"
