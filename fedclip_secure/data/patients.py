"""Which ids of patients are the same: as they are written, or by what silo.yaml lets a silo disregard."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from fedclip_secure import canonical
from fedclip_secure.names import Normalisation

_NAMED = 3  # groups of a warning
_log = logging.getLogger(__name__)


def _strip_zeros(patient: str) -> str:
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", patient)


def _caseless(patient: str) -> str:
    """As Unicode compares identifiers (section 3.13, D147): letters in any case and encoding, no invisible signs."""
    seen = "".join(letter for letter in patient if unicodedata.category(letter) != "Cf")
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", seen).casefold())


_STEPS: Mapping[Normalisation, Callable[[str], str]] = {"casefold": _caseless, "strip_zeros": _strip_zeros}


def normalised(patient: str, how: Collection[Normalisation]) -> str:
    """The id without what `how` disregards.

    `casefold`: large and small letters are the same, and so are letters however they are encoded. `strip_zeros`:
    leading zeros of every run of the digits 0 to 9 go, so that P001 is P1.
    """
    for name, step in _STEPS.items():
        patient = step(patient) if name in how else patient
    return patient


def unit_of(patient: str, how: Collection[Normalisation]) -> bytes | None:
    """32 bytes that stand for a patient: all that is kept of an id. None where there is no id."""
    return canonical.digest("fedclip/v1/patient", normalised(patient, how)) if patient else None


def alike(patient: str) -> str:
    """The id without all that ids of one patient are found to differ in."""
    return normalised(patient, _STEPS)


def warn_of_likes(path: Path, patients: Iterable[str], how: Collection[Normalisation]) -> None:
    """Name in the log ids that stay apart under `how` and differ by case, encoding or zeros alone."""
    groups = likes(patients, how)
    if groups:
        some = "; ".join(" and ".join(map(repr, group)) for group in groups[:_NAMED])
        _log.warning(
            "'%s': %d group(s) of patients' ids differ by case, encoding or leading zeros alone (%s%s) and count as "
            "different patients, each with a privacy budget of its own; if they are the same, set "
            "data.patients.normalise in silo.yaml before the first run",
            path, len(groups), some, "; ..." if len(groups) > _NAMED else "",
        )  # fmt: skip


def likes(patients: Iterable[str], how: Collection[Normalisation]) -> list[Sequence[str]]:
    """Groups of ids, in order, that are different under `how` and the same under all that there is."""
    groups = defaultdict[str, dict[str, str]](dict)
    for patient in sorted(set(patients)):
        groups[alike(patient)].setdefault(normalised(patient, how), patient)
    return [tuple(group.values()) for group in groups.values() if len(group) > 1]
