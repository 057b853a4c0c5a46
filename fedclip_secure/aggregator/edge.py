"""The edge of the HTTP server: bodies with limits, numbers and digests in paths, refusals as problems."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from fedclip_secure.disk import refused
from fedclip_secure.errors import DataError, FedClipError, ProtocolError, TransportError, TrustError
from fedclip_secure.transport.problems import CONTENT_TYPE, Problem

STALL = 60.0  # seconds without a byte before a body is given up
_MAX_DETAIL = 2000  # characters of a problem
_STATUS = {
    "late": 409, "early": 409, "left-out": 409, "differs": 409, "ended": 410, "length": 413, "size": 413, "busy": 503,
}  # fmt: skip
_log = logging.getLogger(__name__)


async def read_body(request: web.Request, limit: int) -> bytes:
    """The whole body, of at most `limit` bytes."""
    check_announced(request, limit)
    body = bytearray()
    async with asyncio.timeout(STALL):
        while piece := await request.content.readany():
            body += piece
            if len(body) > limit:
                raise ProtocolError("size", f"the body has more than {limit} bytes")
    return bytes(body)


def check_announced(request: web.Request, limit: int) -> None:
    """Refuse a body by its announced length, before any of it is read."""
    if (request.content_length or 0) > limit:
        raise ProtocolError("size", f"the body has {request.content_length} bytes, at most {limit} are read")


def digest_of(request: web.Request) -> bytes:
    """The SHA-256 that a path names."""
    try:
        digest = bytes.fromhex(request.match_info["digest"])
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise ProtocolError("message", "a digest is 64 hex digits")
    return digest


def number(text: str) -> int:
    """A small natural number of a path or query."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise ProtocolError("message", f"{text[:20]!r} is not a number")
    return int(text)


@web.middleware
async def problems(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every refusal as RFC 9457 problem details."""
    try:
        return await handler(request)
    except web.HTTPNoContent:
        return web.Response(status=204)
    except web.HTTPException as error:
        code = {413: "size", 404: "not-found"}.get(error.status, "http")
        problem = Problem.of(code, error.status, error.text or error.reason)
    except TimeoutError:
        problem = Problem.of("stalled", 408, f"no data for {STALL:.0f} s")
    except (ConnectionError, web.RequestPayloadError):  # nobody is there to read this
        problem = Problem.of("truncated", 400, "the connection ended before the body did")
    except OSError as error:
        problem = _disk(request, refused(error, error.filename or "the state folder", "be used"))
    except DataError as error:
        problem = _disk(request, str(error))
    except FedClipError as error:
        problem = _problem_of(error)
    except Exception:  # a fault of ours: the log has it, the caller learns no more than that
        _log.exception("%s %s failed", request.method, request.path)
        problem = Problem.of("internal", 500, "the aggregator failed; its log says why")
    return web.Response(body=problem.encode(), status=problem.status, content_type=CONTENT_TYPE)


def _disk(request: web.Request, fault: str) -> Problem:
    """The silo keeps what it has and tries again; paths of this machine are not its business."""
    _log.error("%s %s: %s", request.method, request.rel_url.raw_path, fault)
    return Problem.of("storage", 503, "the aggregator's disk refuses; its log says why")


def _problem_of(error: FedClipError) -> Problem:
    text = str(error)[:_MAX_DETAIL]
    match error:
        case ProtocolError():
            return Problem.of(error.code, _STATUS.get(error.code, 400), text)
        case TrustError():
            return Problem.of("refused", 403, text)
        case TransportError():
            return Problem.of(error.code or "http", error.status or 400, text)
        case _:
            return Problem.of("internal", 500, text)
