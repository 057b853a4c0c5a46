from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pytest

from fedclip_secure.errors import ModelError, ProtocolError, TransportError, TrustError
from fedclip_secure.model.state import AdapterState
from fedclip_secure.silo.link import LeftOutError, Link, present
from fedclip_secure.transport.bodies import Chunks
from fedclip_secure.transport.client import MAX_BODY, Client
from fedclip_secure.transport.faults import Answer
from fedclip_secure.transport.messages import OpeningAnswer, WireList
from tests.fakes import Federation


@dataclass
class Server:
    """A client whose server gives these answers in turn; an error is raised. It takes down what was asked."""

    answers: list[Answer | Exception]
    asked: list[tuple[str, str]] = field(default_factory=list)

    async def get(self, path: str, *, params: Mapping[str, str] | None = None, limit: int = MAX_BODY) -> Answer:
        return self._next("GET", path, limit)

    async def post(self, path: str, body: bytes) -> Answer:
        return self._next("POST", path, MAX_BODY)

    async def put_stream(self, path: str, chunks: Chunks, length: int) -> Answer:
        assert sum([len(chunk) async for chunk in chunks()]) == length
        assert sum([len(chunk) async for chunk in chunks()]) == length, "a retry needs the same bytes"
        return self._next("PUT", path, MAX_BODY)

    def _next(self, method: str, path: str, limit: int) -> Answer:
        self.asked.append((method, path))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert len(answer.body) <= limit
        return answer


def _link(*answers: Answer | Exception | bytes) -> tuple[Link, Server]:
    server = Server([Answer(200, {}, each) if isinstance(each, bytes) else each for each in answers])
    return Link(cast(Client, server)), server


def _refusal(code: str) -> TransportError:
    return TransportError("no", status=409, code=code)


def test_file_of_another_hash_is_refused() -> None:
    link, _ = _link(b"right", b"wrong")
    sha256 = hashlib.sha256(b"right").hexdigest()
    assert asyncio.run(link.file(sha256)) == b"right"
    with pytest.raises(TrustError, match="tell the coordinator"):
        asyncio.run(link.file(sha256))


def test_model_of_another_digest_or_shape_is_refused() -> None:
    federation = Federation(3)
    other = AdapterState(federation.model.layout, federation.model.vector + 1)
    link, _ = _link(federation.model.to_safetensors(), other.to_safetensors(), b"garbage")
    assert asyncio.run(link.model(federation.model.digest, federation.terms)).digest == federation.model.digest
    for said in ("sent another model than", "the server's model: is not a safetensors file"):
        with pytest.raises(ModelError, match=said):
            asyncio.run(link.model(federation.model.digest, federation.terms))


@pytest.mark.parametrize("bytes_off", [-4, -1])
def test_sum_of_another_length_is_refused(bytes_off: int) -> None:
    terms = Federation(3).terms
    link, _ = _link(bytes(4 * terms.vector.words + bytes_off))
    with pytest.raises(ProtocolError) as caught:
        asyncio.run(link.sum(1, terms))
    assert caught.value.code == "length"


def test_sum_is_little_endian_words() -> None:
    terms = Federation(3).terms
    words = np.arange(terms.vector.words, dtype="<u4")
    link, _ = _link(words.tobytes())
    assert asyncio.run(link.sum(1, terms)).tolist() == words.tolist()


def test_long_poll_is_repeated_until_there_is_an_answer() -> None:
    link, server = _link(Answer(204, {}, b""), Answer(204, {}, b""), WireList(messages=[b"x"]).encode())
    assert asyncio.run(link.messages(7, "agrees")) == [b"x"]
    assert server.asked == [("GET", "/v1/attempts/7/agrees")] * 3


@pytest.mark.parametrize("code", ["late", "left-out", "ended", "early"])
def test_refusal_of_a_passed_stage_means_left_out_whatever_was_sent(code: str) -> None:
    link, _ = _link(*[_refusal(code)] * 3)
    with pytest.raises(LeftOutError):
        asyncio.run(link.send(1, "key-ads", b"x"))
    with pytest.raises(LeftOutError):
        asyncio.run(link.messages(1, "key-ads"))
    with pytest.raises(LeftOutError):
        asyncio.run(link.send_upload(1, [b"abc", b"de"]))


@pytest.mark.parametrize("code", ["differs", "signature", None])
def test_other_refusals_are_errors(code: str | None) -> None:
    error = TransportError("no", status=409, code=code)
    link, _ = _link(error, error)
    with pytest.raises(TransportError):
        asyncio.run(link.send(1, "key-ads", b"x"))
    with pytest.raises(TransportError):
        asyncio.run(link.send_if_in_time(1, "agrees", b"x"))


def test_message_that_the_others_did_without_is_no_failure() -> None:
    link, server = _link(_refusal("late"), _refusal("ended"))
    asyncio.run(link.send_if_in_time(1, "agrees", b"x"))
    asyncio.run(link.send_if_in_time(1, "unmasks", b"x"))
    assert len(server.asked) == 2
    left_out, _ = _link(_refusal("left-out"))
    with pytest.raises(LeftOutError):
        asyncio.run(left_out.send_if_in_time(1, "agrees", b"x"))


@pytest.mark.parametrize("body", [b"", b"\xff", b"\xa0", b"\xa1\x68messages\x01", b"<html>"])
def test_answer_that_is_no_message_is_refused(body: bytes) -> None:
    link, _ = _link(body, body)
    with pytest.raises(ProtocolError):
        asyncio.run(link.messages(1, "agrees"))
    with pytest.raises(ProtocolError):
        asyncio.run(link.results(1))


def test_signs_of_life_go_on_after_an_error_and_end_with_the_work() -> None:
    link, server = _link(_refusal("x"), OpeningAnswer(state="waiting").encode())

    async def main() -> None:
        async with present(link, 3):
            await asyncio.sleep(0.01)
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []

    asyncio.run(main())
    assert server.asked == [("GET", "/v1/opening")]
