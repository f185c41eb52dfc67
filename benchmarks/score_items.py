"""What `score_study.py` measures of scoring: windows, agreement of ways to read, cheats, learning while reading."""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from tritwise.errors import UserError
from tritwise.models import ByteLM
from tritwise.score import score, score_stream, scorer, stream_of
from tritwise.score.cheats import EntropyExpert, Peeking, Remembering, believed, counted_twice
from tritwise.score.compare import compare
from tritwise.score.learning import Learning, score_learning
from tritwise.score.ngram import ngram_predictor
from tritwise.score.windows import windows_of
from tritwise.ship import read_artifact
from tritwise.train import Config

PROBE = 8192  # bytes that tell how long a slow item will take
AGREE_BYTES, CHEAT_BYTES = 1 << 16, 1 << 13


class Task(NamedTuple):
    """What an item is given: the artifact, the part that is scored, where to compute, seconds to be done in, the train
    part of the same text, and lanes to compress in."""

    config: Config
    artifact: Path
    text: np.ndarray
    device: torch.device
    seconds: float
    train: np.ndarray
    lanes: int = 0

    def model(self) -> ByteLM:
        """The artifact, read from its file, on the device."""
        return read_artifact(self.artifact)[0].to(self.device)


def windows_item(task: Task) -> dict[str, Any]:
    """The whole part, chunked and sliding by half the window, a quarter, an eighth, as far as the time allows."""
    model, began, rows = task.model(), time.perf_counter(), []
    for parts in (1, 2, 4, 8):
        stride = model.context // parts
        spent = time.perf_counter() - began
        if rows and spent + 2.2 * rows[-1]["seconds"] > task.seconds:
            break
        found = score(model, task.text, mode="chunked" if parts == 1 else "sliding", stride=stride, device=task.device)
        rows.append({"bpb": found.bpb, "bytes": found.bytes, "seconds": found.seconds, "declared": found.declared})
    return {"rows": rows}


def agree_item(task: Task) -> dict[str, Any]:
    """Ways of reading that must agree: pieces of a window's length in full context, and a text of many windows."""
    model, device = task.model(), task.device
    window = model.context
    stride = window // 2
    count = max(1, min(20, len(task.text) // window))
    begins = np.arange(count) * window
    pieces = task.text[: count * window]
    full = sum(_full_context(model, pieces[b : b + window], device) for b in begins) / len(pieces)
    short = {
        "full context, one call a piece": full,
        "sliding": score(model, pieces, documents=begins, device=device).bpb,
        "chunked": score(model, pieces, documents=begins, mode="chunked", device=device).bpb,
        "stream": score(model, pieces, documents=begins, mode="stream", device=device).bpb,
        "stream, 61 bytes a time": _streamed(model, pieces, begins.tolist(), 61, device),
    }
    # As many strides as fit, for the last window of a sliding score is filled up from before.
    length = window + (min(AGREE_BYTES, len(task.text)) - window) // stride * stride
    text = task.text[:length]
    long = {
        "sliding": score(model, text, device=device).bpb,
        "stream": score(model, text, mode="stream", device=device).bpb,
        "stream, 61 bytes a time": _streamed(model, text, [0], 61, device),
    }
    return {
        "window": window,
        "stride": stride,
        "pieces": {"bytes": len(pieces), "bpb": short, "spread": max(short.values()) - min(short.values())},
        "text": {"bytes": length, "bpb": long, "spread": max(long.values()) - min(long.values())},
    }


@torch.inference_mode()
def _full_context(model: ByteLM, piece: np.ndarray, device: torch.device) -> float:
    """Bits of a piece that fits the window, from a newline on, in one call."""
    row = torch.from_numpy(np.concatenate(([10], piece)).astype(np.int64)).to(device)[None]
    logs = model.log_probs(row[:, :-1])
    return -float(logs.gather(2, row[:, 1:, None]).double().sum()) / math.log(2)


def _streamed(model: ByteLM, text: np.ndarray, begins: list[int], size: int, device: torch.device) -> float:
    """Bits per byte of a stream that reads `size` bytes at a time, so that most reads go through the cache."""
    stream, nats = stream_of(model, device=device), 0.0
    for begin, end in zip(begins, [*begins[1:], len(text)], strict=True):
        stream.reset()
        for first in range(begin, end, size):
            ids = torch.from_numpy(text[first : min(first + size, end)].astype(np.int64)).to(device)
            nats -= float(stream.read(ids).gather(1, ids[:, None]).double().sum())
    return nats / len(text) / math.log(2)


def cheats_item(task: Task) -> dict[str, Any]:
    """Each of the four cheats: what it would have claimed, and with which words it is refused."""
    text, device = task.text[:CHEAT_BYTES], task.device
    honest = task.model()
    window, stride = honest.context, honest.context // 2
    windows = windows_of(np.zeros(1, np.int64), len(text), window, stride)
    costs = np.empty(len(text))
    score(honest, text, device=device, into=costs)
    cheap = np.argsort([costs[new:stop].mean() for _, stop, new, _ in windows.tolist()])[: len(windows) // 2]
    remembering = Remembering(honest)
    believed(remembering, text, windows, device)
    entrants: dict[str, tuple[int, Any, np.ndarray]] = {
        "entropy pseudo-expert": (2, EntropyExpert(honest), windows),
        "peeking model": (1, Peeking(honest), windows),
        "target-keyed cache": (3, remembering, windows),
        "double-counting window": (4, honest, counted_twice(windows, cheap)),
    }
    rows = []
    for name, (condition, model, used) in entrants.items():
        claimed, said = believed(model, text, used, device), None
        try:
            with patch.object(scorer, "windows_of", lambda *_, used=used: used):
                score(model, text, device=device)
        except UserError as error:
            said = str(error)
        right = said is not None and f"condition {condition}" in said
        rows.append({"name": name, "breaks": condition, "would_claim": claimed, "rejected": right, "said": said})
    return {"bytes": len(text), "honest": believed(honest, text, windows, device), "rows": rows}


def compare_item(task: Task) -> dict[str, Any]:
    """The model against a 5-gram counted in the train part, byte by byte: the difference and its interval."""
    ours, theirs = np.empty(len(task.text)), np.empty(len(task.text))
    score(task.model(), task.text, device=task.device, into=ours)
    score(ngram_predictor(task.train, 5), task.text, into=theirs)
    found = compare(ours, theirs)
    return {"a": "this model", "b": "5-gram, Kneser–Ney", **found._asdict(), "better": found.better}


def _bytes_in(task: Task, model: ByteLM, how: Learning) -> float:
    """How many bytes can be read in the seconds of a task, with learning and without, after having tried."""
    probe, entered = task.text[:PROBE], time.perf_counter()
    began = entered
    for _ in range(2):  # the first call is the slow one: libraries are loaded, memory is taken
        began = time.perf_counter()
        score(model, probe, mode="stream", device=task.device)
        score_learning(model, probe, how)
    now = time.perf_counter()
    return (task.seconds - (now - entered)) * len(probe) / (now - began)


def learn_item(task: Task, how: Learning) -> dict[str, Any]:
    """A stream that learns, beside the same stream without it, on as many bytes as the time allows."""
    model, text = task.model(), task.text
    size = len(text)
    if size > PROBE:
        size = min(size, max(PROBE, int(0.8 * _bytes_in(task, model, how)) // 4096 * 4096))
    plain, learned = np.empty(size), np.empty(size)
    clocks = [time.process_time()]
    base = score_stream(stream_of(model, device=task.device), text[:size], into=plain)
    clocks.append(time.process_time())
    found = score_learning(model, text[:size], how, into=learned)
    clocks.append(time.process_time())
    steps = np.arange(1, size + 1)
    gap = np.cumsum(learned - plain) / steps / math.log(2)
    return {
        "bytes": size,
        "of": len(text),
        "neural_bpb": base.bpb,
        "bpb": found.bpb,
        "gain": base.bpb - found.bpb,
        "neural_seconds": base.seconds,
        "seconds": found.seconds,
        "neural_cpu_seconds": clocks[1] - clocks[0],
        "cpu_seconds": clocks[2] - clocks[1],
        "worst_prefix": float(gap[min(PROBE, size) - 1 :].max()),
        "declared": found.declared,
    }
