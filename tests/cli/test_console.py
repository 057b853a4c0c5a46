"""Tables as a person reads them in a pipe, and on a terminal."""

from __future__ import annotations

import pytest
from fedclip_cli.console import print_table
from rich.table import Table

LONG = "a class whose name goes on " * 20


def table() -> Table:
    made = Table("class", "records", box=None)
    made.add_row(LONG, "12")
    made.add_row("short", "3")
    return made


def test_a_table_goes_whole_into_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(table())
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["class", "records"]
    assert first.split() == [*LONG.split(), "12"]
    assert second.split() == ["short", "3"]


def test_columns_gives_a_pipe_a_width(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    print_table(table())
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
