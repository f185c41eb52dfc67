"""Bits per byte over a whole text, every byte scored exactly once, from nothing but what came before it.

The scorer owns the loss. It knows a model as a `Predictor`: bytes in, log-probabilities out. A window of W bytes slides
by `stride`: the first window scores all its targets, a later one only those that are new, so a byte is predicted from
at least W - stride bytes before it. stride = W is the cheap "chunked" score, in which the first bytes of every window
know next to nothing.
"""

import math
import time
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tritwise.errors import UserError

BATCH_BYTES = 16384  # read at a time: their float32 log-probabilities take 16 MB
START = ord("\n")  # stands before the first byte, so that the first byte is predicted like every other


class Predictor(Protocol):
    """What can be scored. `log_probs`: int64 [B, T] with T <= context -> natural logs [B, T, 256], position t seeing
    ids up to t and saying what comes next."""

    @property
    def context(self) -> int: ...

    def log_probs(self, ids: Tensor) -> Tensor: ...


class Score(NamedTuple):
    """The result. nats and bpb are means per byte; `bytes` counts every byte of the text, each scored once."""

    nats: float
    bpb: float
    bytes: int
    window: int
    stride: int
    seconds: float


def _spans(total: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, stop, first new target) of each window over targets 0 … total-1; new targets tile the text exactly.

    All windows are as long as the first: `window`, or the whole text where that is shorter.
    """
    spans, done = [], 0
    while done < total:
        stop = min(total, window if done == 0 else done + stride)
        spans.append((max(0, stop - window), stop, done))
        done = stop
    return spans


@torch.inference_mode()
def score(
    model: Predictor,
    data: np.ndarray,
    *,
    window: int = 0,
    stride: int = 0,
    device: torch.device | str = "cpu",
) -> Score:
    """Score `data` (uint8 [N], N >= 1). window: 0 takes the model's context. stride: 0 takes half the window.

    Raises UserError for an empty text, a window the model cannot hold, a stride outside 1 … window, and for a model
    whose probabilities do not sum to 1 within 1e-4 (checked at one position of every batch) or are not numbers.
    """
    total = len(data)
    if total == 0:
        raise UserError("there is nothing to score: the text is empty; name another --data or --split")
    window = window or model.context
    stride = stride or max(1, window // 2)
    if not 1 <= window <= model.context:
        raise UserError(f"window {window} does not fit the model; choose 1 to {model.context}")
    if not 1 <= stride <= window:
        raise UserError(f"stride {stride} would skip or repeat bytes; choose 1 to the window, {window}")
    began, batch = time.perf_counter(), max(1, BATCH_BYTES // window)
    text = np.empty(total + 1, dtype=np.uint8)
    text[0], text[1:] = START, data
    spans, length = _spans(total, window, stride), min(window, total)
    nats, scored = 0.0, 0
    for first in range(0, len(spans), batch):
        group = spans[first : first + batch]
        rows = np.stack([text[start : start + length + 1] for start, _, _ in group]).astype(np.int64)
        ids = torch.from_numpy(rows).to(device)
        log_probs = model.log_probs(ids[:, :-1])
        _check_distribution(log_probs[len(group) // 2, -1])
        losses = -log_probs.gather(2, ids[:, 1:, None])[..., 0].double()
        for row, (start, stop, new) in enumerate(group):
            nats += float(losses[row, new - start :].sum())
            scored += stop - new
    assert scored == total, "the windows must tile the text"
    if not math.isfinite(nats):
        raise UserError("the model gives some byte a probability of zero or no number; it cannot be scored")
    mean = nats / total
    return Score(mean, mean / math.log(2), total, window, stride, time.perf_counter() - began)


def _check_distribution(log_probs_V: Tensor) -> None:
    total = float(log_probs_V.double().exp().sum())
    if not abs(total - 1.0) <= 1e-4:
        raise UserError(f"the model's probabilities sum to {total:.6f}, not 1; such a model cannot be scored")
