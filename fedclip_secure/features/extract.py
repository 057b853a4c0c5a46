"""From image files to features, through the cache."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from fedclip_secure import canonical
from fedclip_secure.data.dataset import FeatureSet, Floats, ImageFile
from fedclip_secure.data.image import decode_image
from fedclip_secure.data.image_facts import ImageFacts
from fedclip_secure.data.walk import patiently
from fedclip_secure.disk import OF_ONE_FILE, refused
from fedclip_secure.errors import DataError
from fedclip_secure.features.batch_size import batch_size as fitting_batch_size
from fedclip_secure.features.cache import FeatureCache
from fedclip_secure.features.encoder import Encoder
from fedclip_secure.features.fixed_batches import Seats
from fedclip_secure.features.index import Contents, FileIndex, read_contents
from fedclip_secure.features.progress import Meter, ShowProgress
from fedclip_secure.features.stage import FEATURES, Stage
from fedclip_secure.features.unusable_images import Broken, check_classes_left

INDEX_NAME = "files.sqlite"
_SHARD_IMAGES = 512  # images between two writes, and
_SHARD_SECONDS = 60.0  # time between two writes: what a kill can lose
_SEATS = 32  # images in a pass of which each has its own row, always: the last passes of a folder are not full
_MAX_DECODERS = 16  # threads; the encoder is the slower half on all but the largest machines


@dataclass(frozen=True, slots=True, eq=False)
class Extraction:
    """The features of all images that could be used, and the `broken` ones that were left out.

    `facts` are those of the used images, in their order.
    """

    features: FeatureSet
    broken: list[Broken]
    facts: list[ImageFacts]


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """`verify`: read every file again, whatever the index says.

    `batch_size` is in images; None: what the device's memory holds. `stage`: how far the encoder runs. `apart`: no bit
    of an image's features may depend on other images (`fixed_batches.py`), which takes a cache of its own.
    """

    verify: bool = False
    batch_size: int | None = None
    stage: Stage = FEATURES
    apart: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """What became of one file; `image` is None where the cache has its features, `facts` where the index has them."""

    number: int  # in the list of files
    contents: Contents | None = None
    image: torch.Tensor | None = None
    facts: ImageFacts | None = None
    fault: Broken | None = None


def extract(
    files: Sequence[ImageFile], encoder: Encoder, folder: Path, show: ShowProgress, options: ExtractOptions
) -> Extraction:
    """Features of `files`, in their order; a record's unit is its patient, or the SHA-256 of its file.

    Where the options ask for another stage, the records have what an image is there too, as `inputs`.

    `folder` holds the cache and the index of files. A file is read only where the index does not have it
    with this size and mtime, and only what the cache lacks is encoded, each image once, and stored shard
    after shard: a run that was killed goes on from its last shard.

    Raises:
        DataError: no files; no image of a class can be used, and then all others are cached first; a disk fails.
        ConfigError: an image needs a window that the plan lacks, or a package.
        ModelError: the device has too little memory.
    """
    if not files:
        raise DataError("there are no images to encode; check `data` in silo.yaml")
    done = _encoded(files, encoder, folder, show, replace(options, stage=FEATURES))
    check_classes_left(files, done.broken)
    found, usable = _gather(files, done.keys, done.cache), [key for key in done.keys if key is not None]
    if options.stage != FEATURES:
        again = _encoded(files, encoder, folder, show, replace(options, verify=False))
        if again.keys != done.keys:
            raise DataError(f"{found.source}: images were changed while they were read; run again")
        found = replace(found, inputs=again.cache.gather(usable))
    return Extraction(found, done.broken, [done.facts[key] for key in usable])


@dataclass(frozen=True, slots=True, eq=False)
class _Done:
    """`keys` of the files' contents, None for a broken one; the cache that has all of them, and their facts."""

    keys: list[bytes | None]
    cache: FeatureCache
    facts: dict[bytes, ImageFacts]
    broken: list[Broken]


def _encoded(
    files: Sequence[ImageFile], encoder: Encoder, folder: Path, show: ShowProgress, options: ExtractOptions
) -> _Done:
    digest = encoder.digest_of(options.stage)
    if options.apart:
        digest = canonical.digest("fedclip/v1/features-apart", digest, encoder.device.type)
    cache = FeatureCache(folder, digest, encoder.shape_of(options.stage))
    with closing(FileIndex(folder / INDEX_NAME)) as index:
        keys: list[bytes | None] = [None] * len(files)
        if not options.verify:
            keys = index.known([file.path for file in files])
        work, waiting, broken = _Work(encoder, options, cache, index), 0, list[Broken]()
        todo = [number for number, key in enumerate(keys) if key is None or not work.has(key)]
        meter = Meter(len(files), len(files) - len(todo), show)
        for batch in _stored(todo, files, work):
            faults = [read.fault for read in batch if read.fault]
            for read in batch:
                keys[read.number] = read.contents.sha256 if read.contents and not read.fault else None
            broken += faults
            found = sum(read.image is None and read.fault is None for read in batch)
            meter.advance(len(batch) + waiting - work.waiting, cached=found, broken=len(faults))
            waiting = work.waiting
    return _Done(keys, cache, work.facts, broken)


def _stored(todo: Sequence[int], files: Sequence[ImageFile], work: _Work) -> Iterator[list[_Read]]:
    """Read, encode and store `todo`, the places of files in the list; batch after batch.

    Images may still wait to be encoded when their batch is given; an empty one follows when these are done.
    """
    if not todo:
        return
    reads = _read_ahead(todo, files, work, work.batch_size)
    while batch := list(islice(reads, work.batch_size)):
        work.store(batch)
        yield batch
    left = work.waiting
    work.finish()
    if left:
        yield []


class _Work:
    """Encodes what was read, and stores features and index shard after shard."""

    def __init__(self, encoder: Encoder, options: ExtractOptions, cache: FeatureCache, index: FileIndex) -> None:
        self.encoder, self.cache, self._options, self._index = encoder, cache, options, index
        self._decoding = canonical.digest("fedclip/v1/decoding", None if encoder.window is None else [*encoder.window])
        self.facts = index.facts(self._decoding)
        self._rows: dict[bytes, Floats] = {}  # encoded and not stored yet
        self._seen: list[Contents] = []
        self._looked_at: dict[bytes, ImageFacts] = {}  # and not stored yet
        self._stored = time.monotonic()

    def has(self, key: bytes) -> bool:
        """Whether all that is wanted of these contents is there."""
        return key in self.cache and key in self.facts

    @cached_property
    def batch_size(self) -> int:
        """How many images are encoded at once; on a GPU a trial finds it out, unless all batches have one size."""
        if self._options.apart:
            return self._options.batch_size or _SEATS
        return self._options.batch_size or fitting_batch_size(self.encoder)

    @property
    def waiting(self) -> int:
        """How many images were read and are not encoded yet."""
        return len(self._seats) if self._options.apart else 0

    @cached_property
    def _seats(self) -> Seats:
        return Seats(self.batch_size)

    def store(self, batch: Sequence[_Read]) -> None:
        """Encode the batch's new images; write a shard when one is full, or after a while."""
        images = {read.contents.sha256: read.image for read in batch if read.contents and read.image is not None}
        known = (self._rows, self.cache, self._seats)
        fresh = {key: image for key, image in images.items() if not any(key in where for where in known)}
        if self._options.apart:
            for key, image in fresh.items():
                self._seats.add(key, image)
            self._encode_seated(all_of_them=False)
        elif fresh:
            rows = self._encode(torch.stack(list(fresh.values())))
            self._rows.update(zip(fresh, rows, strict=True))
        self._seen += [read.contents for read in batch if read.contents]
        facts = {read.contents.sha256: read.facts for read in batch if read.contents and read.facts}
        self.facts.update(facts)
        self._looked_at.update(facts)
        if len(self._seen) >= _SHARD_IMAGES or time.monotonic() - self._stored >= _SHARD_SECONDS:
            self._flush()

    def finish(self) -> None:
        """Encode what still waits, and put on the disk what is not there yet."""
        self._encode_seated(all_of_them=True)
        self._flush()

    def _encode_seated(self, *, all_of_them: bool) -> None:
        for keys, images in self._seats.passes(all_of_them=all_of_them):
            rows = self._encode(images)
            self._rows.update((key, rows[row]) for key, row in keys.items())

    def _encode(self, images: torch.Tensor) -> Floats:
        return self.encoder.encode_images(images, self._options.stage, in_one=self._options.apart)

    def _flush(self) -> None:
        self._index.add(self._seen)
        self._index.add_facts(self._looked_at, self._decoding)
        if self._rows:
            self.cache.add(list(self._rows), np.stack(list(self._rows.values())))
        self._rows, self._seen, self._looked_at, self._stored = {}, [], {}, time.monotonic()


def _read_ahead(todo: Sequence[int], files: Sequence[ImageFile], work: _Work, ahead: int) -> Iterator[_Read]:
    """Read and decode in threads, `ahead` images before they are asked for: so many are in memory, not more."""
    waiting: deque[Future[_Read]] = deque()
    decoders = min(_MAX_DECODERS, os.cpu_count() or 1)
    pool, numbers = ThreadPoolExecutor(decoders), iter(todo)
    try:
        waiting.extend(
            pool.submit(_read, number, files[number].path, work) for number in islice(numbers, max(ahead, 2 * decoders))
        )
        while waiting:
            read = waiting.popleft().result()
            waiting.extend(pool.submit(_read, number, files[number].path, work) for number in islice(numbers, 1))
            yield read
    finally:  # where a disk fails, nobody waits until each of the others has been tried again and again
        pool.shutdown(wait=False, cancel_futures=True)


def _read(number: int, path: Path, work: _Work) -> _Read:
    """A disk that fails ends the run by its name: nothing is known then about the picture."""
    contents = None
    try:
        contents, data = patiently(lambda: read_contents(path))
        if work.has(contents.sha256):
            return _Read(number, contents)
        with ExitStack() as memory:
            decoded = decode_image(data, path, work.encoder.window, memory)
            image = None if contents.sha256 in work.cache else work.encoder.transform(decoded.image)
        return _Read(number, contents, image, decoded.facts)
    except DataError as error:
        return _Read(number, contents, fault=Broken(number, path, str(error)))
    except MemoryError as error:
        raise DataError(f"'{path}': there is too little memory to decode it; free some, or scale it down") from error
    except OSError as error:
        if error.errno not in OF_ONE_FILE:  # the disk's or the machine's, and would cost many records
            raise DataError(refused(error, path)) from error
        return _Read(number, fault=Broken(number, path, refused(error, path)))


def _gather(files: Sequence[ImageFile], keys: Sequence[bytes | None], cache: FeatureCache) -> FeatureSet:
    usable = [(file, key) for file, key in zip(files, keys, strict=True) if key is not None]
    names = [str(file.path) for file in files]
    return FeatureSet(
        cache.gather([key for _, key in usable]),
        np.array([file.label for file, _ in usable], dtype=np.int64),
        np.frombuffer(b"".join(file.unit or key for file, key in usable), dtype=np.uint8).reshape(-1, 32),
        # Of all paths, for each sorts between these two; a split of each would cost a second in a hundred thousand.
        os.path.commonpath([Path(name).absolute() for name in (min(names), max(names))]),
        np.frombuffer(b"".join(key for _, key in usable), dtype=np.uint8).reshape(-1, 32),
    )
