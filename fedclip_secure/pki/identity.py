"""One silo's identity: a folder with its key, its certificate, and the authority that issued it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from pydantic import BaseModel, ConfigDict, ValidationError

from fedclip_secure.disk import refused
from fedclip_secure.errors import DataError, TrustError
from fedclip_secure.files import write_atomically
from fedclip_secure.pki.certificates import read_certificate, silo_name, write_certificate
from fedclip_secure.pki.epoch_file import Epoch
from fedclip_secure.pki.keys import SigningKey, make_private_folder, spki_sha256

KEY = "key.pem"
CERTIFICATE = "certificate.pem"
AUTHORITY = "authority.pem"
ENROLMENT = "enrolment.json"
EPOCH = "epoch"


class Enrolment(BaseModel):
    """The whole of `enrolment.json`: who this silo is, and to whom."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    server: str  # https://HOST or https://HOST:PORT
    federation: str


@dataclass(frozen=True, slots=True)
class Identity:
    """An enrolled silo. `folder` holds the files of this module; the key is only ever read there."""

    folder: Path
    enrolment: Enrolment
    key: SigningKey
    certificate: x509.Certificate
    authority: x509.Certificate

    def __post_init__(self) -> None:
        check_certificate(self.certificate, self.authority, self.key, self.enrolment.name)

    @classmethod
    def load(cls, folder: Path) -> Identity:
        """Read what `enroll` wrote, and check that it holds together and is valid today.

        Raises:
            TrustError: not enrolled; a file is missing, damaged or open to others; the certificate has expired,
                is for another key or name, or was not issued by the authority beside it.
            DataError: the disk refuses.
        """
        enrolment = read_enrolment(folder)
        if enrolment is None:
            raise TrustError(
                f"'{folder}': holds no identity; run `fedclip-silo enroll` with the coordinator's invitation"
            )
        key = SigningKey.load(folder / KEY)
        certificate, authority = read_certificate(folder / CERTIFICATE), read_certificate(folder / AUTHORITY)
        try:
            return cls(folder, enrolment, key, certificate, authority)
        except TrustError as error:
            raise TrustError(f"'{folder}': {error}") from error

    def save(self) -> None:
        """Write certificate, authority and enrolment; the key is there already. The last file completes the identity.

        Raises:
            DataError: the disk refuses.
        """
        write_certificate(self.folder / AUTHORITY, self.authority)
        write_certificate(self.folder / CERTIFICATE, self.certificate)
        write_atomically(self.folder / ENROLMENT, f"{self.enrolment.model_dump_json(indent=2)}\n".encode())

    @property
    def name(self) -> str:
        """This silo's name in the roster."""
        return self.enrolment.name

    @property
    def server(self) -> str:
        """The coordinator's URL."""
        return self.enrolment.server

    @property
    def not_after(self) -> datetime:
        """When the certificate ends, in UTC."""
        return self.certificate.not_valid_after_utc

    @property
    def epoch_path(self) -> Path:
        """Where the silo's epoch file lies: away from its journal, so that a backup of one is not one of both."""
        return self.folder / EPOCH

    def sign(self, data: bytes) -> bytes:
        """An Ed25519 signature; 64 bytes."""
        return self.key.sign(data)


def create_key(folder: Path) -> SigningKey:
    """The key of this folder, made now unless it is there.

    An enrolment that broke off must ask for the same key again, so that the server can give the same answer.

    Raises:
        TrustError: the key that is there cannot be used.
        DataError: the disk refuses.
    """
    path = folder / KEY
    if path.exists():
        return SigningKey.load(path)
    make_private_folder(folder)
    Epoch().save(folder / EPOCH)  # first: a key whose epoch file is missing has lost it
    return SigningKey.create(path)


def signing_request(key: SigningKey, name: str) -> bytes:
    """A PKCS #10 request (RFC 2986) in DER; equal for equal key and name, since Ed25519 is deterministic."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key.private, None)
    return request.public_bytes(Encoding.DER)


def read_enrolment(folder: Path) -> Enrolment | None:
    """What `enrolment.json` says; None where the folder has none.

    Raises:
        TrustError: damaged. DataError: the disk refuses.
    """
    path = folder / ENROLMENT
    try:
        return Enrolment.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(refused(error, path, otherwise="put back what `fedclip-silo enroll` wrote there")) from error
    except ValidationError as error:
        raise TrustError(f"'{path}': is damaged; move it away and run `fedclip-silo enroll` again") from error


def check_certificate(certificate: x509.Certificate, authority: x509.Certificate, key: SigningKey, name: str) -> None:
    """Check that `authority` issued `certificate` to `name` for `key`, and that it is valid now.

    Raises:
        TrustError: says which of these is not so.
    """
    issued_to = silo_name(certificate, authority)
    if issued_to != name:
        raise TrustError(f"the certificate was issued to {issued_to}, not to {name}; enrol again")
    if spki_sha256(certificate) != spki_sha256(key.public):
        raise TrustError(f"the certificate is not for the key in {KEY}; restore that key, or enrol again")
