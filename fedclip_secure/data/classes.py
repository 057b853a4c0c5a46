"""What every reader of labelled images says about the plan's classes."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence

from fedclip_secure.errors import DataError

NAME_ABSENT = "name the class under `data.absent_classes` in silo.yaml"


def check_absent(absent: Sequence[str], classes: Sequence[str]) -> None:
    """Refuse `data.absent_classes` that the plan does not have.

    Raises:
        DataError: names them, with the nearest classes of the plan.
    """
    strangers = sorted(set(absent) - set(classes))
    if strangers:
        raise DataError(
            f"`data.absent_classes` in silo.yaml names {some(strangers)}, no class of the plan"
            f"{near(strangers, classes)}; the plan's classes are {', '.join(map(repr, classes))}"
        )


def composed(name: str) -> str:
    """`name` in the form in which equal letters are equal: a Mac writes ü as u and two dots (Unicode, annex 15)."""
    return unicodedata.normalize("NFC", name)


def decomposed(name: str) -> str:
    """`name` as a Mac writes it."""
    return unicodedata.normalize("NFD", name)


def near(names: Sequence[str], known: Sequence[str]) -> str:
    """` ('Dogs' -> 'dog'?)` for those `names` that are nearly one of `known`; empty where none is."""
    lowered = {name.lower(): name for name in known}
    pairs = [(name, difflib.get_close_matches(name.lower(), lowered, n=1)) for name in names]
    hints = [f"{name!r} -> {lowered[close[0]]!r}?" for name, close in pairs if close]
    return f" ({', '.join(hints[:3])})" if hints else ""


def some(names: Sequence[str]) -> str:
    """The first five in quotes, which show a space at the end, and how many more."""
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
