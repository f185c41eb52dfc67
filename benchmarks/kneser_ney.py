"""How far counting can go: interpolated Kneser–Ney n-grams over bytes, scored as the ladder scores its own.

python benchmarks/kneser_ney.py            some ten seconds; nats per byte of tinyshakespeare's validation part

The ladder's 5-gram is Witten–Bell, which has nothing to tune. Kneser–Ney discounts every count and lets a shorter
context count how many different bytes stood before an n-gram, not how often it occurred (Kneser and Ney 1995). The
modified form has three discounts, from the counts of counts (Chen and Goodman 1998, TR-10-98, section 3).
"""

import math
from collections import Counter, defaultdict
from typing import NamedTuple

from tritwise.data.source import open_bytes
from tritwise.data.split import split


class Level(NamedTuple):
    """One order: counts of n-grams, the discount of a count of 1, 2 or more, and per context the total and the mass
    that discounting frees."""

    counts: Counter[bytes]
    discounts: tuple[float, float, float, float]
    totals: dict[bytes, int]
    freed: dict[bytes, float]


def levels(train: bytes, order: int, modified: bool) -> list[Level]:
    """Orders 1 … `order`. Below the highest, an n-gram counts the different bytes that stood before it."""
    found: list[Level] = []
    for k in range(order, 0, -1):
        longer = k if k == order else k + 1
        grams = Counter(train[i : i + longer] for i in range(len(train) - longer + 1))
        counts = grams if k == order else Counter(gram[1:] for gram in grams)
        discounts = _discounts(counts, modified)
        totals: dict[bytes, int] = defaultdict(int)
        freed: dict[bytes, float] = defaultdict(float)
        for gram, count in counts.items():
            totals[gram[:-1]] += count
            freed[gram[:-1]] += discounts[min(count, 3)]
        found.append(Level(counts, discounts, totals, freed))
    return found[::-1]


def _discounts(counts: Counter[bytes], modified: bool) -> tuple[float, float, float, float]:
    n1, n2, n3, n4 = (sum(1 for count in counts.values() if count == n) or 1 for n in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    return (0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3) if modified else (0.0, y, y, y)


def probability(model: list[Level], context: bytes, byte: bytes) -> float:
    """p(byte | context), from as much of the context as the model's order uses."""
    p = 1 / 256
    for k, level in enumerate(model[: len(context) + 1]):
        known = context[len(context) - k :]
        if total := level.totals.get(known):
            count = level.counts[known + byte]
            p = (count - level.discounts[min(count, 3)] + level.freed[known] * p) / total
    return p


def main() -> None:
    """Print the figures for orders 5 and 6."""
    parts = split(open_bytes("shakespeare"), "90/10")
    train, val = parts["train"].tobytes(), parts["val"].tobytes()
    for order, modified in ((5, False), (5, True), (6, True)):
        model = levels(train, order, modified)
        everything = sum(probability(model, b"ROMEO", bytes([byte])) for byte in range(256))
        assert abs(everything - 1) < 1e-9, "the probabilities must sum to one"
        nats = 0.0
        for i in range(len(val)):
            nats -= math.log(probability(model, val[max(0, i - order + 1) : i], val[i : i + 1]))
        print(f"{'modified ' if modified else ''}Kneser–Ney, order {order}: {nats / len(val):.4f} nats per byte")


if __name__ == "__main__":
    main()
