"""Images that cannot be used: how they are told, and how many may be left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedclip_secure.data.dataset import UNLABELLED, ImageFile
from fedclip_secure.errors import DataError

_LISTED = 10


@dataclass(frozen=True, slots=True)
class Broken:
    """An image that cannot be used, and why; `number` is its place in the list of files."""

    number: int
    path: Path
    reason: str  # begins with the path


def check_classes_left(files: Sequence[ImageFile], broken: Sequence[Broken]) -> None:
    """Refuse to leave out all images of a class: that is a lost disk or a wrong root, not a few bad files.

    Raises:
        DataError: names the first ten of the first such class.
    """
    listed = Counter(file.label for file in files)
    lost = Counter(files[image.number].label for image in broken if files[image.number].label != UNLABELLED)
    for label, count in lost.items():
        if count == listed[label]:
            of_class = [image for image in broken if files[image.number].label == label]
            raise DataError(
                f"none of the {count} image(s) of a class can be used; all others are in the cache. "
                f"Check the disk and `data` in silo.yaml, and run again:\n{_first_of(of_class)}"
            )


def _first_of(broken: Sequence[Broken]) -> str:
    """The first ten reasons, one to a line, and how many more."""
    lines = [f"  {image.reason}" for image in broken[:_LISTED]]
    if len(broken) > _LISTED:
        lines.append(f"  and {len(broken) - _LISTED} more")
    return "\n".join(lines)
