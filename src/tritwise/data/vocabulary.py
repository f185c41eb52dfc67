"""The 288 symbols of a model that reads more than plain text: the 256 bytes, and 32 specials that no byte can be.

A byte is its own id, 0 … 255, so any file is a sequence of symbols and comes back unchanged. Specials have the ids
256 … 287 and are named in `Special`. They mark what bytes cannot: where a text begins, who speaks, where the vectors of
an image or a sound stand in for symbols. Names may be given to reserved ids later; an id never changes its meaning.
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum

import numpy as np

from tritwise.errors import UserError

BYTES = 256


class Special(IntEnum):
    """The specials by name; members are ints and can stand wherever an id can.

    PAD fills up a row and is neither read nor scored. BOS and EOS stand around a document.
    SYSTEM, USER, ASSISTANT and TOOL say who speaks until TURN_END.
    TOOL_CALL, TOOL_RESULT, CODE, TEXT, IMAGE, AUDIO: what lies between _BEGIN and _END is of this kind.
    IMAGE_SLOT, AUDIO_SLOT: a position whose vector comes from an image or a sound, not from the embedding table.
    DRAW asks for a picture of what was said before it. MASK hides a symbol that is to be told.
    RESERVED_…: without meaning so far.
    """

    PAD = 256
    BOS = 257
    EOS = 258
    SYSTEM = 259
    USER = 260
    ASSISTANT = 261
    TOOL = 262
    TURN_END = 263
    TOOL_CALL_BEGIN = 264
    TOOL_CALL_END = 265
    TOOL_RESULT_BEGIN = 266
    TOOL_RESULT_END = 267
    CODE_BEGIN = 268
    CODE_END = 269
    TEXT_BEGIN = 270
    TEXT_END = 271
    IMAGE_BEGIN = 272
    IMAGE_END = 273
    IMAGE_SLOT = 274
    AUDIO_BEGIN = 275
    AUDIO_END = 276
    AUDIO_SLOT = 277
    DRAW = 278
    MASK = 279
    RESERVED_0 = 280
    RESERVED_1 = 281
    RESERVED_2 = 282
    RESERVED_3 = 283
    RESERVED_4 = 284
    RESERVED_5 = 285
    RESERVED_6 = 286
    RESERVED_7 = 287


VOCABULARY = BYTES + len(Special)
"""Symbols in all, 288: the `vocab` of a model that reads specials."""


def encode(*parts: bytes | str | Special) -> np.ndarray:
    """Ids of bytes, text (as UTF-8) and specials one after the other: int64 [N], each 0 … 287."""
    ids = [np.array([part]) if isinstance(part, Special) else _bytes_of(part) for part in parts]
    return np.concatenate(ids or [np.empty(0)]).astype(np.int64)


def _bytes_of(part: bytes | str) -> np.ndarray:
    return np.frombuffer(part.encode() if isinstance(part, str) else part, dtype=np.uint8)


def decode(ids: Iterable[int]) -> list[bytes | Special]:
    """Runs of bytes and the specials between them, in order: `encode(*decode(ids))` gives the ids back.

    Raises UserError for an id that is no symbol.
    """
    parts: list[bytes | Special] = []
    run = bytearray()
    for symbol in map(int, ids):
        if not 0 <= symbol < VOCABULARY:
            raise UserError(f"there is no symbol {symbol}; ids go from 0 to {VOCABULARY - 1}")
        if symbol < BYTES:
            run.append(symbol)
            continue
        if run:
            parts.append(bytes(run))
            run.clear()
        parts.append(Special(symbol))
    return [*parts, bytes(run)] if run else parts


def text_of(ids: Iterable[int], stop: Sequence[Special] = (Special.EOS,)) -> bytes:
    """The bytes before the first special of `stop`; other specials are left out. UserError as in `decode`."""
    found = bytearray()
    for part in decode(ids):
        if isinstance(part, Special):
            if part in stop:
                break
        else:
            found += part
    return bytes(found)
