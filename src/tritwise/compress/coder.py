"""A range coder in whole numbers: symbols with exact probabilities become bytes, and the bytes symbols again.

The method is Martin's (1979), with carries (as in LZMA): a symbol narrows an interval of 64-bit numbers, and whatever
byte the interval's ends agree on is written. All of it is integer arithmetic, so that the same input gives the same
bytes everywhere; it loses less than 2**-30 bits a symbol and at most one byte a stream. It is kept here, in a hundred
lines, because a file must outlive the version of a library: how `constriction`, say, turns probabilities into integers
belongs to its own version. Python is quick enough: about a microsecond a symbol, where a model takes far more.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence

BITS = 24
"""Probabilities are multiples of 2**-BITS."""

TOTAL = 1 << BITS
_TOP = 1 << 56  # the range stays at or above this, so that a unit of probability is at least 2**32 wide
_WORD = 1 << 64
_BYTES = 8
_EVEN = TOTAL >> 8  # the share of one of 256 evenly likely bytes
_BUFFER = 1 << 16


class Damaged(Exception):
    """The bytes cannot have come from the encoder."""


class RangeEncoder:
    """Symbols in, bytes out: `encode` as often as there are symbols, `take` when bytes are wanted, `finish` once."""

    def __init__(self) -> None:
        self._low, self._range, self._out = 0, _WORD, bytearray()

    def encode(self, starts: Iterable[int], stops: Iterable[int]) -> None:
        """Code symbols, each given as the interval start <= x < stop out of 0 … TOTAL, not empty."""
        low, span, out = self._low, self._range, self._out
        for start, stop in zip(starts, stops, strict=True):
            unit = span >> BITS
            low += unit * start
            span = unit * (stop - start)
            while span < _TOP:
                if low >= _WORD:
                    _carry(out)
                out.append(low >> 56 & 255)
                low = (low & _TOP - 1) << 8
                span <<= 8
        self._low, self._range = low, span

    def encode_bytes(self, data: bytes) -> None:
        """Code bytes, all of them evenly likely."""
        self.encode([byte * _EVEN for byte in data], [(byte + 1) * _EVEN for byte in data])

    def take(self) -> bytes:
        """The bytes that are settled: no carry can reach them any more."""
        end = len(self._out.rstrip(b"\xff")) - 1
        taken = bytes(self._out[: max(0, end)])
        del self._out[: len(taken)]
        return taken

    def finish(self) -> bytes:
        """The remaining bytes. Zeros may be thought after them, so one byte settles the interval, or none."""
        value, count = _shortest(self._low, self._range)
        if value >= _WORD:
            _carry(self._out)
        return bytes(self._out) + (value % _WORD).to_bytes(_BYTES, "big")[:count]


class RangeDecoder:
    """The way back. `read(n)` gives the next n bytes of the stream, fewer only at its end.

    Whatever is not exactly what the encoder writes raises Damaged, here or, if the symbols are merely others, wherever
    their checksum is verified.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read, self._buffer, self._place, self._beyond = read, b"", 0, 0
        self._range, self._offset, self._code = _WORD, 0, 0  # offset: how far the code lies above the interval's start
        for _ in range(_BYTES):
            self._code = self._code << 8 | self._byte()
        self._offset = self._code

    def decode(self, tables: Sequence[int], rows: int, columns: int) -> list[int]:
        """Symbols for `rows` tables that lie back to back, each of `columns` numbers rising from 0 to TOTAL.

        Symbol s of a row has the interval from its number s to its number s + 1.
        """
        span, offset, found = self._range, self._offset, []
        for first in range(0, rows * columns, columns):
            unit = span >> BITS
            place = bisect_right(tables, offset // unit, first, first + columns) - 1
            if place == first + columns - 1:
                raise Damaged
            start = tables[place]
            offset -= unit * start
            span = unit * (tables[place + 1] - start)
            found.append(place - first)
            while span < _TOP:
                byte = self._byte()
                offset = offset << 8 | byte
                self._code = (self._code << 8 | byte) % _WORD
                span <<= 8
        self._range, self._offset = span, offset
        return found

    def decode_bytes(self, count: int) -> bytes:
        """`count` bytes that were coded with `encode_bytes`."""
        table = range(0, TOTAL + 1, _EVEN)
        return bytes(symbol for _ in range(count) for symbol in self.decode(table, 1, len(table)))

    def finish(self) -> None:
        """Raises Damaged unless the stream ends here, with the very bytes that `RangeEncoder.finish` writes."""
        value, count = _shortest((self._code - self._offset) % _WORD, self._range)
        at_end = self._place == len(self._buffer) and not self._read(1)
        if not at_end or self._beyond != _BYTES - count or self._code != value % _WORD:
            raise Damaged

    def _byte(self) -> int:
        if self._place == len(self._buffer):
            self._buffer, self._place = self._read(_BUFFER), 0
            if not self._buffer:
                self._beyond += 1
                if self._beyond > _BYTES:
                    raise Damaged
                return 0
        self._place += 1
        return self._buffer[self._place - 1]


def _carry(out: bytearray) -> None:
    """Add one to the number written so far."""
    place = len(out) - 1
    while out[place] == 255:
        out[place] = 0
        place -= 1
    out[place] += 1


def _shortest(low: int, span: int) -> tuple[int, int]:
    """The number in [low, low + span) with the most zeros at its end, and how many of its 8 bytes come before them."""
    for count in (0, 1):
        step = 1 << 8 * (_BYTES - count)
        value = -(-low // step) * step
        if value < low + span:
            return value, count
    raise AssertionError("a range of 2**56 holds a multiple of 2**56")
