"""The pages that people read, cut into their parts."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.federation.processes import ROOT

DOCS = tuple(ROOT / "docs" / name for name in ("tutorial.md", "threat-model.md", "methods.md"))
PAGES = (
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "certs/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
_FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PROGRAMS = ("fedclip-agg", "fedclip-silo")
_SHELLS = ("sh", "bash", "console")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. `words` stand behind its language: the machines it is typed on, or its file there."""

    language: str
    words: tuple[str, ...]
    text: str


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    return [Block(found[1], tuple(found[2].split()), found[3]) for found in _FENCE.finditer(page.read_text())]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def spans(text: str) -> list[str]:
    """What stands between backticks, in one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def commands(page: Path) -> list[list[str]]:
    """Every call of one of the two programs that a page names: program, command, and what follows."""
    if page.suffix != ".md":
        return _calls(_typed(page.read_text()))
    lines = [line for block in blocks(page) for line in _shell_lines(block)]
    return _calls([*lines, *_typed(prose(page))])


def _typed(text: str) -> list[str]:
    """Spans that are commands; others may quote a message that names a program."""
    return [span for span in spans(text) if span.startswith(_PROGRAMS)]


def _shell_lines(block: Block) -> list[str]:
    """Lines that a shell or systemd runs; of a session those behind the prompt."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "ini":
        return [line.partition("=")[2] for line in lines if line.startswith("Exec")]
    if block.language == "console":
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return lines if block.language in _SHELLS else []


def _calls(lines: list[str]) -> list[list[str]]:
    calls = []
    for line in lines:
        if not any(program in line for program in _PROGRAMS):
            continue
        lexer = shlex.shlex(re.sub(r"\s#.*$", "", line), posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, ""
        calls += _calls_among([token.rpartition("/")[2] if token.endswith(_PROGRAMS) else token for token in lexer])
    return calls


def _calls_among(tokens: list[str]) -> list[list[str]]:
    """From a program's name to the next sign of the shell, such as `>` or `)`."""
    calls: list[list[str]] = []
    inside = False
    for token in tokens:
        if token in _PROGRAMS:
            calls.append([token])
            inside = True
        elif not token.strip("();<>|&"):
            inside = False
        elif inside:
            calls[-1].append(token)
    return calls
