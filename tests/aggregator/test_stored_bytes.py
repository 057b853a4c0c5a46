"""What lies on the server's disk while an attempt goes on: nothing that one silo alone has computed.

The silos' vectors are drawn at random and their weights and counts are large. To find by chance, in a few hundred
thousand bytes, one of a few hundred runs of two words or one word in its own place has a probability below 1e-6.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from fedclip_secure.secagg.messages import Ciphertexts
from fedclip_secure.secagg.silo_session import MaskedUpload, ModelRecord, SiloSession
from tests.aggregator.site import NAMES, Site, hands_of, move
from tests.waiting import until

PARAMETERS = 64
SECURE = {"max_weight": 2**26, "coordinate_clip": 0.125}


class UnmaskedSession(SiloSession):
    """A silo that forgets to mask."""

    def upload(self, bundles: list[bytes], inbox: dict[str, Ciphertexts]) -> MaskedUpload:  # type: ignore[override]
        super().upload(bundles, inbox)
        words = self._record.open_vector().copy()
        return MaskedUpload(self._commit(words), words)


def distinctive(site: Site) -> dict[str, ModelRecord]:
    """Vectors whose every word is random over most of its range: update, weight, correct, total."""
    records = {}
    for name in NAMES[:4]:
        draw = [int.from_bytes(os.urandom(4)) for _ in range(PARAMETERS + 3)]
        update = np.array([value % 2**24 for value in draw[:-3]], dtype=np.uint32)
        weight, correct, total = 2**25 + draw[-3] % 2**25, 2**25 + draw[-2] % 2**25, 2**26 + draw[-1] % 2**25
        vector = site.terms.vector.pack(update, weight, correct, total)
        records[name] = ModelRecord(site.terms.initial_model, lambda vector=vector: vector)  # type: ignore[misc]
    return records


def leaks(site: Site, records: dict[str, ModelRecord]) -> set[str]:
    """Whose words stand in any file of the server's state, and in what form."""
    files = {path: path.read_bytes() for path in sorted(site.state.rglob("*")) if path.is_file()}
    assert {path.name for path in files} >= {"aggregator.sqlite", "aggregator.sqlite-wal"}
    found = set()
    for name, record in records.items():
        tail = [str(int(word)).encode() for word in record.open_vector()[PARAMETERS:]]
        for data in files.values():
            if any(run in data for run in runs(record, 4)):
                found.add(f"{name}: vector")
            if any(run in data for run in runs(record, 2)[2 * (PARAMETERS - 1) :]):
                found.add(f"{name}: weight and counts")
            if any(text in data for text in tail):
                found.add(f"{name}: weight or counts in decimal")
    for path in (site.state / "vectors").iterdir():
        stored = np.fromfile(path, dtype="<u4")
        found |= {
            f"{name}: word {int(i)} in its place"
            for name, record in records.items()
            for i in np.flatnonzero(stored == record.open_vector())
        }
    return found | integers_in_sql(site, records)


def runs(record: ModelRecord, length: int) -> list[bytes]:
    """Every run of `length` words, little-endian as on the wire and big-endian as SQLite keeps integers."""
    starts = range(record.open_vector().size - length + 1)
    parts = [record.open_vector()[start : start + length] for start in starts]
    return [part.astype(order).tobytes() for part in parts for order in ("<u4", ">u4")]


def integers_in_sql(site: Site, records: dict[str, ModelRecord]) -> set[str]:
    """Whose weight or counts stand as a number in any column."""
    sql = sqlite3.connect(site.state / "aggregator.sqlite")
    tables = [name for (name,) in sql.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    assert "messages" in tables
    values = {value for table in tables for row in sql.execute(f"SELECT * FROM {table}") for value in row}  # noqa: S608
    sql.close()
    return {
        f"{name}: weight or count as a number"
        for name, record in records.items()
        if values & {int(word) for word in record.open_vector()[PARAMETERS:]}
    }


def found_while_running(tmp_path: Path, session: type[SiloSession]) -> list[set[str]]:
    """What is found once all uploads are in, and once all have helped to unmask."""
    site = Site.frozen(tmp_path, parameters=PARAMETERS, secure_aggregation=SECURE)
    records = distinctive(site)

    async def run() -> list[set[str]]:
        async with site.serving(), hands_of(site, session, records) as hands:
            await move(hands, "key-ads", "bundles", "uploads")
            assert len(list((site.state / "vectors").iterdir())) == len(records)
            found = [leaks(site, records)]
            await move(hands, "agrees", "unmasks")
            await until(lambda: site.status().stage == "result" or site.status().state == "halted")
            return [*found, leaks(site, records)]

    return asyncio.run(run())


def test_nothing_that_the_server_stores_contains_an_unmasked_vector_a_weight_or_a_count(tmp_path: Path) -> None:
    assert found_while_running(tmp_path, SiloSession) == [set(), set()]


def test_the_same_check_finds_every_silo_that_does_not_mask(tmp_path: Path) -> None:
    for found in found_while_running(tmp_path, UnmaskedSession):
        assert {f"{name}: vector" for name in NAMES[:4]} <= found
        assert {f"{name}: weight and counts" for name in NAMES[:4]} <= found
        assert {f"{name}: word {PARAMETERS} in its place" for name in NAMES[:4]} <= found


@pytest.mark.parametrize("leak", ["number", "text"])
def test_the_same_check_finds_a_weight_that_the_server_notes(tmp_path: Path, leak: str) -> None:
    site = Site.frozen(tmp_path, parameters=PARAMETERS, secure_aggregation=SECURE)
    records = distinctive(site)
    weight = int(records["lab-b"].open_vector()[PARAMETERS])
    with site.store() as store:
        assert leaks(site, records) == set()
        store.seen("lab-b", weight if leak == "number" else 0)
        store.open_attempt(1, 1, b"", b"", 0.0)
        row = store.last_attempt()
        assert row is not None
        store.add_complaint(row, "lab-b", str(weight) if leak == "text" else "")
        wanted = {"number": "weight or count as a number", "text": "weight or counts in decimal"}
        assert leaks(site, records) == {f"lab-b: {wanted[leak]}"}
