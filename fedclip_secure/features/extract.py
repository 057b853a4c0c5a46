"""From image files to features, through the cache."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from fedclip_secure.data.dataset import FeatureSet, Floats, ImageFile
from fedclip_secure.data.folder import decode_image
from fedclip_secure.errors import DataError
from fedclip_secure.features.cache import FeatureCache
from fedclip_secure.features.encoder import Encoder

Progress = Callable[[int, int], None]
Wanted = tuple[bytes, Path]  # SHA-256 of an image file, and where it lies
Decoded = tuple[Sequence[Wanted], list[torch.Tensor | DataError]]  # a batch, and what became of each of it
SHARD_IMAGES = 512  # images between two writes: what a kill can lose
_LISTED_FAULTS = 10
_MAX_DECODERS = 8  # threads; the encoder is the slower half on all but the largest machines


def extract(
    files: Sequence[ImageFile], encoder: Encoder, cache: FeatureCache, batch_size: int, progress: Progress
) -> FeatureSet:
    """Features of `files`, in their order; a record's unit is the SHA-256 of its file.

    Only what `cache` lacks is encoded, each image once, and stored shard after shard. `progress(done,
    total)` counts distinct images. A broken image stops nothing: the others are encoded and cached first.

    Raises:
        DataError: no files; broken images, the first ten by name; the disk is full.
    """
    if not files:
        raise DataError("there are no images to encode; check `data` in silo.yaml")
    with ThreadPoolExecutor(min(_MAX_DECODERS, os.cpu_count() or 1)) as pool:
        keys = list(pool.map(_hash, files))
        distinct = {key: file.path for file, key in zip(files, keys, strict=True) if isinstance(key, bytes)}
        wanted = [(key, distinct[key]) for key in distinct.keys() - cache.get(distinct).keys()]
        wanted.sort(key=lambda item: item[1])
        progress(len(distinct) - len(wanted), len(distinct))
        faults = [key for key in keys if isinstance(key, DataError)]
        decoded = _decoded(wanted, encoder, batch_size, pool)
        for done, broken in _fill(cache, encoder, decoded, len(wanted)):
            faults += broken
            progress(len(distinct) - len(wanted) + done, len(distinct))
    if faults:
        raise DataError(_listing(faults))
    return _gather(files, [key for key in keys if isinstance(key, bytes)], cache)


def _fill(
    cache: FeatureCache, encoder: Encoder, decoded: Iterator[Decoded], wanted: int
) -> Iterator[tuple[int, list[DataError]]]:
    """Encode and store; after each batch, how many of `wanted` are done, and what could not be decoded."""
    done, keys, rows = 0, list[bytes](), list[Floats]()
    for batch, images in decoded:
        good = [(key, image) for (key, _), image in zip(batch, images, strict=True) if isinstance(image, torch.Tensor)]
        if good:
            keys += [key for key, _ in good]
            rows.append(encoder.encode_images(torch.stack([image for _, image in good])))
        done += len(batch)
        if keys and (len(keys) >= SHARD_IMAGES or done == wanted):
            cache.add(keys, np.concatenate(rows))
            keys, rows = [], []
        yield done, [image for image in images if isinstance(image, DataError)]


def _decoded(
    wanted: Sequence[Wanted], encoder: Encoder, batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[Decoded]:
    """Batch after batch, decoded while the one before is encoded; never more than two in memory."""
    ahead: deque[tuple[Sequence[Wanted], list[Future[torch.Tensor | DataError]]]] = deque()
    for start in range(0, len(wanted), batch_size):
        batch = wanted[start : start + batch_size]
        ahead.append((batch, [pool.submit(_decode, item, encoder) for item in batch]))
        if len(ahead) > 1:
            ready, futures = ahead.popleft()
            yield ready, [future.result() for future in futures]
    for ready, futures in ahead:
        yield ready, [future.result() for future in futures]


def _hash(file: ImageFile) -> bytes | DataError:
    try:
        with file.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        return DataError(f"{file.path}: cannot be read ({error.strerror})")


def _decode(item: Wanted, encoder: Encoder) -> torch.Tensor | DataError:
    key, path = item
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).digest() != key:
            return DataError(f"{path}: changed while it was read")
        return encoder.transform(decode_image(data, path, encoder.window))
    except DataError as error:
        return error
    except OSError as error:
        return DataError(f"{path}: cannot be read ({error.strerror})")


def _gather(files: Sequence[ImageFile], keys: Sequence[bytes], cache: FeatureCache) -> FeatureSet:
    rows = cache.get(keys)
    return FeatureSet(
        np.stack([rows[key] for key in keys]),
        np.array([file.label for file in files], dtype=np.int64),
        np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32),
        os.path.commonpath([file.path for file in files]),
    )


def _listing(faults: Sequence[DataError]) -> str:
    lines = [f"  {fault}" for fault in faults[:_LISTED_FAULTS]]
    if len(faults) > _LISTED_FAULTS:
        lines.append(f"  and {len(faults) - _LISTED_FAULTS} more")
    return "\n".join(
        [
            f"{len(faults)} image(s) cannot be used; all others are in the cache. "
            "Replace these or move them away, and run again:",
            *lines,
        ]
    )
