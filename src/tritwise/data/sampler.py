"""The sampler: a batch is a pure function of (data, seed, step, micro), so a resumed run reads what it would have read.

Nothing is carried from step to step and nothing is saved but the settings. The randomness is counter-based (Philox
4×64; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the key is the seed, the counter holds the
step and the micro-batch. Only raw 64-bit words are used: numpy keeps their stream for ever, while the streams of
`Generator` methods may change between its versions. A word modulo n is biased by at most n / 2^64: no run can see it.

    random   every row is a window at a uniformly random place, with replacement
    stream   every row reads on where it stopped the step before; the rows share out the data, and all start again when
             they have read their parts (`begins`), of which fewer than ctx + batch bytes at the end are left out
    epoch    the data is cut into windows of ctx bytes at an offset drawn for the epoch, and every window is read
             exactly once in a shuffled order. Fewer than 2·ctx bytes at the ends are left out, others in each epoch.

Shapes: B batch, T ctx.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from tritwise.data.source import sha256_hex
from tritwise.errors import UserError

MODES = ("random", "epoch", "stream")
WINDOWS, ORDER, OFFSET = range(3)  # what a draw is for: streams that never share a counter


class Sampler:
    """Batches of windows over `data` (uint8 [bytes], or uint16 [tokens]).

    batch, ctx: rows and bytes per row. seed: 0 to 2^64 − 1. mode: one of MODES. accum: micro-batches per step;
    the epoch mode needs it to know how far a step moves on.

    Raises UserError: batch, ctx or accum below 1, seed out of range, an unknown mode, or fewer than ctx + 1 bytes.
    """

    def __init__(
        self, data: np.ndarray, batch: int, ctx: int, seed: int, mode: str = "random", *, accum: int = 1
    ) -> None:
        assert data.dtype in (np.uint8, np.uint16) and data.ndim == 1
        for name, value in (("batch", batch), ("ctx", ctx), ("accum", accum)):
            if value < 1:
                raise UserError(f"{name} must be at least 1: got {value}; give a positive whole number")
        if not 0 <= seed < 2**64:
            raise UserError(f"seed out of range: got {seed}; give a whole number from 0 to 2^64 − 1")
        if mode not in MODES:
            raise UserError(f"unknown sampler mode: {mode!r}; use one of {', '.join(MODES)}")
        least = ctx * (batch if mode == "stream" else 1) + 1
        if len(data) < least:
            raise UserError(
                f"data too short: {len(data):,} bytes, ctx {ctx:,} needs {least:,}; give more data or a smaller ctx"
            )
        if mode == "stream" and accum > 1:
            raise UserError(f"rows that read on cannot be split into {accum} micro-batches; use accum 1")
        self.batch, self.ctx, self.seed, self.mode, self.accum = batch, ctx, seed, mode, accum
        self._data = np.asarray(data)  # a memmap's own indexing is slower than that of the plain array around it
        self._windows = np.lib.stride_tricks.sliding_window_view(self._data, ctx + 1)
        # The whole range of offsets stays open unless the data holds a single window.
        self.windows_per_epoch = max(1, (len(data) - ctx) // ctx)
        self._steps_a_pass = max(1, (len(data) - 1) // batch // ctx)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)  # a batch can straddle two epochs

    def batch_at(self, step: int, micro: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of one micro-batch: int64, [B, T] each, targets one byte on. Steps count from 0."""
        rows = self._windows[self.starts_at(step, micro)]
        return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))

    def starts_at(self, step: int, micro: int = 0) -> np.ndarray:
        """Where the windows of one micro-batch begin in the data: int64, [B]."""
        if self.mode == "random":
            words = _words(self.seed, self.batch, WINDOWS, step, micro)
            return (words % np.uint64(len(self._windows))).astype(np.int64)
        if self.mode == "stream":
            return np.arange(self.batch) * ((len(self._data) - 1) // self.batch) + step % self._steps_a_pass * self.ctx
        assert micro < self.accum, "in epoch mode the sampler must be told accum"
        turns = (step * self.accum + micro) * self.batch + np.arange(self.batch)
        epochs, places = np.divmod(turns, self.windows_per_epoch)
        starts = np.empty(self.batch, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            order, offset = self._epoch(epoch)
            mine = epochs == epoch
            starts[mine] = offset + self.ctx * order[places[mine]].astype(np.int64)
        return starts

    def begins(self, step: int) -> bool:
        """Whether the rows of this step do not go on from the step before: what was remembered must be forgotten."""
        return self.mode != "stream" or step % self._steps_a_pass == 0

    def state(self) -> dict[str, Any]:
        """What a resumed run must have in common with this one; plain JSON. The digest is the sha256 of the data."""
        return {
            "mode": self.mode,
            "seed": self.seed,
            "batch": self.batch,
            "ctx": self.ctx,
            "accum": self.accum,
            "bytes": len(self._data),
            "digest": self._digest,
        }

    def check(self, state: dict[str, Any]) -> None:
        """Raises UserError when `state`, recorded by another sampler, would give other batches than this one."""
        now = self.state()
        changed = [f"{key} was {state.get(key)}, is {now[key]}" for key in now if state.get(key) != now[key]]
        if changed:
            raise UserError(
                f"cannot resume exactly: {', '.join(changed)}; give the same data and settings, or start a new run"
            )

    @cached_property
    def _digest(self) -> str:
        return sha256_hex(self._data)

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, int]:
        """The order of an epoch's windows and the offset of its cuts."""
        words = _words(self.seed, self.windows_per_epoch, ORDER, epoch)
        spare = len(self._data) - 1 - self.windows_per_epoch * self.ctx
        offset = int(_words(self.seed, 1, OFFSET, epoch)[0]) % min(self.ctx, spare + 1)
        return np.argsort(words, kind="stable").astype(np.uint32), offset


def _words(seed: int, count: int, purpose: int, step: int, micro: int = 0) -> np.ndarray:
    """`count` random 64-bit words that depend on the arguments alone; the counter's lowest word counts them."""
    return np.random.Philox(key=seed, counter=[0, step, micro, purpose]).random_raw(count)
