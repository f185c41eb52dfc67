"""Which bytes are read together and which of them are scored: documents, windows, and the rows a model gets.

Windows are int64 arrays [R, 4] with the columns

    start, stop   the bytes of the text that the window predicts, stop excluded
    new           the first of them that no earlier window has scored: new … stop - 1 are scored here
    opens         1 if a document begins at start, so that a newline stands before it; else the byte before it does
"""

import re
from collections.abc import Sequence

import numpy as np

from tritwise.errors import UserError
from tritwise.score.protocol import START


def documents_of(
    data: np.ndarray, begins: Sequence[int] | np.ndarray | None = None, separator: bytes = b""
) -> np.ndarray:
    """Where the documents of a text (uint8 [N]) begin: int64 [D], from 0, rising. One document if neither is given.

    begins: offsets of the documents; the first one, 0, may be left out. separator: bytes that end a document; they
    belong to it and are scored with it. Raises UserError for both at once, and for offsets that are not in the text or
    do not rise.
    """
    if begins is not None and separator:
        raise UserError("documents are given twice, by offsets and by a separator; choose one")
    if separator:
        ends = [found.end() for found in re.finditer(re.escape(separator), data.data)]
        begins = [end for end in ends if end < len(data)]
    offsets = np.asarray([] if begins is None else begins, dtype=np.int64).reshape(-1)
    if not len(offsets) or offsets[0] != 0:
        offsets = np.concatenate((np.zeros(1, np.int64), offsets))
    wrong = np.flatnonzero(np.diff(offsets) <= 0)
    if len(wrong) or offsets[-1] >= len(data):
        fault = offsets[wrong[0] + 1] if len(wrong) else offsets[-1]
        raise UserError(f"document offset {fault} is out of place; give rising offsets below {len(data)}")
    return offsets


def windows_of(begins: np.ndarray, total: int, window: int, stride: int) -> np.ndarray:
    """The windows over a text of `total` bytes whose documents begin at `begins`; none reaches into another document.

    The first window of a document scores all its bytes, a later one the next `stride`; all of a document's windows are
    as long as its first: `window`, or the whole document where that is shorter.
    """
    parts = []
    for first, end in zip(begins.tolist(), [*begins[1:].tolist(), total], strict=True):
        stops = np.arange(min(first + window, end), end + stride, stride)
        stops = np.minimum(stops[: 1 + np.searchsorted(stops, end)], end)
        starts = np.maximum(stops - window, first)
        news = np.concatenate(([first], stops[:-1]))
        parts.append(np.stack((starts, stops, news, starts == first), axis=1))
    return np.concatenate(parts)


def rows_of(data: np.ndarray, windows: np.ndarray, start_id: int = START) -> np.ndarray:
    """[R, T + 1], as data: the byte before each window's first (or `start_id`), and the bytes that it predicts.

    Rows of shorter windows are filled with zeros at the end, where causal positions do not see them.
    """
    rows = np.zeros((len(windows), 1 + int((windows[:, 1] - windows[:, 0]).max())), dtype=data.dtype)
    for row, (start, stop, _, opens) in zip(rows, windows.tolist(), strict=True):
        row[0] = start_id if opens else data[start - 1]
        row[1 : stop - start + 1] = data[start:stop]
    return rows
