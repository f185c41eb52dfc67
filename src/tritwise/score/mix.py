"""Online mixing: a neural model beside counts of orders 0 … 5 that grow with the text, weighted by past losses only.

The experts are the neural model and the n-gram models of `tritwise.score.counts`, each a full distribution. They are
mixed in the logistic domain with an explicit partition sum, so that any weights give a distribution:

    p(x) = exp(Σ_i w_i · log p_i(x)) / Σ_y exp(Σ_i w_i · log p_i(y))

and after a piece of text the weights take a gradient step on its code length in nats,

    dL/dw_i = Σ_t [ Σ_y p(y) · log p_i(y) − log p_i(x_t) ],  divided by the root of the sum of its past squares.

There is one set of weights for each longest order that knows the context, and each of SURE ranges of what the counts
give their likeliest byte. Every set starts as the neural model alone. Sources: Mattern, "Mixing strategies in data
compression", DCC 2012 (geometric weighting); Duchi, Hazan and Singer, "Adaptive subgradient methods", JMLR 12, 2011.

A `Switch` between the neural model and the mixture has the last word, so that the result is never worse than the
neural model by more than 0.0007 bits a byte, on any text.

Counts and weights learn at the end of every `piece` bytes, counted from the start of the text however it is read: what
lies less than a piece back is what a neural model sees best. The switch learns from every byte.

Shape suffixes: T time, V bytes (256), E experts, S sets of weights.
"""

import time
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tritwise.errors import UserError
from tritwise.score.counts import ORDER, SLOTS, Counts
from tritwise.score.protocol import START, Stream
from tritwise.score.switch import WORST_BITS, Switch

PIECE = 128
RATE = 0.05
SURE = np.array([0.3, 0.6, 0.9], np.float32)
FLOOR = -30.0  # nats: below it an expert's certainty is not believed; a weight times it must stay a number
LIMIT = 4.0  # of a weight
LOG_EVERY = 4096  # bytes
SHOWN = 50  # rows of weights in a declaration, about
TRAIN_LIMIT = 16 << 20  # the last bytes of train are counted


class Mixed:
    """A Stream: `neural` mixed with counts of what was read.

    neural: the Stream of the neural model; of its symbols the first 256 count. order: the longest context counted.
    piece: bytes between two moments of learning. rate: of the weights. slots: rows for the contexts of each order above
    two, 40 bytes each; all counts take at most 160 MB, twice that with train. train: bytes (uint8 [N]) that are counted
    before the text; the reader must have them too. Raises UserError for an order, piece or rate that cannot work.

    weights: after reading, rows (bytes read, share of the switch for the mixture, weight of the neural model, of order
    0, …), means over the bytes since the row before; `weight_names` names them.
    """

    def __init__(
        self,
        neural: Stream,
        *,
        order: int = ORDER,
        piece: int = PIECE,
        rate: float = RATE,
        slots: int = SLOTS,
        train: np.ndarray | None = None,
    ) -> None:
        if piece < 1:
            raise UserError(f"piece is {piece}; mixing learns after every piece of at least 1 byte")
        if not 0 <= rate < float("inf"):
            raise UserError(f"rate is {rate}; it must be 0 or more and finite")
        self.neural, self.order, self.piece, self.rate, self.slots = neural, order, piece, rate, slots
        self.train_bytes = 0 if train is None else min(len(train), TRAIN_LIMIT)
        self.window, self.stride = getattr(neural, "window", 0), getattr(neural, "stride", 0)
        self.seconds = 0.0  # spent here and not in the neural model
        self._counts: Counts | None = None
        self._primed: Counts | None = None
        if train is not None and len(train):
            self._primed = Counts(order, slots)
            self._primed.prime(train[-TRAIN_LIMIT:])
        self.weight_names = ["read", "mixture", "neural", *(f"order {k}" for k in range(order + 1))]
        self.reset()

    @property
    def declared(self) -> dict[str, Any]:
        """What this and the neural stream learned, and how, for the result."""
        inner = getattr(self.neural, "declared", {})
        words = f"logistic mixing with counts of orders 0 to {self.order}, after every {self.piece} bytes at rate "
        return inner | {
            "adaptation": "; ".join([*([inner["adaptation"]] if inner else []), f"{words}{self.rate:g}"]),
            "mix_train_bytes": self.train_bytes,
            "mix_seconds": self.seconds,
            "mix_worst_bpb": WORST_BITS,
            "mix_weights": [self.weight_names, *self.weights[:: max(1, len(self.weights) // SHOWN)]],
        }

    def reset(self) -> None:
        """Forget all that was read and learned, but not `train`."""
        began = time.perf_counter()
        self.neural.reset()
        if self._counts is None or self._counts.learned:
            self._counts = Counts(self.order, self.slots) if self._primed is None else deepcopy(self._primed)
        experts, sets = self.order + 2, (self.order + 2) * (len(SURE) + 1)
        self._w_SE = np.zeros((sets, experts))
        self._w_SE[:, 0] = 1.0
        self._squares_SE = np.full((sets, experts), 1e-2)
        self._switch = Switch()
        self._before = np.full(self.order, START, np.uint8)
        self._ids = np.empty(0, np.uint8)  # of the piece that is being read, and what was noted at each
        self._sets = np.empty(0, np.int64)
        self._slopes_TE = np.empty((0, experts))
        self._next: Tensor | None = None
        self.bytes_read = 0
        self.weights: list[list[float]] = []
        self._sums_E, self._logged = np.zeros(experts), 0
        self.seconds += time.perf_counter() - began

    def log_probs(self) -> Tensor:
        """Natural logs [256] of the next byte."""
        if self._next is None:
            neural_V = self.neural.log_probs()[None]
            began = time.perf_counter()
            neural_TV, nothing = _bytes_of(neural_V), np.empty(0, np.uint8)
            mixed_TV = self._mix(neural_TV, self._contexts(nothing)).log_p_TV
            self._next = torch.from_numpy(self._switch.peek(neural_TV[0], mixed_TV[0]))
            self.seconds += time.perf_counter() - began
        return self._next

    def read(self, ids: Tensor) -> Tensor:
        """int64 [T] -> [T, 256]: what stood before each byte; then moves on and learns."""
        neural_TV = _bytes_of(self.neural.read(ids))
        began = time.perf_counter()
        data, rows, start = ids.cpu().numpy().astype(np.uint8), np.empty_like(neural_TV), 0
        while start < len(data):
            stop = min(len(data), start + self.piece - len(self._ids))
            rows[start:stop] = self._read(neural_TV[start:stop], data[start:stop])
            start = stop
        if len(data):
            self._next = None
        self.seconds += time.perf_counter() - began
        return torch.from_numpy(rows)

    def _read(self, neural_TV: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Bytes of one piece, its last ones perhaps: then it is learned."""
        mixed = self._mix(neural_TV, self._contexts(ids)[:-1])
        rows_TV = self._switch.blend(neural_TV, mixed.log_p_TV, ids)
        self._ids = np.concatenate([self._ids, ids])
        self._sets = np.concatenate([self._sets, mixed.sets_T])
        self._slopes_TE = np.concatenate([self._slopes_TE, mixed.slopes(ids)])
        self.bytes_read += len(ids)
        if len(self._ids) == self.piece:
            self._learn()
        return rows_TV

    def _contexts(self, ids: np.ndarray) -> np.ndarray:
        """Packed contexts of each of ids, the next bytes, and of what follows: uint64 [T + 1]."""
        held = np.concatenate([self._before, self._ids])
        return self._tables.contexts(held[len(held) - self.order :], ids)

    @property
    def _tables(self) -> Counts:
        assert self._counts is not None
        return self._counts

    def _mix(self, neural_TV: np.ndarray, contexts: np.ndarray) -> "_Mixture":
        p_KTV, known_T = self._tables.probabilities(contexts)
        sure_T = np.digitize(p_KTV[-1].max(axis=1), SURE)
        sets_T = (known_T + 1) * (len(SURE) + 1) + sure_T
        logs = [np.maximum(neural_TV, np.float32(FLOOR)), *np.log(p_KTV, out=p_KTV)]
        w_TE = self._w_SE[sets_T].astype(np.float32)
        # One expert after the other: each position's sum has the same order however many are asked for at once.
        log_p_TV, term_TV = logs[0] * w_TE[:, :1], np.empty_like(neural_TV)
        for i in range(1, len(logs)):
            log_p_TV += np.multiply(logs[i], w_TE[:, i : i + 1], out=term_TV)
        log_p_TV -= log_p_TV.max(axis=1, keepdims=True)
        p_TV = np.exp(log_p_TV)
        total_T1 = p_TV.sum(axis=1, keepdims=True)
        log_p_TV -= np.log(total_T1)
        p_TV /= total_T1
        return _Mixture(log_p_TV, p_TV, logs, sets_T)

    def _learn(self) -> None:
        """A piece has been read: count it and move the weights."""
        self._tables.learn(self._tables.contexts(self._before, self._ids)[:-1], self._ids)
        self._sums_E += self._w_SE[self._sets].sum(axis=0)
        slope_SE = np.zeros_like(self._w_SE)
        np.add.at(slope_SE, self._sets, self._slopes_TE)
        self._squares_SE += slope_SE**2
        self._w_SE -= self.rate * slope_SE / np.sqrt(self._squares_SE)
        np.clip(self._w_SE, -LIMIT, LIMIT, out=self._w_SE)
        if not self.weights or self.bytes_read - self._logged >= LOG_EVERY:
            means_E = self._sums_E / (self.bytes_read - self._logged)
            self.weights.append([self.bytes_read, 1 - self._switch.trusted, *means_E.tolist()])
            self._sums_E[:], self._logged = 0.0, self.bytes_read
        held = np.concatenate([self._before, self._ids])
        self._before = held[len(held) - self.order :]
        self._ids, self._sets, self._slopes_TE = self._ids[:0], self._sets[:0], self._slopes_TE[:0]


class _Mixture(NamedTuple):
    """What was said at T positions, and by whom."""

    log_p_TV: np.ndarray
    p_TV: np.ndarray
    logs: list[np.ndarray]  # of each expert, float32 [T, V]
    sets_T: np.ndarray

    def slopes(self, ids: np.ndarray) -> np.ndarray:
        """The gradient of each byte's nats by the weights it was mixed with: float64 [T, E]."""
        row, found_TE, term_TV = np.arange(len(ids)), np.empty((len(ids), len(self.logs))), np.empty_like(self.p_TV)
        for i, log_TV in enumerate(self.logs):
            np.multiply(self.p_TV, log_TV, out=term_TV)
            found_TE[:, i] = term_TV.sum(axis=1) - log_TV[row, ids]
        return found_TE


def _bytes_of(rows: Tensor) -> np.ndarray:
    """float32 [T, 256], natural logs; what a model gives to symbols that are no bytes is shared out among those."""
    if rows.shape[1] > 256:
        rows = torch.log_softmax(rows[:, :256], dim=1)
    return rows.detach().float().cpu().numpy()
