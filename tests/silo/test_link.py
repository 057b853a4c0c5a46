from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from aiohttp import web

from fedclip_secure.errors import ModelError, ProtocolError, TransportError, TrustError
from fedclip_secure.model.state import AdapterState, Layout
from fedclip_secure.pki.identity import Identity
from fedclip_secure.secagg.ring import VectorLayout
from fedclip_secure.secagg.terms import Terms
from fedclip_secure.silo.run.link import LeftOutError, Link, present
from fedclip_secure.transport.bodies import Chunks
from fedclip_secure.transport.client import MAX_BODY, Client
from fedclip_secure.transport.faults import Answer
from fedclip_secure.transport.messages import OpeningAnswer
from fedclip_secure.transport.tls import client_context
from tests.fakes import Federation
from tests.peak import SLACK, peak
from tests.transport.loopback import Federation as Authorities
from tests.transport.loopback import Waits, serving


@dataclass
class Server:
    """A client whose server gives these answers in turn; an error is raised. It takes down what was asked."""

    answers: list[Answer | Exception]
    asked: list[tuple[str, str]] = field(default_factory=list)

    async def get(self, path: str, *, params: Mapping[str, str] | None = None, limit: int = MAX_BODY) -> Answer:
        return self._next("GET", path, limit)

    async def download(self, path: str, into: Path, limit: int) -> bool:
        answer = self._next("GET", path, limit)
        if answer.status == 200:
            into.write_bytes(answer.body)
        return answer.status == 200

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


def _link(*answers: Answer | Exception | bytes, folder: Path = Path("/absent")) -> tuple[Link, Server]:
    server = Server([Answer(200, {}, each) if isinstance(each, bytes) else each for each in answers])
    return Link(cast(Client, server), folder), server


def _refusal(code: str) -> TransportError:
    return TransportError("no", status=409, code=code)


def test_file_of_another_hash_is_refused() -> None:
    link, _ = _link(b"right", b"wrong")
    sha256 = hashlib.sha256(b"right").hexdigest()
    assert asyncio.run(link.file(sha256)) == b"right"
    with pytest.raises(TrustError, match="tell the coordinator"):
        asyncio.run(link.file(sha256))


def test_model_of_another_digest_or_shape_is_refused(tmp_path: Path) -> None:
    federation = Federation(3)
    other = AdapterState(federation.model.layout, federation.model.vector + 1)
    answers = federation.model.to_safetensors(), other.to_safetensors(), b"garbage", other.to_safetensors()[:-1]
    link, _ = _link(*answers, folder=tmp_path)
    assert asyncio.run(link.model(federation.model.digest, federation.terms)).digest == federation.model.digest
    bad_file = "the server's model: is not a safetensors file"
    for said in ("sent another model than", bad_file, bad_file):
        with pytest.raises(ModelError, match=said):
            asyncio.run(link.model(federation.model.digest, federation.terms))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bytes_off", [-4, -1])
def test_sum_and_vector_of_another_length_are_refused(tmp_path: Path, bytes_off: int) -> None:
    terms = Federation(3).terms
    short = bytes(4 * terms.vector.words + bytes_off)
    link, _ = _link(short, short, folder=tmp_path)
    for name, words in (("the sum", link.sum(1, terms)), ("the vector of silo-001", link.vector(1, "silo-001", terms))):
        with pytest.raises(ProtocolError, match=f"{name} has {len(short)} bytes, the plan's vector") as caught:
            asyncio.run(words)
        assert caught.value.code == "length"
    assert list(tmp_path.iterdir()) == []


def test_sum_is_little_endian_words_that_nobody_can_change(tmp_path: Path) -> None:
    terms = Federation(3).terms
    words = np.arange(terms.vector.words, dtype="<u4") + 2**24
    link, _ = _link(words.tobytes(), folder=tmp_path)
    arrived = asyncio.run(link.sum(1, terms))
    assert list(tmp_path.iterdir()) == []
    assert arrived.dtype == np.uint32
    assert arrived.tolist() == words.tolist()
    with pytest.raises(ValueError, match="read-only"):
        arrived[0] = 1


def test_sum_stays_as_it_is_while_the_next_one_arrives(tmp_path: Path) -> None:
    terms = Federation(3).terms
    link, _ = _link(*(bytes([byte]) * 4 * terms.vector.words for byte in (1, 2)), folder=tmp_path)
    first, second = asyncio.run(link.sum(1, terms)), asyncio.run(link.sum(2, terms))
    assert (set(first.tolist()), set(second.tolist())) == ({0x01010101}, {0x02020202})


def test_long_poll_is_repeated_until_there_is_an_answer(tmp_path: Path) -> None:
    terms, not_yet = Federation(3).terms, Answer(204, {}, b"")
    link, server = _link(not_yet, not_yet, b"x", not_yet, bytes(4 * terms.vector.words), folder=tmp_path)
    assert asyncio.run(link.receive(7, "agrees")) == b"x"
    assert not asyncio.run(link.sum(7, terms)).any()
    assert server.asked == [("GET", "/v1/attempts/7/agrees")] * 3 + [("GET", "/v1/attempts/7/sum")] * 2


def test_stage_that_is_not_open_yet_though_this_silo_has_seen_it_closed_means_a_restored_server() -> None:
    link, _ = _link(*[_refusal("early")] * 2)
    for call in (link.send(1, "bundles", b"x"), link.receive(1, "key-ads")):
        with pytest.raises(TrustError, match="restored from an older backup"):
            asyncio.run(call)


@pytest.mark.parametrize("code", ["late", "left-out", "ended"])
def test_refusal_of_a_passed_stage_means_left_out_whatever_was_sent(code: str) -> None:
    link, _ = _link(*[_refusal(code)] * 4)
    with pytest.raises(LeftOutError):
        asyncio.run(link.send(1, "key-ads", b"x"))
    with pytest.raises(LeftOutError):
        asyncio.run(link.receive(1, "key-ads"))
    with pytest.raises(LeftOutError):
        asyncio.run(link.send_upload(1, lambda: [b"abc", b"de"], 5))
    with pytest.raises(LeftOutError):
        asyncio.run(link.sum(1, Federation(3).terms))


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
        asyncio.run(link.sum_proof(1))
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


def _fetch_model(url: str, folder: Path, digest: bytes, terms: Terms) -> None:
    async def main() -> None:
        async with Client(url, client_context(Identity.load(folder)), Waits()) as client:
            await Link(client, folder).model(digest, terms)

    asyncio.run(main())


def _fetch_sum(url: str, folder: Path, terms: Terms) -> None:
    async def main() -> None:
        async with Client(url, client_context(Identity.load(folder)), Waits()) as client:
            assert int((await Link(client, folder).sum(1, terms))[-1]) == 7

    asyncio.run(main())


def test_silo_fetches_a_large_model_and_sum_in_little_more_memory_than_one_of_them(tmp_path: Path) -> None:
    layout = Layout(tuple((f"block.{i}", (2_000_000,)) for i in range(4)))  # 32 MB
    model = AdapterState(layout, np.random.default_rng().normal(size=layout.size).astype(np.float32))
    vector = VectorLayout(layout.size, counts=False)
    terms = replace(Federation(3).terms, layout=layout, vector=vector)
    model.to_file(tmp_path / model.digest.hex())
    np.full(vector.words, 7, dtype="<u4").tofile(tmp_path / "sum")
    authority = Authorities.create(tmp_path)
    silo = authority.enrol("st-marys").folder

    async def file(request: web.Request) -> web.FileResponse:
        return web.FileResponse(tmp_path / request.path.rpartition("/")[2])

    async def main() -> list[int]:
        async with serving(file, authority.server_context()) as port:
            url = f"https://127.0.0.1:{port}"
            return [
                await asyncio.to_thread(peak, _fetch_model, url, silo, model.digest, terms),
                await asyncio.to_thread(peak, _fetch_sum, url, silo, terms),
            ]

    of_model, of_sum = asyncio.run(main())
    assert of_model < 1.25 * model.vector.nbytes + SLACK
    assert of_sum < model.vector.nbytes / 2 + SLACK  # its pages are read from the file where they are looked at
