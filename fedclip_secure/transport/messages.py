"""What travels in HTTP bodies beside the signed messages of a round, and the one way to read it at the edge."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedclip_secure import canonical
from fedclip_secure.errors import ProtocolError
from fedclip_secure.names import NAME_PATTERN
from fedclip_secure.pki.invitation import SECRET_BYTES

M = TypeVar("M", bound=BaseModel)
_FAULTS, _FAULTS_LENGTH = 5, 500  # named, and characters of them: whoever sent the message chose its keys


class Message(BaseModel):
    """Frozen; converts nothing; knows every key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def encode(self) -> bytes:
        """Canonical CBOR."""
        return canonical.encode(self.model_dump())


class EnrolRequest(Message):
    """`POST /v1/enrol`: the invitation's secret and a PKCS #10 request."""

    token: Annotated[bytes, Field(min_length=SECRET_BYTES, max_length=SECRET_BYTES)] = Field(repr=False)
    csr: Annotated[bytes, Field(min_length=1, max_length=4096)]  # DER


class EnrolAnswer(Message):
    """The certificate for the key of the request."""

    certificate: Annotated[bytes, Field(min_length=1, max_length=8192)]  # DER
    federation: Annotated[str, Field(pattern=NAME_PATTERN)]


Wire = Annotated[bytes, Field(min_length=1, max_length=2**20)]  # one signed message
Pair = Annotated[list[Wire], Field(min_length=2, max_length=2)]  # two ciphertexts: shares, salt


class OpeningAnswer(Message):
    """`GET /v1/opening`: an attempt to join, or why there is none."""

    state: Literal["open", "waiting", "finished", "halted"]
    reason: Annotated[str, Field(max_length=2000)] = ""
    opening: Wire | None = None  # signed ServerAd
    attempt: int = 0
    results: list[Wire] = Field(default_factory=list)  # of the round before
    void: Wire | None = None  # the aggregator's signed word that a sum was out of bounds


class WireList(Message):
    """Signed messages of one stage, in the order of their senders."""

    messages: list[Wire]


class SharesRequest(Message):
    """`POST .../bundles`: stage 1 of one silo."""

    bundles: Wire
    ciphertexts: dict[str, Pair]  # by peer


class SharesAnswer(Message):
    """`GET .../bundles`: U2, and what its members sealed to the one who asks."""

    bundles: list[Wire]
    inbox: dict[str, Pair]  # by sender


def parse(model: type[M], data: bytes) -> M:
    """Decode canonical CBOR and check it against `model`.

    Raises:
        ProtocolError: `encoding` where the bytes are not canonical CBOR, `message` where a field is missing,
            unknown, or of another type or size; names each.
    """
    try:
        return model.model_validate(canonical.decode(data))
    except ValidationError as error:
        # Neither values nor pydantic's own text of them: a field may be a secret.
        faults = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'the message'}: {item['msg'].lower()}"
            for item in error.errors(include_input=False, include_url=False)[:_FAULTS]
        )[:_FAULTS_LENGTH]
        raise ProtocolError("message", f"not a valid {model.__name__}: {faults}") from error
