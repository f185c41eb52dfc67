"""A model that reads many parts of one text side by side, one byte of each part a step.

Shape suffixes: S lanes, T time, V vocabulary.

Decoder and encoder must compute the same probabilities to the last bit, so both do the same here: one byte a lane and
step, batches of one fixed size, one thread for each batch. Kernels then see the same shapes in the same order. On a CPU
lanes are cut into batches of at most BATCH, which run on `jobs` threads beside each other; as no batch knows of the
others, neither `jobs` nor torch's number of threads changes a bit. A GPU runs all lanes as one batch.

A lane is a `score.protocol.Stream` in all but its batch dimension: a newline before the first byte, `window` bytes at
most, and the last `window - stride` of them read again when the window is full.
"""

import contextlib
import contextvars
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from tritwise.score.protocol import Cached, Predictor, device_of

BATCH = 128


def divide(total: int, parts: int) -> list[int]:
    """`total` as `parts` sizes that differ by one at most, the larger ones first."""
    size, larger = divmod(total, parts)
    return [size + 1] * larger + [size] * (parts - larger)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on the calling thread alone within the block: more threads sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Lanes:
    """`lanes` streams of one model. Use it within `one_thread()` and close it.

    jobs: batches computed at a time on a CPU; 0 takes the processors there are.
    """

    def __init__(self, model: Predictor, lanes: int, *, window: int, stride: int, jobs: int = 0) -> None:
        self.device = device_of(model)
        batches = -(-lanes // BATCH) if self.device.type == "cpu" else 1
        self._batches = [_Batch(model, size, window, stride, self.device) for size in divide(lanes, batches)]
        self._sizes = [batch.size for batch in self._batches]
        workers = min(batches, jobs or os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(workers) if workers > 1 else None

    def begin(self, before: Tensor) -> None:
        """Forget everything; every lane has read `before` (int64 [T], 1 <= T <= window) and nothing else."""
        for batch in self._batches:
            batch.begin(before.to(self.device))

    def log_probs(self) -> Tensor:
        """Natural logs of the next byte of each lane: float32 [S, V]."""
        if self._pool is None:
            return torch.cat([batch.log_probs() for batch in self._batches])
        # A thread begins without the caller's context, and which backend was asked for stands there.
        tasks = [self._pool.submit(contextvars.copy_context().run, batch.log_probs) for batch in self._batches]
        return torch.cat([task.result() for task in tasks])

    def read(self, ids_S: Tensor) -> None:
        """Every lane reads one more byte: int64 [S]."""
        for batch, ids in zip(self._batches, ids_S.split(self._sizes), strict=True):
            batch.read(ids)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class _Batch:
    """Lanes that go through the model together."""

    def __init__(self, model: Predictor, size: int, window: int, stride: int, device: torch.device) -> None:
        self.model, self.size, self.window, self.stride = model, size, window, stride
        self._held = torch.zeros(size, window, dtype=torch.int64, device=device)  # what the model looks back on
        self._used = self._owed = 0  # how much of it there is, and how much of that the cache has not read yet

    def begin(self, before: Tensor) -> None:
        self._start(before.expand(self.size, -1))

    def _start(self, held_ST: Tensor) -> None:
        self._used = self._owed = held_ST.shape[1]
        self._held[:, : self._used] = held_ST
        self._state = None  # the caches before are let go of first: two at a time would be twice the memory
        self._state = self.model.new_state(self.size) if isinstance(self.model, Cached) else None

    def read(self, ids: Tensor) -> None:
        if self._used == self.window:
            self._start(self._held[:, self.stride :].clone())
        self._held[:, self._used] = ids
        self._used += 1
        self._owed += 1

    @torch.inference_mode()
    def log_probs(self) -> Tensor:
        held = self._held[:, : self._used]
        if isinstance(self.model, Cached):
            logits = self.model(held[:, self._used - self._owed :], self._state)
            self._owed = 0
            return torch.log_softmax(logits[:, -1].float(), dim=-1)
        return self.model.log_probs(held)[:, -1].float()
