"""The ladder: what simple methods need for the same bytes, so that a model's figure has rungs to stand on.

Every row is an honest code length for the val bytes, given the train bytes:

    uniform    8 bits a byte: knowing nothing
    unigram    how often each byte occurs in train
    5-gram     a byte from the four before it, counted in train, with all shorter contexts interpolated
    5-gram KN  the same context, better smoothed: the best of the counting rungs
    xz         how much longer the xz file of train gets when val is appended

Both 5-grams take D from each count and mix in the probability one order lower, with a weight of W per different byte:

    p_k(x | c) = (max(n(c x) − D, 0) + W · T(c) · p_{k−1}(x | c without its oldest byte)) / (N(c) + (W − D) · T(c))

with p_0 = 1 / 256, n(c x) the count of x after the context c, N(c) its sum over x and T(c) how many different bytes
followed c. A context that train never showed passes p_{k−1} on. The probabilities of the 256 bytes add up to one, and
there is nothing to tune. The two differ in D, in W and in what they count:

    Witten–Bell  D = 0, W = 1; n(c x) is how often c x occurs in train.
    Kneser–Ney   D = W = n1 / (n1 + 2 n2), with n1 and n2 how many n-grams of the order have the count 1 and 2 (each
                 taken as at least 1, so that 0 < D < 1); below the highest order n(c x) is how many different bytes
                 stood before c x in train.

Sources: Witten and Bell, "The zero-frequency problem", IEEE Transactions on Information Theory 37(4), 1991 (method C
there); Kneser and Ney, "Improved backing-off for m-gram language modeling", ICASSP 1995; both in the recursive form of
Chen and Goodman, "An empirical study of smoothing techniques for language modeling", TR-10-98, Harvard, 1998.
On tinyshakespeare split 90/10, in nats per byte of val: Witten–Bell 3.347, 2.486, 2.049, 1.774 and 1.669 for orders 1
to 5, Kneser–Ney 1.579 for order 5.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, TypedDict

import numpy as np

from tritwise.errors import UserError

LADDER_BYTES = 16_000_000  # of a text beside which the ladder is drawn unasked; a longer one takes minutes
# With these the whole ladder takes less than a minute on two cores however long and whatever train is: 20 s for text.
NGRAM_TRAIN_LIMIT = 96 << 20  # the last bytes of train are counted; memory for each: 12 bytes for text, 100 for noise
XZ_TRAIN_LIMIT = 12 << 20  # the last bytes of train stand before val, at about 24 bytes of memory each
XZ_VAL_LIMIT = 6 << 20  # the first bytes of val are scored
CHUNK = 1 << 25  # bytes of val looked up at a time
LONGEST = 8  # an n-gram is packed into one 64-bit word
NAMES = {1: "unigram", 2: "bigram", 3: "trigram"}

Smoothing = Literal["Witten–Bell", "Kneser–Ney"]


class Row(TypedDict):
    """One rung: nats and bits per byte of val. The note names the method and says what part of the data was used."""

    name: str
    nats: float
    bpb: float
    note: str


class Level(NamedTuple):
    """Counts of one order k, sorted. grams, contexts: uint64, bytes packed with the newest lowest; the rest int32."""

    grams: np.ndarray  # the k-grams of train
    counts: np.ndarray  # n(c x)
    contexts: np.ndarray  # their first k − 1 bytes, each once
    totals: np.ndarray  # N(c)
    kinds: np.ndarray  # T(c)


def count_ngrams(train: np.ndarray, order: int) -> list[Level]:
    """How often each n-gram of 1 to `order` bytes occurs in train (uint8, [bytes]; may be empty).

    Raises UserError when the order is not within 1 to 8.
    """
    if not 1 <= order <= LONGEST:
        raise UserError(f"n-gram order out of range: got {order}; give 1 to {LONGEST}")
    levels: list[Level] = []
    grams, counts = _count(_pack(train, order))
    for k in range(order, 0, -1):
        levels.append(_level(grams, counts))
        # The shorter grams need no second sort: they are the contexts, and the one at the very end of train.
        grams, counts = _plus_one(levels[-1].contexts, levels[-1].totals, _pack(train[len(train) - k + 1 :], k - 1))
    return levels[::-1]


class NGram:
    """Interpolated n-gram model over bytes; see the module's first lines. It is never updated while it is scored.

    levels: of `count_ngrams`, for the orders from 1 up. Without train bytes the model is uniform.
    """

    def __init__(self, levels: Sequence[Level], smoothing: Smoothing = "Witten–Bell") -> None:
        self.order = len(levels)
        if smoothing == "Kneser–Ney":
            self._levels = [*map(_continuations, range(1, self.order), levels[1:]), levels[-1]]
            self._discounts = [(discount, discount) for discount in map(_discount, self._levels)]
        else:
            self._levels, self._discounts = list(levels), [(0.0, 1.0)] * self.order

    def distribution(self, context: bytes) -> np.ndarray:
        """p(byte | context): float64, [256]. Uses the last order − 1 bytes of a context; fewer, or none, will do."""
        known = context[max(0, len(context) - self.order + 1) :]
        return self.distributions(np.array([int.from_bytes(known, "big")], np.uint64), len(known))[0]

    def distributions(self, contexts: np.ndarray, known: int) -> np.ndarray:
        """p(byte | context) of many contexts of `known` < order bytes each: uint64 [N], packed with the newest byte
        lowest -> float64 [N, 256]."""
        distinct, place = np.unique(contexts, return_inverse=True)
        grams = distinct[:, None] << np.uint64(8) | np.arange(256, dtype=np.uint64)
        return self._probability(grams.reshape(-1), known + 1).reshape(-1, 256)[place]

    def nats(self, val: np.ndarray, order: int | None = None) -> float:
        """Mean code length in nats per byte of val (uint8, [bytes], at least one), with contexts of order − 1 bytes.

        Contexts lie inside val: the first byte is coded with none, the second with one byte, and so on. None reaches
        back into train, so the figure does not depend on what stood before val. `order` may be below the model's, which
        gives the Witten–Bell model of that order; Kneser–Ney counts its lower orders for the highest only.
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
        if k == 0:
            return np.full(grams.shape, 1 / 256)
        # Sorted again without their oldest byte: each shorter gram is looked up once, and in the order of the tables.
        shorter, place = np.unique(grams & np.uint64(_mask(k - 1)), return_inverse=True)
        p = self._probability(shorter, k - 1)[place]
        level, (discount, weight) = self._levels[k - 1], self._discounts[k - 1]
        (count,) = _look_up(level.grams, grams, level.counts)
        total, kinds = _look_up(level.contexts, grams >> np.uint64(8), level.totals, level.kinds)
        known = np.maximum(count - discount, 0) + weight * kinds * p
        return np.where(total > 0, known / np.maximum(total + (weight - discount) * kinds, 1), p)


def ngram_nats(train: np.ndarray, val: np.ndarray, order: int, smoothing: Smoothing = "Witten–Bell") -> float:
    """Nats per byte of val under an n-gram model of train; see NGram."""
    return NGram(count_ngrams(train, order), smoothing).nats(val)


def xz_nats(train: np.ndarray, val: np.ndarray) -> float:
    """Nats per byte of val as the growth of an xz file: size(train + val) − size(train), preset 9 extreme.

    A figure of file sizes: whole bytes, rounded to xz's blocks of four. The dictionary spans the whole input.
    """
    with ThreadPoolExecutor(2) as pool:  # lzma lets go of the interpreter while it works
        alone, both = pool.map(_xz_size, ((train,), (train, val)))
    return (both - alone) * 8 * math.log(2) / len(val)


def ladder(train: np.ndarray, val: np.ndarray, orders: Sequence[int] = (5,)) -> list[Row]:
    """The rows uniform, unigram, the other n-grams, the longest of them with Kneser–Ney too, and xz.

    train, val: uint8, [bytes]. orders: which n-grams to list beside the unigram. A train longer than the limits above
    is cut to its last bytes, for xz also a val to its first bytes, and the row's note says so. Raises UserError: val is
    empty or an order is out of range.
    """
    if not len(val):
        raise UserError("nothing to score: the val part is empty; give more data or another split")
    counted, cut = train[-NGRAM_TRAIN_LIMIT:], _cut("last", NGRAM_TRAIN_LIMIT, train, "train")
    levels = count_ngrams(counted, max(orders, default=1))
    model = NGram(levels)
    rows = [_row("uniform", math.log(256), "")]
    for order in sorted({1, *orders}):
        rows.append(_row(_name(order), model.nats(val, order), "interpolated Witten–Bell" + cut))
    if orders:
        best = NGram(levels, "Kneser–Ney")
        rows.append(_row(f"{_name(best.order)} KN", best.nats(val), "interpolated Kneser–Ney" + cut))
    note = "file sizes: xz -9e of train + val less that of train"
    note += _cut("last", XZ_TRAIN_LIMIT, train, "train") + _cut("first", XZ_VAL_LIMIT, val, "val")
    rows.append(_row("xz", xz_nats(train[-XZ_TRAIN_LIMIT:], val[:XZ_VAL_LIMIT]), note))
    return rows


def _row(name: str, nats: float, note: str) -> Row:
    return {"name": name, "nats": nats, "bpb": nats / math.log(2), "note": note}


def _name(order: int) -> str:
    return NAMES.get(order, f"{order}-gram")


def _cut(end: str, limit: int, data: np.ndarray, part: str) -> str:
    return "" if len(data) <= limit else f"; only the {end} {limit:,} of {len(data):,} {part} bytes"


def _level(grams: np.ndarray, counts: np.ndarray) -> Level:
    contexts = grams >> np.uint64(8)
    first = _first_of_each(contexts)
    totals = np.add.reduceat(counts, first, dtype=np.int32) if len(first) else counts
    return Level(grams, counts, contexts[first], totals, np.diff(first, append=len(grams)).astype(np.int32))


def _continuations(k: int, longer: Level) -> Level:
    """Order k of Kneser–Ney: a k-gram counts once for each (k + 1)-gram of train that ends with it."""
    return _level(*_count(longer.grams & np.uint64(_mask(k))))


def _discount(level: Level) -> float:
    once, twice = (max(1, np.count_nonzero(level.counts == n)) for n in (1, 2))
    return once / (once + 2 * twice)


def _mask(k: int) -> int:
    """Keeps the newest k bytes of a packed n-gram."""
    return (1 << 8 * k) - 1


def _pack(data: np.ndarray, k: int) -> np.ndarray:
    """All runs of k bytes, each packed into a uint64 with the newest byte lowest: [bytes − k + 1], or empty."""
    count = max(0, len(data) - k + 1)
    packed = np.zeros(count, np.uint64)
    for i in range(k):
        packed <<= np.uint64(8)
        packed |= data[i : i + count]
    return packed


def _count(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """np.unique with counts (int32), but sorting in place: `packed` may be most of the memory there is."""
    packed.sort()
    first = _first_of_each(packed)
    return packed[first], np.diff(first, append=len(packed)).astype(np.int32)


def _first_of_each(values: np.ndarray) -> np.ndarray:
    """Where each new value begins in sorted `values`."""
    return np.flatnonzero(np.concatenate([np.ones(min(1, len(values)), bool), values[1:] != values[:-1]]))


def _plus_one(grams: np.ndarray, counts: np.ndarray, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The table with one more count of `gram` (uint64, [1], or [0] for none)."""
    place = np.searchsorted(grams, gram)
    if not len(gram) or (place[0] < len(grams) and grams[place[0]] == gram[0]):
        counts = counts.copy()
        counts[place] += 1
        return grams, counts
    return np.insert(grams, place, gram), np.insert(counts, place, 1)


def _look_up(keys: np.ndarray, wanted: np.ndarray, *tables: np.ndarray) -> list[np.ndarray]:
    """The entries of each table where keys (sorted) equal wanted, else 0."""
    if not len(keys):
        return [np.zeros(wanted.shape, table.dtype) for table in tables]
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found = keys[place] == wanted
    return [np.where(found, table[place], 0) for table in tables]


def _xz_size(parts: Sequence[np.ndarray]) -> int:
    dictionary = max(sum(map(len, parts)), 4096)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
    xz = lzma.LZMACompressor(format=lzma.FORMAT_XZ, filters=filters)
    size = 0
    for part in parts:
        for start in range(0, len(part), 1 << 20):
            size += len(xz.compress(part[start : start + (1 << 20)].tobytes()))
    return size + len(xz.flush())
