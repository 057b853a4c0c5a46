"""One attempt of a whole federation, stage by stage, with real keys and messages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedclip_secure.secagg.sealing import SealKey
from fedclip_secure.transport.messages import SharesAnswer, SharesRequest, WireList
from secure.federation import CLIP, WEIGHT, Federation, draw
from secure.parties import Server, Silo
from secure.remote import Remote

_CHECKED = 1000  # coordinates of the sum


class Attempt:
    """One attempt of all silos. Of the first one, in a process of its own, the bodies are counted that go either way.

    The last `dropped` silos vanish before stage 2. `server` may be a process of its own too.
    """

    def __init__(
        self,
        federation: Federation,
        number: int,
        first: Remote,
        *,
        server: Remote | None = None,
        folder: Path | None = None,
        dropped: int = 0,
    ) -> None:
        terms, (opening, used) = federation.terms, federation.open(number)
        seal = SealKey(used.private)  # as it was drawn: keys that were made of it go to no other process
        keys = {name: (terms, name, federation.key(name), opening, folder) for name in terms.roster.silos}
        self.name, *others = keys
        first.make(Silo, *keys[self.name])
        if server is not None:
            server.make(Server, terms, opening, seal, folder)
        self.server: Any = server or Server(terms, opening, seal, folder)
        self.first: Any = first
        self._terms, self._dropped = terms, dropped
        self._silos: dict[str, Any] = {self.name: first} | {name: Silo(*keys[name]) for name in others}
        self.sent: list[int] = []  # bytes of the first silo's bodies
        self.upload_bytes = 0
        self.received = [4 * terms.vector.words]  # the sum

    def run(self) -> None:
        """All stages; the sum must be right."""
        self.first.know_model()
        self._join_and_share()
        alive = dict(list(self._silos.items())[: len(self._silos) - self._dropped])
        self._upload(alive)
        uploads = self._close()
        for name, silo in alive.items():
            self.server.agree(name, self._count(name, silo.agree(uploads)))
        agrees = self._close()
        answering = list(alive.items())[: self._terms.threshold]
        total = self.server.unmask({name: self._count(name, silo.unmask(agrees)) for name, silo in answering})
        self._count(self.name, self.first.result(total))
        self._check(total, len(alive))

    def _join_and_share(self) -> None:
        for seed, (name, silo) in enumerate(self._silos.items()):
            self.server.join(name, self._count(name, silo.join(seed + 1)))
        ads = self._close()
        for name, silo in self._silos.items():
            shares = silo.share(ads)
            request = SharesRequest(bundles=shares.bundles, ciphertexts=_pairs(shares.ciphertexts))
            self._count(name, request.encode())
            self.server.share(name, shares)

    def _upload(self, alive: Mapping[str, Any]) -> None:
        bundles = self.server.close()
        for name, silo in alive.items():
            inbox = self.server.inbox(name)
            self.upload_bytes = silo.upload(bundles, inbox)
            if name == self.name:
                self.received.append(len(SharesAnswer(bundles=bundles, inbox=_pairs(inbox)).encode()))
                self.sent.append(self.upload_bytes)
            self.server.upload(name, silo.take_sealed())

    def _close(self) -> list[bytes]:
        """Close a stage; its list, as all receive it."""
        wires: list[bytes] = self.server.close()
        self.received.append(len(WireList(messages=wires).encode()))
        return wires

    def _count(self, name: str, body: bytes) -> bytes:
        if name == self.name:
            self.sent.append(len(body))
        return body

    def _check(self, total: np.ndarray[Any, Any] | Path, alive: int) -> None:
        sums = np.fromfile(total, "<i4", _CHECKED) if isinstance(total, Path) else total[:_CHECKED].view(np.int32)
        mean = self._terms.grid.mean(sums, alive * WEIGHT)
        wanted = sum(draw(sums.size, seed + 1).astype(np.float64) for seed in range(alive)) / alive
        if np.abs(mean - wanted).max() > CLIP / 1000:
            raise AssertionError("the average is wrong")


def _pairs(ciphertexts: Mapping[str, tuple[bytes, bytes]]) -> dict[str, list[bytes]]:
    return {peer: list(pair) for peer, pair in ciphertexts.items()}
