"""Problem details (RFC 9457): how the server says no, and how a silo reads it."""

from __future__ import annotations

from http import HTTPStatus

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

CONTENT_TYPE = "application/problem+json"
_URN = "urn:fedclip:problem:"


class Problem(BaseModel):
    """One refusal. `type` is stable and for programs, `detail` is for the person at the other end."""

    # RFC 9457 section 3.2: a reader ignores members that it does not know.
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    type: str = Field(default="about:blank", max_length=200)
    title: str = Field(default="", max_length=200)
    status: int = Field(ge=400, le=599)
    detail: str = Field(default="", max_length=2000)

    @field_validator("type", "title", "detail")
    @classmethod
    def _printable(cls, text: str) -> str:
        """The text ends on a terminal: a server must not be able to steer it."""
        return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)

    @classmethod
    def of(cls, code: str, status: int, detail: str) -> Problem:
        """A problem of ours; `code` as in `token-used`, `detail` the fact and the remedy."""
        return cls(type=_URN + code, title=HTTPStatus(status).phrase, status=status, detail=detail)

    @property
    def code(self) -> str:
        """The last part of a type of ours; another type whole."""
        return self.type.removeprefix(_URN)

    def encode(self) -> bytes:
        """The body of the answer, as `application/problem+json`."""
        return self.model_dump_json().encode()


def parse_problem(content_type: str, body: bytes) -> Problem | None:
    """The problem that an answer carries; None for a proxy's HTML page or whatever else is no problem."""
    if content_type.partition(";")[0].strip().lower() != CONTENT_TYPE:
        return None
    try:
        return Problem.model_validate_json(body)
    except ValidationError:
        return None
