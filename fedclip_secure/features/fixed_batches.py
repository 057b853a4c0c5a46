"""Which images are encoded together, with privacy: so that no bit of a feature depends on the others.

A library rounds a row by its place in a batch and by the batch's size. So with privacy all batches have one size, also
where memory is short, and the row of an image is a remainder of the SHA-256 of its file; rows that nobody has are
zeros. The program that runs for given shapes reads no values to choose its way, and computes each row of its own row
and the weights: so the features of an image are the same bits whichever images are there besides. (Which program runs,
the library and the device decide, and not the images.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

_WAITING = 8  # images for each row: then hardly a row is empty in a pass


class Seats:
    """Images that wait to be encoded, in passes of `rows`."""

    def __init__(self, rows: int) -> None:
        self._waiting = [deque[tuple[bytes, torch.Tensor]]() for _ in range(rows)]
        self._keys: set[bytes] = set()

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: bytes, image: torch.Tensor) -> None:
        """`key` is the SHA-256 of the image's file, `image` (3, S, S)."""
        self._waiting[int.from_bytes(key[:8], "big") % len(self._waiting)].append((key, image))
        self._keys.add(key)

    def passes(self, *, all_of_them: bool) -> Iterator[tuple[dict[bytes, int], torch.Tensor]]:
        """The row of each key, and images (rows, 3, S, S); of those that fill passes well, or of all."""
        while len(self._keys) > (0 if all_of_them else _WAITING * len(self._waiting)):
            taken = {row: queue.popleft() for row, queue in enumerate(self._waiting) if queue}
            images = torch.zeros(len(self._waiting), *next(iter(taken.values()))[1].shape)
            for row, (_, image) in taken.items():
                images[row] = image
            keys = {key: row for row, (key, _) in taken.items()}
            self._keys -= keys.keys()
            yield keys, images
