"""Dropout whose mask is a hash of where and when it is drawn, so that it needs no generator.

A mask computed again (activation checkpointing), replayed (a CUDA graph), compiled, or drawn by another rank is the
same one. Source: Srivastava et al., "Dropout", 2014; the hash is that of `tritwise.registers.random`.
"""

import math

import torch
from torch import Tensor

from tritwise.registers import make_key, words_at

_STREAM = 3  # of the keys: 0 to 2 and those below are the optimizer's


def noise_of(seed: int, step: int, micro: int) -> int:
    """What the masks of one micro-batch of one step are drawn from, as a signed 64-bit number."""
    key = make_key(seed, step, micro, _STREAM)
    return (int(key.second) << 32) | (int(key.first) & 0xFFFFFFFF)


def dropout(x: Tensor, share: float, noise: Tensor, place: int, *, rows: bool = False) -> Tensor:
    """x with about `share` of its elements set to 0 and the others divided by 1 - share; of x's shape and dtype.

    noise: int64 0-d, of `noise_of`, on x's device. place: a number of its own for each use in one pass. rows: whole
    rows, along the last axis, are set to 0 or stay.
    """
    first, second = ((noise << 32) >> 32).to(torch.int32), (noise >> 32).to(torch.int32)
    drawn = (*x.shape[:-1], 1) if rows else x.shape
    index = torch.arange(math.prod(drawn), dtype=torch.int32, device=x.device).view(drawn)
    own = make_key(place)
    words = words_at(index, first ^ own.first, second ^ own.second)
    kept = (words & 0xFFFF) >= round(share * 65536)
    return torch.where(kept, x * (1 / (1 - share)), torch.zeros((), dtype=x.dtype, device=x.device))
