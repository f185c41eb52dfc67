"""What can be scored, and how any model is read as a stream.

    Predictor   a function: a batch of windows of bytes in, log-probabilities of each next byte out
    Stream      one sequence, read from left to right; may carry state, and may learn from what it has read
    stream_of   any Predictor as a Stream, with a KV cache where the model has one
    EndlessStream  a model whose state is bounded, read without ever starting again

`score` takes a Predictor, `score_stream` a Stream. Both own the loss: a model only says what it expects.

A stream sees a newline before the first byte, so that the first byte is predicted like every other. It holds at most
`window` bytes. When it is full, it starts again and reads the last `window - stride` bytes once more; so a byte is
predicted from at least `window - stride` and at most `window` bytes, as in the sliding-window score.

Shape suffixes: B batch, T time, V vocabulary (256, or more for a model with spare symbols).
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tritwise.errors import UserError

START = ord("\n")  # stands before the first byte of a text or document; it is not scored


class Predictor(Protocol):
    """A model as a function of what is before it: it keeps nothing between two calls.

    `log_probs`: int64 [B, T] with 1 <= T <= context -> natural logs float32 [B, T, V], position t seeing the ids up
    to t of its own row and saying what comes next.
    """

    @property
    def context(self) -> int: ...

    def log_probs(self, ids: Tensor) -> Tensor: ...


class Stream(Protocol):
    """One sequence, read byte by byte or in pieces, from left to right.

    log_probs  natural logs float32 [V] of the next byte, given all that was read; the caller does not write into it
    read       int64 [T] (T >= 0, any device) -> float32 [T, V]: the log-probabilities that stood before each of the T
               bytes was seen, row 0 being what `log_probs` says now; then moves on. A stream that learns, learns from a
               byte only after its row stands.
    reset      forgets all that was read and learned: the next byte is the first of a text

    The same bytes in the same pieces give the same bits on one machine with the same number of threads (matrix
    libraries split a sum by threads). Other pieces give equal probabilities up to the rounding of float32.
    """

    def log_probs(self) -> Tensor: ...

    def read(self, ids: Tensor) -> Tensor: ...

    def reset(self) -> None: ...


@runtime_checkable
class Cached(Protocol):
    """A Predictor that can go on where it stopped: model(ids [B, T], state) -> logits [B, T, V], and state moves on."""

    def new_state(self, batch: int = 1) -> Any: ...

    def __call__(self, ids: Tensor, state: Any) -> Tensor: ...


def fit_window(model: Predictor, window: int = 0, stride: int = 0) -> tuple[int, int]:
    """(window, stride) with the defaults filled in: 0 is the model's context, and half the window.

    Raises UserError for a window the model cannot hold and for a stride outside 1 … window.
    """
    window = window or model.context
    stride = stride or max(1, window // 2)
    if not 1 <= window <= model.context:
        raise UserError(f"window {window} does not fit the model; choose 1 to {model.context}")
    if not 1 <= stride <= window:
        raise UserError(f"stride {stride} would skip or repeat bytes; choose 1 to the window, {window}")
    return window, stride


class _OneAhead:
    """A stream that has its say on the next byte ready as soon as it is asked, and `_extend`, which reads on."""

    device: torch.device
    _next: Tensor | None

    @torch.no_grad()
    def log_probs(self) -> Tensor:
        """Natural logs [V] of the next byte."""
        if self._next is None:
            self._next = self._extend(torch.tensor([START], device=self.device))[0]
        return self._next

    def _extend(self, ids: Tensor) -> Tensor:
        raise NotImplementedError


class EndlessStream(_OneAhead):
    """A model that reads on without an end, its state bounded: attention with a sliding window, or an LSTM.

    Nothing is ever read twice, and nothing is forgotten but what the model itself no longer sees; window and stride are
    0 for that reason. Any cut of the bytes gives the same probabilities up to rounding. UserError for a model that
    would have to remember everything.
    """

    window = stride = 0

    def __init__(self, model: Any, device: torch.device | str | None = None) -> None:
        if not isinstance(model, Cached):
            raise UserError("this model has no state that could go on; leave --mode endless out")
        self.model: Any = model
        self.device = torch.device(device or device_of(model))
        self.reset()

    def reset(self) -> None:
        """Forget all that was read."""
        self._state, self._next = self.model.new_state(endless=True), None

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """int64 [T] -> [T, V]: what stood before each byte; then moves on."""
        told = [self.log_probs()[None]]
        told += [self._extend(part) for part in ids.to(self.device).split(self.model.context) if len(part)]
        rows = torch.cat(told)
        self._next = rows[-1].clone()
        return rows[:-1]

    def _extend(self, ids: Tensor) -> Tensor:
        return torch.log_softmax(self.model(ids[None], self._state), dim=-1)[0]


def stream_of(
    model: Predictor, *, window: int = 0, stride: int = 0, device: torch.device | str | None = None
) -> Stream:
    """`model` as a Stream that holds up to `window` bytes; window and stride as in `fit_window`.

    device: where the model wants its ids; None: where its weights are.
    A model with `new_state` reads every byte once into its KV cache, and the last `window - stride` again whenever the
    cache is full. Any other model is asked for the whole window at every read. Raises UserError as `fit_window` does.
    """
    return WindowStream(model, *fit_window(model, window, stride), torch.device(device or device_of(model)))


class WindowStream(_OneAhead):
    """What `stream_of` returns: see there. What a read computes depends on the bytes and on how they were cut only."""

    def __init__(self, model: Predictor, window: int, stride: int, device: torch.device) -> None:
        self.model, self.window, self.stride, self.device = model, window, stride, device
        self.reset()

    def reset(self) -> None:
        """Forget all that was read."""
        self._begin(torch.empty(0, dtype=torch.int64, device=self.device))
        self._next = None

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """int64 [T] -> [T, V]: what stood before each byte; then moves on."""
        told, rest = [self.log_probs()[None]], ids.to(self.device)
        while len(rest):
            if len(self._held) == self.window:
                self._begin(self._held[self.stride :])
            room = self.window - len(self._held)
            told.append(self._extend(rest[:room]))
            rest = rest[room:]
        rows = torch.cat(told)
        self._next = rows[-1].clone()  # a view would keep all rows in memory
        return rows[:-1]

    def _begin(self, held: Tensor) -> None:
        """An empty cache that owes `held`, the bytes to be read again: they go in with the next new byte."""
        self._held, self._owed = held, len(held)
        self._state = self.model.new_state() if isinstance(self.model, Cached) else None

    def _extend(self, ids: Tensor) -> Tensor:
        """Read T >= 1 ids that fit -> [T, V], what is expected after each."""
        self._held = torch.cat((self._held, ids))
        if isinstance(self.model, Cached):
            fresh = self._held[-len(ids) - self._owed :]
            self._owed = 0
            found = torch.log_softmax(self.model(fresh[None], self._state), dim=-1)
        else:
            found = self.model.log_probs(self._held[None])
        return found[0, -len(ids) :]


def device_of(model: Any) -> torch.device:
    """Where a model's weights are; the CPU for a model that has none."""
    first = next(model.parameters(), None) if hasattr(model, "parameters") else None
    return first.device if first is not None else torch.device("cpu")
