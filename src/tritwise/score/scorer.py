"""Bits per byte over a whole text, every byte scored exactly once, from nothing but what came before it.

The scorer owns the loss: it looks up each byte's own log-probability and adds them up over the bytes of the text. It
reads in one of three ways.

    sliding   a window of W bytes moves by `stride`: the first window scores all its bytes, a later one only those that
              are new, so a byte is predicted from at least W - stride bytes before it
    chunked   stride = W, the cheap one: the first bytes of every window know next to nothing
    stream    one sequence through a Stream; for a model without learning the same numbers as sliding, and the way to
              score a predictor that learns or mixes as it reads (`score_stream`)

With documents, each is scored like a text of its own. The guards (guards.py) run with every score.

A model of tokens is scored in the same way, token by token, and what all tokens cost is divided by the bytes that they
stand for: an `Alphabet` says how many. Marks between documents cost what they cost, and stand for none.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from tritwise.errors import UserError
from tritwise.score.guards import (
    NoNumberError,
    Tally,
    check_again,
    check_predictor,
    check_stream,
    check_sums,
    check_told,
)
from tritwise.score.protocol import START, EndlessStream, Predictor, Stream, fit_window, stream_of
from tritwise.score.windows import documents_of, rows_of, windows_of

BATCH_BYTES = 16384  # read at a time: their float32 log-probabilities take 16 MB
BATCH_BYTES_GPU = ((40 << 30, 131_072), (16 << 30, 32_768))  # the same of a GPU of at least so much memory
PIECE = 4096  # bytes that a stream reads at a time

Mode = Literal["sliding", "chunked", "stream", "endless"]


class Alphabet(Protocol):
    """Symbols that are not the bytes. start: the one before a text. sizes: integers [N] -> bytes of each, [N]."""

    @property
    def start(self) -> int: ...

    def sizes(self, ids: np.ndarray) -> np.ndarray: ...


class Score(NamedTuple):
    """The result. nats and bpb are means per byte; `bytes` counts every byte of the text, each scored once.

    declared: what the figure rests on, plain JSON.
        mode           sliding, chunked or stream; of an endless stream, stream with a window of 0
        window, stride in bytes; 0: the stream does not say
        reset          when everything is forgotten: "never", or how many documents and how they were told apart
        adaptation     what was learned from scored bytes: "none", or in words
        extra_bytes    that a decoder would need besides the model: the separator, or the documents' lengths
        seconds        of all, and guard_seconds of it for the guards' own calls
    """

    nats: float
    bpb: float
    bytes: int
    window: int
    stride: int
    seconds: float
    declared: dict[str, Any]


def score(
    model: Predictor,
    data: np.ndarray,
    *,
    mode: Mode = "sliding",
    window: int = 0,
    stride: int = 0,
    documents: Sequence[int] | np.ndarray | None = None,
    separator: bytes = b"",
    into: np.ndarray | None = None,
    device: torch.device | str = "cpu",
    alphabet: Alphabet | None = None,
) -> Score:
    """Score `data` (uint8 [N], N >= 1).

    mode: endless reads the text once, in a state that goes on (`EndlessStream`); there is no window and no stride then.
    window: 0 takes the model's context. stride: 0 takes half the window, or all of it when chunked.
    documents, separator: where the model starts anew, by offsets or after these bytes; see `documents_of`.
    into: float array [N] that takes the nats of each byte.
    alphabet: data are its symbols, uint16 [N], and so is what window, stride and into count; modes are sliding and
    chunked then.
    Raises UserError for an empty text, a window the model cannot hold, a stride outside 1 … window, documents that are
    out of place, a model that breaks a condition of the guards, or one that finds some byte impossible.
    """
    began = time.perf_counter()
    if mode not in get_args(Mode):
        raise UserError(f"there is no mode {mode!r}; choose sliding, chunked, stream or endless")
    if alphabet is not None and (mode not in ("sliding", "chunked") or separator):
        raise UserError(
            "a model that reads tokens is scored in the modes sliding and chunked, and without a separator; leave "
            "others out"
        )
    if mode == "endless":
        if window or stride:
            raise UserError("an endless score reads in no windows; leave window and stride out")
        stream = EndlessStream(model, device)
        return score_stream(stream, data, documents=documents, separator=separator, into=into)
    window, stride = fit_window(model, window, stride or (window or model.context if mode == "chunked" else 0))
    if mode == "chunked" and stride != window:
        raise UserError(f"a chunked score moves by the whole window, {window}, not {stride}; leave the stride out")
    if mode == "stream":
        stream = stream_of(model, window=window, stride=stride, device=device)
        return score_stream(stream, data, documents=documents, separator=separator, into=into)
    begins = _begins(data, documents, separator)
    windows = windows_of(begins, len(data), window, stride)
    tally, start_id = Tally(len(data), into), START if alphabet is None else alphabet.start
    told = check_predictor(model, data, windows, device, start_id)
    guarded = time.perf_counter() - began
    with torch.inference_mode():
        for first, last in _batches(windows, batch_bytes(device)):
            group = windows[first:last]
            rows = torch.from_numpy(rows_of(data, group, start_id).astype(np.int64)).to(device)
            log_probs = model.log_probs(rows[:, :-1])
            byte = group[:, :1] + np.arange(log_probs.shape[1])
            check_sums(log_probs, first, (byte >= group[:, 2:3]) & (byte < group[:, 1:2]))
            costs = _costs(log_probs, rows[:, 1:])
            for number, row, (start, stop, new, _) in zip(range(first, last), costs, group.tolist(), strict=True):
                if number in told:
                    check_again(told[number], np.exp(-row[: stop - start]))
                tally.add(new, row[new - start : stop - start])
    about = {"mode": "chunked" if stride == window else "sliding", "window": window, "stride": stride}
    about |= _reset(begins, len(data), separator)
    if alphabet is None:
        return _result(tally, about, began, guarded)
    size = int(alphabet.sizes(data).sum(dtype=np.int64))
    return _result(tally, about | {"unit": "tokens", "tokens": len(data)}, began, guarded, size)


def score_unless_diverged(
    model: Predictor, data: np.ndarray, stride: int, device: torch.device | str = "cpu"
) -> Score | None:
    """`score` in sliding windows, or None if the model's probabilities are no numbers, as after training that diverged.

    A model that breaks a condition of the guards is an error, as there.
    """
    try:
        return score(model, data, stride=stride, device=device)
    except NoNumberError:
        return None


def score_stream(
    stream: Stream,
    data: np.ndarray,
    *,
    documents: Sequence[int] | np.ndarray | None = None,
    separator: bytes = b"",
    into: np.ndarray | None = None,
    declared: dict[str, Any] | None = None,
) -> Score:
    """Score `data` (uint8 [N], N >= 1) with anything that reads from left to right; a document begins with a reset.

    What goes into `Score.declared`: the stream's own `window` and `stride`; its attribute `declared`, a dict, as it is
    when the text has been read; and over these `declared`, what the caller says. Any of them may be missing.
    documents, separator, into and errors as in `score`. The stream is reset before and left at the end of the text.
    """
    began = time.perf_counter()
    about = {"mode": "stream", "window": getattr(stream, "window", 0), "stride": getattr(stream, "stride", 0)}
    begins = _begins(data, documents, separator)
    tally = Tally(len(data), into)
    check_stream(stream, data, about["window"] + about["stride"])
    guarded = time.perf_counter() - began
    for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(data)], strict=True):
        stream.reset()
        for first in range(begin, end, PIECE):
            ids = torch.from_numpy(data[first : min(first + PIECE, end)].astype(np.int64))
            told = stream.log_probs().clone()
            rows = stream.read(ids).detach()
            check_told(told, rows[0], first)
            check_sums(rows, first)
            tally.add(first, _costs(rows, ids.to(rows.device)))
    about |= _reset(begins, len(data), separator) | getattr(stream, "declared", {}) | (declared or {})
    return _result(tally, about, began, guarded)


def spread(costs_N: np.ndarray, ends_N: np.ndarray, into: np.ndarray) -> None:
    """The nats of tokens as those of bytes, in `into` [bytes]: a token's stand at its last byte, so that a stretch of
    text has its cost up to the token that crosses its edge. ends_N: bytes of the text up to each token's end."""
    into[:] = 0
    np.add.at(into, np.maximum(ends_N, 1) - 1, costs_N)


def _costs(log_probs: Tensor, targets: Tensor) -> np.ndarray:
    """Nats of the targets [...] under log_probs [..., V]: float64 [...]."""
    return -log_probs.gather(-1, targets[..., None])[..., 0].double().cpu().numpy()


def batch_bytes(device: torch.device | str) -> int:
    """Bytes that are read at a time on `device`: many on a large GPU, which small batches leave waiting for the host.
    Its whole memory decides and not what is free, so that a score is the same to the last digit on the same GPU."""
    if torch.device(device).type != "cuda":
        return BATCH_BYTES
    memory = torch.cuda.get_device_properties(device).total_memory
    return next((count for least, count in BATCH_BYTES_GPU if memory >= least), BATCH_BYTES)


def _batches(windows: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """(first, last) of consecutive windows that fit `most` bytes when filled up to the longest; at least one each."""
    first, longest = 0, 0
    for number, length in enumerate((windows[:, 1] - windows[:, 0]).tolist()):
        longest = max(longest, length)
        if number > first and (number + 1 - first) * longest > most:
            yield first, number
            first, longest = number, length
    yield first, len(windows)


def _begins(data: np.ndarray, documents: Sequence[int] | np.ndarray | None, separator: bytes) -> np.ndarray:
    if len(data) == 0:
        raise UserError("there is nothing to score: the text is empty; name another --data or --split")
    return documents_of(data, documents, separator)


def _reset(begins: np.ndarray, total: int, separator: bytes) -> dict[str, Any]:
    """What is declared about documents, and the bytes that a decoder needs to find them."""
    if separator:
        return {"reset": f"{len(begins)} documents, after {separator!r}", "extra_bytes": len(separator)}
    if len(begins) == 1:
        return {"reset": "never", "extra_bytes": 0}
    # Lengths in the usual variable-length form: seven bits to a byte.
    lengths = np.diff(np.append(begins, total))
    return {"reset": f"{len(begins)} documents, by offsets", "extra_bytes": sum(_varint(n) for n in lengths.tolist())}


def _varint(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


def _result(tally: Tally, about: dict[str, Any], began: float, guarded: float, size: int | None = None) -> Score:
    """size: bytes of the text, where its symbols are not the bytes."""
    size = tally.total if size is None else size
    if not size:
        raise UserError("there is nothing to score: these tokens stand for no byte; score more of them")
    mean = tally.close() / size
    seconds = time.perf_counter() - began
    declared = {"adaptation": "none"} | about | {"seconds": seconds, "guard_seconds": guarded}
    return Score(mean, mean / math.log(2), size, about["window"], about["stride"], seconds, declared)
