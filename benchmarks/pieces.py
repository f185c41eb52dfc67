"""A small text out of a large one: pieces to train on, and pieces to score that lie apart from them.

    python benchmarks/pieces.py enwik8.gz pieces.txt --train 850000 --score 200000 [--piece 5000] [--of 90000000]

So a run on a CPU reads a little of everything as often as a run on a GPU reads all of it. The first OF bytes are cut
into as many spans of one length as there are training pieces; each span begins with one, and the middle of every so
many of them begins one that is scored. The file has the training pieces, then the scored ones; what is printed is the
split that finds them again: --data pieces.txt --split first:850000,last:200000. Pieces that meet are refused.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tritwise.data.source import open_bytes
from tritwise.errors import UserError
from tritwise.files import atomic_write


def places(length: int, train: int, score: int, piece: int) -> tuple[list[int], list[int]]:
    """Where pieces of `piece` bytes begin in `length` bytes: those to train on, `train` bytes in all, and those to
    score. UserError if they are no whole numbers of pieces, or meet."""
    if min(train, score) < piece or train % piece or score % piece:
        raise UserError(f"--train and --score must be multiples of --piece, {piece}, and not 0")
    spans, scored = train // piece, score // piece
    learned = [span * length // spans for span in range(spans)]
    middle = length // spans // 2
    held = [middle + learned[number * spans // scored] for number in range(scored)]
    check_apart([*learned, *held], piece, length)
    return learned, held


def check_apart(begins: Sequence[int], piece: int, length: int) -> None:
    """UserError if any two pieces that begin there share a byte, or one ends after `length`."""
    ordered = sorted(begins)
    if any(after - before < piece for before, after in pairwise(ordered)) or ordered[-1] + piece > length:
        raise UserError("pieces that are trained on and scored would meet; ask for fewer, or of more bytes with --of")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a text, plain or packed")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=850_000)
    parser.add_argument("--score", type=int, default=200_000)
    parser.add_argument("--piece", type=int, default=5000)
    parser.add_argument("--of", type=int, default=90_000_000, help="bytes that are looked at, from the first on")
    given = parser.parse_args(arguments)
    try:
        text = open_bytes(given.data)[: given.of]
        learned, held = places(len(text), given.train, given.score, given.piece)
        atomic_write(given.out, b"".join(text[at : at + given.piece].tobytes() for at in (*learned, *held)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"--data {given.out} --split first:{given.train},last:{given.score}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
