"""The one-time token that lets a silo enrol, and tells it which authority to believe before it connects."""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from dataclasses import dataclass, field

from fedclip_secure import canonical
from fedclip_secure.errors import ConfigError, ProtocolError
from fedclip_secure.names import AGGREGATOR, NAME_PATTERN

_PREFIX = "fedclip-"
_CHECKSUM_BYTES = 4  # one typo in 2^32 passes for a token that the server does not know
SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class Invitation:
    """What the coordinator hands to one silo, by a channel that nobody else reads."""

    name: str
    secret: bytes = field(repr=False)  # 32 bytes; whoever has it may enrol as `name`, once
    authority_fingerprint: bytes  # SHA-256 of the authority's certificate, 32 bytes

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME_PATTERN, self.name) or self.name == AGGREGATOR:
            raise ConfigError(
                f"{self.name!r} cannot be a silo's name; use a-z, 0-9 and -, at most 63, not {AGGREGATOR!r}"
            )
        if len(self.secret) != SECRET_BYTES or len(self.authority_fingerprint) != 32:
            raise ConfigError("an invitation holds a secret and a fingerprint of 32 bytes each; ask for a new one")

    @classmethod
    def create(cls, name: str, authority_fingerprint: bytes) -> Invitation:
        """A fresh invitation, its secret from the OS.

        Raises:
            ConfigError: `name` cannot be a silo's.
        """
        return cls(name, secrets.token_bytes(SECRET_BYTES), authority_fingerprint)

    def encode(self) -> str:
        """The token as a person passes it on: about 150 characters without spaces."""
        data = canonical.encode([self.name, self.secret, self.authority_fingerprint, self._checksum()])
        return _PREFIX + base64.urlsafe_b64encode(data).decode().rstrip("=")

    @classmethod
    def decode(cls, token: str) -> Invitation:
        """Read a token; line breaks that a mail program put in do no harm.

        Raises:
            ConfigError: not a token, or cut short or mistyped. A used token is whole: only the server can tell.
        """
        text = "".join(token.split())
        if not text.startswith(_PREFIX):
            raise ConfigError(
                f"the token must begin with {_PREFIX!r}; copy the whole line that `fedclip-agg invite` wrote"
            )
        try:
            name, secret, fingerprint, checksum = _fields(text.removeprefix(_PREFIX))
            invitation = cls(name, secret, fingerprint)
        except (ConfigError, ProtocolError, ValueError, TypeError) as error:
            raise ConfigError(_MISTYPED) from error
        if checksum != invitation._checksum():
            raise ConfigError(_MISTYPED)
        return invitation

    def secret_hash(self) -> bytes:
        """What the server stores; 32 bytes."""
        return secret_hash(self.secret)

    def _checksum(self) -> bytes:
        fields = (self.name, self.secret, self.authority_fingerprint)
        return canonical.digest("fedclip/v1/invitation-checksum", *fields)[:_CHECKSUM_BYTES]


_MISTYPED = "the token is cut short or mistyped; copy the whole line that `fedclip-agg invite` wrote"


def secret_hash(secret: bytes) -> bytes:
    """What the server stores in place of a token's secret; 32 bytes. 256 random bits need no salt and no stretching."""
    return canonical.digest("fedclip/v1/invitation-secret", secret)


def _fields(text: str) -> tuple[str, bytes, bytes, bytes]:
    """Raises ValueError or ProtocolError for whatever is not four fields of the right types."""
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError("not base64url") from error
    match canonical.decode(data):
        case [str(name), bytes(secret), bytes(fingerprint), bytes(checksum)]:
            return name, secret, fingerprint, checksum
        case _:
            raise ValueError("not an invitation")
