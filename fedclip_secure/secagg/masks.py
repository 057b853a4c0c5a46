"""Masks: uniform words expanded from a key that is used once, added and taken away modulo 2^32."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fedclip_secure.secagg.keystream import Drawer, keystream
from fedclip_secure.secagg.ring import Words

_CHUNK = 1 << 16  # words, 256 KiB: the masked part, zeros and keystream lie together in a core's second-level cache
_WORK = 1 << 22  # words of keystream, 2 ms: what a thread must have to do to be worth starting
_STREAMS = 64  # open at a time, at 1 KiB each: where many silos drop out there are thousands of keys
_MOST_THREADS = 8  # the cipher and numpy let go of the interpreter's lock, but between two calls a thread needs it
_GRAIN = 16  # words, 64 bytes: threads write into different lines of cache, and start at whole blocks of the cipher


def expand(key: bytes, length: int) -> Words:
    """Expand a single-use 32-byte key into `length` uniform uint32 words (AES-256-CTR, zero IV)."""
    words = np.zeros(length, dtype=np.uint32)
    apply(words, add=[key], subtract=[])
    return words


def apply(words: Words, add: Sequence[bytes], subtract: Sequence[bytes]) -> None:
    """Add and subtract the masks of the given 32-byte keys, in place, modulo 2^32.

    The zero IV is sound because no key is used twice: each is derived for one pair in one attempt.
    """
    _mask(words, words, add, subtract)


def masked(source: Words, add: Sequence[bytes], subtract: Sequence[bytes]) -> Words:
    """`apply` to a copy (d,) uint32 of `source` (d,), which may be a read-only map of a file."""
    words = np.empty(source.size, dtype=np.uint32)
    _mask(source, words, add, subtract)
    return words


def _mask(source: Words, words: Words, add: Sequence[bytes], subtract: Sequence[bytes]) -> None:
    keys = [(key, np.add) for key in add] + [(key, np.subtract) for key in subtract]
    threads = min(_cores(), _MOST_THREADS, words.size // (2 * _CHUNK), words.size * len(keys) // _WORK)
    if threads < 2:
        _mask_span(source, words, keys, range(words.size))
        return
    with ThreadPoolExecutor(threads) as pool:
        spans = _cut(range(words.size), threads)
        list(pool.map(lambda span: _mask_span(source, words, keys, span), spans))  # a list raises what a thread raised


def _mask_span(source: Words, words: Words, keys: Sequence[tuple[bytes, np.ufunc]], span: range) -> None:
    """Put the words of `source` in `span` into `words`, with the masks; without keys too."""
    drawer = Drawer(_CHUNK)
    for first in range(0, max(1, len(keys)), _STREAMS):
        streams = [(keystream(key, span.start), operation) for key, operation in keys[first : first + _STREAMS]]
        for chunk in _cut(span, -(-len(span) // _CHUNK)):
            part = words[chunk.start : chunk.stop]
            np.copyto(part, (words if first else source)[chunk.start : chunk.stop])
            for stream, operation in streams:
                operation(part, drawer.draw(stream, part.size), out=part)


def _cut(span: range, pieces: int) -> list[range]:
    """At most `pieces` pieces of equal length, but for the last."""
    grains = -(-len(span) // _GRAIN)
    step = _GRAIN * max(1, -(-grains // max(1, pieces)))
    return [span[start : start + step] for start in range(0, len(span), step)]


def _cores() -> int:
    """Cores that this process may run on, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
