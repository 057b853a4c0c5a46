"""Tables as a person reads them in a pipe, and on a terminal."""

from __future__ import annotations

import io
import sys

import click
import pytest
from fedclip_cli.console import Group, out, print_table
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


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_signs_that_a_terminal_lacks_are_spelled_out(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))

    @click.group(cls=Group)
    def program() -> None: ...

    @program.command()
    def show() -> None:
        print_table(table())
        out.print("ε ≤ 8 at δ = 10⁻⁵, 81.2 ± 0.4 %", markup=False)
        out.print("scans/bild-\u6587 \udcff.png")

    program.main(["show"], standalone_mode=False)
    sys.stdout.flush()
    said = written.getvalue().decode(encoding)
    assert "a class whose name" in said
    assert {
        "ascii": "epsilon <= 8 at delta = 10^-5, 81.2 +/- 0.4 %\nscans/bild-\\u6587 \\udcff.png",
        "cp1252": "epsilon <= 8 at delta = 10^-5, 81.2 ± 0.4 %\nscans/bild-\\u6587 \\udcff.png",
        "utf-8": "ε ≤ 8 at δ = 10⁻⁵, 81.2 ± 0.4 %\nscans/bild-文 \\udcff.png",
    }[encoding] in said
