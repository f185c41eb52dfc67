"""The split rule: which bytes a model trains on and which it is scored on, written as one short string.

    90/10                        percentages, in order: train, val
    90/5/5                       percentages, in order: train, val, test (they add up to 100; 99.5/0.5 is fine too)
    first:90000000,last:5000000  byte counts: train is the first part of the data, val the last; the rest is unused
    all                          everything is val; for scoring a file that no one trained on
    named                        of shards of tokens: files are parts by the train, val or test in their names

A percentage boundary is the floor of the exact product, computed in integers: 90/10 of tinyshakespeare is 1,003,854 and
111,540 bytes, 90/5/5 of enwik8 is 90, 5 and 5 million.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np

from tritwise.errors import UserError

NAMES = ("train", "val", "test")
SHORTEST = 2  # one byte to read and one to predict
COUNTS = re.compile(r"first:([0-9]+),last:([0-9]+)", re.ASCII)
PERCENT = re.compile(r"[0-9]+(\.[0-9]+)?", re.ASCII)
NAMED = "named"
GRAMMAR = "use 90/10, 90/5/5, first:BYTES,last:BYTES or all"


@dataclass(frozen=True)
class Split:
    """A split rule, checked when it is made. Raises UserError when the rule is malformed."""

    rule: str

    def __post_init__(self) -> None:
        if self.rule not in ("all", NAMED) and not COUNTS.fullmatch(self.rule):
            _percentages(self.rule)

    def bounds(self, total: int) -> dict[str, tuple[int, int]]:
        """Where each part starts and ends in `total` bytes, end excluded.

        Raises UserError: the data is shorter than the rule asks for, or a part would have fewer than two bytes.
        """
        if self.rule == NAMED:
            raise UserError(f"split {NAMED} is for shards of tokens, whose files are named; {GRAMMAR}")
        if self.rule == "all":
            bounds = {"val": (0, total)}
        elif counts := COUNTS.fullmatch(self.rule):
            first, last = (int(count) for count in counts.groups())
            if first + last > total:
                raise UserError(f"split {self.rule} needs {first + last:,} bytes: the data has {total:,}; ask for less")
            bounds = {"train": (0, first), "val": (total - last, total)}
        else:
            shares = _percentages(self.rule)
            ends = [0, *(int(total * share / 100) for share in accumulate(shares))]
            bounds = {name: (ends[i], ends[i + 1]) for i, name in enumerate(NAMES[: len(shares)])}
        for name, (start, end) in bounds.items():
            if end - start < SHORTEST:
                raise UserError(
                    f"split {self.rule} leaves {end - start} bytes for {name}: the data has {total:,}; "
                    f"give more data or another split ({GRAMMAR})"
                )
        return bounds


def split(data: np.ndarray, rule: str) -> dict[str, np.ndarray]:
    """The parts of `data` (uint8, [bytes]) by name, in order, as views: nothing is copied.

    Raises UserError: the rule is malformed, or the data is too short for it.
    """
    return {name: data[start:end] for name, (start, end) in Split(rule).bounds(len(data)).items()}


def named_part(parts: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The part of a split that is called `name`. Raises UserError, listing the parts, if there is none."""
    if name not in parts:
        raise UserError(f"there is no part {name!r}; choose one of {', '.join(parts)}")
    return parts[name]


def _percentages(rule: str) -> list[Fraction]:
    words = rule.split("/")
    if len(words) not in (2, 3) or not all(PERCENT.fullmatch(word) for word in words):
        raise UserError(f"unknown split rule: {rule!r}; {GRAMMAR}")
    shares = [Fraction(word) for word in words]
    if sum(shares) != 100:
        raise UserError(f"split {rule} adds up to {float(sum(shares)):g}: percentages must add up to 100; {GRAMMAR}")
    return shares
