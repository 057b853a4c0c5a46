"""How many images are encoded at once."""

from __future__ import annotations

import math

import torch

from fedclip_secure.features.encoder import Encoder

_WITHOUT_CUDA = 32  # a CPU gains nothing beyond, and a ViT-L/14 at 336 pixels stays below 2 GB
_MOST = 512  # a GPU gains nothing beyond; 300 MB of decoded images at 224 pixels
_TRIED = 4  # images in the trial
_SHARE = 0.5  # of the free memory: others may use the device too


def batch_size(encoder: Encoder) -> int:
    """On CUDA what half of the free memory holds, by a trial of a few images; elsewhere a fixed number.

    Raises:
        ModelError: not even the trial fits.
    """
    if encoder.device.type != "cuda":
        return _WITHOUT_CUDA
    size = encoder.lock.preprocessing.size
    trial = torch.zeros(_TRIED, 3, size, size)
    encoder.encode_images(trial)  # the first loads kernels, whose memory is not the images'
    torch.cuda.reset_peak_memory_stats(encoder.device)
    before = torch.cuda.memory_allocated(encoder.device)
    encoder.encode_images(trial)
    each = (torch.cuda.max_memory_allocated(encoder.device) - before) / _TRIED
    torch.cuda.empty_cache()  # what torch keeps for itself is free too
    free, _ = torch.cuda.mem_get_info(encoder.device)
    return fitting(free, each)


def fitting(free: int, each: float) -> int:
    """The largest power of two of images, 1 to 512, at `each` bytes in half of `free` bytes."""
    images = min(_MOST, max(1.0, free * _SHARE / max(each, 1.0)))
    return 1 << int(math.log2(images))
