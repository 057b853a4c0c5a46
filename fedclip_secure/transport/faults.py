"""What went wrong on the way, in words that a person can act on, and whether waiting may help."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import aiohttp
from cryptography import x509

from fedclip_secure.errors import FedClipError, TransportError, TrustError
from fedclip_secure.pki.certificates import ENROL_AGAIN, utc_time
from fedclip_secure.transport.problems import parse_problem
from fedclip_secure.transport.proxy import ENCODED


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server said. Names of headers are matched whatever their case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Fault:
    """Why one try failed."""

    error: FedClipError
    transient: bool  # the same request may well succeed later
    after: float = 0.0  # seconds that the server asked to wait


@dataclass(frozen=True, slots=True)
class Route:
    """Between which hosts: both as `host:port`, `proxy` None for a direct connection."""

    server: str
    proxy: str | None


@dataclass(frozen=True, slots=True)
class Shown:
    """The server's certificate that was refused, and the server's clock; nothing vouches for what a second try told."""

    issuer: str  # fit for a terminal; empty where it cannot be read
    begins: datetime  # UTC
    ends: datetime  # UTC
    clock: datetime | None  # UTC; None where no HTTP server answered

    @classmethod
    def of(cls, certificate: x509.Certificate, clock: datetime | None) -> Shown:
        """Read what matters of `certificate`.

        Raises:
            ValueError: its dates cannot be read.
        """
        return cls(_issuer(certificate), certificate.not_valid_before_utc, certificate.not_valid_after_utc, clock)


_TRANSIENT_STATUS = (429, 502, 503, 504)
_LONGEST_RETRY_AFTER = 300.0  # seconds
_HOST_MISMATCH, _ADDRESS_MISMATCH = 62, 64  # X509_V_ERR_HOSTNAME_MISMATCH, ..._IP_ADDRESS_MISMATCH
_DATES = _NOT_YET_VALID, _EXPIRED = 9, 10  # X509_V_ERR_CERT_NOT_YET_VALID, ..._CERT_HAS_EXPIRED
_SKEW = timedelta(minutes=5)  # two clocks that differ by less agree

# TLS alerts about our certificate (RFC 8446 section 6.2), by OpenSSL's name for them.
_ALERTS = {
    "CERTIFICATE_EXPIRED": f"this silo's certificate has expired, says the server; {ENROL_AGAIN}",
    "CERTIFICATE_REVOKED": "this silo's certificate was revoked; talk to the coordinator",
    "UNKNOWN_CA": "the server belongs to another federation than this silo's certificate; check the server's URL, "
    "or enrol here",
    "CERTIFICATE_REQUIRED": f"the server asks for a certificate and this silo showed none; {ENROL_AGAIN}",
    "BAD_CERTIFICATE": f"the server does not take this silo's certificate; {ENROL_AGAIN}",
    "CERTIFICATE_UNKNOWN": f"the server does not take this silo's certificate; {ENROL_AGAIN}",
}


def _issuer(certificate: x509.Certificate) -> str:
    try:
        name = certificate.issuer.rfc4514_string()[:200]
    except (ValueError, TypeError):  # no valid UTF-8, or no text at all
        return ""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def explain(error: BaseException, route: Route, shown: Shown | None = None) -> Fault:
    """Turn what aiohttp, ssl or the OS raised into a fault; `shown` is the certificate that failed, where known."""
    at = f"{route.server}: "
    for cause in _ssl_errors(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Fault(TrustError(at + _certificate(cause, shown)), transient=False)
        if (found := _handshake(cause, at)) is not None:
            return Fault(found, transient=False)
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return _refused_by_proxy(error.status, route)
    return Fault(TransportError(_unreachable(error, route)), transient=True)


def is_foreign(error: BaseException) -> bool:
    """Whether the server's certificate failed for its issuer, so that its name would help."""
    return any(code not in (_HOST_MISMATCH, _ADDRESS_MISMATCH, *_DATES) for code in _verify_codes(error))


def is_dated(error: BaseException) -> bool:
    """Whether it failed for its dates, so that these and the server's clock would help."""
    return any(code in _DATES for code in _verify_codes(error))


def refusal(answer: Answer, route: Route) -> Fault:
    """Turn an answer that is not a success into a fault."""
    problem = parse_problem(answer.headers.get("Content-Type", ""), answer.body)
    transient = answer.status in _TRANSIENT_STATUS
    if problem is not None:
        said, code = problem.detail or problem.title, problem.code
    else:
        said, code = _without_problem(answer.status, transient), None
    error = TransportError(f"{route.server}: {said}", status=answer.status, code=code)
    return Fault(error, transient, _retry_after(answer.headers.get("Retry-After", "")))


def _without_problem(status: int, transient: bool) -> str:
    if 300 <= status < 400:
        return f"answered with a redirect (HTTP {status}), which is never followed; is it the coordinator's URL?"
    if transient:
        return f"cannot serve us now (HTTP {status})"
    return f"answered HTTP {status} and no reason; is it a fedclip-agg of this version?"


def _retry_after(value: str) -> float:
    """Seconds (RFC 9110 section 10.2.3); the form with a date is not used by our server."""
    return min(float(value), _LONGEST_RETRY_AFTER) if value.isascii() and value.isdigit() else 0.0


def _ssl_errors(error: BaseException) -> Iterator[ssl.SSLError]:
    """What OpenSSL raised, out of what aiohttp made of it: aiohttp's own SSL errors lack reason and code."""
    seen: list[BaseException] = []
    waiting: list[object] = [error]
    while waiting:
        item = waiting.pop(0)
        if isinstance(item, BaseException) and item not in seen:
            seen.append(item)
            waiting += [item.__cause__, item.__context__]
            if isinstance(item, ssl.SSLError) and not isinstance(item, aiohttp.ClientError):
                yield item


def _verify_codes(error: BaseException) -> list[int]:
    return [cause.verify_code for cause in _ssl_errors(error) if isinstance(cause, ssl.SSLCertVerificationError)]


def _certificate(error: ssl.SSLCertVerificationError, shown: Shown | None) -> str:
    if error.verify_code in (_HOST_MISMATCH, _ADDRESS_MISMATCH):
        return (
            "the server's certificate is for another host; use the host name that the coordinator gave, "
            "or ask for a certificate that covers this one"
        )
    if error.verify_code in _DATES:
        return _out_of_date(error.verify_code == _EXPIRED, shown)
    whose = f"; it was issued by {shown.issuer}" if shown and shown.issuer else ""
    return (
        f"the server's certificate is not from this federation's authority{whose}. A proxy or an antivirus that opens "
        f"TLS may stand between: ask that this host be exempted from inspection. Nothing was sent"
    )


def _out_of_date(expired: bool, shown: Shown | None) -> str:
    """Either the certificate is at fault or a clock. The peer's clock is a hint: who follows it blindly could be led
    to take a certificate that is long over.
    """
    now = datetime.now(UTC)
    here = f"this machine's clock says {utc_time(now)}"
    if shown is None:
        fact = "the server's certificate has expired" if expired else "the server's certificate is not valid yet"
        return f"{fact}, and {here}; set the clock if it is wrong, else tell the coordinator"
    begins, ends = shown.begins, shown.ends
    if shown.clock is not None and begins <= shown.clock <= ends and abs(now - shown.clock) > _SKEW:
        there = f"the server's {utc_time(shown.clock)}, at which its certificate is valid"
        return (
            f"{here}, and {there}: they differ by {_long(abs(now - shown.clock))}. Nothing vouches for the server's: "
            "compare both with a third (`timedatectl`, a phone) and set the wrong one"
        )
    if not begins <= now <= ends:
        fact = f"ended on {utc_time(ends)}" if expired else f"is valid only from {utc_time(begins)}"
        agrees = " and the server's agrees" if shown.clock is not None and abs(now - shown.clock) <= _SKEW else ""
        remedy = "start `fedclip-agg serve` again, which makes it anew" if expired else "look at the server's clock"
        return f"the server's certificate {fact} ({here}{agrees}); ask the coordinator to {remedy}"
    return f"the authority of this federation is outside its dates, and {here}; talk to the coordinator"


def _long(difference: timedelta) -> str:
    minutes = round(difference / timedelta(minutes=1))
    if minutes < 120:
        return f"{minutes} minutes"
    return f"{round(minutes / 60)} hours" if minutes < 48 * 60 else f"{round(minutes / 1440)} days"


def _handshake(error: ssl.SSLError, at: str) -> FedClipError | None:
    """The error for an alert or a broken handshake; None where the connection merely ended."""
    reason = error.reason or ""
    for alert, meaning in _ALERTS.items():
        if reason.endswith(f"_ALERT_{alert}"):
            return TrustError(at + meaning)
    if any(word in reason for word in ("VERSION", "PROTOCOL", "HANDSHAKE_FAILURE", "HTTP_REQUEST", "RECORD_LAYER")):
        return TransportError(
            f"{at}does not speak TLS 1.3 ({reason}); a proxy that opens TLS may stand between, or the port is another "
            f"service's: check the URL, and ask that this host be exempted from inspection"
        )
    return None


def _refused_by_proxy(status: int, route: Route) -> Fault:
    if status == 407:
        error = TransportError(
            f"the proxy {route.proxy} wants a user name and password, or other ones; "
            f"set HTTPS_PROXY=http://USER:PASSWORD@{route.proxy}, {ENCODED}",
            status=status,
        )
        return Fault(error, transient=False)
    error = TransportError(
        f"the proxy {route.proxy} refuses to connect to {route.server} (HTTP {status}); "
        f"ask that this host be allowed, or name it in NO_PROXY",
        status=status,
    )
    return Fault(error, transient=status in _TRANSIENT_STATUS)


def _unreachable(error: BaseException, route: Route) -> str:
    whom, why = route.server, "the connection broke"
    through = f" through the proxy {route.proxy}" if route.proxy else ""
    resolved_here = isinstance(error, aiohttp.ClientConnectorDNSError)  # the server's name is the proxy's to find
    if isinstance(error, aiohttp.ClientProxyConnectionError) or (route.proxy and resolved_here):
        whom = f"the proxy {route.proxy}"
    match error:
        case aiohttp.ClientConnectorDNSError():
            return f"{whom}: the name is not found; check its spelling, this machine's DNS and HTTPS_PROXY"
        case TimeoutError():
            return f"{whom}: no answer in time{through}; is the server up, and does a firewall let this machine out?"
        case aiohttp.ClientConnectorError() if isinstance(error.os_error, ConnectionRefusedError):
            return f"{whom}: refuses connections; is it running, and is the port right?"
        case aiohttp.ClientConnectorError() if isinstance(error.os_error, ConnectionResetError):
            return f"{whom}: hung up during the TLS handshake; a firewall or an old proxy may stand between"
        case aiohttp.ClientConnectorError():
            return f"{whom}: cannot be reached ({error.os_error.strerror or error.os_error}); check network and VPN"
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError():
            why = "the server closed the connection; it may be restarting, or not take this silo's certificate"
        case aiohttp.ClientResponseError():
            why = "the answer is not HTTP"
        case OSError() if error.strerror:
            why = f"the connection broke ({error.strerror})"
    return f"{whom}: {why}; check network and VPN"
