"""What was found where a silo's images lie: those to be read, and what was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from fedclip_secure.data.dataset import ImageFile

_KINDS = 5  # named in a line


class Reason(StrEnum):
    """Why a file gives no record."""

    NO_IMAGE = "no image"
    PASSED_OVER = "hidden, or a system's own"
    DANGLING = "a link to what is not there"
    SPECIAL = "no regular file"
    UNUSABLE = "cannot be used"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file, or a folder with all that is in it; `detail` is what more is known."""

    path: str
    reason: Reason
    detail: str = ""


@dataclass(slots=True)
class Listing:
    """The images, in order, and what is no image."""

    files: list[ImageFile] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def kinds_of(paths: Sequence[str]) -> str:
    """`3 x .txt, 1 x without a known extension`: the most frequent first, and how many more kinds there are."""
    counts = Counter(_kind(path) for path in paths)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{count} x {kind}" for kind, count in ordered[:_KINDS])
    left = len(counts) - _KINDS
    return named + (f" and {left} other kind(s)" if left > 0 else "")


def _kind(path: str) -> str:
    _, dot, end = path.rpartition("/")[2].rpartition(".")
    return dot + end.lower() if dot and end.isalpha() else "without a known extension"
