from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclip_secure import canonical
from fedclip_secure.errors import ProtocolError
from fedclip_secure.transport.messages import EnrolRequest, parse
from fedclip_secure.transport.problems import CONTENT_TYPE, Problem, parse_problem

SECRET = bytes(range(100, 132))


def test_message_survives_the_wire() -> None:
    request = EnrolRequest(token=SECRET, csr=b"csr")
    assert parse(EnrolRequest, request.encode()) == request


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"token": SECRET}, "csr: field required"),
        ({"token": SECRET[1:], "csr": b"x"}, "token: data should have at least 32 bytes"),
        ({"token": SECRET, "csr": b""}, "csr: data should have at least 1 byte"),
        ({"token": SECRET, "csr": bytes(4097)}, "csr: data should have at most 4096 bytes"),
        ({"token": SECRET, "csr": "text"}, "csr: input should be a valid bytes"),
        ({"token": SECRET, "csr": b"x", "name": "st-marys"}, "name: extra inputs are not permitted"),
    ],
)
def test_faulty_field_is_named_and_its_value_is_not(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ProtocolError, match=named) as caught:
        parse(EnrolRequest, canonical.encode(fields))
    assert caught.value.code == "message"
    assert repr(SECRET)[2:10] not in str(caught.value)


@pytest.mark.parametrize("value", [None, [], "text", 1, {}])
def test_other_shapes_are_no_message(value: object) -> None:
    with pytest.raises(ProtocolError, match="not a valid EnrolRequest"):
        parse(EnrolRequest, canonical.encode(value))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse(EnrolRequest, data)


def test_secret_does_not_show_in_messages() -> None:
    assert repr(SECRET)[2:10] not in repr(EnrolRequest(token=SECRET, csr=b"x"))


def test_problem_survives_the_wire() -> None:
    problem = Problem.of("token-used", 409, "the token was used on Monday; ask for a new invitation")
    assert problem.type == "urn:fedclip:problem:token-used"
    read = parse_problem(f"{CONTENT_TYPE}; charset=utf-8", problem.encode())
    assert read == problem
    assert problem.code == "token-used"


def test_unknown_members_of_a_problem_are_ignored() -> None:
    read = parse_problem(CONTENT_TYPE, b'{"status": 404, "title": "Not Found", "instance": "/x"}')
    assert read is not None
    assert (read.status, read.title, read.code) == (404, "Not Found", "about:blank")


def test_problem_cannot_steer_a_terminal() -> None:
    read = parse_problem(CONTENT_TYPE, b'{"status": 400, "detail": "\\u001b[2Jgone\\u202e"}')
    assert read is not None
    assert read.detail == "?[2Jgone?"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [("text/html", b"<html>"), (CONTENT_TYPE, b"<html>"), (CONTENT_TYPE, b"{}"), (CONTENT_TYPE, b'{"status": 200}')],
)
def test_what_is_no_problem_is_not_read_as_one(content_type: str, body: bytes) -> None:
    assert parse_problem(content_type, body) is None
