"""What both programs print, and how an error becomes text and an exit code."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import errno
import io
import logging
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from fedclip_secure.config.fields import CONTROL
from fedclip_secure.disk import refused
from fedclip_secure.errors import ConfigError, FedClipError
from fedclip_secure.extras import lacking
from fedclip_secure.features.progress import Progress, ShowProgress


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    """What is written in place of signs that an encoding lacks: a word, or else the sign's number (PEP 293)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = re.sub("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", r"^\g<0>", error.object[error.start : error.end]).translate(_WORDS)
    return signs.encode("ascii", "backslashreplace").decode(), error.end


_SPELLING = "fedclip_spelling"
_WORDS = str.maketrans(
    {"ε": "epsilon", "δ": "delta", "σ": "sigma", "±": "+/-", "·": "*", "×": "x", "≤": "<=", "≥": ">=", "…": "..."}
    | dict(zip("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789", strict=True))
)
codecs.register_error(_SPELLING, _spelled)
T = TypeVar("T")
Decorated = TypeVar("Decorated", bound=Callable[..., Any])
_WIDEST, _NARROWEST = 100_000, 20  # characters of a line
_VERBOSE = "fedclip.verbose"  # in a context's meta
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class Command(click.Command):
    """A command whose expected errors end in one message and their own exit code, without a stack trace.

    `anywhere`: it runs on systems too that are not POSIX's, for it neither locks files nor keeps keys.
    """

    def __init__(self, *arguments: Any, anywhere: bool = False, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._anywhere = anywhere

    def invoke(self, context: click.Context) -> Any:
        """Run, and turn errors into text."""
        if not self._anywhere and find_spec("fcntl") is None:
            _print_error(
                f"`{context.command_path}` locks files and keeps keys as Linux and macOS do, and does not run on this "
                "system; on Windows run it in WSL. `fedclip-silo verify` and `--help` run here too"
            )
            context.exit(1)
        try:
            return super().invoke(context)
        except FedClipError as error:
            _print_error(str(error))
            context.exit(error.exit_code)
        except ModuleNotFoundError as error:
            missing = lacking(error)
            if missing is None:
                raise
            _print_error(f"`{context.command_path}`: {missing}")
            context.exit(1)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EPIPE) and error.filename is None:
                _print_error(f"standard output cannot be written: {error.strerror}")
                context.exit(1)
            if error.filename is None:  # not a file that a person could do something about
                raise
            _print_error(refused(error, str(error.filename), "be used"))
            context.exit(1)
        except KeyboardInterrupt:
            err.print(f"stopped. `{context.command_path}` goes on from here")
            context.exit(130)


class Group(click.Group):
    """A program: its commands are `Command`s and stand in the order in which they are used."""

    command_class = Command

    def main(self, *arguments: Any, **named: Any) -> Any:
        """Run the program. Signs that the terminal's or file's encoding lacks are spelled out, and end nothing."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=_SPELLING)
        return super().main(*arguments, **named)

    def invoke(self, context: click.Context) -> Any:
        """Run a command, with what is logged meanwhile in view."""
        with showing_logs(verbose=bool(context.meta.get(_VERBOSE))):
            return super().invoke(context)

    def list_commands(self, context: click.Context) -> list[str]:
        """In the order of definition."""
        del context
        return list(self.commands)


def program_options(program: Decorated) -> Decorated:
    """`--verbose` and `--version`: the latter gives the hash of the code too, which ledgers and reports name."""

    def remember(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
        context.meta[_VERBOSE] = wanted

    def show(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
        if not wanted or context.resilient_parsing:
            return
        from fedclip_secure.privacy.report.software import code_sha256

        click.echo(f"{context.info_name}, version {version('fedclip-secure')}\ncode {code_sha256()}")
        context.exit()

    told = "Show the version and the hash of the code, and exit."
    verbose = click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=remember, help="Show other libraries' warnings."
    )
    version_ = click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=show, help=told)
    return verbose(version_(program))


def say(text: str) -> None:
    """One line of progress, with the time."""
    # One print: a bar that is shown at the same time would come between two.
    out.print(Text.assemble((time.strftime("%m-%d %H:%M:%S"), "dim"), " ", printable(text)))


def print_table(table: Table) -> None:
    """A table where it fits the terminal, else a block of lines for each row: nothing is cut.

    It goes whole into a pipe or a file, unless COLUMNS gives these a width.
    """
    console = Console(highlight=False, width=_WIDEST)
    whole = console.measure(table).maximum
    limit = shutil.get_terminal_size().columns if out.is_terminal or "COLUMNS" in os.environ else whole
    console.width = min(whole, max(limit, _NARROWEST))
    if whole <= console.width:
        console.print(table)
        return
    for number, block in enumerate(_blocks(table)):
        if number:
            console.print()
        console.print(block)


def _blocks(table: Table) -> Iterator[Table]:
    """A row as lines of head and value; a table without heads has such lines already."""
    rows = zip(*(column.cells for column in table.columns), strict=True)
    if not table.show_header:
        yield _block(rows)
        return
    heads = [column.header for column in table.columns]
    for row in rows:
        yield _block(zip(heads, row, strict=True))


def _block(lines: Iterable[tuple[RenderableType, ...]]) -> Table:
    """Values are folded beside their heads."""
    block = Table(Column("", no_wrap=True), Column("", overflow="fold"), box=None, show_header=False)
    for head, value in lines:
        block.add_row(head, value)
    return block


def agreed(question: str, *, yes: bool, to: str = "decided", on_stderr: bool = False) -> bool:
    """Whether a person consents; `yes` is their word on the command line. `to`: what they have done before that.

    Raises:
        ConfigError: there is nobody to ask.
    """
    if yes:
        return True
    try:
        if sys.stdin is not None:
            return click.confirm(question, err=on_stderr)
    except click.Abort:
        click.echo(err=True)
        if sys.stdin.isatty():  # Ctrl-C, Ctrl-D
            return False
    raise ConfigError(
        f"this asks a question, and standard input is no terminal: run it in one, or add --yes once you have {to}"
    )


def warn(text: str) -> None:
    """One line beside what a command prints, for a person to act on."""
    err.print(Text.assemble(("warning:", "bold yellow"), " ", printable(text)))


class _Logged(logging.Handler):
    """Shows what is logged in the way of all other lines; of libraries beneath only errors, unless `verbose`."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__(logging.WARNING)
        self._others = logging.WARNING if verbose else logging.ERROR

    def emit(self, record: logging.LogRecord) -> None:
        """One record."""
        own = record.name.split(".")[0] == "fedclip_secure"
        if record.levelno >= (logging.WARNING if own else self._others):
            tell = _print_error if record.levelno >= logging.ERROR else warn
            tell(self.format(record))


@contextlib.contextmanager
def showing_logs(*, verbose: bool) -> Iterator[None]:
    """Without a handler of ours the first library that logs would install one, which names modules."""
    handler = _Logged(verbose=verbose)
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)  # Pillow's of broken EXIF, say: told as other libraries' warnings are
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """Turn the signals that end a program into KeyboardInterrupt, so that what it started ends with it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def printable(text: str) -> str:
    """`text` without what a terminal would obey: part of it may be the server's."""
    return re.sub(rf"(?!\n)[{CONTROL}]", "?", text)


def _print_error(text: str) -> None:
    err.print("[bold red]error:[/] ", end="")
    err.print(printable(text), markup=False)


def waiting(reason: str, seconds: float) -> None:
    """Before a retry: why, and when."""
    say(f"{reason}; trying again in {seconds:.0f} s")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine; Ctrl-C cancels it first and then ends the command."""
    return asyncio.run(main)


@contextlib.contextmanager
def image_progress(*, quiet: bool = False) -> Iterator[ShowProgress]:
    """A bar on a terminal; elsewhere a line every ten seconds; `quiet`: nothing."""
    if quiet:
        yield lambda _: None
    elif out.is_terminal:
        with _bar() as callback:
            yield callback
    else:
        yield _Lines()


@contextlib.contextmanager
def _bar() -> Iterator[ShowProgress]:
    columns = (TextColumn("extracting"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with Bar(*columns, console=out, transient=True) as bar:
        task = bar.add_task("extracting", total=None, speed="")

        def update(progress: Progress) -> None:
            todo = progress.total - progress.cached
            done, speed = progress.done - progress.cached, ", ".join(_speed(progress))
            bar.update(task, completed=done, total=todo, visible=todo > 0, speed=speed)

        yield update


class _Lines:
    """Plain progress: a line every ten seconds, and after any of them one when all is done."""

    def __init__(self) -> None:
        self._next = time.monotonic() + 10
        self._said = False

    def __call__(self, progress: Progress) -> None:
        last = self._said and progress.done == progress.total
        if last or time.monotonic() >= self._next:
            self._next = time.monotonic() + 10
            self._said = progress.done < progress.total
            say(", ".join([_extracted(progress), *_speed(progress)]))


def _extracted(progress: Progress) -> str:
    """What was encoded, of what must be; what the cache had is no work of this run."""
    todo = progress.total - progress.cached
    if not todo:
        return f"{progress.total} images: the cache has the features of all"
    cached = f" ({progress.cached} more are in the cache)" if progress.cached else ""
    return f"extracted {progress.done - progress.cached} of {todo} images{cached}"


def _speed(progress: Progress) -> list[str]:
    """`8.9 images/s`, `0:01:39 left`, `2 broken`, as far as it is known."""
    parts = []
    if progress.images_per_second is not None:
        parts.append(f"{progress.images_per_second:.1f} images/s")
    if progress.seconds_left is not None:
        parts.append(f"{timedelta(seconds=round(progress.seconds_left))} left")
    if progress.broken:
        parts.append(f"{progress.broken} broken")
    return parts


FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
