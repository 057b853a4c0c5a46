"""Private keys in files, the Ed25519 key that signs, and the hash that stands for a public key."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedclip_secure.disk import refused
from fedclip_secure.errors import DataError, TrustError
from fedclip_secure.files import make_folder, write_atomically

PrivateKey = Ed25519PrivateKey | EllipticCurvePrivateKey
PublicKey = Ed25519PublicKey | EllipticCurvePublicKey


@dataclass(frozen=True, slots=True)
class SigningKey:
    """An Ed25519 key (RFC 8032) of a silo or of the aggregator. The private half never leaves its file."""

    private: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def create(cls, path: Path) -> SigningKey:
        """Make a key from the OS's randomness and write it to `path`, readable by its owner alone.

        Raises:
            TrustError: there is a key already.
            DataError: the disk refuses.
        """
        if path.exists():
            raise TrustError(
                f"'{path}': there is a key already, and the roster may name it; move it away to make another"
            )
        key = cls(Ed25519PrivateKey.generate())
        write_private_key(path, key.private)
        return key

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read the key that `create` wrote.

        Raises:
            TrustError: missing, damaged, of another kind, or open to others on this machine.
        """
        private = read_private_key(path)
        if not isinstance(private, Ed25519PrivateKey):
            raise TrustError(f"'{path}': is not an Ed25519 key; restore the one that was made here")
        return cls(private)

    def sign(self, data: bytes) -> bytes:
        """64 bytes; equal data gives an equal signature."""
        return self.private.sign(data)

    @property
    def public(self) -> Ed25519PublicKey:
        """The half that others may have."""
        return self.private.public_key()

    @property
    def public_bytes(self) -> bytes:
        """The public key as RFC 8032 encodes it; 32 bytes. What a roster holds."""
        return self.public.public_bytes_raw()


def spki_sha256(key: PublicKey | x509.Certificate) -> bytes:
    """SHA-256 of a key's SubjectPublicKeyInfo in DER (RFC 5280 section 4.1.2.7); 32 bytes.

    It stays the same when the certificate is renewed.
    """
    public = key.public_key() if isinstance(key, x509.Certificate) else key
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).digest()


def write_private_key(path: Path, key: PrivateKey) -> None:
    """Write `key` as unencrypted PKCS #8 PEM: mode 0600 from the first byte, and its folder 0700 if made here.

    Raises:
        DataError: the disk refuses.
    """
    make_private_folder(path.parent)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_atomically(path, pem, mode=0o600)


def make_private_folder(folder: Path) -> None:
    """Make a folder, 0700, where it is missing.

    Raises:
        DataError: the disk refuses.
    """
    make_folder(folder, "choose another folder", 0o700)


def read_private_key(path: Path) -> PrivateKey:
    """Read an Ed25519 or elliptic-curve key.

    Raises:
        TrustError: missing, damaged, of another kind, or open to others on this machine.
        DataError: the disk refuses.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            pem = file.read()
    except FileNotFoundError as error:
        raise TrustError(f"'{path}': the private key is missing; restore it") from error
    except OSError as error:
        raise DataError(refused(error, path, otherwise="restore the private key there")) from error
    if mode & 0o077:
        raise TrustError(
            f"'{path}': others on this machine may use this private key (mode {mode:04o}); run `chmod 600 {path}`, "
            f"and replace the key if somebody may have copied it"
        )
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise TrustError(
            f"'{path}': is not an unencrypted PEM private key; restore the one that was made here"
        ) from error
    if not isinstance(key, PrivateKey):
        raise TrustError(f"'{path}': is a key of another kind; restore the one that was made here")
    return key
