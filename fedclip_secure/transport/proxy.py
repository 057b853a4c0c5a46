"""Which proxy the environment names for a server (HTTPS_PROXY, NO_PROXY)."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from urllib.request import getproxies, proxy_bypass

from yarl import URL

from fedclip_secure.errors import ConfigError

ENCODED = "in user and password % written as %25, @ as %40, : as %3A, / as %2F, # as %23 and ? as %3F"


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy that is asked to CONNECT (RFC 9110 section 9.3.6). It sees TLS and nothing inside."""

    url: URL  # without user and password
    headers: dict[str, str] = field(repr=False)  # Proxy-Authorization, where there is a password

    @property
    def host(self) -> str:
        """`host:port`, fit for messages."""
        return self.url.authority


def proxy_for(server: URL) -> Proxy | None:
    """The proxy on the way to `server`; None where the environment names none or exempts this host.

    aiohttp's own `trust_env` is not used: it also reads passwords from ~/.netrc and would send them to the server.

    Raises:
        ConfigError: HTTPS_PROXY is no http:// URL.
    """
    value = getproxies().get("https")
    if not value or proxy_bypass(f"{server.host}:{server.port}"):
        return None
    try:
        url = URL(value if "://" in value else f"http://{value}")  # curl takes `host:port` too
        usable = url.scheme == "http" and bool(url.host) and url.port is not None and not _cut_short(url)
    except ValueError:
        usable = False
    if not usable:
        # The value is not repeated: it may hold a password.
        raise ConfigError(
            f"HTTPS_PROXY must be http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, {ENCODED}; correct or unset it"
        )
    return Proxy(url.with_user(None).with_path("/"), _authorization(url))


def _cut_short(url: URL) -> bool:
    """Whether a password with / ? or # in it made what follows a path: the host would be the user's name."""
    return "@" in f"{url.raw_path}{url.raw_query_string}{url.raw_fragment}"


def _authorization(url: URL) -> dict[str, str]:
    """Basic authentication (RFC 7617), as UTF-8."""
    if url.user is None:
        return {}
    pair = f"{url.user}:{url.password or ''}".encode()
    return {"Proxy-Authorization": f"Basic {base64.b64encode(pair).decode()}"}
