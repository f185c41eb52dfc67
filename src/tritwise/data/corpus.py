"""What a model reads, by parts: bytes, or with a tokenizer the tokens of shards or of a text."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tritwise.data.shards import looks_like_shards, open_shards, shard_files
from tritwise.data.source import describe, once, sha256_hex
from tritwise.data.split import split
from tritwise.data.tokenizer import Tokenizer
from tritwise.errors import UserError


def open_parts(
    data: Path | str, rule: str, tokenizer: Tokenizer | None = None, *, cache: Path | str | None = None
) -> dict[str, np.ndarray]:
    """The parts of a split by name: uint8 [bytes] each, or uint16 [tokens] with a tokenizer.

    data: as for `describe`, or, with a tokenizer, shards: .bin files. Of a text the rule cuts bytes, and each part is
    tokenized once, into the cache; of shards it cuts tokens. Raises UserError for data that cannot be read.
    """
    if tokenizer is None:
        if looks_like_shards(data):
            raise UserError(f"{data} holds shards of tokens, not text; name their tokenizer with --tokenizer")
        return split(describe(data, cache=cache).data, rule)
    if shard_files(data):
        return open_shards(data, rule, tokenizer.size, cache=cache)
    parts = split(describe(data, cache=cache).data, rule)
    return {name: tokens_of(part, tokenizer, cache=cache) for name, part in parts.items()}


def tokens_of(text: np.ndarray, tokenizer: Tokenizer, *, cache: Path | str | None = None) -> np.ndarray:
    """The tokens of a text (uint8 [bytes]), kept in the cache: uint16 [N]. Raises UserError as `Tokenizer.encode`."""
    if not len(text):
        return np.zeros(0, "<u2")  # no file of nothing can be mapped

    def pieces() -> Iterator[bytes]:
        yield tokenizer.encode(text.tobytes()).tobytes()

    made = once(f"tokens {tokenizer.digest} {sha256_hex(text)}", pieces(), cache=cache)
    return np.memmap(made, dtype="<u2", mode="r")
