"""The artifact's file format: a JSON header and named streams of bytes. It knows nothing of models.

    8 bytes    TRITWISE
    4 bytes    format version, little-endian
    4 bytes    length of the header, little-endian
    …          header: canonical JSON {"header": the caller's, "sha256": of all streams, "streams": [StreamInfo, …]}
    32 bytes   SHA-256 of everything up to here
    …          the streams, back to back, each raw or as one zstd frame, whichever is smaller

Everything up to the first SHA-256 keeps its place in every format version, so a reader can tell newer from damaged.
"""

import hashlib
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import zstandard

from tritwise.errors import UserError
from tritwise.files import atomic_write, canonical_json, parse_json, read_bytes

MAGIC = b"TRITWISE"
VERSION = 1
_START = struct.Struct("<8sII")
_DIGEST = 32
_LEVEL = 22


class OverBudgetError(UserError):
    """A file that would have more bytes than it may. found: what is known of the model that was to be in it."""

    found: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class StreamInfo:
    """One stream as the header lists it. The offset counts from the end of the header's SHA-256."""

    name: str
    codec: str  # "raw" or "zstd"
    offset: int
    stored: int  # bytes in the file
    raw: int  # bytes after decompression
    crc32: int  # of the bytes in the file


@dataclass(frozen=True)
class ContainerInfo:
    """What was written: the file's size, how much of it is header (all that is not streams), and its streams."""

    path: Path
    bytes: int
    header_bytes: int
    streams: tuple[StreamInfo, ...]


def write_container(
    path: str | Path,
    header: dict[str, Any],
    streams: Mapping[str, bytes | np.ndarray],
    *,
    compress: bool = True,
    budget: int = 0,
) -> ContainerInfo:
    """Write a container atomically. The same input makes the same bytes (with one version of zstd).

    Arguments:
        header: plain JSON values: lists and not tuples, keys that are strings, no NaN.
        streams: bytes, or uint8 arrays of any shape in C order; stored in the order given.
        compress: store a stream as zstd where that is smaller.
        budget: bytes that the file may have; 0: any number.

    Raises:
        UserError: the disk is full or read-only, or the folder is missing. OverBudgetError: it would have more bytes
            than it may, which are not written. A previous file is intact.
    """
    start, stored, infos = _assembled(header, streams, _LEVEL if compress else None)
    front = len(start) + _DIGEST
    size = front + sum(info.stored for info in infos)
    if budget and size > budget:
        raise OverBudgetError(
            f"{path} would have {size:,} bytes, {size - budget:,} over the budget of {budget:,}; "
            "make the model smaller, or the budget larger"
        )
    atomic_write(path, [start, hashlib.sha256(start).digest(), *stored])
    return ContainerInfo(Path(path), size, front, tuple(infos))


def container_bytes(header: dict[str, Any], streams: Mapping[str, bytes | np.ndarray], level: int = _LEVEL) -> int:
    """How many bytes a container would have, compressed at a level of zstd; nothing is written."""
    start, stored, _ = _assembled(header, streams, level)
    return len(start) + _DIGEST + sum(map(len, stored))


def _assembled(
    header: dict[str, Any], streams: Mapping[str, bytes | np.ndarray], level: int | None
) -> tuple[bytes, list[bytes], list[StreamInfo]]:
    """What stands before the first SHA-256, the streams as they are stored, and what the header says of each."""
    assert parse_json(canonical_json(header), "header") == header, "header must be plain JSON: lists and string keys"
    stored, infos, offset, checksum = [], [], 0, hashlib.sha256()
    for name, stream in streams.items():
        assert isinstance(stream, bytes) or stream.dtype == np.uint8, f"stream {name} must be bytes or uint8"
        raw = stream if isinstance(stream, bytes) else stream.tobytes()
        codec, data = ("raw", raw) if level is None else _smaller(raw, level)
        infos.append(StreamInfo(name, codec, offset, len(data), len(raw), zlib.crc32(data)))
        stored.append(data)
        offset += len(data)
        checksum.update(data)
    listed = [asdict(info) for info in infos]
    encoded = canonical_json({"header": header, "sha256": checksum.hexdigest(), "streams": listed})
    return _START.pack(MAGIC, VERSION, len(encoded)) + encoded, stored, infos


def read_container(path: str | Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The header and the streams of a container, every byte of the file verified.

    Raises:
        UserError: missing, a folder, empty, not an artifact, cut short, changed anywhere, longer than it should be, or
            made by a newer Tritwise.
    """
    try:
        # The first bytes are enough to refuse some other file, however large, without reading it.
        _check_magic(read_bytes(path, first=_START.size))
        listing, body = _verified_header(memoryview(read_bytes(path)))
        streams = _listed_streams(listing)
        return listing["header"], _verified_streams(listing["sha256"], streams, body)
    except _Unusable as problem:
        raise UserError(f"{path} {problem}; {problem.remedy}") from problem


class _Unusable(Exception):
    """A file that cannot be read as a container: what is wrong with it, and the remedy."""

    def __init__(self, message: str, remedy: str = "copy it again, or make it again with tritwise ship") -> None:
        super().__init__(message)
        self.remedy = remedy


def _check_magic(first: bytes) -> None:
    if not first:
        raise _Unusable("is empty")
    if not first.startswith(MAGIC):
        raise _Unusable("is not a Tritwise artifact", "name a file that tritwise ship made")
    if len(first) < _START.size:
        raise _Unusable("is cut short inside its header")


def _verified_header(data: memoryview) -> tuple[Any, memoryview]:
    """The header's JSON and the bytes after it."""
    _, version, length = _START.unpack_from(data)
    end = _START.size + length
    whole = end + _DIGEST <= len(data)
    vouched = whole and hashlib.sha256(data[:end]).digest() == data[end : end + _DIGEST]
    if version > VERSION:
        newer = f"was made by a newer Tritwise (artifact format {version}; this one reads {VERSION})"
        if vouched:
            raise _Unusable(newer, "upgrade Tritwise")
        raise _Unusable(f"{newer}, or is damaged (its checksum does not match)", "upgrade Tritwise, or copy it again")
    if not whole:
        raise _Unusable("is cut short inside its header, or its header is damaged")
    if not vouched:
        raise _Unusable("is damaged: its header's checksum does not match")
    return parse_json(bytes(data[_START.size : end]), "the artifact's header"), data[end + _DIGEST :]


def _listed_streams(listing: Any) -> list[StreamInfo]:
    """The streams of a header, after checking that they lie back to back and that every figure is possible.

    Its checksum does not vouch for a header that somebody made by hand, so nothing in it is trusted before this.
    """
    impossible = _Unusable("is not a valid artifact: its header does not describe its streams")
    try:
        streams = [StreamInfo(**entry) for entry in listing["streams"]]
        texts = [listing["sha256"], *(text for stream in streams for text in (stream.name, stream.codec))]
        numbers = [number for stream in streams for number in (stream.offset, stream.stored, stream.raw, stream.crc32)]
        well_typed = isinstance(listing["header"], dict) and {type(text) for text in texts} == {str}
    except (KeyError, TypeError) as error:
        raise impossible from error
    if not well_typed or any(type(number) is not int or number < 0 for number in numbers):
        raise impossible
    if len({stream.name for stream in streams}) < len(streams):
        raise impossible
    offset = 0
    for stream in streams:
        possible = {"raw": stream.raw == stream.stored, "zstd": stream.raw <= _most_raw(stream.stored)}
        if stream.offset != offset or not possible.get(stream.codec, False):
            raise impossible
        offset += stream.stored
    return streams


def _verified_streams(checksum: str, streams: list[StreamInfo], body: memoryview) -> dict[str, bytes]:
    expected = sum(stream.stored for stream in streams)
    if len(body) < expected:
        raise _Unusable(f"is cut short: {len(body)} of {expected} bytes after its header")
    if len(body) > expected:
        raise _Unusable(f"is damaged: {len(body) - expected} bytes too many at its end")
    parts = [body[stream.offset : stream.offset + stream.stored] for stream in streams]
    for stream, part in zip(streams, parts, strict=True):
        if zlib.crc32(part) != stream.crc32:
            raise _Unusable(f"is damaged in its stream {stream.name!r}: the checksum does not match")
    if hashlib.sha256(body).hexdigest() != checksum:
        raise _Unusable("is damaged: the checksum of its streams does not match")
    return {stream.name: _decoded(stream, part) for stream, part in zip(streams, parts, strict=True)}


def _decoded(stream: StreamInfo, part: memoryview) -> bytes:
    if stream.codec == "raw":
        return bytes(part)
    broken = _Unusable(f"is not a valid artifact: its stream {stream.name!r} cannot be decompressed")
    try:
        # The frame names its own size too, and the decoder would believe it and allocate that.
        if zstandard.get_frame_parameters(part).content_size != stream.raw:
            raise broken
        return zstandard.ZstdDecompressor().decompress(part, max_output_size=stream.raw, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise broken from error


def _smaller(raw: bytes, level: int) -> tuple[str, bytes]:
    packed = zstandard.ZstdCompressor(level=level).compress(raw)
    return ("zstd", packed) if len(packed) < len(raw) <= _most_raw(len(packed)) else ("raw", raw)


def _most_raw(stored: int) -> int:
    """How much a zstd stream may expand to: a file of a few bytes must not make its reader fill the memory."""
    return (1 << 20) + 1024 * stored
