"""Where the server listens, and what it says where it cannot."""

from __future__ import annotations

import asyncio
import errno
import socket
from pathlib import Path
from typing import Any

import pytest

from fedclip_secure.aggregator import serve as server_module
from fedclip_secure.aggregator.home import init_home
from fedclip_secure.aggregator.serve import serve
from fedclip_secure.errors import TransportError


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_without_a_wish_both_families_of_addresses_are_listened_on() -> None:
    hosts = ["127.0.0.1", "::1"] if has_ipv6() else ["127.0.0.1"]
    with server_module._everywhere(0) as listener:
        for host in hosts:
            socket.create_connection((host, listener.getsockname()[1])).close()


def test_a_machine_whose_ipv6_is_switched_off_listens_on_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.create_server

    def create(address: tuple[str, int], *, family: int = socket.AF_INET, **options: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        return real(address, family=family, **options)

    monkeypatch.setattr(socket, "create_server", create)
    with server_module._everywhere(0) as listener:
        assert listener.family == socket.AF_INET


@pytest.mark.parametrize(
    ("host", "number", "said"),
    [
        ("::1", errno.EADDRINUSE, r"^\[::1\]:\d+: cannot listen there \(.*\); choose with --listen$"),
        (
            None,
            errno.EACCES,
            r"^port \d+ of all addresses: cannot listen there .*needs the capability CAP_NET_BIND_SERVI",
        ),
        ("127.0.0.1", errno.EACCES, r"^127\.0\.0\.1:\d+: cannot listen there .*CAP_NET_BIND_SERVICE.*--listen$"),
    ],
)
def test_an_address_that_cannot_be_had_is_named_with_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str | None, number: int, said: str
) -> None:
    home = init_home(tmp_path / "lung", "lung", ["localhost"], 8443)

    def refuse(*_: object) -> None:
        raise OSError(number, "refused by the test")

    monkeypatch.setattr(socket.socket, "bind", refuse)

    async def run() -> None:
        await serve(home, host, 8443, lambda _: None, asyncio.Event())

    with pytest.raises(TransportError, match=said):
        asyncio.run(run())
