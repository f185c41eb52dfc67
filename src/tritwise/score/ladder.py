"""The ladder: what simple methods need for the same bytes, so that a model's figure has rungs to stand on.

Every row is an honest code length for the val bytes, given the train bytes:

    uniform    8 bits a byte: knowing nothing
    unigram    how often each byte occurs in train
    5-gram     a byte from the four before it, counted in train, with all shorter contexts interpolated
    xz         how much longer the xz file of train gets when val is appended

The n-gram model is interpolated Witten–Bell: Witten and Bell, "The zero-frequency problem", IEEE Transactions on
Information Theory 37(4), 1991 (method C there), in the recursive form of Chen and Goodman, "An empirical study of
smoothing techniques for language modeling", TR-10-98, Harvard, 1998:

    p_k(x | c) = (n(c x) + T(c) · p_{k−1}(x | c without its oldest byte)) / (N(c) + T(c)),    p_0 = 1 / 256

with n(c x) how often x followed the context c in train, N(c) their sum over x and T(c) how many different bytes
followed c. A context that train never showed passes p_{k−1} on. There is no parameter to tune, and the probabilities of
the 256 bytes add up to one. A rung is simple on purpose: better smoothing (Kneser–Ney) would need fewer bits.
On tinyshakespeare split 90/10: 3.347, 2.486, 2.049, 1.774 and 1.669 nats per byte of val for orders 1 to 5.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypedDict

import numpy as np

from tritwise.errors import UserError

NGRAM_TRAIN_LIMIT = 128 << 20  # the last bytes of train are counted, at 8 bytes of memory each
XZ_TRAIN_LIMIT = 64 << 20  # the last bytes of train stand before val, at about 12 bytes of memory each
XZ_DICTIONARY_LIMIT = 128 << 20
CHUNK = 1 << 22  # bytes of val looked up at a time
LONGEST = 8  # an n-gram is packed into one 64-bit word
NAMES = {1: "unigram", 2: "bigram", 3: "trigram"}


class Row(TypedDict):
    """One rung: nats and bits per byte of val. The note names the method and says when part of train was left out."""

    name: str
    nats: float
    bpb: float
    note: str


class _Level(NamedTuple):
    """Counts of one order k, sorted. grams, contexts: uint64, the bytes packed with the newest lowest."""

    grams: np.ndarray  # the k-grams of train
    counts: np.ndarray  # n(c x)
    contexts: np.ndarray  # their first k − 1 bytes, each once
    totals: np.ndarray  # N(c)
    kinds: np.ndarray  # T(c)


class NGram:
    """Interpolated Witten–Bell n-gram model over bytes, counted once and never updated while it is scored.

    train: uint8, [bytes]; empty means the uniform model. order: bytes in the longest n-gram, context plus one, 1 to 8.
    Raises UserError when the order is out of range.
    """

    def __init__(self, train: np.ndarray, order: int) -> None:
        if not 1 <= order <= LONGEST:
            raise UserError(f"n-gram order out of range: got {order}; give 1 to {LONGEST}")
        self.order = order
        levels: list[_Level] = []
        grams, counts = _count(_pack(train, order))
        for k in range(order, 0, -1):
            contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
            totals = np.add.reduceat(counts, first) if len(first) else counts
            levels.append(_Level(grams, counts, contexts, totals, np.diff(first, append=len(grams))))
            # The shorter grams need no second sort: they are the contexts, and the one at the very end of train.
            grams, counts = _plus_one(contexts, totals, _pack(train[len(train) - k + 1 :], k - 1))
        self._levels = levels[::-1]

    def distribution(self, context: bytes) -> np.ndarray:
        """p(byte | context): float64, [256]. Uses the last order − 1 bytes of a context; fewer, or none, will do."""
        known = context[max(0, len(context) - self.order + 1) :]
        packed = int.from_bytes(known, "big") << 8
        return self._probability(np.uint64(packed) | np.arange(256, dtype=np.uint64), len(known) + 1)

    def nats(self, val: np.ndarray, order: int | None = None) -> float:
        """Mean code length in nats per byte of val (uint8, [bytes], at least one), with contexts of order − 1 bytes.

        Contexts lie inside val: the first byte is coded with none, the second with one byte, and so on. None reaches
        back into train, so the figure does not depend on what stood before val. `order` may be below the model's.
        """
        order = self.order if order is None else order
        assert 1 <= order <= self.order and len(val)
        total = sum(self._nats_of(_pack(val[:k], k), k) for k in range(1, min(order - 1, len(val)) + 1))
        for start in range(0, len(val) - order + 1, CHUNK):
            total += self._nats_of(_pack(val[start : start + CHUNK + order - 1], order), order)
        return total / len(val)

    def _nats_of(self, grams: np.ndarray, k: int) -> float:
        distinct, counts = _count(grams)  # a byte's probability depends on its k-gram alone, so each is looked up once
        return float(-(counts * np.log(self._probability(distinct, k))).sum())

    def _probability(self, grams: np.ndarray, k: int) -> np.ndarray:
        """p(last byte | the k − 1 before it) of packed k-grams: float64, the shape of grams."""
        p = np.full(grams.shape, 1 / 256)
        for j, level in enumerate(self._levels[:k], start=1):
            gram = grams & np.uint64((1 << 8 * j) - 1)
            context = gram >> np.uint64(8)
            count = _look_up(level.grams, level.counts, gram)
            total = _look_up(level.contexts, level.totals, context)
            kinds = _look_up(level.contexts, level.kinds, context)
            p = np.where(total > 0, (count + kinds * p) / np.maximum(total + kinds, 1), p)
        return p


def ngram_nats(train: np.ndarray, val: np.ndarray, order: int) -> float:
    """Nats per byte of val under an n-gram model of train; see NGram."""
    return NGram(train, order).nats(val)


def xz_nats(train: np.ndarray, val: np.ndarray) -> float:
    """Nats per byte of val as the growth of an xz file: size(train + val) − size(train), preset 9 extreme.

    A figure of file sizes: whole bytes, rounded to xz's blocks of four. The dictionary spans the input up to 128 MiB.
    """
    with ThreadPoolExecutor(2) as pool:  # lzma lets go of the interpreter while it works
        alone, both = pool.map(_xz_size, ((train,), (train, val)))
    return (both - alone) * 8 * math.log(2) / len(val)


def ladder(train: np.ndarray, val: np.ndarray, orders: Sequence[int] = (5,)) -> list[Row]:
    """The rows uniform, unigram, the other n-grams and xz.

    train, val: uint8, [bytes]. orders: which n-grams to list beside the unigram. A train longer than the limits above
    is cut to its last bytes, and the row's note says so. Raises UserError: val is empty or an order is out of range.
    """
    if not len(val):
        raise UserError("nothing to score: the val part is empty; give more data or another split")
    counted, near = train[-NGRAM_TRAIN_LIMIT:], train[-XZ_TRAIN_LIMIT:]
    model = NGram(counted, max(orders, default=1))
    rows = [_row("uniform", math.log(256), "")]
    for order in sorted({1, *orders}):
        note = "interpolated Witten–Bell" + _cut(counted, train)
        rows.append(_row(NAMES.get(order, f"{order}-gram"), model.nats(val, order), note))
    note = "file sizes: xz -9e of train + val less that of train" + _cut(near, train)
    rows.append(_row("xz", xz_nats(near, val), note))
    return rows


def _row(name: str, nats: float, note: str) -> Row:
    return {"name": name, "nats": nats, "bpb": nats / math.log(2), "note": note}


def _cut(used: np.ndarray, train: np.ndarray) -> str:
    return "" if len(used) == len(train) else f"; only the last {len(used):,} of {len(train):,} train bytes"


def _pack(data: np.ndarray, k: int) -> np.ndarray:
    """All runs of k bytes, each packed into a uint64 with the newest byte lowest: [bytes − k + 1], or empty."""
    count = max(0, len(data) - k + 1)
    packed = np.zeros(count, np.uint64)
    for i in range(k):
        packed <<= np.uint64(8)
        packed |= data[i : i + count]
    return packed


def _count(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """np.unique with counts, but sorting in place: `packed` may be most of the memory there is."""
    packed.sort()
    first = np.flatnonzero(np.concatenate([np.ones(min(1, len(packed)), bool), packed[1:] != packed[:-1]]))
    return packed[first], np.diff(first, append=len(packed))


def _plus_one(grams: np.ndarray, counts: np.ndarray, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The table with one more count of `gram` (uint64, [1], or [0] for none)."""
    place = np.searchsorted(grams, gram)
    if not len(gram) or (place[0] < len(grams) and grams[place[0]] == gram[0]):
        counts = counts.copy()
        counts[place] += 1
        return grams, counts
    return np.insert(grams, place, gram), np.insert(counts, place, 1)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values where keys (sorted) equal wanted, else 0."""
    if not len(keys):
        return np.zeros(wanted.shape, values.dtype)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def _xz_size(parts: Sequence[np.ndarray]) -> int:
    dictionary = min(max(sum(map(len, parts)), 4096), XZ_DICTIONARY_LIMIT)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
    xz = lzma.LZMACompressor(format=lzma.FORMAT_XZ, filters=filters)
    size = 0
    for part in parts:
        for start in range(0, len(part), 1 << 20):
            size += len(xz.compress(part[start : start + (1 << 20)].tobytes()))
    return size + len(xz.flush())
