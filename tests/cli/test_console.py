"""What both programs print: tables of any width, warnings, and questions that nobody is there to answer."""

from __future__ import annotations

import io
import logging
import os
import pty
import subprocess
import sys
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from fedclip_cli import agg, silo
from fedclip_cli.console import Group, agreed, out, print_table, program_options, showing_logs
from rich.table import Column, Table

from fedclip_secure.aggregator.status import RunStatus, SiloStatus
from fedclip_secure.errors import ConfigError
from fedclip_secure.pki.roster import readable_fingerprint
from fedclip_secure.silo.run.attendance import Attendance
from fedclip_secure.silo.run.train import Finished
from tests.federation.processes import ENVIRONMENT
from tests.waiting import BOUND

LONG = "a class whose name goes on " * 20
SILOS = ("st-marys-hospital-lung-ward", "lakeside")
PRINTS = [readable_fingerprint(bytes(range(first, first + 32))) for first in (0, 100)]


def table() -> Table:
    made = Table("class", "records", box=None)
    made.add_row(LONG, "12")
    made.add_row("short", "3")
    return made


def wide(columns: int = 12) -> Table:
    made = Table(*(f"head {number}" for number in range(columns)), box=None)
    for row in "ab":
        made.add_row(*(f"{row}-value-{number}" for number in range(columns)))
    return made


def fingerprints() -> Table:
    made = Table("party", "key's fingerprint", box=None)
    for name, found in zip(SILOS, PRINTS, strict=True):
        made.add_row(name, found)
    return made


def facts() -> Table:
    made = Table("", Column("", overflow="fold"), box=None, show_header=False)
    made.add_row("what becomes of it", "kept " * 40 + "sha256:" + "a" * 64)
    return made


def printed(capsys: pytest.CaptureFixture[str], made: Table) -> list[str]:
    print_table(made)
    return capsys.readouterr().out.splitlines()


@pytest.fixture(params=[60, 80])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


def test_a_table_goes_whole_into_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    head, first, second = printed(capsys, table())
    assert head.split() == ["class", "records"]
    assert first.split() == [*LONG.split(), "12"]
    assert second.split() == ["short", "3"]


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


@pytest.mark.parametrize("make", [table, wide, fingerprints, facts])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_cut(
    capsys: pytest.CaptureFixture[str], width: int, make: type[Table]
) -> None:
    lines = printed(capsys, make())
    assert max(map(len, lines)) <= width
    said = "".join("".join(lines).split())
    for column in make().columns:
        assert all("".join(str(cell).split()) in said for cell in [*column.cells, column.header] if cell != LONG)
    assert "\u2026" not in said


def test_a_row_that_does_not_fit_is_a_block_of_lines(capsys: pytest.CaptureFixture[str], width: int) -> None:
    lines = [line.split() for line in printed(capsys, wide())]
    assert lines[:2] == [["head", "0", "a-value-0"], ["head", "1", "a-value-1"]]
    assert lines[12:14] == [[], ["head", "0", "b-value-0"]]
    assert len(lines) == 25


def test_a_fingerprint_stands_in_one_line(capsys: pytest.CaptureFixture[str], width: int) -> None:
    lines = printed(capsys, fingerprints())
    assert all(any(found in line for line in lines) for found in PRINTS)


def test_the_status_of_a_run_fits_the_terminal(capsys: pytest.CaptureFixture[str], width: int) -> None:
    silos = [SiloStatus(name, True, 1.9e9, 1.0, 999, 1, {"upload": 12, "join": 3}) for name in SILOS]
    agg._print_status(
        RunStatus("lung", True, "running", "", 9, 50, 9, "join", [], 2e9, 3, 1, silos, [], []),
    )
    lines = capsys.readouterr().out.partition("may be absent\n")[2].splitlines()
    assert max(map(len, lines)) <= width
    assert all(any(name in line for line in lines) for name in SILOS)
    assert any("upload x12, join x3" in line for line in lines)


def test_a_warning_is_a_line_and_names_no_module(capsys: pytest.CaptureFixture[str]) -> None:
    with showing_logs(verbose=False):
        logging.getLogger("fedclip_secure.data.folder").warning("%s: is damaged", "cat.png")
    assert capsys.readouterr().err == "warning: cat.png: is damaged\n"


@pytest.mark.parametrize(("verbose", "told"), [(False, ""), (True, "warning: a hint of theirs\n")])
def test_other_libraries_are_heard_only_where_somebody_asks(
    capsys: pytest.CaptureFixture[str], verbose: bool, told: str
) -> None:
    with showing_logs(verbose=verbose):
        logging.getLogger("elsewhere").warning("a hint of theirs")
        logging.getLogger("fedclip_secure.data.folder").info("nothing for a person")
    assert capsys.readouterr().err == told


@pytest.mark.filterwarnings("always")
def test_python_warnings_are_told_as_other_libraries_are(capsys: pytest.CaptureFixture[str]) -> None:
    for verbose in (False, True):
        with showing_logs(verbose=verbose):
            warnings.warn("a tag had too many entries", UserWarning, stacklevel=1)
        assert ("a tag had too many entries" in capsys.readouterr().err) is verbose


def test_errors_of_other_libraries_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with showing_logs(verbose=False):
        logging.getLogger("elsewhere").error("it failed")
    assert capsys.readouterr().err == "error: it failed\n"


def test_verbose_is_an_option_of_the_program() -> None:
    @click.group(cls=Group)
    @program_options
    def program() -> None:
        """One."""

    @program.command()
    def hint() -> None:
        """Warn."""
        logging.getLogger("elsewhere").warning("a hint of theirs")

    told = {given: CliRunner().invoke(program, [*given, "hint"]).stderr for given in ((), ("-v",))}
    assert told == {(): "", ("-v",): "warning: a hint of theirs\n"}


@pytest.mark.parametrize(
    ("taken", "warned"), [(0, True), (24, True), (25, False), (50, False)], ids=["none", "few", "half", "all"]
)
def test_a_silo_that_was_in_few_rounds_ends_loudly(
    capsys: pytest.CaptureFixture[str], taken: int, warned: bool
) -> None:
    missed = {"the others went on without it": 50 - taken} if taken < 50 else {}
    silo._print_finished("st-marys", Finished([], Attendance(50, taken, missed), None))
    told = capsys.readouterr()
    said = f"st-marys took part in {taken} of 50 round(s)"
    assert said in (told.err if warned else told.out)
    assert told.err.startswith("warning: ") is warned
    assert ("(26: the others went on without it)" in told.err) is (taken == 24)


def test_a_run_that_ended_early_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    silo._print_finished("st-marys", Finished([], Attendance(12, 12, {}), "nothing is left to learn: round 12"))
    assert capsys.readouterr().out.splitlines() == [
        "finished: nothing is left to learn: round 12",
        "st-marys took part in 12 of 12 round(s)",
    ]


def test_yes_on_the_command_line_asks_nobody() -> None:
    assert agreed("Go on?", yes=True)


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    file = tmp_path / "asks.py"
    file.write_text(
        "from fedclip_cli.console import agreed\n"
        "from fedclip_secure.errors import ConfigError\n"
        "try:\n"
        "    print('agreed' if agreed('Go on?', yes=False, to='compared the fingerprints') else 'declined')\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    return [sys.executable, str(file)]


@pytest.mark.parametrize(("typed", "said"), [("y\n", "agreed"), ("n\n", "declined")])
def test_an_answer_may_come_through_a_pipe(program: list[str], typed: str, said: str) -> None:
    done = subprocess.run(
        program, input=typed, text=True, capture_output=True, env=ENVIRONMENT, timeout=BOUND, check=True
    )
    assert done.stdout.strip().endswith(said)


@pytest.mark.parametrize("closed", ["< /dev/null", "<&-"])
def test_a_question_without_a_terminal_says_so_and_names_the_option(program: list[str], closed: str) -> None:
    command = ["sh", "-c", f"exec {' '.join(program)} {closed}"]
    done = subprocess.run(command, text=True, capture_output=True, env=ENVIRONMENT, timeout=BOUND, check=True)
    said = "standard input is no terminal: run it in one, or add --yes once you have compared the fingerprints"
    assert said in done.stdout
    assert "Aborted" not in done.stdout + done.stderr


def test_at_a_terminal_to_give_no_answer_is_to_decline(program: list[str]) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(program, stdin=theirs, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        os.close(theirs)
        assert process.stdout is not None
        asked = process.stdout.read(len("Go on?"))
        os.write(ours, b"\x04")  # Ctrl-D
        rest = process.stdout.read()
        process.wait(BOUND)
    os.close(ours)
    assert asked == b"Go on?"
    assert rest.strip().endswith(b"declined")


def test_nobody_to_ask_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match="add --yes once you have decided"):
        agreed("Go on?", yes=False)
