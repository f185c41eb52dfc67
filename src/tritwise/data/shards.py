"""Shards: files of token numbers as speedruns of language models use them, for example FineWeb cut up and tokenized.

    1,024 bytes   256 little-endian int32: magic 20240520, version 1, number of tokens N, the rest 0
    2·N bytes     the tokens, uint16, little-endian; a begin or end token stands before every document

A folder of shards is read in the order of their names. By the split rule `named` its files are parts by their names:
those with the word `train`, `val` or `test` in them. Any other rule cuts all tokens, one after the other.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tritwise.data.source import locate, once
from tritwise.data.split import NAMED, NAMES, SHORTEST, split
from tritwise.errors import UserError
from tritwise.files import atomic_write, read_bytes

MAGIC, VERSION, HEADER = 20240520, 1, 256
LARGEST = 100_000_000  # tokens of a shard, where nobody says otherwise
SUFFIX = ".bin"
PIECE = 1 << 24  # tokens looked at or copied at a time


def shard_files(data: Path | str) -> list[Path]:
    """The shards at a path, in order: the .bin file itself, or those right in the folder; none for anything else."""
    path = locate(data)
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    return [file for file in files if file.suffix == SUFFIX and file.is_file() and not file.name.startswith(".")]


def looks_like_shards(data: Path | str) -> bool:
    """Whether the first file there begins as a shard does."""
    files = shard_files(data)
    return bool(files) and read_bytes(files[0], 4) == MAGIC.to_bytes(4, "little")


def read_shard(path: Path) -> np.ndarray:
    """The tokens of one shard, mapped where they lie: uint16 [N]. Raises UserError for what is no whole shard."""
    head = np.frombuffer(read_bytes(path, 4 * HEADER).ljust(4 * HEADER, b"\0"), "<i4")
    if head[0] != MAGIC:
        raise UserError(f"{path} is no shard: it begins with {head[0]}, not {MAGIC}; make one with tritwise tokenize")
    if head[1] != VERSION:
        raise UserError(f"{path} is a shard of version {head[1]}; this tritwise reads version {VERSION}")
    count, size = int(head[2]), path.stat().st_size
    if count < 1 or size != 4 * HEADER + 2 * count:
        raise UserError(
            f"{path} is cut off or damaged: it names {count:,} tokens and has {size:,} bytes, not "
            f"{4 * HEADER + 2 * count:,}; download or write it again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER)


def open_shards(
    data: Path | str, rule: str, vocabulary: int, *, cache: Path | str | None = None
) -> dict[str, np.ndarray]:
    """The parts of the shards at a path by name: uint16 [N] each, tokens below `vocabulary`.

    Several shards of a part are joined once, in the cache. Raises UserError for shards that cannot be read, a token
    that the tokenizer does not know, and a rule that does not suit.
    """
    files = shard_files(data)
    if rule != NAMED:
        return split(_joined(files, vocabulary, cache), rule)
    groups = {name: [file for file in files if name in _words(file)] for name in NAMES}
    parts = {name: _joined(own, vocabulary, cache) for name, own in groups.items() if own}
    if "val" not in parts or any(len(part) < SHORTEST for part in parts.values()):
        raise UserError(f"no shards for val in {data}; put val into a file's name, or use a split such as 90/10")
    return parts


def write_shards(ids: np.ndarray, folder: Path, name: str, largest: int = LARGEST) -> list[Path]:
    """Tokens (uint16 [N], N >= 1) as NAME_000000.bin and so on, of at most `largest` tokens each; the files.

    Raises UserError if one is there already or cannot be written.
    """
    starts = range(0, len(ids), largest)
    files = [folder / f"{name}_{number:06d}{SUFFIX}" for number in range(len(starts))]
    for file in files:
        if file.exists():
            raise UserError(f"{file} is there already; choose another --out")
    for file, start in zip(files, starts, strict=True):
        own = ids[start : start + largest]
        head = np.zeros(HEADER, "<i4")
        head[:3] = MAGIC, VERSION, len(own)
        atomic_write(file, [head.tobytes(), own.astype("<u2").tobytes()])
    return files


def _joined(files: list[Path], vocabulary: int, cache: Path | str | None) -> np.ndarray:
    """The tokens of all files, one after the other."""
    shards = [read_shard(file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        most = max(int(piece.max()) for piece in _pieces(shard))
        if most >= vocabulary:
            raise UserError(
                f"{file} holds token {most}, and the tokenizer knows {vocabulary:,} from 0 on; give the tokenizer "
                "that it was made with"
            )
    if len(shards) == 1:
        return shards[0]
    joined = once(files, (piece.tobytes() for shard in shards for piece in _pieces(shard)), cache=cache)
    return np.memmap(joined, dtype="<u2", mode="r")


def _words(file: Path) -> list[str]:
    """The words of a file's name: fineweb_train_000001.bin has fineweb and train, and no val."""
    words = re.split(r"[^a-z]+", file.stem.lower())
    return ["val" if word == "validation" else word for word in words]


def _pieces(shard: np.ndarray) -> Iterator[np.ndarray]:
    return (shard[start : start + PIECE] for start in range(0, len(shard), PIECE))
