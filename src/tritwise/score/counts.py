"""Counts that grow while a text is read: how often each byte followed each context of 0 … `order` bytes.

They are the ladder's n-gram model for one who reads on (`tritwise.score.ladder`: the formula with D = W = DISCOUNT):

    p_k(x | c) = (max(n(c x) − D, 0) + D · T(c) · p_{k−1}(x | c without its oldest byte)) / N(c)

Memory is bounded. Contexts of up to two bytes have a table row each. Longer ones share `slots` rows by hash: a row
knows its context, a new context takes the row over, and a row holds its KINDS commonest followers. A count that would
overflow halves its row, so that old counts fade. All is integers until the division: the same bytes give the same bits.

Shape suffixes: T time, V bytes (256), K followers in a row.
"""

import numpy as np

from tritwise.errors import UserError
from tritwise.score.protocol import START

ORDER = 5
SLOTS = 1 << 20  # rows for each of the longer orders, 40 bytes each: 40 MB where all are used
DENSE = 2  # contexts of so many bytes have a row of all 256 counts each: 34 MB for order 2 where all are used
KINDS = 16
PRIME_PIECE = 1 << 16
DISCOUNT = 0.8
LONGEST = 7  # a context and a mark fit one 64-bit word
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: multiplication spreads nearby contexts


class Counts:
    """Counts of bytes after contexts of 0 … order bytes, and the n-gram models that they make.

    slots: rows of each table of the longer orders, a power of two. Raises UserError for an order outside 0 … 7 and for
    other slots.
    """

    def __init__(self, order: int = ORDER, slots: int = SLOTS) -> None:
        if not 0 <= order <= LONGEST:
            raise UserError(f"order of counts out of range: got {order}; give 0 to {LONGEST}")
        if slots < 2 or slots & (slots - 1):
            raise UserError(f"slots are {slots}; give a power of two, such as {SLOTS}")
        self.order, self.learned = order, False
        self.tables = [_Dense(k) if k <= DENSE else _Hashed(slots) for k in range(order + 1)]

    def contexts(self, before: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The packed contexts of the longest order: uint64 [len(ids) + 1], of each byte of ids and of what follows.

        before: uint8 [order], what stood before ids (uint8 [T]). The newest byte lies lowest."""
        text = np.concatenate([before, ids])
        packed = np.zeros(len(ids) + 1, np.uint64)
        for i in range(self.order):
            packed = packed << np.uint64(8) | text[i : i + len(packed)]
        return packed

    def probabilities(self, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """After each of uint64 [T] packed contexts: float32 [order + 1, T, 256], p_0 … p_order, all above zero and
        summing to 1; and int64 [T], the longest order that knows its context, −1 if none does."""
        p_KTV = np.empty((self.order + 1, len(contexts), 256), np.float32)
        shorter, known = np.full((len(contexts), 256), 1 / 256, np.float32), np.full(len(contexts), -1)
        for k, table in enumerate(self.tables):
            counts, kinds = table.look_up(contexts & _mask(k))
            total = counts.sum(axis=1, dtype=np.float32)
            seen = total > 0
            known[seen] = k
            total[~seen], kinds[~seen] = 1.0, 1.0 / DISCOUNT  # then the line below passes p_{k−1} on
            p = np.maximum(counts - np.float32(DISCOUNT), 0, out=p_KTV[k])
            p += (np.float32(DISCOUNT) * kinds)[:, None] * shorter
            p /= total[:, None]
            shorter = p
        return p_KTV, known

    def learn(self, contexts: np.ndarray, ids: np.ndarray) -> None:
        """Count ids (uint8 [T]) after their packed contexts (uint64 [T]). T is best a few hundred or more."""
        self.learned = self.learned or len(ids) > 0
        for k, table in enumerate(self.tables):
            table.add(contexts & _mask(k), ids)

    def prime(self, train: np.ndarray) -> None:
        """Count a whole text (uint8 [N]) that is not read: `learned` stays as it was."""
        learned, before = self.learned, np.full(self.order, START, np.uint8)
        for start in range(0, len(train), PRIME_PIECE):
            ids = train[start : start + PRIME_PIECE]
            self.learn(self.contexts(before, ids)[:-1], ids)
            before = np.concatenate([before, ids])[-self.order :] if self.order else before
        self.learned = learned


def _mask(k: int) -> np.uint64:
    return np.uint64((1 << 8 * k) - 1)


class _Dense:
    """A row of 256 counts for every context of k bytes."""

    def __init__(self, k: int) -> None:
        self.counts = np.zeros((256**k, 256), np.uint32 if k < DENSE else np.uint16)
        self.limit = 1 << 16 if k == DENSE else 1 << 20

    def look_up(self, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Counts float32 [T, 256] and kinds float32 [T], how many of them are not zero."""
        counts = self.counts[contexts].astype(np.float32)
        return counts, np.count_nonzero(counts, axis=1).astype(np.float32)

    def add(self, contexts: np.ndarray, ids: np.ndarray) -> None:
        (rows, symbols), counts = _pairs(contexts, ids)
        total = self.counts[rows, symbols] + counts
        full = np.unique(rows[total >= self.limit])
        while len(full):
            self.counts[full] = (self.counts[full] + 1) >> 1
            total = self.counts[rows, symbols] + counts
            full = np.unique(rows[total >= self.limit])
        self.counts[rows, symbols] = total


class _Hashed:
    """Rows of the KINDS commonest followers, for the contexts that were seen last."""

    def __init__(self, slots: int) -> None:
        self.shift = np.uint64(64 - (slots.bit_length() - 1))
        self.owner = np.zeros(slots, np.uint64)  # the context plus one; 0: nobody's
        self.symbols = np.zeros((slots, KINDS), np.uint8)
        self.counts = np.zeros((slots, KINDS), np.uint8)  # 0: an empty place

    def _slots(self, contexts: np.ndarray) -> np.ndarray:
        return (contexts * _SPREAD) >> self.shift

    def look_up(self, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `_Dense.look_up`."""
        slots = self._slots(contexts)
        found = np.flatnonzero(self.owner[slots] == contexts + np.uint64(1))
        counts_TV, kinds_T = np.zeros((len(contexts), 256), np.float32), np.zeros(len(contexts), np.float32)
        symbols, counts = self.symbols[slots[found]], self.counts[slots[found]]
        row, place = np.nonzero(counts)
        counts_TV[found[row], symbols[row, place]] = counts[row, place]
        kinds_T[found] = np.count_nonzero(counts, axis=1)
        return counts_TV, kinds_T

    def add(self, contexts: np.ndarray, ids: np.ndarray) -> None:
        (grams, symbols), adds = _pairs(contexts, ids)
        slots = self._slots(grams)
        # One owner for each slot: of the contexts that want it now, the greatest.
        order = np.argsort(slots, kind="stable")
        slots, grams, symbols, adds = slots[order], grams[order], symbols[order], adds[order]
        last = np.flatnonzero(np.append(slots[1:] != slots[:-1], True))
        first = np.concatenate([[0], last[:-1] + 1])
        mine = np.repeat(grams[last], last - first + 1) == grams
        lost = last[self.owner[slots[last]] != grams[last] + np.uint64(1)]
        self.owner[slots[lost]] = grams[lost] + np.uint64(1)
        self.counts[slots[lost]] = 0
        self.symbols[slots[lost]] = 0
        slots, symbols, adds = slots[mine], symbols[mine], adds[mine]
        # The followers of one context one after the other, those of different contexts together.
        first = np.flatnonzero(np.concatenate([[True], slots[1:] != slots[:-1]]))
        turn = np.arange(len(slots)) - np.repeat(first, np.diff(first, append=len(slots)))
        for r in range(int(turn.max()) + 1):
            now = turn == r
            self._add_one(slots[now], symbols[now], adds[now])

    def _add_one(self, slots: np.ndarray, symbols: np.ndarray, adds: np.ndarray) -> None:
        """One follower for each of different slots."""
        counts = self.counts[slots]
        same = (self.symbols[slots] == symbols[:, None]) & (counts > 0)
        hit = same.any(axis=1)
        # A new follower takes the first empty place, or that of the rarest.
        place = np.where(hit, same.argmax(axis=1), counts.argmin(axis=1))
        total = np.where(hit, counts[np.arange(len(slots)), place], 0) + adds
        full = total > 255
        self.counts[slots[full]] = (counts[full] + 1) >> 1
        self.counts[slots, place] = np.minimum(np.where(full, (total + 1) >> 1, total), 255)
        self.symbols[slots, place] = symbols


def _pairs(contexts: np.ndarray, ids: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Each (context, byte) once, sorted, and how often it came: uint64 [n], uint8 [n], int64 [n]."""
    packed, counts = np.unique(contexts << np.uint64(8) | ids, return_counts=True)
    return (packed >> np.uint64(8), (packed & np.uint64(255)).astype(np.uint8)), counts
