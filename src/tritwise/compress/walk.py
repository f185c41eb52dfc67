"""The walk through a text that coding and decoding share: frames, lanes and steps; see archive.py for what they are.

Shape suffixes: S lanes, T steps.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from tritwise.compress import header as head
from tritwise.compress.coder import Damaged, RangeDecoder, RangeEncoder
from tritwise.compress.lanes import Lanes, divide
from tritwise.compress.quantise import SYMBOLS, cumulative
from tritwise.errors import UserError
from tritwise.files import explain
from tritwise.score.protocol import START, Predictor

FRAME_BYTES, FRAME_LANE_BYTES = 1 << 22, 1 << 16  # a frame is at most the first, or the second for each lane
CHECKSUM = 6
COLD = 64  # a lane's first bytes, over which its cold start is reckoned
_TOGETHER = 64  # steps between two looks at what a GPU has computed

Progress = Callable[[int, int], None]
"""Called with the bytes of text done and their total."""


class Tally:
    """What the float probabilities cost, gathered while coding. Bits as plain floats."""

    def __init__(self) -> None:
        self.bits = 0.0
        self._cold, self._cold_bytes, self._bytes = 0.0, 0, 0

    def add(self, nats_TS: Tensor, first: int, counts: list[int]) -> None:
        """nats of steps first, first + 1, … of one frame; of step t the first counts[t] lanes count."""
        for step, (row, count) in enumerate(zip(nats_TS.double().cpu().numpy() / math.log(2), counts, strict=True)):
            self.bits += float(row[:count].sum())
            self._bytes += count
            if first + step < COLD:
                self._cold += float(row[1:count].sum())
                self._cold_bytes += count - 1

    @property
    def lane_bits(self) -> float | None:
        """What all lanes but the first pay for beginning without context; None if nothing is left to compare with."""
        rest = self._bytes - self._cold_bytes
        if not self._cold_bytes:
            return 0.0
        if rest < self._cold_bytes:
            return None
        return self._cold - self._cold_bytes * (self.bits - self._cold) / rest


class Walk:
    """The walk over frames, lanes and steps that both directions share."""

    def __init__(
        self, model: Predictor, about: head.Header, spelled: bytes, jobs: int, progress: Progress | None
    ) -> None:
        self.about, self.progress = about, progress or (lambda done, total: None)
        self.lanes = Lanes(model, about.lanes, window=about.window, stride=about.stride, jobs=jobs)
        most = max(FRAME_BYTES, about.lanes * FRAME_LANE_BYTES)
        self.frames = divide(about.length, max(1, -(-about.length // most)))
        self.digest = hashlib.sha256(spelled)

    def __enter__(self) -> "Walk":
        return self

    def __exit__(self, *_: object) -> None:
        self.lanes.close()

    def encode(self, file: BinaryIO, source: Path, tally: Tally) -> Iterator[bytes]:
        """The code of a text, in pieces."""
        coder, read, done = RangeEncoder(), reading(file, source), 0
        before = bytes([START])
        for size in self.frames:
            text = read(size)
            if len(text) < size:
                raise UserError(f"{source} became shorter while it was read; compress it when nobody writes to it")
            columns_TS = torch.from_numpy(_columns(text, self.about.lanes)).to(self.lanes.device)
            counts = self._counts(size)
            self.lanes.begin(_ids(before))
            for first in range(0, len(counts), _TOGETHER):
                part = columns_TS[first : first + _TOGETHER].to(torch.int64)
                starts, stops, nats = zip(*(self._interval(ids) for ids in part), strict=True)
                here = counts[first : first + _TOGETHER]
                for start, stop, count in zip(_rows(starts), _rows(stops), here, strict=True):
                    coder.encode(start[:count], stop[:count])
                tally.add(torch.stack(nats), first, here)
                done += sum(here)
                self.progress(done, self.about.length)
                yield coder.take()
            coder.encode_bytes(self._mark(text))
            before = self._tail(before, text)
        if read(1):
            raise UserError(f"{source} became longer while it was read; compress it when nobody writes to it")
        yield coder.finish()

    def decode(self, coder: RangeDecoder) -> Iterator[bytes]:
        """The text, a frame at a time. Raises Damaged."""
        before, done = bytes([START]), 0
        for size in self.frames:
            counts = self._counts(size)
            columns_TS = np.zeros((len(counts), self.about.lanes), np.uint8)
            self.lanes.begin(_ids(before))
            for step, count in enumerate(counts):
                tables = cumulative(self.lanes.log_probs())[:count].to(torch.int32).cpu().numpy()
                found = coder.decode(tables.reshape(-1).data, count, SYMBOLS + 1)
                columns_TS[step, :count] = found
                self.lanes.read(torch.from_numpy(columns_TS[step].astype(np.int64)).to(self.lanes.device))
                done += count
                if step % _TOGETHER == 0 or step == len(counts) - 1:
                    self.progress(done, self.about.length)
            text = _text(columns_TS, size)
            if coder.decode_bytes(CHECKSUM) != self._mark(text):
                raise Damaged
            before = self._tail(before, text)
            yield text
        coder.finish()

    def _interval(self, ids_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Start and stop of each lane's next byte, and its nats; then the lanes read it. All stay on the device."""
        log_probs = self.lanes.log_probs()
        table, ids = cumulative(log_probs), ids_S[:, None]
        nats = -log_probs.gather(1, ids)[:, 0]
        self.lanes.read(ids_S)
        return table.gather(1, ids)[:, 0], table.gather(1, ids + 1)[:, 0], nats

    def _counts(self, size: int) -> list[int]:
        """How many lanes still have a byte, for each step of a frame."""
        whole, rest = divmod(size, self.about.lanes)
        return [self.about.lanes] * whole + [rest] * (rest > 0)

    def _mark(self, text: bytes) -> bytes:
        self.digest.update(text)
        return self.digest.digest()[:CHECKSUM]

    def _tail(self, before: bytes, text: bytes) -> bytes:
        """What the lanes of the next frame have read when they begin."""
        return (before + text)[-max(1, self.about.window - self.about.stride) :]


def _columns(text: bytes, lanes: int) -> np.ndarray:
    """uint8 [T, S]: each lane's part of the text as a column, padded with a zero where it is one byte shorter."""
    sizes = divide(len(text), lanes)
    columns = np.zeros((max(sizes), lanes), np.uint8)
    longer, array = sizes.count(sizes[0]), np.frombuffer(text, np.uint8)
    place = longer * sizes[0]
    columns[:, :longer] = array[:place].reshape(longer, -1).T
    if longer < lanes:
        columns[: sizes[-1], longer:] = array[place:].reshape(lanes - longer, -1).T
    return columns


def _text(columns: np.ndarray, size: int) -> bytes:
    """The text of which `columns` are the lanes."""
    sizes = divide(size, columns.shape[1])
    longer = sizes.count(sizes[0])
    return columns[:, :longer].T.tobytes() + columns[: sizes[-1], longer:].T.tobytes()


def _rows(tensors: Iterable[Tensor]) -> list[list[int]]:
    return torch.stack(list(tensors)).tolist()


def _ids(text: bytes) -> Tensor:
    return torch.tensor(list(text))


def reading(file: BinaryIO, path: Path) -> Callable[[int], bytes]:
    """`file.read` with errors of the disk as lines for people: they must not be told as errors of writing."""

    def read(count: int) -> bytes:
        try:
            return file.read(count)
        except OSError as error:
            raise explain(error, path, "read") from error

    return read
